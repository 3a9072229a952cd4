"""Notices of the user's own: a file that appears, and a function that knows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torchtrainer.preempt.notice import Notice

FILE_EVERY_S = 1.0
"""Time between two checks for a file."""


class FileSource:
    """Gives notice when a path exists.

    Args:
        path: of the file; what it contains does not matter.
    """

    name = "file"
    interval_s = FILE_EVERY_S

    def __init__(self, path: Path) -> None:
        self._path = path
        self._given = False

    def poll(self) -> Iterator[Notice]:
        """Looks once."""
        if self._given or not self._path.exists():
            return
        self._given = True
        yield Notice(source=self.name, deadline=None, must_stop=True, text=f"the file {self._path} exists")


class CheckSource:
    """Calls the user's function every few seconds, until it has said that everything must stop.

    Args:
        check: returns something false, True, the seconds left, or a `Notice`.
        interval_s: between two calls.
        say: takes one line for the user when the function fails, the first time.
    """

    name = "callable"

    def __init__(self, check: Callable[[], object], *, interval_s: float, say: Callable[[str], None]) -> None:
        self.interval_s = interval_s
        self._check = check
        self._say = say
        self._told = False
        self._last: Notice | None = None

    def poll(self) -> Iterator[Notice]:
        """Calls the function once; an exception of its is told, not raised."""
        if self._last is not None and self._last.must_stop:
            return
        try:
            notice = _as_notice(self._check())
        except Exception as error:
            if not self._told:
                self._told = True
                self._say(f"PreemptionConfig.check failed and will be called again: {type(error).__name__}: {error}")
            return
        if notice is not None and notice != self._last:
            self._last = notice
            yield notice


def _as_notice(answer: object) -> Notice | None:
    if isinstance(answer, Notice):
        return answer
    if not answer:
        return None
    text = "PreemptionConfig.check says that this machine will be taken away"
    if answer is True:
        return Notice(source=CheckSource.name, deadline=None, must_stop=True, text=text)
    if isinstance(answer, int | float) and not math.isnan(answer):
        deadline = time.monotonic() + answer
        return Notice(
            source=CheckSource.name, deadline=deadline, must_stop=True, text=f"{text} in {max(0, answer):.0f} s"
        )
    raise TypeError(f"it returned {answer!r}, not a false value, True, a number of seconds or a Notice")
