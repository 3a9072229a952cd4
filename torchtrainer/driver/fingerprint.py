"""What a training depends on, by name: the script's arguments, and the code and values that the user's functions reach.

Each is a short text that is the same in every start of an unchanged script, and that a change changes. Values that cannot be
compared count by their type: what does not pickle, such as an open file. Values that are made anew at each start count by how they
are made: see `made_anew`.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import fractions
import functools
import os
import re
import sys
import types
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from torchtrainer.driver.array_digest import array_text, is_initial
from torchtrainer.driver.code_names import code_digest, global_names, is_set, short_digest
from torchtrainer.driver.made_anew import how_made_anew, is_seeded, is_users_file

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_READABLE = (
    enum.Enum,
    PurePath,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    range,
    slice,
    re.Pattern,
)
"""Other types that their ``repr`` describes completely."""
_NAMESPACES = ("argparse", "types", "torchtrainer")
_CONTAINERS = (dict, list, tuple, set, frozenset, deque, types.MappingProxyType)
_MAX_SHOWN = 120
"""Longest text of a value that is kept verbatim."""
_MAX_NAMED = 64
"""Largest container whose members are compared by name; a larger one gets a single digest."""
_MAX_DEPTH = 5
"""The same for nested containers."""
_DIGEST = re.compile(r" ?#[0-9a-f]{16}$")
_Value = tuple[str, tuple[str, ...], str, Any]
"""A value still to be examined: its name, the names that lead to it, the module where it was found, and the value."""


class _NotComparedError(Exception):
    """Something does not pickle."""


def fingerprint(roots: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprints of values and of the code behind them, by name, such as ``{"LR": "0.1", "ARGS.epochs": "3"}``.

    Args:
        roots: the values by how the user calls them; functions and classes of the user's are followed to what they use.
    """
    walk = _Walk()
    for name, value in roots.items():
        walk.later.append((name, (name.split("[")[0],), "__main__", value))
    walk.run()
    return walk.parts


def script_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """The arguments of a script by option: ``--lr 0.1 data.csv`` gives what ``--lr`` and ``argument 1`` are.

    An option takes the words after it that are no options themselves.
    """
    found: dict[str, list[str]] = {}
    option, number = "", 0
    for word in arguments:
        if re.match(r"--?[A-Za-z]", word):
            option, equals, value = word.partition("=")
            found.setdefault(option, []).extend([value] if equals else [])
            option = "" if equals else option
        elif option:
            found[option].append(word)
        else:
            number += 1
            found[f"argument {number}"] = [word]
    return {name: " ".join(map(repr, values)) or "given" for name, values in found.items()}


def differences(then: Mapping[str, str], now: Mapping[str, str], may_change: Sequence[str] = ()) -> list[str]:
    """What has changed, each as a clause: ``LR was 0.1 and is 0.2``. Values come before code.

    Args:
        then, now: fingerprints.
        may_change: names, or words of names, that do not count.
    """
    free = {one.strip("-").replace("-", "_") for one in may_change}
    values, code = [], []
    for name in dict.fromkeys((*now, *then)):
        old, new = then.get(name, "not there"), now.get(name, "not there")
        words = {one.replace("-", "_") for one in re.findall(r"\w[\w-]*", name)}
        if old == new or name in may_change or words & free:
            continue
        before, after = _DIGEST.sub("", old), _DIGEST.sub("", new)
        if before == after:
            code.append(f"{name} has changed")
        else:
            values.append(f"{name} was {before or 'there'} and is {after or 'there'}")
    return values + code


class _Walk:
    """One look at everything that is reached. Used once."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self.later: deque[_Value] = deque()
        self._seen: dict[int, object] = {}  # holds what it has seen, so that no other object gets its id
        self._open: set[int] = set()  # containers whose members are being looked at
        self._reached: set[tuple[str, str]] = set()
        self._strict = False

    def run(self) -> None:
        """Looks at everything."""
        while self.later:
            name, names, module, value = self.later.popleft()
            try:
                self._value(name, names, module, value)
            except Exception:  # an object of the user's that does not let itself be looked at, or goes too deep
                self._put(name, f"{type(value).__qualname__}, not compared")

    def _put(self, name: str, text: str) -> None:
        number, free = 1, name
        while self.parts.get(free, text) != text:
            number += 1
            free = f"{name} ({number})"
        self.parts[free] = text

    def _leaf(self, name: str, names: tuple[str, ...], module: str, text: str) -> None:
        made = how_made_anew(module, names)
        if made is None:
            self._put(name, text)
            return
        self._put(name, f"made anew at each start #{short_digest(made[0])}")
        holder = vars(sys.modules[module])
        for used in made[1]:
            if isinstance(holder.get(used), (*_PLAIN, *_READABLE)):
                self._global(module, (used,), holder)

    def _value(self, name: str, names: tuple[str, ...], module: str, value: Any) -> None:
        if type(value) in _PLAIN or isinstance(value, _READABLE):
            self._leaf(name, names, module, _shown(repr(value)))
        elif (text := array_text(value, whole=not is_initial(value) or is_seeded(module))) is not None:
            self._leaf(name, names, module, text)
        elif isinstance(value, types.ModuleType):
            self._put(name, f"module {value.__name__}")
        elif isinstance(value, _CONTAINERS):
            self._container(name, names, module, value)
        elif id(value) not in self._seen:
            self._seen[id(value)] = value
            if isinstance(value, type):
                self._class(name, names, value)
            elif isinstance(value, types.FunctionType):
                self._function(name, names, value)
            else:
                self._object(name, names, module, value)

    # Containers

    def _container(self, name: str, names: tuple[str, ...], module: str, value: Any) -> None:
        if id(value) in self._open:
            return  # it is inside itself
        self._open.add(id(value))
        try:
            if _is_users(type(value)):
                self._users_object(name, names, value)
            if isinstance(value, set | frozenset):
                members = sorted(self._apart(names, module, one) for one in value)
                self._put(name, _shown(f"{type(value).__name__} of {', '.join(members)}"))
            elif len(value) > _MAX_NAMED or len(names) > _MAX_DEPTH:
                digest = self._members_digest(names, module, value)
                self._leaf(name, names, module, f"{type(value).__name__} of {len(value)} #{digest}")
            else:
                self._put(name, _said_name(type(value).__qualname__))
                for key, one in self._items(names, module, value):
                    self._value(f"{name}[{key}]", (*names, key.strip("'\"")), module, one)
        finally:
            self._open.remove(id(value))

    def _items(self, names: tuple[str, ...], module: str, value: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, Mapping):
            yield from ((str(number), one) for number, one in enumerate(value))
            return
        for key in value:
            with contextlib.suppress(KeyError):  # a mapping with a mind of its own
                yield repr(key) if type(key) in _PLAIN else self._apart(names, module, key), value[key]

    def _members_digest(self, names: tuple[str, ...], module: str, value: Any) -> str:
        if isinstance(value, Mapping):
            if set(map(type, value)) | set(map(type, value.values())) <= set(_PLAIN):
                return short_digest("\n".join(sorted(map(repr, value.items()))))
            members = [f"{key}: {self._apart(names, module, one)}" for key, one in self._items(names, module, value)]
            return short_digest("\n".join(sorted(members)))
        if set(map(type, value)) <= set(_PLAIN):
            return short_digest("\n".join(map(repr, value)))
        return short_digest("\n".join(self._apart(names, module, one) for one in value))

    def _apart(self, names: tuple[str, ...], module: str, value: Any) -> str:
        """The text of a value alone: what it says itself if that is short, else a digest."""
        if type(value) in _PLAIN:
            return _shown(repr(value))
        outside, self.parts = self.parts, {}
        try:
            self._value("", (*names, ""), module, value)
            said = sorted(self.parts.items())
        finally:
            self.parts = outside
        return said[0][1] if len(said) == 1 else f"{type(value).__qualname__} #{short_digest(repr(said))}"

    # Code

    def _function(self, name: str, names: tuple[str, ...], function: types.FunctionType) -> None:
        code, module = function.__code__, function.__globals__.get("__name__", "__main__")
        ours = is_users_file(code.co_filename)
        if ours or not hasattr(function, "__wrapped__"):
            self._put(name, f"#{code_digest(code)}" if ours else f"{function.__module__}.{function.__qualname__}")
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        around = {free: cell.cell_contents for free, cell in cells if is_set(cell)}
        positional = code.co_varnames[: code.co_argcount]
        defaults = function.__defaults__ or ()
        around |= dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
        around |= function.__kwdefaults__ or {}
        around |= {key: one for key, one in vars(function).items() if key != "__wrapped__"}
        called = name if name.isidentifier() else _said_name(function.__qualname__)
        for free, value in around.items():
            if ours or _is_users(value):  # a wrapper of a library leads to the user's function
                inner = value.__qualname__ if _is_users(value) else f"{free} of {called}"
                self.later.append((_said_name(inner), (*names, free), module, value))
        if ours:
            for chain in global_names(code):
                self._global(module, chain, function.__globals__)

    def _global(self, module: str, chain: tuple[str, ...], holder: Mapping[str, Any]) -> None:
        if chain[0].endswith(":"):  # imported inside a function; what is not loaded here is not looked for
            module, chain = chain[0][:-1], chain[1:]
            holder = vars(sys.modules[module]) if module in sys.modules else {}
        first, *rest = chain
        if first not in holder or first.startswith("__"):
            return
        value = holder[first]
        if isinstance(value, types.ModuleType):
            if is_users_file(getattr(value, "__file__", None)):
                for one in [rest[0]] if rest else [one for one in vars(value) if type(vars(value)[one]) in _PLAIN]:
                    self._global(value.__name__, (one, *rest[1:]), vars(value))
            return
        if (module, first) in self._reached:
            return
        self._reached.add((module, first))
        name = first if module == "__main__" else f"{module}.{first}"
        if _is_users(value):
            name = (
                _said_name(value.__qualname__)
                if value.__module__ == "__main__"
                else f"{value.__module__}.{value.__qualname__}"
            )
        self.later.append((name, (first,), module, value))

    def _class(self, name: str, names: tuple[str, ...], value: type) -> None:
        if not _is_users(value):
            self._put(name, f"{value.__module__}.{value.__qualname__}")
            return
        said = _said_name(value.__qualname__)
        if name != said and not name.endswith(f".{said}"):  # such as an argument of the trainer
            self._put(name, said)
            name = said
        self._put(name, f"class of {', '.join(f'{one.__module__}.{one.__qualname__}' for one in value.__bases__)}")
        for member, one in vars(value).items():
            inner = getattr(one, "__func__", None) or getattr(one, "func", None) or one
            is_code = isinstance(inner, types.FunctionType | property)
            if member == "_abc_impl" or (member.startswith("__") and not is_code):
                continue
            if isinstance(one, types.MemberDescriptorType | types.GetSetDescriptorType):
                continue
            parts = (one.fget, one.fset, one.fdel) if isinstance(one, property) else (inner if is_code else one,)
            for part in parts:
                if part is not None or not isinstance(one, property):
                    self.later.append((f"{name}.{member}", (*names, member), value.__module__, part))
        for base in value.__bases__:
            if _is_users(base):
                self.later.append((_said_name(base.__qualname__), (base.__name__,), base.__module__, base))

    # Objects

    def _object(self, name: str, names: tuple[str, ...], module: str, value: Any) -> None:
        kind = type(value)
        inner = getattr(value, "__dict__", {}).get("__wrapped__")  # of a cached function
        if isinstance(value, types.MethodType):
            self._value(name, names, module, value.__func__)
            self._value(f"{name}.__self__", (*names, "__self__"), module, value.__self__)
        elif isinstance(value, functools.partial):
            for part in ("func", "args", "keywords"):
                self._value(f"{name}.{part}", (*names, part), module, getattr(value, part))
        elif isinstance(value, types.BuiltinFunctionType):
            self._put(name, f"{value.__module__}.{value.__qualname__}")
        elif isinstance(inner, types.FunctionType):
            self._value(name, names, module, inner)
        elif _is_users(kind):
            self._users_object(name, names, value)
        elif kind.__module__.partition(".")[0] in _NAMESPACES and hasattr(value, "__dict__"):
            self._attributes(name, names, module, value)
        elif isinstance(value, Mapping) and value is not os.environ and _pickles(value):
            self._container(name, names, module, value)
        else:
            self._leaf(name, names, module, self._reduced(names, module, value))

    def _users_object(self, name: str, names: tuple[str, ...], value: Any) -> None:
        kind = type(value)
        self.later.append((_said_name(kind.__qualname__), (kind.__name__,), kind.__module__, kind))
        self._put(name, _said_name(kind.__qualname__))
        self._attributes(name, names, kind.__module__, value)

    def _attributes(self, name: str, names: tuple[str, ...], module: str, value: Any) -> None:
        slots = [one for kind in type(value).__mro__ for one in _slots(kind)]
        given = {one: getattr(value, one) for one in slots if hasattr(value, one)} | getattr(value, "__dict__", {})
        strict, self._strict = self._strict, False
        for attribute, one in given.items():
            self._value(f"{name}.{attribute}", (*names, attribute), module, one)
        self._strict = strict

    def _reduced(self, names: tuple[str, ...], module: str, value: Any) -> str:
        """The text of an object of a library: a digest of what it would pickle."""
        kind = type(value)
        outermost, self._strict = not self._strict, True
        try:
            if value is os.environ:  # what the user sets for a run, among much that others set
                raise _NotComparedError
            reduced = value.__reduce_ex__(4)
            if isinstance(reduced, str):
                return reduced
            function, arguments, *state = (list(one) if isinstance(one, Iterator) else one for one in reduced)
            said = [self._apart(names, module, one) for one in (function, arguments, *state)]
            return f"{kind.__qualname__} #{short_digest(repr(said))}"
        except Exception as error:  # whatever its author thought that pickling should raise
            if not outermost:
                raise _NotComparedError from error
            return f"{kind.__qualname__}, not compared"
        finally:
            self._strict = not outermost


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 20]}... #{short_digest(text)}"


def _said_name(qualname: str) -> str:
    return qualname.rpartition("<locals>.")[2]


def _pickles(value: Any) -> bool:
    try:
        value.__reduce_ex__(4)
    except Exception:  # whatever its author thought that pickling should raise
        return False
    return True


def _slots(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [one for one in slots if not one.startswith("__")]


def _is_users(value: Any) -> bool:
    """Whether a function or class is of the user's own code: of a file of theirs, or made while the script runs."""
    if isinstance(value, types.FunctionType):
        return is_users_file(value.__code__.co_filename)
    if not isinstance(value, type) or value.__module__ == "builtins":
        return False
    if value.__module__ == "__main__":
        return True
    module = sys.modules.get(value.__module__)
    file = getattr(module, "__file__", None)
    return is_users_file(file) or (file is not None and not _is_found(value, module))


def _is_found(value: type, module: types.ModuleType | None) -> bool:
    found: Any = module
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value
