"""What a launcher says to its user: a line at the start and at the end, and one when something noteworthy happens."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any


class Summary:
    """Says it, on standard error, and keeps the times that the last line reports. Used by the launcher's thread.

    Args:
        command: what the user called, put before each line.
        began_s: when that was, monotonic.
        device: what the workers run on, in a word or two.
    """

    def __init__(self, command: str, began_s: float, device: str) -> None:
        self._command = command
        self._began_s = began_s
        self._device = device
        self._failed_s: float | None = None
        self._restarts = 0
        self._lost_s = 0.0

    def says(self, text: str) -> None:
        """Prints a line, or several of which the first is the headline."""
        say(self._command, text)

    def started(self, workers: Sequence[Any], attempt: int) -> None:
        """Tells the first time that workers run; later it only stops the clock of the lost time.

        Args:
            workers: torch's ``Worker`` values of this machine.
            attempt: restarts before.
        """
        now_s = time.monotonic()
        if self._failed_s is not None:
            self._lost_s += now_s - self._failed_s
            self._failed_s = None
            self._restarts = attempt
        elif attempt == 0 and self._restarts == 0:
            world, here = workers[0].world_size, len(workers)
            which = f"{here} rank{'s' if here > 1 else ''}"
            if world != here:
                which = f"rank{'s' if here > 1 else ''} {_span([w.global_rank for w in workers])} of {world}"
            self.says(f"{which} on {self._device}, started in {now_s - self._began_s:.1f} s")

    def failed(self) -> None:
        """An attempt failed and the next one begins."""
        self._failed_s = time.monotonic()

    def ended(self, how: str) -> None:
        """The last line.

        Args:
            how: ``done``, ``failed`` and the like.
        """
        restarts = ""
        if self._restarts:
            plural = "s" if self._restarts > 1 else ""
            restarts = f", {self._restarts} restart{plural}, {self._lost_s:.1f} s lost between attempts"
        self.says(f"{how} after {time.monotonic() - self._began_s:.1f} s{restarts}")


def say(command: str, text: str) -> None:
    """Prints for the user; a terminal that is gone hears nothing, and that is no error."""
    with contextlib.suppress(OSError, ValueError):
        print(f"{command}: {text}", file=sys.stderr, flush=True)


def process_start_s() -> float:
    """When this process began, as monotonic time: earlier than its first Python line. Now, where the system does not say."""
    now_s = time.monotonic()
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return now_s
    return now_s - age_s


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
