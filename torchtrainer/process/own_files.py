"""Opens the files of a run directory: regular ones of the directory's owner, no links, and nothing is waited for.

Others may have had a hand in such a directory: it was writable to them once, it came out of an archive, or a full disk left
half of a file. So nobody else opens a file there, and what a file says is checked before it is believed or shown.

- A link may lead to a file that is not the run's; opening a pipe waits for its other end; a device never ends.
- A file of somebody else's, in a directory of the user's, was put there. One with a second name, elsewhere, would be written
  to there too.
- A hole in a file is as long as somebody wants it, and takes no room on the disk until it is read.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, Final

RECORD_BYTES: Final = 16 * 1024**2
"""Size limit of a record such as ``run.json``."""
LINES_BYTES: Final = 512 * 1024**2
"""Size limit of a file of lines such as ``calls.jsonl``."""

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_SAFELY: Final = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_OF_ANOTHER_KIND: Final = frozenset({errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EMLINK})
"""Errors of opening a link, a pipe, a socket or a directory as a file; the message then says what it is."""


class UnsafeFileError(OSError):
    """Something in a run directory is not what a run puts there; the text says what, and what to do about it."""


def open_own(path: Path, flags: int, mode: int = 0o600) -> int:
    """Opens a file of a run directory; returns its descriptor, which a child does not inherit.

    Args:
        path: of the file.
        flags, mode: as for `os.open`. What cannot be taken back, such as ``O_TRUNC``, is not for files that may be there.

    Raises:
        UnsafeFileError: it is a link, no regular file, or somebody else's; or it is to be written and has a second name.
        OSError: it cannot be opened.
    """
    try:
        fd = os.open(path, flags | _SAFELY, mode)
    except OSError as error:
        if error.errno in _OF_ANOTHER_KIND:
            check_file(path)
        raise
    try:
        if not flags & os.O_EXCL:  # else it was made just now
            _check(path, os.fstat(fd), writing=flags & (os.O_WRONLY | os.O_RDWR) != 0)
        if hasattr(os, "O_NONBLOCK"):
            os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_to_read(path: Path) -> BinaryIO:
    """The same for reading only, as a file object without a buffer."""
    return os.fdopen(open_own(path, os.O_RDONLY), "rb", buffering=0)


def read_own(path: Path, limit_bytes: int | None) -> bytes:
    """All of a file of a run directory.

    Args:
        path: of the file.
        limit_bytes: the longest that it can be; None: any length.

    Raises:
        UnsafeFileError: as for `open_own`, or it is longer.
        OSError: it cannot be read.
    """
    with open_to_read(path) as file:
        if limit_bytes is not None:
            _check_size(path, os.fstat(file.fileno()), limit_bytes)
        return file.read()


def parse_json(content: bytes) -> Any:
    """The contents of a JSON file.

    Raises:
        ValueError: it is no JSON: not UTF-8, torn, or nested deeper than anything that a run writes.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_file(path: Path, limit_bytes: int | None = None) -> None:
    """Looks at a file of a run directory that is to be written later, without opening it; one that is not there is fine.

    Args:
        path: of the file.
        limit_bytes: as for `read_own`.

    Raises:
        UnsafeFileError: `open_own` or `read_own` would refuse it, or others may write to it.
    """
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    _check(path, found, writing=True)
    _check_others(path, found)
    if limit_bytes is not None:
        _check_size(path, found, limit_bytes)


def check_directory(path: Path) -> None:
    """Looks at a directory whose files are to be the user's alone.

    Raises:
        UnsafeFileError: it is a link, no directory, somebody else's, or others may write to it.
        OSError: it is not there.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise UnsafeFileError(f"{path} is a symbolic link; give the directory that it points to")
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafeFileError(f"{path} is not a directory")
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        raise UnsafeFileError(f"{path} belongs to user id {found.st_uid}, not to you")
    _check_others(path, found)


def check_tree(top: Path) -> None:
    """Looks at all that is in a directory, if it is there, for something of somebody else's.

    Raises:
        UnsafeFileError: there is something.
        OSError: it cannot be looked at.
    """
    if not hasattr(os, "geteuid") or not os.path.lexists(top):
        return
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            path = Path(directory, name)
            owner = path.lstat().st_uid
            if owner not in (os.geteuid(), top.stat().st_uid):
                raise UnsafeFileError(f"{path} belongs to user id {owner}, not to you: remove {top}")


def others_may_write(path: Path, found: os.stat_result) -> bool:
    """Whether the mode of a file or directory lets others write, on a file system that keeps modes."""
    if sys.platform == "win32" or not found.st_mode & _OTHERS_WRITE:
        return False
    try:
        with tempfile.TemporaryDirectory(prefix=".torchtrainer-", dir=path.parent) as made:  # it is made for us alone
            return not os.stat(made).st_mode & _OTHERS_WRITE
    except OSError:
        return True


def printable(text: str, limit: int | None = None) -> str:
    """A text from a file, safe to show on a terminal: one line, no control characters, not longer than ``limit``."""
    safe = "".join(character if character.isprintable() else "?" for character in text[:limit])
    return safe if limit is None or len(text) <= limit else f"{safe}…"


def _check(path: Path, found: os.stat_result, *, writing: bool) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise UnsafeFileError(f"{path} is a symbolic link, where a run has a file of its own: remove it")
    if not stat.S_ISREG(found.st_mode):
        raise UnsafeFileError(f"{path} is {_kind(found.st_mode)}, where a run has a regular file: remove it")
    if hasattr(os, "geteuid") and found.st_uid not in (os.geteuid(), path.parent.stat().st_uid):
        raise UnsafeFileError(f"{path} belongs to user id {found.st_uid}, not to you: remove it")
    if writing and found.st_nlink > 1:
        raise UnsafeFileError(
            f"{path} has another name elsewhere (a hard link), which would show any change too: replace it by a copy"
        )


def _check_others(path: Path, found: os.stat_result) -> None:
    if others_may_write(path, found):
        raise UnsafeFileError(
            f"{path}: other users may write to it (mode {stat.S_IMODE(found.st_mode):o}): run chmod go-w {path}, if what is in it is "
            "yours"
        )


def _check_size(path: Path, found: os.stat_result, limit_bytes: int) -> None:
    if found.st_size > limit_bytes:
        raise UnsafeFileError(f"{path} has {found.st_size} bytes, and no run writes more than {limit_bytes} there")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a directory",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISBLK: "a device",
        stat.S_ISCHR: "a device",
    }
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "no file")
