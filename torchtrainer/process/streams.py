"""Standard input, output and error of a process, which whoever started it may have closed."""

from __future__ import annotations

import os
from pathlib import Path


def open_standard_descriptors() -> None:
    """Opens the null device where one of the descriptors 0 to 2 is closed.

    Else the next file or socket gets that number, and what libraries print goes into it; and a child that is to inherit it would
    have it replaced by a stream of its own.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            redirect(fd, os.devnull, os.O_RDWR)


def redirect(fd: int, path: str | Path, flags: int, mode: int = 0o777) -> None:
    """Makes a descriptor, open or not, that of a file, for this process and what it starts.

    Args:
        fd: the descriptor.
        path, flags, mode: as for `os.open`.
    """
    put_at(fd, os.open(path, flags, mode))


def put_at(fd: int, opened: int) -> None:
    """Moves an open file to a descriptor, open or not, for this process and what it starts."""
    if opened == fd:  # it was closed, and the lowest that was free
        os.set_inheritable(fd, True)  # noqa: FBT003  # takes no keyword
        return
    os.dup2(opened, fd)
    os.close(opened)
