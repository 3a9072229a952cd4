"""Small files that exist whole or not at all, and files of lines of which each does."""

from __future__ import annotations

import os
from io import RawIOBase
from pathlib import Path

from torchtrainer.process.own_files import open_own

TORN_BYTES = 64 * 1024**2
"""Length limit of a line, whole or torn."""
_LOOK_BYTES = 1024**2


def replace_file(path: Path, content: bytes) -> None:
    """Puts a file, for its owner only, in the place of the one that is there, once its content is on the disk.

    Raises:
        OSError: it could not be written; the old one is as it was.
    """
    unready = path.with_name(f".{path.name}.unready")
    unready.unlink(missing_ok=True)  # a crash left it, or somebody put it there
    with os.fdopen(open_own(unready, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unready, path)


def append_line(path: Path, line: bytes, *, durable: bool = False) -> None:
    """Appends a line to a file for its owner only; what a crash left of the last line is removed first.

    Args:
        path: of the file; made if it is not there.
        line: with its end.
        durable: returns when it is on the disk.

    Raises:
        OSError: it could not be written; the file is as it was.
    """
    fd = open_own(path, os.O_RDWR | os.O_CREAT)
    with os.fdopen(fd, "r+b", buffering=0) as file:
        if hasattr(os, "fchmod"):
            os.fchmod(fd, 0o600)
        end = _remove_torn_line(file)
        try:
            _write_all(fd, line)
            if durable:
                os.fsync(fd)
        except OSError:
            file.truncate(end)
            raise


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of such a file, without one at the end that a crash tore."""
    return content[: _end_of_whole_lines(content)].splitlines()


def _end_of_whole_lines(content: bytes) -> int:
    return content.rfind(b"\n") + 1


def _remove_torn_line(file: RawIOBase) -> int:
    """Leaves the file at its end, which is the end of a whole line, and returns that position."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        first = max(0, end - (_LOOK_BYTES if end < size else 1))
        file.seek(first)
        found = _end_of_whole_lines(file.read(end - first) or b"")
        end = first + found
        if found:
            break
        if size - end > TORN_BYTES:
            raise OSError(f"the last {size - end} bytes have no line end, so no run wrote them")
    if end < size:
        file.truncate(end)
    return file.seek(end)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
