"""What is known of workers: by their messages, and by what they were told to carry. Values only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

EXCHANGING = frozenset({"exchange", "backward"})
"""Phases in which a worker may be waiting for the others."""


@dataclass(frozen=True, kw_only=True)
class Lap:
    """A worker's clock at a step: seconds that it has spent in each phase since it was built."""

    step: int
    spent_s: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """What is known of a worker.

    Attributes:
        worker: its number in the group.
        ranks: that it carries; none: it is a newcomer, which has not joined, or a spare.
        like: the rank that it was built like.
        pid: 0 before the process exists.
        phase, phase_since: what its training thread does, and since when (monotonic).
        heard_at: when it was heard of last (monotonic).
        spoke: it has sent a heartbeat.
        busy: it is being built, or has not answered the running call for all its ranks.
        ready: it is built.
        joining: it was told to join, and has not said that its part is done.
        reading: it was told to join, and may still be reading the state that was shared for it.
        lost: its process is gone, and nobody carries its ranks yet.
        leaving_by: it was told to leave, and has until then (monotonic); None: it stays.
        longest_s: the longest of its latest steps; 0.0: not known.
        laps: where it was in time, oldest first; for finding stragglers.
    """

    worker: int
    ranks: tuple[int, ...] = ()
    like: int = 0
    pid: int = 0
    phase: str = "start"
    phase_since: float = 0.0
    heard_at: float = 0.0
    spoke: bool = False
    busy: bool = True
    ready: bool = False
    joining: bool = False
    reading: bool = False
    lost: bool = False
    leaving_by: float | None = None
    step: int = 0
    epoch: int = 0
    batch: int = 0
    device: str = ""
    rss_bytes: int = 0
    cpu_s: float = 0.0
    longest_s: float = 0.0
    laps: tuple[Lap, ...] = field(default=(), repr=False)

    @property
    def rank(self) -> int:
        """The lowest rank that it carries; without ranks, the one that it was built like."""
        return self.ranks[0] if self.ranks else self.like

    @property
    def carries(self) -> bool:
        """Whether it is a living carrier of ranks."""
        return bool(self.ranks) and not self.lost

    @property
    def newcomer(self) -> bool:
        """Whether it is to join, and has not been told to yet."""
        return not self.ranks and not self.lost and self.leaving_by is None


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Who carries and who does not.

    Attributes:
        carriers: how many living workers carry ranks.
        newcomers: places of those that are being built, or wait to join.
        uncarried: ranks whose worker is gone and that nobody carries.
    """

    carriers: int
    newcomers: tuple[int, ...]
    uncarried: tuple[int, ...]

    @classmethod
    def of(cls, views: Iterable[WorkerView]) -> Standing:
        """Looks at every worker."""
        carriers = 0
        newcomers: list[int] = []
        uncarried: list[int] = []
        for place, view in enumerate(views):
            if view.carries:
                carriers += 1
            elif view.lost:
                uncarried += view.ranks
            elif view.newcomer:
                newcomers.append(place)
        return cls(carriers=carriers, newcomers=tuple(newcomers), uncarried=tuple(sorted(uncarried)))


class Roster(tuple[WorkerView, ...]):  # noqa: SLOT001 - subclasses of tuple cannot have slots that hold something
    """All workers of a group, by ascending number.

    With thousands of them no message may cost a look at each: a worker is found by its number, and `Standing` stays known while
    heartbeats and replies come in, which do not change it.
    """

    known: Standing | None = None

    @property
    def standing(self) -> Standing:
        """Worked out when it is asked for first."""
        if self.known is None:
            self.known = Standing.of(self)
        return self.known

    def find(self, worker: int) -> WorkerView | None:
        """A worker by its number."""
        place = self._place(worker)
        return self[place] if place < len(self) and self[place].worker == worker else None

    def see(self, worker: int, changes: Mapping[str, Any]) -> Roster:
        """The roster with something new about one of its workers."""
        place = self._place(worker)
        before, after = self[place], replace(self[place], **changes)
        roster = Roster((*self[:place], after, *self[place + 1 :]))
        if (before.ranks, before.lost, before.leaving_by) == (after.ranks, after.lost, after.leaving_by):
            roster.known = self.known
        return roster

    def _place(self, worker: int) -> int:
        return bisect_left(self, worker, key=_number)


def _number(view: WorkerView) -> int:
    return view.worker
