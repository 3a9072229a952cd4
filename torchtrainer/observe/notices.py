"""How the package tells its user something noteworthy that is not an error: through the logger ``torchtrainer``.

An application routes, formats or silences these lines by giving that logger a handler, a level or a filter. While it has no
handler of its own, `DEFAULT_HANDLER` writes each line to standard error, as `logging.lastResort` would: nothing is added to any logger, so
what is configured later takes over. Handlers of the root logger get the records too, but for those that write to the terminal, where
the line is already.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TextIO, cast

from torchtrainer.errors import InvalidArgumentError
from torchtrainer.process.own_files import printable
from torchtrainer.topology import current as current_topology

LOGGER = "torchtrainer"
NOTICE_EVERY_S = 1.0
"""Seconds between two lines about events that may come many times in a row."""


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


class DefaultHandler(logging.Handler):
    """Shows records as lines that start with ``torchtrainer:``, on ``sys.stderr`` as it is then (a notebook replaces it)."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the line."""
        try:
            standard_stream("stderr").write(f"{getattr(record, 'prefix', '')}{_line(record.getMessage())}")
        except Exception:
            self.handleError(record)


DEFAULT_HANDLER = DefaultHandler()
_unregistered = logging.Logger(LOGGER)  # noqa: LOG001  # see `_logger`
_unregistered.parent = logging.root


def notice(text: str, *, level: int = logging.INFO, stream: TextSink | None = None) -> None:
    """Tells the user something in one line.

    Args:
        text: what to say; line breaks become blanks, so that it stays one line, and what a terminal would obey is left out.
        level: of `logging`.
        stream: where it goes, past the logger; None: to the logger.
    """
    if stream is not None:
        stream.write(_line(_clean(text)))
    elif _forward is not None and _forward.pid == os.getpid():
        _forward.send(level, _clean(text))
    else:
        log(level, text, rank=_rank(), pid=os.getpid())


def warn(text: str) -> None:
    """Tells the user of something that went wrong, which is dealt with."""
    notice(text, level=logging.WARNING)


def log(level: int, text: str, *, rank: int | None, pid: int, prefix: str = "") -> None:
    """Has the handlers of the logger take a record; where it has none, `DEFAULT_HANDLER` and those of the root logger.

    Args:
        level, text: of the record.
        rank: of the process that tells it; None: it is no rank.
        pid: of that process.
        prefix: what the default handler shows before the line.
    """
    logger = _logger()
    if not _wants(logger, level):
        return
    extra: dict[str, Any] = {"rank": rank, "pid": pid, "prefix": prefix}
    frame = sys._getframe(1)  # noqa: SLF001  # as `logging` itself finds its caller
    while frame.f_back is not None and frame.f_globals is globals():
        frame = frame.f_back
    code = frame.f_code
    record = logger.makeRecord(
        LOGGER, level, code.co_filename, frame.f_lineno, _clean(text), (), None, code.co_name, extra
    )
    if not logger.filter(record):
        return
    if logger.handlers:
        logger.callHandlers(record)
        return
    others = [one for one in logging.root.handlers if not _on_terminal(one)] if logger.propagate else []
    for handler in (DEFAULT_HANDLER, *others):
        if record.levelno >= handler.level:
            handler.handle(record)


def _logger() -> logging.Logger:
    """The logger ``torchtrainer`` if anybody has asked for it, else one like it that only we hold.

    `logging.config` disables every logger that exists and is not named in the configuration. Whether ours is disabled would depend
    on whether there had been something to tell before.
    """
    found = logging.root.manager.loggerDict.get(LOGGER)
    return found if isinstance(found, logging.Logger) else _unregistered


def _wants(logger: logging.Logger, level: int) -> bool:
    """Whether records of this level are wanted: by default from INFO on, as the root logger's WARNING is a default, too."""
    if logger.disabled or logger.manager.disable >= level:
        return False
    return level >= (logger.level or (logging.root.level if logging.root.level > logging.WARNING else logging.INFO))


def _on_terminal(handler: logging.Handler) -> bool:
    """Whether a handler writes to a standard stream of this process, itself or through a console as rich's does."""
    stream = getattr(handler, "stream", None) or getattr(getattr(handler, "console", None), "file", None)
    return stream is not None and stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


def _clean(text: str) -> str:
    return printable(" ".join(text.split()))


def _line(text: str) -> str:
    return f"torchtrainer: {text}\n"


def _rank() -> int | None:
    """Of this process in its launch; None if there is none."""
    try:
        at = current_topology()
    except InvalidArgumentError:  # whoever attaches to the launch says so
        return None
    return None if at is None else at.rank


class Forward(NamedTuple):
    """Where lines of a worker go: to the driver.

    Attributes:
        pid: of the worker; a process that it forks has no way to the driver.
        send: called with a level and a text.
    """

    pid: int
    send: Callable[[int, str], None]


_forward: Forward | None = None


def forward_notices(send: Callable[[int, str], None]) -> None:
    """Has this process hand its lines on, from now on, instead of telling them itself."""
    global _forward  # noqa: PLW0603  # it is the process that is a worker
    _forward = Forward(os.getpid(), send)


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
