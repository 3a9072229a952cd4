"""Pickling what travels to the workers, with errors that name what does not pickle."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torchtrainer.errors import NotSerializableError
from torchtrainer.script import pickler

MAX_DEPTH = 6
"""How deep the search for the culprit goes."""


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
    seen: set[int] = set()
    path, culprit = name, value
    for _ in range(MAX_DEPTH):
        for part_path, part in _parts(culprit, path):
            if id(part) not in seen and not _pickles(part):
                seen.add(id(part))
                path, culprit = part_path, part
                break
        else:
            break
    return path, culprit


def _pickles(value: Any) -> bool:
    try:
        pickler.dumps(value)
    except Exception:
        return False
    return True


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What an object is made of, each with the path that leads there."""
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, types.MethodType):
        yield f"{path}.__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        names = value.__code__.co_freevars
        for free, cell in zip(names, value.__closure__ or (), strict=True):
            try:
                yield f"{path}: {free}", cell.cell_contents
            except ValueError:  # not bound yet
                continue
        for used in value.__code__.co_names:
            if used in value.__globals__ and not isinstance(value.__globals__[used], types.ModuleType):
                yield f"{path}: {used}", value.__globals__[used]
        yield from ((f"{path}.__defaults__[{index}]", item) for index, item in enumerate(value.__defaults__ or ()))
        yield from ((f"{path}.__kwdefaults__[{key!r}]", item) for key, item in (value.__kwdefaults__ or {}).items())
    elif isinstance(value, functools.partial):
        yield f"{path}.func", value.func
        yield from ((f"{path}.args[{index}]", item) for index, item in enumerate(value.args))
        yield from ((f"{path}.keywords[{key!r}]", item) for key, item in value.keywords.items())
    elif isinstance(value, type):
        yield from ((f"{path}.{key}", item) for key, item in vars(value).items() if not key.startswith("__"))
    elif hasattr(value, "__dict__"):
        yield from ((f"{path}.{key}", item) for key, item in vars(value).items())
