"""What the driver's machine is made of: its states, and all that is known of a worker group. Values only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, KeysView, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torchtrainer.config import FailureConfig, Timeouts
from torchtrainer.control.messages import CheckpointEnded, Failure, Reply, StopAt
from torchtrainer.driver.causes import Cause, WorkerHung, WorkerLost
from torchtrainer.driver.events import Action, CallRequested, StopRequested
from torchtrainer.driver.policies import MIN_SAVE_EVERY_S
from torchtrainer.driver.views import WorkerTable, WorkerView

TO_THE_END = 1 << 62
"""A boundary that no pass reaches: go on to the end, since another rank has already got there."""

# States


@dataclass(frozen=True, kw_only=True)
class Starting:
    """Processes come to be and build their ranks."""

    ready: frozenset[int] = frozenset()
    failures: tuple[Failure, ...] = ()
    deaths: tuple[WorkerLost, ...] = ()
    settle_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Every rank waits for a call."""


@dataclass(frozen=True, kw_only=True)
class Calling:
    """Ranks run a call.

    Attributes:
        method, blob: of the call.
        replies: by rank.
        boundaries: where workers pause since a stop, a save or a pause was asked for; None: it never was.
        round: how often that was asked for.
        stop, save, pause: what is asked for.
        decided: workers were told where, in this round.
        orders: what they were told in this and earlier rounds and may not have come to.
        slow: workers that were reported as stragglers.
    """

    method: str
    blob: bytes = b""
    replies: Mapping[int, Reply] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    deaths: tuple[WorkerLost, ...] = ()
    settle_at: float | None = None
    boundaries: Mapping[int, int] | None = None
    round: int = 0
    stop: bool = False
    save: bool = False
    pause: bool = False
    decided: bool = False
    orders: tuple[StopAt, ...] = ()
    slow: frozenset[int] = frozenset()

    @property
    def deciding(self) -> bool:
        """Whether workers are being asked where they are."""
        return self.boundaries is not None and not self.decided

    @property
    def replied(self) -> KeysView[int]:
        """Ranks that have returned from the call."""
        return self.replies.keys()


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Workers clean up and leave."""

    until: float


@dataclass(frozen=True, kw_only=True)
class Killing:
    """Every process of the group is being killed. ``cause``: None if the user wanted it; the rest as in `Raised`."""

    cause: Cause | None
    until: float
    retry: bool = False
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Closed:
    """Nothing is left of the group."""

    cause: Cause | None = None


State = Starting | Idle | Calling | Ending | Killing | Closed

# What goes on beside the states


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A worker hangs; its stacks were asked for before it is killed."""

    worker: int
    cause: WorkerHung
    until: float


@dataclass(frozen=True, kw_only=True)
class PendingKill:
    """A worker is being killed for this cause; it has until then to be gone."""

    worker: int
    cause: WorkerHung
    until: float


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A worker that was lost, until what it had left undone is done.

    Attributes:
        worker, ranks, cause, step, redone: see `Recovered`.
        since: when it was lost (monotonic).
        left: ranks that are not carried yet.
        replaced: a new worker took some of them over.
    """

    worker: int
    ranks: tuple[int, ...]
    cause: WorkerLost
    step: int
    since: float
    left: frozenset[int]
    redone: int = 0
    replaced: bool = False


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many failures there were in a row.

    Attributes:
        failures: since the last progress.
        since: when the latest one began (monotonic).
        step: highest optimizer step at that time.
        progressed: a later step was completed, or a call returned.
    """

    failures: int = 0
    since: float = -math.inf
    step: int = 0
    progressed: bool = False


@dataclass(frozen=True, kw_only=True)
class Move:
    """A change of who carries what that is under way.

    Attributes:
        newcomer: worker that is to join; None: ranks only change places.
        pause: it happens at a step boundary of the running call, at which workers pause; else while they wait anyway.
        boundary: that boundary; None: they do not agree on it yet.
        paused: workers that pause there.
        sharer, number: which worker was asked for its state, and the number of that; None, 0: nobody was.
        takes: the rank that each newcomer takes over from a lost worker, with that state.
        until: when the newcomer, or what holds, has waited long enough (monotonic).
    """

    newcomer: int | None
    pause: bool
    until: float
    boundary: int | None = None
    paused: frozenset[int] = frozenset()
    sharer: int | None = None
    number: int = 0
    takes: Mapping[int, int] = field(default_factory=dict)

    @property
    def pausing(self) -> bool:
        """Whether workers pause, or go to the boundary to pause there."""
        return self.pause and self.boundary is not None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """All that the driver knows of a group.

    Attributes:
        group: its name.
        world_size: ranks.
        timeouts: deadlines of the engine.
        hang_timeout_s: longest time without progress where none is learnt from step times.
        failure: what to do about workers that are lost.
        min_workers: fewer workers than these do not carry all ranks: they wait for a replacement.
        processes: how many workers are to carry the ranks.
        views: the workers that carry ranks, or are to; lost ones as long as nobody carries their ranks.
        next_worker: number of the next process.
        call: number of the latest call; 0 is the start.
        pending, pending_stop: a call that waits until a worker has joined, and a stop that is meant for it.
        facts, record: what worker 0 built, and what ranks said to each other meanwhile.
        losses: workers that were lost and whose work is not done yet.
        budget: failures in a row.
        unbuilt: replacements in a row that could not be built.
        move: change of carriers that is under way.
        shares: how often a worker was asked to share its state.
        resizing: another number of processes was asked for and is not there yet.
        diagnosis, pending_kills: workers that hang, before and while they are killed.
        ticked_at: when the driver looked last.
        save_every_s: seconds between two checkpoints; None: nobody asks for any.
        save_cheaply: ``save_every_s`` follows what checkpoints cost.
        saved_at: when the latest one was asked for.
        ended: the latest checkpoint that was written, or could not be.
    """

    group: str
    world_size: int
    timeouts: Timeouts
    hang_timeout_s: float
    state: State
    views: WorkerTable
    failure: FailureConfig
    min_workers: int
    processes: int
    next_worker: int
    ticked_at: float
    call: int = 0
    pending: CallRequested | None = None
    pending_stop: StopRequested | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    record: list[Any] = field(default_factory=list)
    losses: tuple[Loss, ...] = ()
    budget: Budget = field(default_factory=Budget)
    unbuilt: int = 0
    move: Move | None = None
    shares: int = 0
    resizing: bool = False
    diagnosis: Diagnosis | None = None
    pending_kills: tuple[PendingKill, ...] = ()
    save_every_s: float | None = None
    save_cheaply: bool = False
    saved_at: float = 0.0
    ended: CheckpointEnded | None = None

    @classmethod
    def start(
        cls,
        *,
        group: str,
        world_size: int,
        timeouts: Timeouts,
        hang_timeout_s: float,
        now: float,
        failure: FailureConfig | None = None,
        min_workers: int = 1,
        save_every_s: float | Literal["auto"] | None = None,
    ) -> Machine:
        """A group that was just asked for: one worker per rank."""
        views = WorkerTable(
            WorkerView(worker=r, ranks=(r,), like=r, phase_since=now, heard_at=now) for r in range(world_size)
        )
        return cls(
            group=group,
            world_size=world_size,
            timeouts=timeouts,
            hang_timeout_s=hang_timeout_s,
            state=Starting(),
            views=views,
            failure=failure or FailureConfig(hang_timeout_s=hang_timeout_s),
            min_workers=min_workers,
            processes=world_size,
            next_worker=world_size,
            ticked_at=now,
            save_every_s=MIN_SAVE_EVERY_S if isinstance(save_every_s, str) else save_every_s,
            save_cheaply=save_every_s == "auto",
            saved_at=now,
        )

    def view(self, worker: int) -> WorkerView | None:
        """What is known of a worker; None: it is not of this group any more, or its process is gone."""
        view = self.views.find(worker)
        return view if view is not None and not view.lost else None

    def see(self, worker: int, **changes: Any) -> Machine:
        """The machine with something new about a living worker."""
        return self if self.view(worker) is None else replace(self, views=self.views.see(worker, changes))

    def owing(self, ranks: Iterable[int]) -> bool:
        """Whether any of these ranks has not returned from the running call."""
        return isinstance(self.state, Calling) and not self.state.replied >= set(ranks)

    def without(self, worker: int) -> Machine:
        """The machine without a worker, which has left or never came."""
        return replace(self, views=WorkerTable(v for v in self.views if v.worker != worker))

    def to(self, state: State) -> Machine:
        """The machine in another state."""
        return replace(self, state=state)

    @property
    def at_work(self) -> bool:
        """Whether the group takes calls, or runs one in which nothing has been raised: what is lost then is replaced."""
        return isinstance(self.state, Idle) or (isinstance(self.state, Calling) and self.state.settle_at is None)

    @property
    def carriers(self) -> tuple[WorkerView, ...]:
        """Living workers that carry ranks, by number."""
        return tuple(view for view in self.views if view.carries)

    @property
    def carrier_count(self) -> int:
        """How many `carriers` there are, without a look at each."""
        return self.views.standing.carriers

    @property
    def newcomers(self) -> tuple[WorkerView, ...]:
        """Workers that are being built, or wait to join."""
        return tuple(self.views[place] for place in self.views.standing.newcomers)

    @property
    def uncarried(self) -> tuple[int, ...]:
        """Ranks whose worker is gone and that nobody carries."""
        return self.views.standing.uncarried

    @property
    def awaited(self) -> tuple[int, ...]:
        """Ranks that nobody carries and that others may wait for: inside a call only those that have not returned from it."""
        if not isinstance(self.state, Calling):
            return self.uncarried
        return tuple(rank for rank in self.uncarried if rank not in self.state.replied)

    @property
    def bound(self) -> str:
        """Why a worker can carry only the rank that it was built for; empty: it can carry any."""
        return str(self.facts.get("bound", ""))

    @property
    def replacing(self) -> bool:
        """Whether more workers may be built: the latest ones did not all fail."""
        return self.unbuilt < self.tries

    @property
    def tries(self) -> int:
        """How many workers in a row may fail to be built."""
        return max(1, self.failure.max_failures)

    @property
    def able(self) -> tuple[WorkerView, ...]:
        """Carriers that are not being killed."""
        doomed = {one.worker for one in self.pending_kills}
        return tuple(view for view in self.carriers if view.worker not in doomed)

    @property
    def recovers(self) -> bool:
        """Whether a lost worker can be replaced while the others keep their memory."""
        return bool(self.facts.get("recovers", False))


Result = tuple[Machine, tuple[Action, ...]]


def in_turn(machine: Machine, now: float, *steps: Callable[[Machine, float], Result]) -> Result:
    """Takes one step after the other, each on what the one before left, as long as the group lives."""
    done: tuple[Action, ...] = ()
    for step in steps:
        if not isinstance(machine.state, Starting | Idle | Calling):
            break
        machine, actions = step(machine, now)
        done += actions
    return machine, done
