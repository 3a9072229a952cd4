"""Makes a forked interpreter look like one that has just started, while what it preloaded stays at hand.

A forked worker runs a user's script, which must not notice that torch was imported before its first line: modules that were
preloaded are taken out of `sys.modules` and handed over when the script imports them. At that moment an interpreter would
have read the environment; what the script changed there in between is reported, so that it can be applied.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

IMPORT_TIME_PREFIXES = (
    "AOTINDUCTOR_",
    "AOT_",
    "ATEN_",
    "BLIS_",
    "COMPILE_STROBELIGHT_",
    "CUBLASLT_",
    "CUBLAS_LOG",
    "CUTEDSL_",
    "CUTLASS_",
    "DNNL_",
    "DUMP_AOTI_",
    "ENABLE_",
    "FAKE_ALLOW_",
    "FX_",
    "GOMP_",
    "GOTO_",
    "INDUCTOR_",
    "KINETO_",
    "KMP_",
    "LOG_AUTOTUNE_",
    "LOG_TLPARSE",
    "MKLDNN_",
    "MKL_",
    "MPMATH_",
    "NPY_",
    "NUMEXPR_",
    "NUMPY_",
    "NVPL_",
    "NVRTC_",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "PARTITIONER_",
    "PT2_",
    "PYTORCH_",
    "SYMPY_",
    "TORCHDYNAMO_",
    "TORCHEXPORT_",
    "TORCHINDUCTOR_",
    "TORCH_",
    "TRITON_",
    "UNSAFE_SKIP_",
    "VECLIB_",
)
"""Prefixes of environment variables that torch and its imports read when they are imported."""
MAIN_ALIAS = "__mp_main__"
"""What multiprocessing also calls the main module."""
OWN_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """The state of an interpreter before it preloaded anything.

    Attributes:
        modules: names in `sys.modules`.
        filters: of `warnings`.
        path: `sys.path` without the entry of the program that runs.
        descriptors: open ones besides the standard streams: whoever started the interpreter left them open.
        blocked_signals: its signal mask.
    """

    modules: frozenset[str]
    filters: tuple[Any, ...]
    path: tuple[str, ...]
    descriptors: tuple[int, ...]
    blocked_signals: frozenset[int]

    @classmethod
    def taken_now(cls, path: Sequence[str], modules: frozenset[str] | None = None) -> Fresh:
        """Remembers the present state, and takes back a signal mask: it would hide the ends of workers from this process.

        Args:
            path: `sys.path` as a program starts with it, without its own directory.
            modules: names that were loaded then; None: those that are loaded now.
        """
        masks = hasattr(signal, "pthread_sigmask")
        return cls(
            blocked_signals=frozenset(signal.pthread_sigmask(signal.SIG_SETMASK, []) if masks else ()),
            modules=frozenset(sys.modules) if modules is None else modules,
            filters=tuple(warnings.filters),
            path=tuple(path),
            descriptors=tuple(fd for fd in open_descriptors() if fd > 2),
        )

    def close_descriptors(self) -> None:
        """Closes what was left open for the first interpreter, as starting a program does."""
        for fd in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(fd)

    def block_signals(self) -> None:
        """Blocks what was blocked for the first interpreter, as programs inherit it."""
        if self.blocked_signals:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked_signals)

    def shadowed_in(self, directory: str) -> bool:
        """Whether a program in this directory has a module of its own by the name of one that was preloaded.

        Its libraries would have imported that one, so no preloaded module can stand for them.
        """
        for name, module in self._preloaded().items():
            if "." in name or name == OWN_PACKAGE:
                continue
            own = PathFinder.find_spec(name, [directory])
            if own is not None and own.origin not in (None, getattr(module.__spec__, "origin", None)):
                return True
        return False

    def _preloaded(self) -> dict[str, ModuleType]:
        """Modules that a program must not see before it imports them."""
        return {
            name: module
            for name, module in sys.modules.items()
            if name not in self.modules and name.partition(".")[0] not in sys.stdlib_module_names
        }

    def restore(self, on_change: Callable[[dict[str, str | None]], None]) -> None:
        """Hides what was preloaded, in a freshly forked process.

        Modules of the standard library stay: they read nothing from the environment that a program changes in between.

        Args:
            on_change: called with variables that changed between now and the first import of a hidden module that is not
                on its own: their present values, None for removed ones.
        """
        hidden = self._preloaded()
        added = [entry for entry in warnings.filters if entry not in self.filters]
        set_filters(self.filters)
        for name in hidden:
            del sys.modules[name]
        sys.meta_path.insert(0, HandOver(hidden, added, import_time_variables(os.environ), on_change))


class HandOver(MetaPathFinder, Loader):
    """Gives a script the preloaded modules when it imports them: `torch` with all others, any other package by itself."""

    def __init__(
        self,
        hidden: dict[str, ModuleType],
        filters: Sequence[Any],
        variables: Mapping[str, str],
        on_change: Callable[[dict[str, str | None]], None],
    ) -> None:
        self._hidden = hidden
        self._filters = filters
        self._variables = variables
        self._on_change = on_change
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds a hidden module. Nothing is handed over yet: programs ask for specs to learn what is installed."""
        module = self._hidden.get(fullname)
        if module is None or self._is_shadowed(fullname.partition(".")[0]):
            return None
        return _Found(fullname, self, module)

    def _is_shadowed(self, package: str) -> bool:
        """Whether the program has a package of its own by this name: then that is what it imports."""
        if package == "torch":
            return False  # it cannot be loaded twice
        own = PathFinder.find_spec(package, sys.path[:1])
        known = getattr(self._hidden.get(package), "__spec__", None)
        if own is None or (known is not None and own.origin == known.origin):
            return False
        for name in [n for n in self._hidden if n.partition(".")[0] == package]:
            del self._hidden[name]
        return True

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module as it was; all that belong to it are back from then on."""
        assert isinstance(spec, _Found)
        self._specs[spec.name] = spec.module.__spec__
        package = spec.name.partition(".")[0]
        for name in [name for name in self._hidden if _comes_with(name, spec.name, package)]:
            sys.modules.setdefault(name, self._hidden.pop(name))
        if package == "torch":
            self._catch_up()
        return spec.module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is executed again; the module gets its own spec back."""
        module.__spec__ = self._specs.pop(module.__name__)

    def _catch_up(self) -> None:
        """Does what importing torch would have done just now: adds its filters and reads the environment."""
        set_filters([*self._filters, *warnings.filters])
        now = import_time_variables(os.environ)
        changed = {n: now.get(n) for n in {*now, *self._variables} if now.get(n) != self._variables.get(n)}
        if changed:
            self._on_change(changed)


class _Found(ModuleSpec):
    """Says of a hidden module what its own spec says."""

    def __init__(self, name: str, loader: Loader, module: ModuleType) -> None:
        own = getattr(module, "__spec__", None)
        super().__init__(name, loader, origin=getattr(own, "origin", None), is_package=hasattr(module, "__path__"))
        self.module = module
        if hasattr(module, "__path__"):
            self.submodule_search_locations = list(module.__path__)
        self.has_location = bool(getattr(own, "has_location", False))


def _comes_with(name: str, imported: str, package: str) -> bool:
    """Whether a hidden module is back when another one is imported: all with torch, but our own ones by themselves."""
    top = name.partition(".")[0]
    if top == OWN_PACKAGE:
        return name == imported
    return package in ("torch", top)


def open_descriptors() -> list[int]:
    """Open descriptors of this process; none where the system does not list them."""
    try:
        return [fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open(fd)]
    except OSError:
        return []


def _is_open(fd: int) -> bool:
    try:  # the one that listed the directory is gone by now
        os.fstat(fd)
    except OSError:
        return False
    return True


def import_time_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that are read when numerical libraries are imported."""
    return {name: value for name, value in environ.items() if name.startswith(IMPORT_TIME_PREFIXES)}


def set_filters(filters: Sequence[Any]) -> None:
    """Makes these the filters of `warnings`, the first that matches first."""
    warnings.filters[:] = filters  # type: ignore[index]  # a list, whatever the stubs say
    # The public functions call it; one that sets the whole list has to as well.
    with contextlib.suppress(AttributeError):
        warnings._filters_mutated()  # type: ignore[attr-defined]
