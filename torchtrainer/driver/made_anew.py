"""Finds values of a script that differ at each start: from the clock, the process, the machine or chance.

Such a value says nothing about whether the user changed something, so it is compared by how it is made. That is read from the
source: a value counts as made anew if an expression that its name is assigned leads to one of `_SOURCES`.
"""

from __future__ import annotations

import ast
import functools
import linecache
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

_SOURCES = re.compile(
    r"time\.(time|time_ns|monotonic|perf_counter|process_time|strftime|localtime|gmtime|ctime|asctime)|"
    r"datetime\.(datetime\.|date\.)?(now|utcnow|today)|"
    r"os\.(getpid|getppid|urandom|uname|times|cpu_count|process_cpu_count|sched_getaffinity|getloadavg)|"
    r"os\.(pipe|pipe2|open|dup|eventfd|memfd_create|openpty)|.*\.fileno|"
    r"uuid\.(uuid1|uuid4|getnode)|multiprocessing\.cpu_count|torch\.(cuda|distributed)\..*|torch\.seed|"
    r"torchtrainer\.session\.(rank|world_size)|(secrets|tempfile|socket|platform|psutil|wandb)\..*|id|hash"
)
"""Functions whose results differ from start to start; numbers of open files do."""
_CHANCE = re.compile(
    r"random\..*|numpy\.random\..*|torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial|poisson)(_like)?"
)
"""The same, unless the script sets a seed, or the call gets one."""
_SEEDED_BY_ARGUMENT = re.compile(r".*\.(Random|default_rng|RandomState|SeedSequence|PCG64|MT19937|Philox)")
_LAUNCHER = re.compile(
    r"(RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE|NODE|MASTER|TORCHELASTIC|SLURM|OMPI|PMI|PMIX|MPI)_\w+|HOSTNAME|TMPDIR)"
)
"""Environment variables that a launcher or a scheduler sets for one start."""
_MADE_OF_KEYWORDS = frozenset({"dict", "SimpleNamespace", "Namespace"})
_MOST_NAMES = 64
"""Longest chain of names to follow from a value."""


_NOT_USERS = tuple(
    os.path.realpath(one) + os.sep
    for one in (sysconfig.get_path("stdlib"), Path(__file__).parents[1])
    if one is not None
)


@dataclass
class Source:
    """The assignments in one of the user's files.

    Attributes:
        assigned: expressions by the name, attribute, key or parameter that gets them; none for one that only has to be given.
        functions: what each function returns, and the names of its parameters.
        imported: where a name comes from, with dots.
        seeds: running the file sets a seed for random numbers.
    """

    assigned: dict[str, list[ast.expr]] = field(default_factory=dict)
    functions: dict[str, tuple[list[ast.expr], list[str]]] = field(default_factory=dict)
    imported: dict[str, str] = field(default_factory=dict)
    seeds: bool = False

    @classmethod
    def parse(cls, text: str) -> Source:
        """Reads a file.

        Raises:
            SyntaxError, ValueError: it is no Python.
        """
        made = cls()
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                made._read_class(node)
            else:
                made._read(node)
        for node in ast.walk(tree):  # now that the parameters are known
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                made._read_arguments(node, node.func.id)
        made.seeds = any(_sets_seed(call, made) for call in _calls_made(tree))
        return made

    def _read(self, node: ast.AST) -> None:
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    self._assign(key.value, value)
        elif isinstance(node, ast.Call):
            self._read_call(node)
        elif isinstance(node, ast.FunctionDef):
            self._read_function(node, node.name, skip=0)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            self._read_import(node)
        else:
            self._read_assignment(node)

    def _read_assignment(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._take(target, node.value)
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
            self._take(node.target, node.value)
        elif isinstance(node, ast.For):
            self._take(node.target, node.iter)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._take(node.optional_vars, node.context_expr)

    def _read_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            else:
                first = alias.name.partition(".")[0]
                self.imported[alias.asname or first] = alias.name if alias.asname else first

    def _read_class(self, node: ast.ClassDef) -> None:
        fields = [
            one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        ]
        self.functions[node.name] = ([], fields)  # of a dataclass
        for one in node.body:
            if isinstance(one, ast.FunctionDef) and one.name == "__init__":
                self._read_function(one, node.name, skip=1)

    def _read_function(self, node: ast.FunctionDef, name: str, skip: int) -> None:
        parameters = [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
        returned = [one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value is not None]
        self.functions[name] = (returned if skip == 0 else [], parameters[skip:])
        defaults = node.args.defaults
        for parameter, default in zip(parameters[len(parameters) - len(defaults) :], defaults, strict=True):
            self._assign(parameter, default)
        for one, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            if value is not None:
                self._assign(one.arg, value)

    def _read_call(self, node: ast.Call) -> None:
        option = next((one for one in map(_option, node.args) if one is not None), None)
        if option is not None:  # of a command line: what is typed there is no matter of the clock
            defaults = [given.value for given in node.keywords if given.arg == "default"]
            self.assigned.setdefault(option, []).extend(defaults)

    def _read_arguments(self, node: ast.Call, called: str) -> None:
        """Reads the arguments given to a function or class of this file, or to a container."""
        parameters = self.functions[called][1] if called in self.functions else []
        for parameter, given in zip(parameters, node.args, strict=False):
            self._assign(parameter, given)
        if called in self.functions or called in _MADE_OF_KEYWORDS:
            for keyword in node.keywords:
                if keyword.arg is not None:
                    self._assign(keyword.arg, keyword.value)

    def _take(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            pairs = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
            for number, one in enumerate(target.elts):
                self._take(one, value.elts[number] if pairs and isinstance(value, ast.Tuple | ast.List) else value)
        elif isinstance(target, ast.Name):
            self._assign(target.id, value)
        elif isinstance(target, ast.Attribute):
            self._assign(target.attr, value)
        elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
            self._assign(str(target.slice.value), value)

    def _assign(self, name: str, value: ast.expr) -> None:
        self.assigned.setdefault(name, []).append(value)


def _calls_made(tree: ast.Module) -> Iterator[ast.Call]:
    """The calls that are made when a file is run: also in functions that it calls by name, but not in what it hands over."""
    functions = {one.name: one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)}
    later: list[ast.AST] = list(tree.body)
    while later:
        node = later.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        later.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call):
            yield node
            if isinstance(node.func, ast.Name) and node.func.id in functions:
                later.extend(functions.pop(node.func.id).body)


def _sets_seed(call: ast.Call, source: Source) -> bool:
    """Whether this is ``torch.manual_seed(0)``, ``seed_everything(0)`` or the like, and no method of one generator."""
    *modules, name = _dotted(call.func, source).split(".")
    first = call.func
    while isinstance(first, ast.Attribute):
        first = first.value
    of_module = isinstance(first, ast.Name) and (first is call.func or first.id in source.imported)
    return "seed" in name and of_module and (bool(modules) or name not in source.functions)


def _option(node: ast.expr) -> str | None:
    """``--run-name`` as argparse and click call it: ``run_name``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"--[\w-]+", node.value):
        return node.value[2:].replace("-", "_")
    return None


@functools.lru_cache(maxsize=4096)
def is_users_file(file: str | None) -> bool:
    """Whether a file is no part of an installed package, of Python or of this package."""
    if file is None or file.startswith("<frozen") or "site-packages" in file or "dist-packages" in file:
        return False
    return not os.path.realpath(file).startswith(_NOT_USERS)


@functools.lru_cache(maxsize=256)
def source_of(module: str) -> Source | None:
    """The source of a module that is loaded; None: it cannot be had."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return None
    try:
        return Source.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return None


def is_seeded(module: str) -> bool:
    """Whether a module or the script sets a seed, so that random numbers are the same at each start."""
    return any(source is not None and source.seeds for source in (source_of(module), source_of("__main__")))


def how_made_anew(module: str, names: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    """How a value is made, if it is made anew at each start.

    Args:
        module: where it was found.
        names: those that lead to it, the outermost first: for ``ARGS.lr`` they are ``ARGS`` and ``lr``.

    Returns:
        The expressions as text, and the names in them; None: it is not made anew, or nobody knows.
    """
    source = source_of(module)
    if source is None:
        return None
    if len(names) == 1 and names[0] in source.imported:
        origin, _, its_name = source.imported[names[0]].rpartition(".")
        return how_made_anew(origin, [its_name]) if origin else None
    known = next((name for name in reversed(names) if name in source.assigned), None)
    return None if known is None else _how(module, known)


@functools.lru_cache(maxsize=4096)
def _how(module: str, name: str) -> tuple[str, tuple[str, ...]] | None:
    source = source_of(module)
    assert source is not None
    found = [one for one in source.assigned[name] if _leads_to_source(one, source, {(id(source), name)})]
    if not found:
        return None
    used = {one.id for each in found for one in ast.walk(each) if isinstance(one, ast.Name)}
    return "; ".join(ast.unparse(one) for one in found), tuple(sorted(used))


def _leads_to_source(expression: ast.expr, source: Source, seen: set[tuple[int, str]]) -> bool:
    """Whether an expression uses one of `_SOURCES`, itself or through a name; each name is followed once.

    Args:
        expression: part of ``source``.
        source: a module's.
        seen: names that were followed, each with its module.
    """
    if isinstance(expression, ast.Constant):
        return isinstance(expression.value, str) and _LAUNCHER.fullmatch(expression.value) is not None
    if isinstance(expression, ast.Name | ast.Attribute | ast.Subscript):
        names = _names_of(expression)
        if _is_source(expression, source, seen):
            return True
        inside = next((one for one in reversed(names) if one in source.assigned), None)
        if inside is not None:  # of HP["lr"], what lr is; whatever else may be in HP
            return _is_new(source, inside, seen) and any(
                _leads_to_source(one, source, seen) for one in source.assigned[inside]
            )
    if isinstance(expression, ast.Call) and _is_given_seed(expression, source):
        return any(_leads_to_source(one, source, seen) for one in expression.args)
    return any(
        _leads_to_source(one, source, seen) for one in ast.iter_child_nodes(expression) if _is_of_an_expression(one)
    )


def _is_new(source: Source, name: str, seen: set[tuple[int, str]]) -> bool:
    """Whether a name is to be followed: it was not yet, nor were very many others."""
    if (id(source), name) in seen or len(seen) >= _MOST_NAMES:
        return False
    seen.add((id(source), name))
    return True


def _is_of_an_expression(node: ast.AST) -> TypeGuard[ast.expr]:
    return isinstance(node, ast.expr | ast.keyword | ast.comprehension | ast.FormattedValue)


def _names_of(node: ast.expr) -> list[str]:
    """``a.b["c"]`` as ``a``, ``b``, ``c``."""
    names: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node.slice, ast.Constant):
            names.append(str(node.slice.value))
        node = node.value
    return [*([node.id] if isinstance(node, ast.Name) else []), *reversed(names)]


def _is_given_seed(call: ast.Call, source: Source) -> bool:
    by_argument = _SEEDED_BY_ARGUMENT.fullmatch(_dotted(call.func, source)) is not None
    return (by_argument and bool(call.args or call.keywords)) or any(one.arg == "generator" for one in call.keywords)


def _is_source(node: ast.expr, source: Source, seen: set[tuple[int, str]]) -> bool:
    """Whether a name is one of `_SOURCES`, or a function of the user's that returns what one of them gave."""
    dotted = _dotted(node, source)
    if dotted not in source.assigned and _SOURCES.fullmatch(dotted):
        return True
    if _CHANCE.fullmatch(dotted):
        return not (source.seeds or is_seeded("__main__"))
    origin, _, name = dotted.rpartition(".")
    other = source if not origin else _source_of_users(origin)
    if other is None:
        return False
    made = [*other.functions.get(name, ([], []))[0], *(other.assigned.get(name, []) if origin else [])]
    return bool(made) and _is_new(other, f"{name}()", seen) and any(_leads_to_source(one, other, seen) for one in made)


def _source_of_users(module: str) -> Source | None:
    """The source of a module that is the user's own."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return source_of(module) if is_users_file(file) else None


def _dotted(node: ast.expr, source: Source) -> str:
    """A name or an attribute as text with dots, beginning with the module that it comes from."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    first = source.imported.get(node.id, node.id) if isinstance(node, ast.Name) else "()"
    return ".".join((first, *reversed(attributes)))
