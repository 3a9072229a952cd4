"""Files that are on the disk once they are written, and digests of what is in them."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from torchtrainer.checkpoint.failpoints import failpoint
from torchtrainer.process.own_files import open_to_read

READ_BYTES: Final = 1024**2
"""Bytes read at a time when a file is digested."""
FILE_MODE: Final = 0o600

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size and digest of a file.

    Attributes:
        size_bytes: its length.
        sha256: hexadecimal digest of its content.
    """

    size_bytes: int
    sha256: str


class DigestingFile(io.RawIOBase):
    """A file that is written once from start to end, and digested on the way.

    Attributes:
        error: the first error of the system while writing; libraries that write may hide it behind one of their own.

    Args:
        fd: an open file; owned from here on.
        failpoints: where the names of its failpoints start.
    """

    def __init__(self, fd: int, failpoints: str) -> None:
        self.error: OSError | None = None
        self._fd = fd
        self._failpoints = failpoints
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()

    def writable(self) -> bool:
        """It is for writing only."""
        return True

    def write(self, data: Any, /) -> int:
        """Writes all of the bytes, however many turns that takes.

        Raises:
            OSError: the system did not take them.
        """
        view = memoryview(data).cast("B")
        written = 0
        try:
            failpoint(f"{self._failpoints}.write")
            while written < view.nbytes:
                written += os.write(self._fd, view[written:])
        except OSError as error:
            self.error = self.error or error
            raise
        self._sha256.update(view)
        self._size_bytes += view.nbytes
        return written

    def sync(self) -> FileDigest:
        """Brings what was written to the disk.

        Raises:
            OSError: it is not there. What the system still holds of the file cannot be relied on: write a new file.
        """
        failpoint(f"{self._failpoints}.fsync")
        os.fsync(self._fd)
        if hasattr(os, "posix_fadvise"):  # who reads it back is to read the disk, not what memory still holds of it
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return FileDigest(size_bytes=self._size_bytes, sha256=self._sha256.hexdigest())

    def close(self) -> None:
        """Closes the file; some file systems report here that they did not keep it."""
        if self.closed:
            return
        super().close()
        try:
            failpoint(f"{self._failpoints}.close")
        finally:
            os.close(self._fd)


def write_file(path: Path, write: Callable[[BinaryIO], object], *, failpoints: str) -> FileDigest:
    """Makes a file for its owner only, has it filled, and brings it to the disk.

    Args:
        path: where; nothing may be there yet.
        write: gets the open file; it can write but not seek.
        failpoints: where the names of its failpoints start.

    Raises:
        OSError: the file is not on the disk, also where ``write`` put another error in its place, or none.
    """
    with DigestingFile(os.open(path, _NEW, FILE_MODE), failpoints) as file:
        try:
            write(cast("BinaryIO", file))
        except Exception as error:
            if file.error is not None and error is not file.error:
                raise file.error from error
            raise
        if file.error is not None:
            raise file.error
        return file.sync()


def digest_file(path: Path) -> FileDigest:
    """Reads a file to its end.

    Raises:
        OSError: it cannot be read.
    """
    sha256, size_bytes = hashlib.sha256(), 0
    with open_to_read(path) as file:
        while data := file.read(READ_BYTES):
            sha256.update(data)
            size_bytes += len(data)
    return FileDigest(size_bytes=size_bytes, sha256=sha256.hexdigest())


def sync_directory(path: Path) -> None:
    """Brings the names in a directory to the disk: files made, renamed and removed.

    Raises:
        OSError: they are not there.
    """
    if sys.platform == "win32":  # a directory cannot be opened there
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
