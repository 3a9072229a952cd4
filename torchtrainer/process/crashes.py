"""Records where a process crashed: the stack of the crashing thread, in a file that nothing else writes to.

User code may redirect or close its standard error. Of many threads Python dumps a hundred, the latest ones: so it dumps one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
from pathlib import Path

from torchtrainer.process.logs import last_text, size_of
from torchtrainer.process.own_files import open_own

HEADING = "Fatal Python error:"
NO_STACK = "(in a native thread, in which no Python code ran)"
_HIGH = 200
"""Descriptors below are the ones that programs close or replace by number."""


class CrashFile:
    """The file of this process, which processes that are forked from it share."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._fd = -1
        self._read = 0

    def write_to(self, path: Path) -> None:
        """Has crashes of this process written to a file from now on."""
        self._fd = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if sys.platform != "win32":
            import fcntl  # there is none on Windows

            low = self._fd
            with contextlib.suppress(OSError):  # so many are not allowed
                self._fd = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _HIGH)
                os.close(low)
        self._path, self._read = path, size_of(path)
        faulthandler.enable(file=self._fd, all_threads=False)

    def write_again(self) -> None:
        """The same in a process that was forked from this one, in which somebody has installed other handlers since."""
        if self._path is None:
            return
        faulthandler.disable()
        faulthandler.enable(file=self._fd, all_threads=False)

    def news(self) -> str:
        """The crash of another process that was written since this was asked last; empty if there is none."""
        if self._path is None:
            return ""
        before, self._read = self._read, size_of(self._path)
        return last_crash(self._path, before)


crash_file = CrashFile()


def last_crash(path: Path, start: int) -> str:
    """The latest crash in a file; empty if there is none.

    Args:
        path: of the file.
        start: bytes of it that are of earlier processes.
    """
    text = last_text(path, start)
    at = text.rfind(HEADING)
    if at < 0:
        return ""
    lines = [line for line in text[at:].splitlines() if line.strip() and not line.startswith("Extension modules:")]
    return "\n".join(lines if len(lines) > 1 else [*lines, NO_STACK])
