"""The machine's values as JSON, and back, checked field by field against their types. Pure.

A dataclass is an object with its class under ``is`` and the fields that differ from their defaults; a mapping with keys that are no
texts is a list of pairs; a tuple, set or table is a list. What the machine decides nothing by does not get into a journal, since
whoever sends one in does not know what is in it: bytes become their length, and `PRIVATE` says what becomes of other fields.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torchtrainer.config import FailureConfig, Timeouts
from torchtrainer.control import messages
from torchtrainer.control.wire import Message
from torchtrainer.driver import causes, events, states, stragglers, views

MAX_TEXT = 400
"""Characters kept of a text, such as a method's name."""
DECIDING_FACTS = frozenset({"bound", "recovers"})
"""Entries of `WorkerReady.facts` that the machine reads."""


class Unsaid(bytes):
    """Bytes of which only the number is known."""

    length: int

    def __new__(cls, length: int) -> Unsaid:
        """Bytes of this length."""
        made = super().__new__(cls)
        made.length = length
        return made


def _nothing(_value: object) -> None:
    return None


def _length(text: str) -> str:
    """Whether a text is empty, the machine may look at; what it says, it does not."""
    return text if not text or (text.startswith("(") and text.endswith(" characters)")) else f"({len(text)} characters)"


def _deciding(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name in DECIDING_FACTS}


def _empty_list(_value: object) -> list[Any]:
    return []


def _empty_dict(_value: object) -> dict[str, Any]:
    return {}


PRIVATE: Mapping[tuple[str, str], Callable[[Any], Any]] = {
    ("Failure", "text"): _length,
    ("Failure", "traceback"): _length,
    ("WorkerExited", "stderr_tail"): _length,
    ("WorkerExited", "crash"): _length,
    ("WorkerDied", "stderr_tail"): _length,
    ("WorkerDied", "crash"): _length,
    ("WorkerHung", "stacks"): _length,
    ("Stacks", "text"): _length,
    ("LoaderLost", "stack"): _length,
    ("LoaderDied", "stack"): _length,
    ("StateSent", "error"): _length,
    ("StateSent", "at"): _empty_dict,
    ("Join", "at"): _empty_dict,
    ("CheckpointEnded", "path"): _length,
    ("CheckpointEnded", "error"): _length,
    ("CheckpointEnded", "problems"): _empty_list,
    ("WorkerReady", "facts"): _deciding,
    ("WorkerReady", "modules"): _empty_list,
    ("WorkerReady", "record"): _empty_list,
    ("StartWorker", "record"): _empty_list,
    ("Machine", "facts"): _deciding,
    ("Machine", "record"): _empty_list,
    ("Heartbeat", "loss"): _nothing,
}
"""What is kept of fields that may reveal the user's data, code or machine, by class and field."""
UNWRITTEN = frozenset({("WorkerView", "heartbeat"), ("WorkerView", "phase_times")})
"""Fields left out: no decision depends on the first, and the second leads only to `Straggler`, which orders nothing."""

_OWN = (states.Machine, Timeouts, FailureConfig)


@cache
def kinds() -> dict[str, type]:
    """Every class whose values can be in a journal, by its name."""
    found = {
        name: kind
        for module in (causes, events, states, stragglers, views, messages)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and is_dataclass(kind) and kind is not Message
    }
    return {**found, **{kind.__name__: kind for kind in _OWN}}


@cache
def _fields(kind: type) -> tuple[tuple[Field[Any], Any], ...]:
    hints = get_type_hints(kind)
    return tuple((item, hints[item.name]) for item in fields(kind))


# To JSON


def to_json(value: Any) -> Any:
    """A value of the machine's, as JSON takes it."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT else value[: MAX_TEXT - 1] + "…"
    if isinstance(value, bytes):
        return value.length if isinstance(value, Unsaid) else len(value)
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: to_json(one) for key, one in value.items()}
        return [[key, to_json(one)] for key, one in value.items()]
    if isinstance(value, frozenset | set):
        return [to_json(one) for one in sorted(value)]
    if isinstance(value, Sequence):
        return [to_json(one) for one in value]
    return {"is": type(value).__name__, **changed_fields(value)}


def changed_fields(value: Any, before: Any = None) -> dict[str, Any]:
    """The fields of a dataclass that differ from those of another value of it, or from their defaults."""
    kind: Any = type(value)
    name = kind.__name__
    written = {}
    for item, _hint in _fields(kind):
        if (name, item.name) in UNWRITTEN:
            continue
        one = getattr(value, item.name)
        known = _default(item) if before is None else getattr(before, item.name)
        if one is known or (type(one) is type(known) and one == known):
            continue
        private = PRIVATE.get((name, item.name))
        written[item.name] = to_json(one if private is None else private(one))
    return written


def _default(item: Field[Any]) -> Any:
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else MISSING


# From JSON


def from_json(hint: Any, value: Any) -> Any:  # noqa: PLR0911  # one return per kind of type
    """The value of this type that `to_json` wrote.

    Raises:
        ValueError: it is something else; the text says where.
    """
    if hint is Any or value is None:
        return _checked(hint is Any or hint is type(None) or type(None) in get_args(hint), hint, value)
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _checked(value in inside, hint, value)
    if origin in (Union, types.UnionType):
        return _one_of(inside, hint, value)
    if origin is not None:
        return _container(origin, inside, hint, value)
    if hint is bytes:
        return Unsaid(_checked(type(value) is int and value >= 0, hint, value)) if value != 0 else b""
    if hint is float:
        return float(_checked(type(value) in (int, float), hint, value))
    if hint is views.WorkerTable:
        return _table(from_json(tuple[views.WorkerView, ...], value))
    if is_dataclass(hint):
        return _dataclass(hint, value)
    return _checked(type(value) is hint, hint, value)


def new_fields(kind: type, value: Any) -> dict[str, Any]:
    """The fields that `changed_fields` wrote for a value of this class.

    Raises:
        ValueError: it is something else.
    """
    hints = {item.name: hint for item, hint in _fields(kind)}
    _checked(isinstance(value, dict), kind, value)
    read = {}
    for name, one in value.items():
        if name not in hints:
            raise ValueError(f"{kind.__name__} has no field {name[:40]!r}")
        try:
            read[name] = from_json(hints[name], one)
        except ValueError as error:
            raise ValueError(f"{kind.__name__}.{name}: {error}") from None
    return read


def _checked(right: bool, hint: Any, value: Any) -> Any:
    if not right:
        raise ValueError(f"expected {getattr(hint, '__name__', hint)}, got {str(value)[:80]!r}")
    return value


def _one_of(hints: tuple[Any, ...], hint: Any, value: Any) -> Any:
    if isinstance(value, dict) and "is" in value:
        kind = kinds().get(str(value["is"]))
        fits = any(isinstance(one, type) and kind is not None and issubclass(kind, one) for one in hints)
        return _dataclass(_checked(fits, hint, value) and kind, value)
    for one in hints:
        if not is_dataclass(one) and one is not type(None):
            try:
                return from_json(one, value)
            except ValueError:
                continue
    return _checked(right=False, hint=hint, value=value)


def _container(origin: Any, inside: tuple[Any, ...], hint: Any, value: Any) -> Any:
    if origin in (dict, Mapping):
        pairs = value.items() if isinstance(value, dict) else _checked(isinstance(value, list), hint, value)
        _checked(all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs), hint, value)
        return {from_json(inside[0], key): from_json(inside[1], one) for key, one in pairs}
    _checked(isinstance(value, list), hint, value)
    return origin(from_json(inside[0], one) for one in value)


def _dataclass(kind: Any, value: Any) -> Any:
    _checked(isinstance(value, dict) and value.get("is") == kind.__name__, kind, value)
    read = new_fields(kind, {name: one for name, one in value.items() if name != "is"})
    missing = [item.name for item, _ in _fields(kind) if item.name not in read and _default(item) is MISSING]
    if missing:
        raise ValueError(f"{kind.__name__} has no {', '.join(missing)}")
    return kind(**read)


def _table(found: tuple[views.WorkerView, ...]) -> views.WorkerTable:
    numbers = [view.worker for view in found]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"workers are not in ascending order: {numbers[:20]}")
    return views.WorkerTable(found)
