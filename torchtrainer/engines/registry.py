"""Engines by name: ours, and those that installed packages register in the entry-point group ``torchtrainer.engines``."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from torchtrainer.engines.base import Engine
from torchtrainer.errors import InvalidArgumentError, NotAvailableError

ENTRY_POINTS = "torchtrainer.engines"
OURS = {
    "local": "torchtrainer.engines.local:shared_engine",
    "spmd": "torchtrainer.engines.spmd:spmd_engine",
}
"""As in ``pyproject.toml``. They are also here for a source checkout that is not installed, and as a look through all installed
packages takes a good part of what a start may take; a package cannot take their names."""
PLANNED = {
    "ray": 'the Ray engine is not supported in this version: use engine="local", or start the script with torchrun'
}


def engine_called(name: str) -> Engine:
    """The engine of this name, made by calling what its entry point names, without arguments.

    Raises:
        NotAvailableError: it is not there yet, and no package brings it.
        InvalidArgumentError: there is none, or it cannot be loaded.
    """
    if name in OURS:
        return _made(EntryPoint(name=name, value=OURS[name], group=ENTRY_POINTS))
    found = {one.name: one for one in entry_points(group=ENTRY_POINTS)}
    if name in found:
        return _made(found[name])
    if name in PLANNED:
        raise NotAvailableError(
            f'{PLANNED[name]}. A package that brings one has an entry point "{name}" in the group {ENTRY_POINTS}; none is installed'
        )
    known = ", ".join(["auto", *OURS, *sorted(found.keys() - OURS.keys())])
    raise InvalidArgumentError(f"engine must be one of {known}, or an engine object; got {name!r}")


def _made(entry: EntryPoint) -> Engine:
    try:
        make: Callable[[], Engine] = entry.load()
    except (ImportError, AttributeError) as error:
        raise InvalidArgumentError(
            f"engine={entry.name!r} is {entry.value}, which cannot be imported: {error}"
        ) from error
    return make()
