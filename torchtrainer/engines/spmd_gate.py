"""The step boundary of a rank in the calling process: it shows where it is, and asks whether to continue."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torchtrainer.process.paths import LaunchPaths
from torchtrainer.train.progress import Progress, StepGate

LAUNCH_DIR = "TORCHTRAINER_LAUNCH_DIR"
"""Set by `torchtrainer run` for its workers: its private directory."""
STEP_COUNTER = struct.Struct("<q")
"""What a worker tells the launcher: steps done, a little-endian 64-bit integer; 0: it counts none at present."""


class StepCounter:
    """Tells the launcher how far this worker is, by a file in memory that both see.

    While it tells a number, only a change of it counts as progress towards ``--hang-timeout``; while it tells 0, use of the
    processor does.

    Args:
        path: of the file; made anew.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(fd, STEP_COUNTER.size)
            self._memory = mmap.mmap(fd, STEP_COUNTER.size)
        finally:
            os.close(fd)

    @classmethod
    def of_launch(cls, environ: Mapping[str, str]) -> StepCounter | None:
        """The counter of this worker; None where nobody reads it.

        Args:
            environ: of this process.
        """
        directory, local_rank = environ.get(LAUNCH_DIR), environ.get("LOCAL_RANK", "")
        if directory is None or not local_rank.isdecimal():
            return None
        try:
            return cls(LaunchPaths(Path(directory)).progress(int(local_rank)))
        except OSError:  # the launcher is gone, and with it this process soon
            return None

    def show(self, step: int) -> None:
        """Tells the number of steps done."""
        STEP_COUNTER.pack_into(self._memory, 0, step)


class SpmdGate:
    """Asks another gate whether to continue, after showing where the rank is.

    Args:
        progress: of the rank.
        inner: the gate that decides.
        report: called every now and then with no more than a boundary between; None: nobody looks.
        every_s: seconds between two reports.
        counter: of the launcher; None: there is none.
    """

    def __init__(
        self,
        progress: Progress,
        inner: StepGate,
        *,
        report: Callable[[], None] | None,
        every_s: float,
        counter: StepCounter | None,
    ) -> None:
        self._progress = progress
        self._inner = inner
        self._report = report
        self._every_s = every_s
        self._counter = counter
        self._due = 0.0

    @property
    def save_wanted(self) -> bool:
        """See `StepGate`."""
        return self._inner.save_wanted

    def stop_requested(self, boundary: int) -> bool:
        """See `StepGate`."""
        if self._counter is not None:
            self._counter.show(self._progress.step)
        if self._report is not None:
            now = time.monotonic()
            if now >= self._due:
                self._report()
                self._due = now + self._every_s
        return self._inner.stop_requested(boundary)
