"""How far the steps of a run were shown to its callbacks, over all starts of the script: none is shown twice."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
from pathlib import Path

from torchtrainer.process.own_files import open_own

_PLACE = struct.Struct("<qq")


class Shown:
    """The last step that was shown. Written at each step that is, so that it survives a kill; for the user's thread.

    Args:
        path: of the file, in the run directory; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._memory: mmap.mmap | bytearray = bytearray(_PLACE.size)
        if path is None:
            return
        with contextlib.suppress(OSError):  # a full disk: what is shown twice after a restart is the smaller harm
            self._memory = _mapped(path)

    def is_new(self, call: int, batch: int) -> bool:
        """Whether a step was not shown yet; from then on it was.

        Args:
            call: place of the call among those of the trainer, from 0.
            batch: batches that were completed in it.
        """
        place = (call + 1, batch)  # a new file is all zeros: nothing was shown
        if place <= _PLACE.unpack_from(self._memory, 0):
            return False
        _PLACE.pack_into(self._memory, 0, *place)
        return True


def _mapped(path: Path) -> mmap.mmap:
    fd = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        if os.fstat(fd).st_size < _PLACE.size and os.write(fd, bytes(_PLACE.size)) < _PLACE.size:
            raise OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC)
            )  # a page without a place on the disk would end the process
        return mmap.mmap(fd, _PLACE.size)
    finally:
        os.close(fd)
