"""Shared memory for snapshots: as much as there is, known before it is touched, in large pages where the system has them."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path

from torchtrainer.process.cgroups import cgroup_memory_left

_MEMINFO = Path("/proc/meminfo")
KIB = 1024


def map_shared(path: str, size_bytes: int) -> mmap.mmap:
    """Maps a file of shared memory, made as long as it has to be.

    Writing to memory that the system does not have ends the process, so that it is asked for first.

    Args:
        path: of the file; it is there already.
        size_bytes: wanted.

    Raises:
        OSError: there is not so much.
    """
    fd = os.open(path, os.O_RDWR)
    try:
        available = available_bytes()
        if available is not None:
            grows_by = size_bytes - os.fstat(fd).st_size
            if grows_by > available:
                raise OSError(errno.ENOMEM, f"{available / 1e6:.0f} MB are free")
            os.ftruncate(fd, max(size_bytes, os.fstat(fd).st_size))
        elif hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size_bytes)
        else:
            os.ftruncate(fd, size_bytes)
        mapped = mmap.mmap(fd, size_bytes)
    finally:
        os.close(fd)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them copies a little slower
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def available_bytes() -> int | None:
    """Memory that can still be had, by the machine and by the container's limit; None where the system does not tell."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * KIB for line in lines if line.startswith("MemAvailable:")]
    left = cgroup_memory_left()
    if left is not None:
        found.append(left)
    return min(found, default=None)
