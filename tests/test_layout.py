"""The structure of the package: who may import what, what stays free of torch, and how long things get."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import torchtrainer

pytestmark = pytest.mark.pure

PACKAGE = Path(torchtrainer.__file__).parent
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 40
REASON_FOR_LENGTH = "Long because"

# From the bottom up. A unit (a module of the package, or a folder) imports from layers below its own, and from units of its
# own layer only where they are listed together: the operator's hooks call the built-in loop, which calls the hooks.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"version"}),
    frozenset({"config"}),
    frozenset({"topology"}),
    frozenset({"spec"}),
    frozenset({"arguments"}),
    frozenset({"resnet"}),
    frozenset({"process"}),
    frozenset({"script"}),
    frozenset({"preempt"}),
    frozenset({"checkpoint"}),
    frozenset({"control"}),
    frozenset({"comm"}),
    frozenset({"train", "operator"}),
    frozenset({"lightning"}),
    frozenset({"driver"}),
    frozenset({"observe"}),
    frozenset({"worker"}),
    frozenset({"engines"}),
    frozenset({"run_places"}),
    frozenset({"resume"}),
    frozenset({"planning"}),
    frozenset({"call_replay"}),
    frozenset({"session"}),
    frozenset({"trainer"}),
    # The launcher's two sides: without torch, and on torch's elastic agent, which calls back.
    frozenset({"launcher", "elastic"}),
    frozenset({"run", "launch"}),
    frozenset({"__init__", "__main__"}),
)

FREE_OF_TORCH = (
    "__init__",
    "trainer",
    "call_replay",
    "resume",
    "driver",
    "control",
    "process",
    "script",
    "preempt",
    "launcher",
    "run",
    "launch",
)
ONLY_IMPORTERS = {"torch.distributed": {"comm", "elastic"}, "zmq": {"control"}}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name and where it stands.

    Attributes:
        name: dotted, the imported object included: ``torch.distributed.TCPStore``.
        line: in the file.
        function: that it stands in, of the outermost ones; empty: it runs when the module is imported.
    """

    name: str
    line: int
    function: str

    @property
    def at_module_level(self) -> bool:
        return not self.function


@dataclass(frozen=True, kw_only=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    lines: int
    imports: tuple[Import, ...]

    @property
    def unit(self) -> str:
        return unit_of(self.name)


def unit_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_in(body: list[ast.stmt], function: str = "") -> Iterator[Import]:
    """Imports that can run: what stands under ``if TYPE_CHECKING`` never does."""
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name=alias.name, line=node.lineno, function=function)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                yield Import(name=f"{node.module}.{alias.name}", line=node.lineno, function=function)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports_in(node.orelse, function)
        else:
            inside = function or (node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else "")
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from imports_in(getattr(node, field, []), inside)


def read_module(path: Path) -> Module:
    text = path.read_text()
    tree = ast.parse(text, filename=str(path))
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    return Module(name=name, path=path, tree=tree, lines=len(text.splitlines()), imports=tuple(imports_in(tree.body)))


MODULES = tuple(read_module(path) for path in sorted(PACKAGE.rglob("*.py")))
NAMES = frozenset(module.name for module in MODULES)


def imported_module(name: str) -> str:
    """The module of this package that an imported name lives in: the name itself, or what it is taken from."""
    return name if name in NAMES else name.rpartition(".")[0]


def is_from(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A part that uses the core, and that the core can do without.

    Attributes:
        parts: modules or packages.
        seam: where the core reaches it, ``module:function``; empty: users alone do, by its name.
    """

    parts: tuple[str, ...]
    seam: str = ""

    def has(self, module: str) -> bool:
        return any(is_from(module, f"torchtrainer.{part}") for part in self.parts)


ADAPTERS = {
    "lightning": Adapter(parts=("lightning",), seam="operator:from_ptl"),
    "verify-resume": Adapter(
        parts=("launcher.verify_resume", "launcher.verify_compare", "launcher.verify_start"), seam="launcher.cli:main"
    ),
    "what verify-resume compares": Adapter(
        parts=("worker.digests", "worker.held"), seam="worker.checkpointer:step_iterator"
    ),
    "doctor": Adapter(
        parts=("launcher.doctor", "launcher.doctor_checks", "launcher.doctor_torch"), seam="launcher.cli:main"
    ),
    "cloud pollers": Adapter(
        parts=("preempt.aws", "preempt.azure", "preempt.gcp", "preempt.metadata"),
        seam="preempt.clouds:metadata_sources",
    ),
    "resnet": Adapter(parts=("resnet",)),
}
"""Parts that depend on the core; the core reaches each by an import inside one function, or not at all."""


def is_seam(module: Module, used: Import) -> bool:
    target = imported_module(used.name)
    where = f"{module.name.removeprefix('torchtrainer.')}:{used.function}"
    return any(adapter.has(target) and adapter.seam == where for adapter in ADAPTERS.values())


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_the_core_reaches_an_adapter_by_one_function_alone(adapter):
    imports = [(module, used) for module in MODULES if not adapter.has(module.name) for used in module.imports]
    reached = [(module, used) for module, used in imports if adapter.has(imported_module(used.name))]
    wrong = [f"{module.path}:{used.line}: {used.name}" for module, used in reached if not is_seam(module, used)]
    assert not wrong, "\n".join(wrong)
    assert bool(reached) == bool(adapter.seam), "nothing reaches it any more"


def test_units_import_from_layers_below_only():
    layer_of = {unit: index for index, layer in enumerate(LAYERS) for unit in layer}
    wrong = []
    for module in MODULES:
        assert module.unit in layer_of, f"{module.name} belongs to no layer: give {module.unit!r} a place in LAYERS"
        for used in module.imports:
            target = unit_of(imported_module(used.name)) if is_from(used.name, "torchtrainer") else module.unit
            if (
                target == module.unit
                or layer_of[target] < layer_of[module.unit]
                or {target, module.unit} <= LAYERS[layer_of[target]]
                or is_seam(module, used)
            ):
                continue
            wrong.append(
                f"{module.path}:{used.line}: {module.unit} imports {used.name} from {target}, which is above it"
            )
    assert not wrong, "\n".join(wrong)


def test_modules_import_each_other_without_cycles():
    graph = {
        module.name: {
            imported_module(used.name)
            for used in module.imports
            if used.at_module_level
            and is_from(used.name, "torchtrainer")
            and imported_module(used.name) != "torchtrainer"
        }
        - {module.name}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(("package", "only_importers"), ONLY_IMPORTERS.items())
def test_package_has_few_importers(package, only_importers):
    importers = {module.unit for module in MODULES for used in module.imports if is_from(used.name, package)}
    assert importers == only_importers


def test_units_free_of_torch_do_not_name_it_at_module_level():
    wrong = [
        f"{module.path}:{used.line}: {used.name}"
        for module in MODULES
        for used in module.imports
        if module.unit in FREE_OF_TORCH and used.at_module_level and is_from(used.name.split(".")[0], "torch")
    ]
    assert not wrong, "\n".join(wrong)


SEAM_USERS = ("trainer", "planning", "call_replay")
"""They use any engine and any group, by the Protocols in ``engines/base.py`` alone."""
BEHIND_SEAMS = ("engines", "worker", "train", "comm")
VALUES = frozenset({"ModelStates"})
"""Not what a rank is, but what a call returned in place of a model."""
ASKING = ("isinstance", "issubclass", "type")


@pytest.mark.parametrize("unit", SEAM_USERS)
def test_what_an_engine_is_makes_no_difference_to_the_trainer(unit):
    """Of what comes from below the seam, nothing is asked which class it is of."""
    (module,) = (module for module in MODULES if module.name == f"torchtrainer.{unit}")
    imported = {used.name.rpartition(".")[2] for used in module.imports if unit_of(used.name) in BEHIND_SEAMS}
    kinds = imported - VALUES
    asked = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in ASKING]
    wrong = [ast.unparse(node) for node in asked if kinds & {name for one in node.args[1:] for name in names_in(one)}]
    assert wrong == [], "let the Protocol say it"


def names_in(node: ast.expr) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def heavy_modules_after(code: str) -> list[str]:
    report = (
        "import json, sys; print(json.dumps(sorted({'torch', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules))))"
    )
    program = f"{code}\n{report}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    loaded: list[str] = json.loads(done.stdout.splitlines()[-1])
    return loaded


def test_import_of_the_package_loads_nothing_heavy():
    assert heavy_modules_after("import torchtrainer; torchtrainer.TorchTrainer") == []


def test_import_of_every_torch_free_module_loads_nothing_heavy():
    names = [module.name for module in MODULES if module.unit in FREE_OF_TORCH and module.unit != "__main__"]
    assert len(names) > len(FREE_OF_TORCH)
    assert heavy_modules_after(f"import {', '.join(names)}") == []


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_command_line_answers_without_torch(argument):
    code = (
        "from torchtrainer.launcher.cli import main\n"
        "try:\n"
        f"    main([{argument!r}])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0, stop.code"
    )
    assert heavy_modules_after(code) == []


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not statements:
        return 0
    last = statements[-1].end_lineno
    assert last is not None
    return last - statements[0].lineno + 1


def test_modules_and_functions_are_short_or_say_why_not():
    wrong = []
    for module in MODULES:
        if module.lines > MAX_MODULE_LINES and REASON_FOR_LENGTH not in (ast.get_docstring(module.tree) or ""):
            wrong.append(f"{module.path}: {module.lines} lines")
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or body_lines(node) <= MAX_FUNCTION_LINES:
                continue
            if REASON_FOR_LENGTH not in (ast.get_docstring(node) or ""):
                wrong.append(f"{module.path}:{node.lineno}: {node.name} has {body_lines(node)} lines")
    advice = f"split it, or say why not in the docstring: {REASON_FOR_LENGTH!r} ..."
    assert not wrong, "\n".join([*wrong, advice])


def test_every_module_says_what_it_is():
    silent = [str(module.path) for module in MODULES if not ast.get_docstring(module.tree)]
    assert not silent
