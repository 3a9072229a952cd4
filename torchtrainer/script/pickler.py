"""Pickles a script's code so that workers find it where the script has it: by its names, over one set of globals.

cloudpickle carries functions and classes of ``__main__`` by value. Here they are, in addition, put into the ``__main__`` of the
process that loads them, and its namespace is what they have as globals. So whatever pickles a function of the script by its
name there, such as `multiprocessing.Pool.map` or a loader whose processes are spawned, finds that very function.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import importlib
import io
import sys
import types
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import cloudpickle

from torchtrainer.script.modules import ALIASES, MAIN, made_modules, module_dict

_CACHED = type(functools.lru_cache(len))
"""What `functools.lru_cache` and `functools.cache` return."""


def dumps(value: Any) -> bytes:
    """Pickles a value whose functions bring globals of their own; `cloudpickle.loads` reads it."""
    return _dumps(value, in_place=False)


def dumps_in_place(value: Any) -> bytes:
    """Pickles a value whose functions and classes take their places in the script's modules when `loads_in_place` reads it."""
    return _dumps(value, in_place=True)


def loads_in_place(data: bytes) -> Any:
    """Reads what `dumps_in_place` wrote."""
    value, *modules = cloudpickle.loads(data)
    for module, names in (one for places in modules for one in places.items()):
        namespace = namespace_of(module)
        for name, found in names.items():
            namespace.setdefault(name, found)
    # Classes of which the script has a newer one, in a notebook for instance: better found by that name than not at all.
    for kind in list(cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.values()):
        if kind.__module__ == MAIN and "." not in kind.__qualname__:
            namespace_of(MAIN).setdefault(kind.__name__, kind)
    return value


def namespace_of(module: str) -> dict[str, Any]:
    """The globals of one of the script's modules in this process; a module that is not there is made."""
    if module not in sys.modules:
        sys.modules[module] = types.ModuleType(module)
    return module_dict(sys.modules[module])


def _module(name: str) -> types.ModuleType:
    namespace_of(name)
    return sys.modules[name]


def _dumps(value: Any, *, in_place: bool) -> bytes:
    file, modules = io.BytesIO(), made_modules()
    pickler = _ScriptPickler(file, modules, in_place=in_place)
    with _by_value(modules):
        # One pickle: the places are noted while what comes before is written, and written after it.
        pickler.dump((value, _contents(modules), pickler.places) if in_place else value)
    return file.getvalue()


def _contents(modules: Sequence[types.ModuleType]) -> dict[str, dict[str, Any]]:
    """All that can be carried of the modules that the script made: a worker cannot execute them again."""
    found: dict[str, dict[str, Any]] = {}
    for module in modules:
        if module.__name__ not in (MAIN, *ALIASES):
            items = {name: one for name, one in module_dict(module).items() if not name.startswith("__")}
            found[module.__name__] = {name: one for name, one in items.items() if _pickles(one)}
    return found


def _pickles(value: Any) -> bool:
    try:
        dumps(value)
    except Exception:
        return False
    return True


@contextlib.contextmanager
def _by_value(modules: Sequence[types.ModuleType]) -> Iterator[None]:
    """Has cloudpickle carry what these modules define."""
    known = cloudpickle.list_registry_pickle_by_value()
    added = [module for module in modules if module.__name__ not in (MAIN, *known)]  # the main module it carries anyway
    for module in added:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)


class _Namespace:
    """Stands for the globals of a module of the script; it is pickled as the way to find them."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __reduce__(self) -> tuple[Callable[[str], dict[str, Any]], tuple[str]]:
        return namespace_of, (self._module,)


def _with_its_file(code: types.CodeType) -> tuple[Any, tuple[Any, ...]]:
    """How code is pickled, with the name of its file, which newer releases of cloudpickle leave out: tracebacks need it."""
    make, arguments = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    return make, tuple(code.co_filename if one == "<dynamic-code>" else one for one in arguments)


class _ScriptPickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """cloudpickle's, and what it leaves to be found by name: that works only for what a worker can import.

    Args:
        file: to write to.
        modules: those that workers cannot import.
        in_place: functions share the globals of their module in the process that reads.

    Attributes:
        places: by module and name, what was pickled by value and is found by that name here.
    """

    dispatch_table: ClassVar[Any] = ChainMap({types.CodeType: _with_its_file}, cloudpickle.Pickler.dispatch_table)

    def __init__(self, file: io.BytesIO, modules: Sequence[types.ModuleType], *, in_place: bool) -> None:
        super().__init__(file)
        self._in_place = in_place
        self._namespaces = {module.__name__: module_dict(module) for module in modules}
        self.places: dict[str, dict[str, Any]] = {}
        if in_place:
            for name, namespace in self._namespaces.items():
                self.globals_ref[id(namespace)] = _Namespace(ALIASES.get(name, name))

    def reducer_override(self, obj: Any) -> Any:
        """How an object is pickled; ``NotImplemented``: as pickle does it by itself."""
        if isinstance(obj, type | types.FunctionType | _CACHED):
            self._keep_place(obj)
        if isinstance(obj, type | types.FunctionType):
            return super().reducer_override(obj)
        if isinstance(obj, types.ModuleType) and sys.modules.get(obj.__name__) is obj:
            if obj.__name__ in self._namespaces:
                return _module, (ALIASES.get(obj.__name__, obj.__name__),)
            if (
                type(obj) is not types.ModuleType
            ):  # cloudpickle leaves those to pickle; torch.backends.cudnn is such a one
                return importlib.import_module, (obj.__name__,)
        if isinstance(obj, functools.cached_property):  # before Python 3.12 it holds a lock
            return _cached_property, (obj.func, obj.attrname)
        if isinstance(obj, weakref.WeakKeyDictionary):  # in what `functools.singledispatch` returns
            return type(obj), (dict(obj),)
        if self._is_named_by_script(obj):
            if isinstance(obj, _CACHED):
                return _cached, (obj.__wrapped__, obj.cache_parameters())
            return copyreg.__newobj__, (type(obj),), vars(obj)  # type: ignore[attr-defined]
        return super().reducer_override(obj)

    def _keep_place(self, obj: Any) -> None:
        """Notes the name by which the script has an object."""
        module, name = str(getattr(obj, "__module__", "")), str(getattr(obj, "__qualname__", ""))
        if self._in_place and module in self._namespaces and self._namespaces[module].get(name) is obj:
            self.places.setdefault(ALIASES.get(module, module), {})[name] = obj

    def _is_named_by_script(self, obj: Any) -> bool:
        """Whether pickle would write only a name, and that of something which no worker can import."""
        if isinstance(obj, _CACHED):
            return obj.__module__ in self._namespaces or "<locals>" in obj.__qualname__
        if getattr(obj, "__module__", None) not in self._namespaces or not hasattr(obj, "__dict__"):
            return False
        reduce: Any = type(obj).__reduce__
        return reduce is not object.__reduce__ and isinstance(reduce(obj), str)


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _cached_property(function: Callable[..., Any], name: str | None) -> functools.cached_property[Any]:
    made = functools.cached_property(function)
    made.attrname = name
    return made
