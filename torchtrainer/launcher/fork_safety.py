"""Decides from the command line and the files, before anything runs, what the workers run and whether they may be forked.

A forked worker has torch loaded before the first line of its program. Where the program could tell, because it shadows a
module, reads its flags from elsewhere or sets what libraries read when they are imported, it is exec'd, and the reason is
kept for those who ask.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import stat
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder

from torchtrainer.process.fresh import IMPORT_TIME_PREFIXES

PRELOAD = ("torch", "torch.distributed")
PRELOAD_FOR_TRAINING = ("torch.nn.parallel", "torch.optim", "torch.utils.data", "torch._dynamo")
"""Modules that a training program imports: creating the first optimizer or DDP imports ``torch._dynamo``, lazily."""
TRAINING_WORDS = (b"optim", b"DistributedDataParallel", b"lightning", b"accelerate", b"transformers", b"torchtrainer")
PRELOADABLE = ("torchvision",)
"""Packages that are imported beforehand if the program names them: known to start no thread when imported."""
MAX_SOURCE_BYTES = 4 << 20
"""A program longer than this is not read beforehand: it is data, or generated, and exec'd."""
MAX_OWN_MODULES = 500
"""A program with more modules of its own than this is exec'd: reading them all would take as long as importing torch."""
_IMPORT = re.compile(
    rb"^[ \t]*(?:import[ \t]+((?:\\\n|[^\n#;])+)|from[ \t]+([.\w]+)[ \t]*import[ \t]*(\([^)]*\)|(?:\\\n|[^\n#;])+))",
    re.MULTILINE,
)
_NAME = re.compile(rb"(?:^|[,(])[\s\\]*([\w.]+)")
_WRITING_METHODS = frozenset({"setdefault", "update", "pop", "clear", "__setitem__"})
_ENVIRONMENT_CALLS = frozenset({"putenv", "unsetenv", "load_dotenv"})
_ENVIRONMENT_WORDS = (b"environ", b"putenv", b"unsetenv", b"load_dotenv")


@dataclass(frozen=True, kw_only=True)
class Program:
    """The program that every worker of a launch runs.

    Attributes:
        kind: ``script``, ``module``, ``run_path``, or ``command`` for anything that is not Python of this interpreter.
        name: as it was typed.
        path: source file of a script or module; empty if there is none.
        arguments: what follows it on the command line.
        exec_reason: why its processes have to be exec'd; None: they may be forked.
        preload: modules to import before the first fork.
    """

    kind: str
    name: str
    path: str
    arguments: tuple[str, ...]
    exec_reason: str | None
    preload: tuple[str, ...] = PRELOAD


def program_of(args: argparse.Namespace, environ: Mapping[str, str], search_path: Sequence[str]) -> Program:
    """Finds out what a command line starts.

    Args:
        args: as `options.parse` returns them.
        environ: of the launcher.
        search_path: ``sys.path`` of the workers, without the program's own directory.
    """
    if args.run_path:
        kind = "run_path"
    elif args.no_python:
        kind = "command"
    else:
        kind = "module" if args.module else "script"
    name: str = args.training_script
    path = name if kind in ("script", "run_path") else ""
    if kind == "module":
        path = _module_source(name, [os.getcwd(), *search_path])
    source = _read(path)
    reason = _launch_reason(args, environ) or _file_reason(kind, path, source)
    if reason is None and source is not None:
        directory = os.getcwd() if kind == "module" else os.path.dirname(os.path.realpath(path))
        reason = _shadow_reason(directory, path, script=kind != "module")
        if reason is None:
            reason = _environment_reason(directory, path, source, name if kind == "module" else "")
    return Program(
        kind=kind,
        name=name,
        path=path,
        arguments=tuple(args.training_script_args),
        exec_reason=reason,
        preload=_preload_for(source or b""),
    )


def _launch_reason(args: argparse.Namespace, environ: Mapping[str, str]) -> str | None:
    """Why this launch as a whole has to exec."""
    if sys.platform != "linux":
        return f"forking a process that has torch loaded is not safe on {sys.platform}"
    if args.start_fresh:
        return "--start-fresh"
    if args.no_python:
        return "--no-python: it need not be Python"
    if args.numa_binding is not None:
        return "--numa-binding: numactl starts the processes"
    other = environ.get("PYTHON_EXEC")
    if other is not None and other != sys.executable:
        return f"PYTHON_EXEC={other} is another interpreter"
    if sys.stdout is None or sys.stderr is None:
        return "a standard stream is closed here, and may be a file in the workers"
    if sys.gettrace() is not None or sys.getprofile() is not None:
        return "a debugger or profiler follows this interpreter"
    return None


def _file_reason(kind: str, path: str, source: bytes | None) -> str | None:
    """Why a program of this form has to be exec'd."""
    if source is None:
        return f"{path or 'the module'} is not a source file"
    if kind != "module" and zipfile.is_zipfile(path):
        return f"{path} is an archive"
    return None


def _shadow_reason(directory: str, path: str, *, script: bool) -> str | None:
    """Names in the program's directory that would be imported instead of modules that are loaded already."""
    loaded = {name.partition(".")[0] for name in (*sys.modules, *PRELOAD, *PRELOADABLE)} | sys.stdlib_module_names
    own = os.path.basename(path) if script else ""
    try:
        entries = os.listdir(directory or ".")
    except OSError:
        return None
    for entry in entries:
        stem, dot, _ = entry.partition(".")
        package = os.path.join(directory, entry, "__init__.py")
        is_module = entry.endswith((".py", ".so", ".pyc")) if dot else os.path.exists(package)
        if is_module and stem in loaded and stem != "torchtrainer" and entry != own:
            return f"{os.path.join(directory, entry)} has the name of a module that is loaded already"
    return None


def _environment_reason(directory: str, path: str, source: bytes, module_name: str) -> str | None:
    """Why a program has to be exec'd by what it does: sets variables that libraries read when they are imported."""
    reason = _source_reason(source, "")
    waiting, seen = [(path, source), (path, f"import {module_name}".encode())], {os.path.realpath(path)}
    while reason is None and waiting:
        for module in _imported_files(directory, *waiting.pop()):
            if os.path.realpath(module) in seen:
                continue
            seen.add(os.path.realpath(module))
            own = _read(module)
            if own is None or len(seen) > MAX_OWN_MODULES:
                return f"{module} is not read beforehand: it is not plain source, or one of too many"
            waiting.append((module, own))
            if reason is None and any(word in own for word in _ENVIRONMENT_WORDS):
                reason = _source_reason(own, f"{module} ")
    return reason


def _imported_files(directory: str, path: str, source: bytes) -> Iterator[str]:
    """Files of the program's own directory that a source imports, packages around them included; too many rather than too few."""
    for modules, base, names in _IMPORT.findall(source):
        stem = base.decode(errors="replace").lstrip(".")
        level = len(base) - len(stem)
        root = directory
        if level:
            root = os.path.normpath(os.path.join(os.path.dirname(path), *[os.pardir] * (level - 1)))
        found = [name.decode(errors="replace") for name in _NAME.findall(modules or names)]
        for dotted in found if modules else [stem, *(f"{stem}.{name}" for name in found)]:
            parts = [part for part in dotted.split(".") if part]
            for depth in range(1, len(parts) + 1):
                below = os.path.join(root, *parts[:depth])
                yield from (
                    file for file in (f"{below}.py", os.path.join(below, "__init__.py")) if os.path.isfile(file)
                )


def _source_reason(source: bytes, where: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the program is compiled once more, and warns then
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return f"{where or 'it '}does not compile"
    for node in ast.walk(tree):
        key = _written_variable(node)
        if key is not None and (not key or key.startswith(IMPORT_TIME_PREFIXES)):
            line = getattr(node, "lineno", "?")
            return f"{where}line {line} sets {key or 'environment variables'} for libraries it imports"
    return None


def _written_variable(node: ast.AST) -> str | None:
    """Name of the environment variable that a statement writes; empty if it cannot be read from the source; else None."""
    if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
        targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
        for target in targets:
            if isinstance(target, ast.Subscript) and _is_environ(target.value):
                return _text(target.slice)
            if _is_environ(target):
                return ""
    if isinstance(node, ast.Call):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in _ENVIRONMENT_CALLS:
            return _text(node.args[0]) if node.args and name != "load_dotenv" else ""
        if isinstance(function, ast.Attribute) and name in _WRITING_METHODS and _is_environ(function.value):
            return _text(node.args[0]) if node.args and name in ("setdefault", "pop", "__setitem__") else ""
    return None


def _is_environ(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def _text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _module_source(name: str, search_path: Sequence[str]) -> str:
    """Source file of a module, or of a package's ``__main__``, without importing the packages around it."""
    path: Sequence[str] | None = search_path
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), path)
        if spec is None:
            return ""
        path = spec.submodule_search_locations
        if path is None:
            return (spec.origin or "") if depth == len(parts) else ""
    spec = PathFinder.find_spec(f"{name}.__main__", path)
    return (spec.origin or "") if spec is not None else ""


def _read(path: str) -> bytes | None:
    """The source; None if it is not a file that can be read as one."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_SOURCE_BYTES or path.endswith(".pyc"):
            return None
        with open(path, "rb") as file:
            source = file.read()
    except OSError:
        return None
    return None if b"\0" in source else source


def _preload_for(source: bytes) -> tuple[str, ...]:
    preload = [*PRELOAD]
    if any(word in source for word in TRAINING_WORDS):
        preload += PRELOAD_FOR_TRAINING
    return (*preload, *(name for name in PRELOADABLE if name.encode() in source))
