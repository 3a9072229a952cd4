"""One counter per rank in shared memory, which one process raises and the others wait for."""

from __future__ import annotations

import ctypes
import mmap
import time

from torchtrainer.comm import futex

LINE_BYTES = 64
"""Spacing of counters: one cache line, so that writing one does not slow down readers of another."""
_WORDS_PER_LINE = LINE_BYTES // 8


class Counters:
    """A 64-bit counter per rank; Python reads and writes such an aligned word by one instruction.

    A waiter sleeps on the very word that a writer changes, and the kernel compares it before it lets anybody sleep, so that
    no change is missed.

    Args:
        memory: that holds them.
        offset: of the first one, in bytes; a multiple of 64.
        world_size: number of ranks.
        shared: other processes map this memory too, and may sleep on it.
    """

    def __init__(self, memory: mmap.mmap, offset: int, *, world_size: int, shared: bool) -> None:
        end = offset + world_size * LINE_BYTES
        self._words = memoryview(memory)[offset:end].cast("Q")[::_WORDS_PER_LINE]
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory, offset))
        self._shared = shared

    def __getitem__(self, rank: int) -> int:
        """The rank's counter."""
        return int(self._words[rank])

    def publish(self, rank: int, number: int) -> None:
        """Sets the rank's counter, after everything that this thread wrote before, and wakes who waits for it."""
        self._words[rank] = number
        if self._shared:
            futex.wake(self._address + rank * LINE_BYTES)

    def reached(self, number: int) -> bool:
        """Whether all ranks have come so far."""
        return min(self._words.tolist()) >= number

    def missing(self, number: int) -> list[int]:
        """The ranks that have not come so far."""
        return [rank for rank, reached in enumerate(self._words.tolist()) if reached < number]

    def sleep(self, rank: int, number: int, timeout_s: float) -> None:
        """Sleeps until the rank may have reached the number, or the time is over; returns early now and then."""
        if not self._shared:
            time.sleep(timeout_s)
        elif (seen := self[rank]) < number:
            futex.wait(self._address + rank * LINE_BYTES, seen, timeout_s)

    def close(self) -> None:
        """Lets go of the memory."""
        self._words.release()
