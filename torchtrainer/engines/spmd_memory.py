"""What rank 0 opens and tells the other ranks about: the directory of a run, and what is there to resume."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torchtrainer import errors
from torchtrainer.comm.group import Collective

T = TypeVar("T")


def share_from_first(
    collective: Collective,
    open_here: Callable[[], T],
    known: Callable[[T], dict[str, Any]],
    borrowed: Callable[[Mapping[str, Any]], T],
) -> T:
    """Opens something on rank 0, and tells the others of it. A collective call; an error of any rank is raised on all.

    Args:
        collective: the ranks.
        open_here: called on rank 0.
        known: JSON data on what was opened, for the other ranks.
        borrowed: makes of that what the other ranks have.

    Raises:
        TorchTrainerError: that of the first rank that had one.
    """
    first = collective.rank == 0
    opened, failed = _tried(open_here) if first else (None, None)
    told, error = collective.all_gather([known(opened) if opened is not None else None, _said(failed)])[0]
    if error is None and not first:
        opened, failed = _tried(lambda: borrowed(told))
    reported = [error, *(found for found in collective.all_gather(_said(failed)) if found is not None)]
    what = next((found for found in reported if found is not None), None)
    if failed is not None:
        raise failed
    if what is not None:
        raise _error_called(what[0])(what[1])
    assert opened is not None
    return opened


def _tried(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:  # raised again once all ranks know of it
        return None, error


def _said(error: Exception | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, f"{error} (on {socket.gethostname()})"]


def _error_called(name: str) -> type[Exception]:
    """An error of this package by its name; others had their type where they were raised."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.TorchTrainerError):
        return kind
    return errors.EngineError
