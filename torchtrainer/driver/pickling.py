"""Pickling what travels to the workers, with errors that name what does not pickle."""

from __future__ import annotations

import contextlib
import functools
import pickle
import types
from collections.abc import Iterator
from typing import Any

from torchtrainer.errors import NotSerializableError
from torchtrainer.script import pickler

MAX_DEPTH = 30
"""Depth limit of the search for the culprit."""
_OF_EVERY_CLASS = ("__dict__", "__weakref__", "__module__", "__doc__", "__mro__")
_WRAPPED = ("__func__", "__wrapped__", "fget", "fset", "fdel")
"""Attributes in which descriptors and decorators keep the function that they wrap."""


def dumps(value: Any, name: str, *, in_place: bool = False) -> bytes:
    """Pickles a value for a worker.

    Args:
        value: anything; classes and functions of a script or notebook cell travel with their code.
        name: what to call it in an error.
        in_place: they take their places in the worker's ``__main__``; see `torchtrainer.script.pickler`.

    Raises:
        NotSerializableError: it does not pickle; the message names the innermost attribute that does not.
    """
    try:
        return pickler.dumps_in_place(value) if in_place else pickler.dumps(value)
    except Exception as error:
        path, culprit = find_culprit(value, name)
        raise NotSerializableError(
            f"{path} cannot be sent to the worker processes: {type(culprit).__name__} object does not pickle ({error}). "
            "Make it where it is used, inside a creator, setup or the function itself, which run in the workers."
        ) from error


def find_culprit(value: Any, name: str) -> tuple[str, Any]:
    """Finds the innermost part that does not pickle: its path, as a person would write it, and the object."""
    return _innermost(value, name, {id(value): value}) or (name, value)


def _innermost(value: Any, path: str, seen: dict[int, Any], depth: int = 0) -> tuple[str, Any] | None:
    """The culprit in an object that does not pickle; None: only because of what is looked at already, such as its own class."""
    if depth == MAX_DEPTH:
        return path, value
    leads_back = False
    for part_path, part in _parts(value, path):
        if id(part) not in seen and not _pickles(part):
            seen[id(part)] = part
            found = _innermost(part, part_path, seen, depth + 1)
            if found is not None:
                return found
        leads_back = leads_back or id(part) in seen
    return None if leads_back else (path, value)


def _pickles(value: Any) -> bool:
    try:
        pickler.dumps(value)
    except Exception:
        return False
    return True


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The parts of an object, each with the path that leads there."""
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, types.MethodType):
        yield f"{path}.__self__", value.__self__
        yield path, value.__func__
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(value, path)
    elif isinstance(value, functools.partial):
        yield f"{path}.func", value.func
        yield from ((f"{path}.args[{index}]", item) for index, item in enumerate(value.args))
        yield from ((f"{path}.keywords[{key!r}]", item) for key, item in value.keywords.items())
    elif isinstance(value, type):
        yield from ((f"{path}.{key}", item) for key, item in vars(value).items() if key not in _OF_EVERY_CLASS)
        yield from ((f"{path}.__bases__[{index}]", base) for index, base in enumerate(value.__bases__))
    else:
        yield from _parts_of_object(value, path)


def _parts_of_function(function: types.FunctionType, path: str) -> Iterator[tuple[str, Any]]:
    names = function.__code__.co_freevars
    for free, cell in zip(names, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not bound yet
            yield f"{path}: {free}", cell.cell_contents
    for used in _names_in(function.__code__):
        if used in function.__globals__ and not isinstance(function.__globals__[used], types.ModuleType):
            yield f"{path}: {used}", function.__globals__[used]
    yield from ((f"{path}.__defaults__[{index}]", item) for index, item in enumerate(function.__defaults__ or ()))
    yield from ((f"{path}.__kwdefaults__[{key!r}]", item) for key, item in (function.__kwdefaults__ or {}).items())
    yield from ((f"{path}.{key}", item) for key, item in vars(function).items())


def _names_in(code: types.CodeType) -> Iterator[str]:
    """Names that a function uses, in the functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _parts_of_object(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What pickle would write of an object: what it wraps, its state, its items, and last its class."""
    for name in _WRAPPED:
        if getattr(value, name, None) is not None:
            yield path, getattr(value, name)
    try:
        reduced = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    except Exception:
        reduced = ()
    if isinstance(reduced, tuple):
        _, arguments, state, items, pairs = (*reduced, *(None,) * 5)[:5]
        for one in state if isinstance(state, tuple) else (state,):
            yield from _state(one, path)
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(items or ()))
        yield from ((f"{path}[{key!r}]", item) for key, item in pairs or ())
        yield from ((path, one) for one in arguments or () if one is not type(value))
    if not reduced and hasattr(value, "__dict__"):
        yield from _state(vars(value), path)
    yield f"{path}.__class__", type(value)


def _state(state: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        yield from ((f"{path}.{key}", item) for key, item in state.items())
    elif state is not None:
        yield path, state
