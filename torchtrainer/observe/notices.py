"""How the package tells its user something noteworthy that is not an error."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from typing import Literal, Protocol, TextIO, cast

from torchtrainer.process.own_files import printable

NOTICE_EVERY_S = 1.0
"""Seconds between two lines about what may happen many times in a row."""


class TextSink(Protocol):
    """Where a line of text goes: a stream such as ``sys.stderr``, or a progress bar that must not be torn."""

    def write(self, text: str, /) -> object:
        """Takes the text, which ends with a newline."""


class Nowhere(io.TextIOBase):
    """A stream that takes any text and shows none of it."""

    def write(self, text: str, /) -> int:
        """Takes the text."""
        return len(text)


def standard_stream(name: Literal["stdout", "stderr"]) -> TextIO:
    """The stream of this name as it is now; one that leads nowhere if it is closed, as it is for some daemons."""
    stream: TextIO | None = getattr(sys, name)
    return cast("TextIO", Nowhere()) if stream is None or getattr(stream, "closed", False) else stream


def notice(text: str, *, stream: TextSink | None = None) -> None:
    """Tells the user something in one line that starts with ``torchtrainer:``.

    Args:
        text: what to say; line breaks become blanks, so that it stays one line, and what a terminal would obey is left out.
        stream: where it goes; None: ``sys.stderr`` as it is now (a notebook replaces it).
    """
    sink = standard_stream("stderr") if stream is None else stream
    sink.write(f"torchtrainer: {printable(' '.join(text.split()))}\n")


_said: set[str] = set()


def notice_once(text: str) -> None:
    """The same, for what every trainer of a script would tell again."""
    if text not in _said:
        _said.add(text)
        notice(text)


class PacedNotices:
    """Says at most one line in an interval. Of those that come meanwhile, the latest is said after it, with a count of the others.

    Args:
        say: shows a line.
        every_s: seconds between two lines.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        say: Callable[[str], None] = notice,
        *,
        every_s: float = NOTICE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._every_s = every_s
        self._clock = clock
        self._due = -float("inf")
        self._held: list[str] = []

    def say(self, text: str) -> None:
        """Says a line, now or later."""
        self._held.append(text)
        self.say_due()

    def say_due(self, *, all_held: bool = False) -> None:
        """Says what was held back if it is time to; to be called now and then.

        Args:
            all_held: also if it is not time yet.
        """
        if not self._held or (self._clock() < self._due and not all_held):
            return
        *others, latest = self._held
        self._held = []
        self._due = self._clock() + self._every_s
        more = f" (and {len(others)} more line{'' if len(others) == 1 else 's'} since the one before)" if others else ""
        self._say(latest + more)
