"""One advance warning, which of two is the more urgent, and wall-clock times as deadlines."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Notice:
    """An advance warning that this machine or job will be taken away.

    Attributes:
        source: where it comes from: "SIGTERM", "Slurm time limit", "AWS spot", "file"...
        deadline: when everything here is gone, in seconds of `time.monotonic`; None: unknown.
        must_stop: False: only a hint, so save a checkpoint and continue.
        text: one line for people.
    """

    source: str
    deadline: float | None
    must_stop: bool
    text: str

    def seconds_left(self) -> float | None:
        """Seconds until the deadline, 0 if it has passed; None: unknown."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


def is_more_urgent(new: Notice, old: Notice | None) -> bool:
    """Whether a notice takes the place of another: a stop that of a hint or of a later stop, a hint that of an older hint."""
    if old is None or not old.must_stop:
        return True
    if not new.must_stop:
        return False
    return new.deadline is not None and (old.deadline is None or new.deadline < old.deadline)


def monotonic_at(wall_time_s: float) -> float:
    """Where a time of the wall clock, in seconds since 1970, lies on the monotonic clock."""
    return time.monotonic() + wall_time_s - time.time()
