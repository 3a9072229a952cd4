"""The driver's memory of the failures of a run: it tells callbacks, the history and the user of each, once its outcome is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from torchtrainer.driver.causes import Cause, UserCodeFailed, WorkerHung
from torchtrainer.driver.events import Joined, Recovered
from torchtrainer.driver.report import short_cause
from torchtrainer.driver.views import WorkerView
from torchtrainer.observe.events import Callbacks, FailureEvent
from torchtrainer.observe.failures import (
    FailureRecord,
    details,
    goodput_line,
    joined_line,
    ranks_of,
    recovery_line,
    step_of,
)
from torchtrainer.observe.notices import PacedNotices


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A failure of the whole group, after which the ranks may still be started anew.

    Attributes:
        place: of its record.
        since: when it was seen (monotonic).
        message: the whole story.
        raised: user code raised an exception, which is no matter for the history of processes.
    """

    place: int
    since: float
    message: str
    raised: bool


class FailureWatch:
    """Collects the failures of a run. All in the user's thread.

    Args:
        callbacks: the user's.
        lines: to the user.
        keep: writes the loss of processes to the history.
        clock, wall_clock: monotonic seconds, and seconds since 1970.

    Attributes:
        records: oldest first.
        views: the workers as they are now; set when the ranks are there.
        epoch: passes over the training data that were started; set when one is.
    """

    def __init__(
        self,
        *,
        callbacks: Callbacks,
        lines: PacedNotices,
        keep: Callable[[FailureRecord], None],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._callbacks = callbacks
        self._lines = lines
        self._keep = keep
        self._clock = clock
        self._wall_clock = wall_clock
        self._open: list[_Open] = []
        self._carried: set[int] = set()
        self._stood_still: list[tuple[float, float]] = []
        self.records: list[FailureRecord] = []
        self.epoch = 0
        self.views: Callable[[], tuple[WorkerView, ...]] = tuple

    @property
    def lost_s(self) -> float:
        """For how long training stood still because of the failures; what happened at the same time counts once."""
        return sum(end - since for since, end in self._stood_still)

    def on_recovered(self, found: Recovered) -> None:
        """A worker was lost, and what it had left undone is done."""
        seconds = found.seconds + (found.cause.silent_s if isinstance(found.cause, WorkerHung) else 0.0)
        views = self.views()
        record = FailureRecord(
            time=self._wall_clock() - seconds,
            ranks=found.ranks,
            cause=short_cause(found.cause),
            step=found.step,
            epoch=self._epoch(views),
            redone=found.redone,
            seconds=seconds,
            how=found.how,
        )
        if found.how == "carried":
            self._carried.update(found.ranks)
        self._count(seconds)
        self.records.append(record)
        line = recovery_line(found, views, seconds)
        self._lines.say(line)
        self._tell(record, "\n".join(part for part in (line, details(found.cause)) if part))

    def on_joined(self, joined: Joined) -> None:
        """A new worker has taken over ranks; worth telling if they had been lost, and others carried them meanwhile."""
        if self._carried.isdisjoint(joined.ranks):
            return
        self._carried.difference_update(joined.ranks)
        pid = next((view.pid for view in self.views() if view.worker == joined.worker), 0)
        self._lines.say(joined_line(joined.ranks, pid))

    def on_failure(self, cause: Cause, error: BaseException) -> None:
        """The group failed; whether that is the end, `on_restarted` or `settle` says."""
        message = "\n".join(_said(part) for part in (error, error.__cause__) if part is not None)
        raised = isinstance(cause, UserCodeFailed)
        self._open.append(_Open(place=len(self.records), since=self._clock(), message=message, raised=raised))
        record = FailureRecord(
            time=self._wall_clock(),
            ranks=ranks_of(cause),
            cause=short_cause(cause),
            step=step_of(cause),
            epoch=self._epoch(self.views()),
        )
        self.records.append(record)

    def on_restarted(self, steps_redone: int, seconds: float) -> None:
        """The ranks were started anew from a saved state, perhaps after several tries.

        Args:
            steps_redone: optimizer steps that are taken again.
            seconds: the last try took, until the ranks were where the script is, less those steps.
        """
        self._carried.clear()
        opened, self._open = self._open, []
        for one, following in zip(opened, [*opened[1:], None], strict=True):
            taken_s = seconds if following is None else following.since - one.since
            redone = steps_redone if following is None else 0
            record = replace(self.records[one.place], redone=redone, seconds=taken_s, how="restarted")
            self._close(one, record)
        if opened:
            self._count(self._clock() - opened[0].since)

    def settle(self) -> None:
        """The call has failed: what is open was not recovered."""
        opened, self._open = self._open, []
        for one in opened:
            self._close(one, self.records[one.place])

    def goodput(self, total_s: float) -> str:
        """What the failures have cost, in a line; empty if none was recovered.

        Args:
            total_s: how long the run took.
        """
        return goodput_line(self.records, self.lost_s, total_s)

    def _close(self, one: _Open, record: FailureRecord) -> None:
        self.records[one.place] = record
        self._tell(record, one.message, kept=not one.raised)

    def _tell(self, record: FailureRecord, message: str, *, kept: bool = True) -> None:
        if kept:
            self._keep(record)
        self._callbacks.on_failure(FailureEvent(**asdict(record), message=message))

    def _epoch(self, views: tuple[WorkerView, ...]) -> int:
        """Of the pass that is under way: heartbeats know of it a little later, and of a call with several alone."""
        return max(self.epoch, *(view.epoch for view in views), 0)

    def _count(self, seconds: float) -> None:
        """Training stood still until now. A restart that began before other failures were over has their time in its own."""
        now = self._clock()
        since = now - seconds
        while self._stood_still and self._stood_still[-1][1] >= since:
            since = min(since, self._stood_still.pop()[0])
        self._stood_still.append((since, now))


def _said(error: BaseException) -> str:
    """``str(error)``, also for an exception of the user's whose own ``__str__`` fails."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__
