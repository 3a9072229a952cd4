"""The modules of a script that a worker would not find by itself, and where it finds them."""

from __future__ import annotations

import os
import re
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader, all_suffixes
from importlib.util import spec_from_file_location
from typing import Any

from torchtrainer.process.fresh import MAIN_ALIAS, OWN_PACKAGE

MAIN = "__main__"
ALIASES = {MAIN_ALIAS: MAIN}
"""In a process that multiprocessing spawned, the script runs under another name."""
_STDLIB = os.path.dirname(os.__file__) + os.sep
_INSTALLED = re.compile(r"[/\\](?:site|dist)-packages[/\\]")


@dataclass(frozen=True, kw_only=True)
class FileModule:
    """A module that the script loaded from a file which is not where its name says.

    Attributes:
        path: of its file; None: a package that has none.
        search: where its own modules are; None: it is not a package.
    """

    path: str | None
    search: tuple[str, ...] | None = None


def module_dict(module: types.ModuleType) -> dict[str, Any]:
    """The names of a module; one that loads itself when it is looked at stays as it is."""
    found: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return found


def search_path() -> list[str]:
    """The module search path, absolute: a relative entry is what it was when the script first looked there."""
    found = []
    for entry in sys.path:
        known = None if os.path.isabs(entry) else getattr(sys.path_importer_cache.get(entry), "path", None)
        found.append(known if isinstance(known, str) else os.path.abspath(entry))
    return found


def made_modules() -> list[types.ModuleType]:
    """The script's main module, and those in which it executed code without a file that a worker could load."""
    made = [sys.modules[MAIN]]
    for name, module in list(sys.modules.items()):
        if name == MAIN_ALIAS and module not in made:
            made.append(module)
        elif "." not in name and name != MAIN and type(module) is types.ModuleType and module.__name__ == name:
            names = module_dict(module)
            if names.get("__spec__") is None and "__file__" not in names and "__builtins__" in names:
                made.append(module)
    return made


def own_modules() -> dict[str, types.ModuleType]:
    """The modules with a file that are neither of Python nor installed: those that belong to the script."""
    installed: dict[str, bool] = {MAIN: True, MAIN_ALIAS: True, OWN_PACKAGE: True}
    found: dict[str, types.ModuleType] = {}
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if top not in installed:
            installed[top] = is_installed(top)
        if not installed[top] and isinstance(module, types.ModuleType):
            path = module_dict(module).get("__file__")
            if isinstance(path, str) and os.path.isabs(path):
                found[name] = module
    return found


def misplaced(modules: Mapping[str, types.ModuleType]) -> dict[str, FileModule]:
    """Those of the script's modules that the search path does not lead to, with the packages that they are in."""
    directories = set(search_path())
    found: dict[str, FileModule] = {}
    for name, module in modules.items():
        names = module_dict(module)
        path, search = names["__file__"], names.get("__path__")
        package, _, _ = name.rpartition(".")
        place = os.path.dirname(os.path.dirname(path) if search is not None else path)
        if place not in (_search_of(package) if package else directories):
            found[name] = FileModule(path=path, search=None if search is None else tuple(map(str, search)))
            while package and package not in sys.modules:
                found[package] = FileModule(path=None, search=())
                package, _, _ = package.rpartition(".")
    return found


def is_installed(package: str) -> bool:
    """Whether a package is of Python or was installed, as far as its file tells."""
    module = sys.modules.get(package)
    if not isinstance(module, types.ModuleType):
        return False
    names = module_dict(module)
    path = names.get("__file__") or next(iter(names.get("__path__") or ()), None)
    return package in sys.builtin_module_names or (
        isinstance(path, str) and (path.startswith(_STDLIB) or _INSTALLED.search(path) is not None)
    )


def _search_of(package: str) -> Sequence[str]:
    module = sys.modules.get(package)
    if not isinstance(module, types.ModuleType):
        return ()
    return list(module_dict(module).get("__path__") or ())


class MisplacedModules(MetaPathFinder):
    """Finds modules where the script had them.

    Args:
        modules: by name.
    """

    def __init__(self, modules: dict[str, FileModule]) -> None:
        self._modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where the module is, if it is one of them."""
        found = self._modules.get(fullname)
        if found is None:
            return None
        search = None if found.search is None else list(found.search)
        if found.path is None:
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = search
            return spec
        known = found.path.endswith(tuple(all_suffixes()))
        loader = None if known else SourceFileLoader(fullname, found.path)
        return spec_from_file_location(fullname, found.path, loader=loader, submodule_search_locations=search)
