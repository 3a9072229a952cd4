"""Reads the logs that workers write: what is new since the last read, and the last lines."""

from __future__ import annotations

import os
from pathlib import Path

from torchtrainer.process.own_files import UnsafeFileError, open_own, open_to_read

STDERR_TAIL_BYTES = 16000
_READ_BYTES = 1 << 16
MAX_CHUNKS = 16
"""Number of such chunks read at once, so that a flood of output holds nobody up."""


class LogTail:
    """Follows one log file and hands out whole lines. Used by one thread.

    A carriage return ends a line too, so that a progress bar inside a worker shows while it moves.

    Args:
        path: of the file.
        start: bytes of it that somebody has written before.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path = path
        self._start = start
        self._fd: int | None = None
        self._partial = b""

    def new_text(self, flush: bool = False) -> str:
        """Returns what was written since the last call, up to the last complete line.

        Args:
            flush: return an incomplete last line too.
        """
        if self._fd is None:
            try:
                self._fd = open_own(self._path, os.O_RDONLY)
            except (FileNotFoundError, UnsafeFileError):  # not there yet, or not what a worker writes
                return ""
            os.lseek(self._fd, self._start, os.SEEK_SET)
        chunks = [self._partial]
        while (flush or len(chunks) <= MAX_CHUNKS) and (chunk := os.read(self._fd, _READ_BYTES)):
            chunks.append(chunk)
        data = b"".join(chunks)
        cut = len(data) if flush else max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        self._partial = data[cut:]
        return data[:cut].decode(errors="replace")

    def close(self) -> None:
        """Closes the file. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def size_of(path: Path) -> int:
    """Bytes in a log file so far; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def last_text(path: Path, start: int = 0, limit_bytes: int = STDERR_TAIL_BYTES) -> str:
    """Returns the end of a log file, beginning with a whole line; empty if there is no file.

    Args:
        path: of the file.
        start: bytes of it that somebody has written before, which are left out.
        limit_bytes: most that is returned.
    """
    try:
        with open_to_read(path) as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(start, size - limit_bytes))
            data = log.read(limit_bytes)
    except (FileNotFoundError, UnsafeFileError):
        return ""
    if size - start > limit_bytes:
        data = data[data.find(b"\n") + 1 :]
    return data.decode(errors="replace").strip()
