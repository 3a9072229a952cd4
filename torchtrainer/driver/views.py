"""What the driver knows about workers, from their messages and from what it told them to carry. Values only."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, overload

from torchtrainer.control.messages import Heartbeat

EXCHANGING = frozenset({"exchange", "backward"})
"""Phases in which a worker may be waiting for the others."""
BLOCK = 128
"""Workers of which one message copies what is known; about the root of the largest number of ranks."""


@dataclass(frozen=True, kw_only=True)
class PhaseTimes:
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
        machine: the host name of where it runs; empty before the process exists.
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
        phase_times: where it was in time, oldest first; for finding stragglers.
        heartbeat: its latest heartbeat, for what nobody decides by.
    """

    worker: int
    ranks: tuple[int, ...] = ()
    like: int = 0
    pid: int = 0
    machine: str = ""
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
    longest_s: float = 0.0
    phase_times: tuple[PhaseTimes, ...] = field(default=(), repr=False)
    heartbeat: Heartbeat | None = field(default=None, repr=False)

    def heard(self, heartbeat: Heartbeat, now: float) -> WorkerView:
        """The view when the worker has sent a heartbeat."""
        return replace(self, **seen_in(heartbeat, now))

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


def seen_in(heartbeat: Heartbeat, now: float) -> dict[str, Any]:
    """What a heartbeat says of its worker, as fields of its view."""
    return {
        "heard_at": now,
        "spoke": True,
        "phase": heartbeat.phase,
        "phase_since": now - heartbeat.phase_age_s,
        "step": heartbeat.step,
        "epoch": heartbeat.epoch,
        "batch": heartbeat.batch,
        "longest_s": heartbeat.longest_s,
        "heartbeat": heartbeat,
    }


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


class WorkerTable(Sequence[WorkerView]):
    """All workers of a group, by ascending number; immutable.

    With thousands of them no message may cost a look at each, or a copy of all. A worker is found by its number, they lie in
    blocks of which a change copies one, and `Standing` stays known while heartbeats and replies come in, which do not change it.

    Args:
        views: by ascending number.
    """

    __slots__ = ("_blocks", "_size", "_standing")

    def __init__(self, views: Iterable[WorkerView] = ()) -> None:
        every = tuple(views)
        self._blocks = tuple(every[first : first + BLOCK] for first in range(0, len(every), BLOCK))
        self._size = len(every)
        self._standing: Standing | None = None

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[WorkerView]:
        return chain.from_iterable(self._blocks)

    @overload
    def __getitem__(self, place: int) -> WorkerView: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[WorkerView, ...]: ...

    def __getitem__(self, place: int | slice) -> WorkerView | tuple[WorkerView, ...]:
        if isinstance(place, slice):
            return tuple(self)[place]
        block, rest = divmod(range(self._size)[place], BLOCK)
        return self._blocks[block][rest]

    def __eq__(self, other: object) -> bool:
        return self._blocks == other._blocks if isinstance(other, WorkerTable) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._blocks)

    def __repr__(self) -> str:
        return f"WorkerTable({list(self)!r})"

    @property
    def standing(self) -> Standing:
        """Worked out when it is asked for first."""
        if self._standing is None:
            self._standing = Standing.of(self)
        return self._standing

    def find(self, worker: int) -> WorkerView | None:
        """A worker by its number."""
        place = self._place(worker)
        view = self[place] if place < self._size else None
        return view if view is not None and view.worker == worker else None

    def see(self, worker: int, changes: Mapping[str, Any]) -> WorkerTable:
        """The table with something new about one of its workers."""
        number, rest = divmod(self._place(worker), BLOCK)
        block = list(self._blocks[number])
        before, after = block[rest], replace(block[rest], **changes)
        block[rest] = after
        blocks = list(self._blocks)
        blocks[number] = tuple(block)
        table = WorkerTable()
        table._blocks, table._size = tuple(blocks), self._size
        if (before.ranks, before.lost, before.leaving_by) == (after.ranks, after.lost, after.leaving_by):
            table._standing = self._standing
        return table

    def changed_since(self, before: WorkerTable) -> list[tuple[WorkerView, WorkerView]] | None:
        """The workers of which something new is known, as they were and are; None: they are not the same workers."""
        if self._size != before._size:
            return None
        found: list[tuple[WorkerView, WorkerView]] = []
        for old, new in zip(before._blocks, self._blocks, strict=True):
            if old is not new:
                found += ((was, now) for was, now in zip(old, new, strict=True) if was is not now)
        return found if all(was.worker == now.worker for was, now in found) else None

    def _place(self, worker: int) -> int:
        number = max(0, bisect_right(self._blocks, worker, key=_first_number) - 1)
        return number * BLOCK + (bisect_left(self._blocks[number], worker, key=_number) if self._blocks else 0)


def _first_number(block: tuple[WorkerView, ...]) -> int:
    return block[0].worker


def _number(view: WorkerView) -> int:
    return view.worker
