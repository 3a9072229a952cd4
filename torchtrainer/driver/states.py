"""What the driver's machine is made of: events, actions, states, and all that is known of a worker group. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torchtrainer.config import Timeouts
from torchtrainer.control.messages import CheckpointEnded, Failure, Reply
from torchtrainer.control.wire import Message
from torchtrainer.driver.causes import Cause, WorkerDied, WorkerHung
from torchtrainer.driver.policies import MIN_SAVE_EVERY_S, RankView

TO_THE_END = 1 << 62
"""A boundary that no pass reaches: go on to the end, since another rank has already got there."""

# Events that are not messages


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, kw_only=True)
class CallRequested:
    """The user calls a method on every rank."""

    method: str
    blob: bytes


@dataclass(frozen=True, kw_only=True)
class StopRequested:
    """The running call is to end early.

    Attributes:
        signum: interrupts calls that have no step boundary; None: those go on to their end.
        save: the state is saved where the call ends.
    """

    signum: int | None
    save: bool = False


@dataclass(frozen=True, kw_only=True)
class SaveRequested:
    """The state is to be saved at the next step boundary of the running call."""


@dataclass(frozen=True, kw_only=True)
class EndRequested:
    """The user wants no more of the group; ``force``: do not wait for the workers to clean up."""

    force: bool = False


@dataclass(frozen=True, kw_only=True)
class HostLost:
    """The host process is gone, and with it every process of the group."""

    text: str


Event = Message | Tick | CallRequested | StopRequested | SaveRequested | EndRequested | HostLost

# Actions


@dataclass(frozen=True, kw_only=True)
class Send:
    """Send a message to the host."""

    message: Message


@dataclass(frozen=True, kw_only=True)
class Returned:
    """The running call, or the start (call 0), is done: replies by rank."""

    call: int
    replies: tuple[Reply, ...]


@dataclass(frozen=True, kw_only=True)
class Raised:
    """The running call, or the start, failed. ``usable``: the group still takes calls."""

    cause: Cause
    usable: bool


Action = Send | Returned | Raised

# States


@dataclass(frozen=True, kw_only=True)
class Starting:
    """Processes come to be and build their ranks."""

    since: float
    ready: frozenset[int] = frozenset()
    failures: tuple[Failure, ...] = ()
    deaths: tuple[WorkerDied, ...] = ()
    settle_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Every rank waits for a call."""


@dataclass(frozen=True, kw_only=True)
class Calling:
    """Ranks run a call.

    Attributes:
        boundaries: where ranks hold since a stop, or a save, was asked for; None: it was not, or it is done.
        round: how often that was asked for.
        stop, save: what was asked for.
        decided: ranks were told where.
    """

    method: str
    replies: tuple[Reply, ...] = ()
    failures: tuple[Failure, ...] = ()
    deaths: tuple[WorkerDied, ...] = ()
    settle_at: float | None = None
    boundaries: dict[int, int] | None = None
    round: int = 0
    stop: bool = False
    save: bool = False
    decided: bool = False


@dataclass(frozen=True, kw_only=True)
class Diagnosing:
    """A rank hangs; its stacks were asked for before it is killed."""

    cause: WorkerHung
    until: float


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Ranks clean up and leave."""

    until: float


@dataclass(frozen=True, kw_only=True)
class Killing:
    """Every process of the group is being killed. ``cause``: None if the user wanted it."""

    cause: Cause | None
    until: float


@dataclass(frozen=True, kw_only=True)
class Closed:
    """Nothing is left of the group."""

    cause: Cause | None = None


State = Starting | Idle | Calling | Diagnosing | Ending | Killing | Closed


@dataclass(frozen=True, kw_only=True)
class Machine:
    """All that the driver knows of a group.

    Attributes:
        group: its name.
        world_size: ranks.
        timeouts: deadlines of the engine.
        hang_timeout_s: longest time without progress while building or stepping.
        call: number of the latest call; 0 is the start.
        facts: what rank 0 built.
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
    views: tuple[RankView, ...]
    call: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
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
        save_every_s: float | Literal["auto"] | None = None,
    ) -> Machine:
        """A group that was just asked for."""
        cheaply = save_every_s == "auto"
        views = tuple(RankView(rank=r, phase_since=now, heard_at=now) for r in range(world_size))
        return cls(
            group=group,
            world_size=world_size,
            timeouts=timeouts,
            hang_timeout_s=hang_timeout_s,
            state=Starting(since=now),
            views=views,
            save_every_s=MIN_SAVE_EVERY_S if isinstance(save_every_s, str) else save_every_s,
            save_cheaply=cheaply,
            saved_at=now,
        )

    def see(self, rank: int, **changes: Any) -> Machine:
        """The machine with something new about a rank."""
        views = tuple(replace(v, **changes) if v.rank == rank else v for v in self.views)
        return replace(self, views=views)

    def to(self, state: State) -> Machine:
        """The machine in another state."""
        return replace(self, state=state)
