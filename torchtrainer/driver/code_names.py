"""The digest of a function's code, without comments and line numbers, and the global names that it uses."""

from __future__ import annotations

import dis
import hashlib
import types
from collections.abc import Iterator

_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_OF_A_PLACE = frozenset({"__doc__", "__firstlineno__"})
"""What the body of a class notes of its text and its place in the file."""


def short_digest(content: str | bytes) -> str:
    """Sixteen hexadecimal digits."""
    data = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def code_digest(code: types.CodeType) -> str:
    """A digest of what code does: comments, docstrings and the place in the file do not count."""
    return short_digest(_constant(code))


def _constant(value: object) -> str:
    if isinstance(value, types.CodeType):
        return f"{value.co_name} {value.co_varnames[: value.co_argcount + value.co_kwonlyargcount]} {_steps(value)}"
    if isinstance(value, frozenset):
        return f"frozenset {sorted(_constant(one) for one in value)}"
    if isinstance(value, tuple):
        return f"({','.join(_constant(one) for one in value)})"
    return f"{type(value).__name__} {value!r}"


def _steps(code: types.CodeType) -> list[str]:
    """The instructions with the values that they use; a docstring is used by none."""
    said: list[str] = []
    for one in dis.get_instructions(code):
        if one.opname == "STORE_NAME" and one.argval in _OF_A_PLACE:
            said.pop()
        else:
            said.append(f"{one.opname} {_constant(one.argval)}")
    return said


def global_names(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """Global names that code and what is nested in it use, each with the attributes that are asked of it at once: ``(np, pi)``."""
    chain: tuple[str, ...] = ()
    module = ""
    for one in dis.get_instructions(code):
        if one.opname in _ATTRIBUTES and chain:
            chain = (*chain, one.argval)
            continue
        if chain:
            yield chain
        chain = (one.argval,) if one.opname in _LOADS else ()
        if one.opname == "IMPORT_NAME":
            module = one.argval
        elif one.opname == "IMPORT_FROM":
            yield (f"{module}:", one.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from global_names(constant)


def is_set(cell: types.CellType) -> bool:
    """Whether the name of a surrounding function was ever given a value."""
    try:
        cell.cell_contents  # noqa: B018  # raises if a name was never given a value
    except ValueError:
        return False
    return True
