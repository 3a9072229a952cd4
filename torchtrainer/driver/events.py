"""Events that the driver's machine gets besides messages, and the actions that it asks for. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchtrainer.control.messages import Reply
from torchtrainer.control.wire import Message
from torchtrainer.driver.causes import Cause, LoaderDied, WorkerLost
from torchtrainer.driver.stragglers import Straggler

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
class ResizeRequested:
    """This many processes are to carry the ranks from now on; see `policies.why_not_resize`."""

    processes: int


@dataclass(frozen=True, kw_only=True)
class EndRequested:
    """The user wants no more of the group; ``force``: do not wait for the workers to clean up."""

    force: bool = False


@dataclass(frozen=True, kw_only=True)
class HostLost:
    """The host process is gone, and with it every process of the group."""

    text: str


Event = Message | Tick | CallRequested | StopRequested | SaveRequested | ResizeRequested | EndRequested | HostLost

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
    """The running call, or the start, failed.

    Attributes:
        cause: why.
        usable: the group still takes calls.
        retry: a new group may continue from the newest snapshot or checkpoint.
        why: it was not recovered in place; empty for what never is.
    """

    cause: Cause
    usable: bool
    retry: bool = False
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """The unfinished work of a lost worker, or of a loader process, is done.

    Attributes:
        worker, ranks: that were lost, or whose loader's process was.
        cause: how.
        step: optimizer steps that were completed when it was lost, as far as was known.
        redone: shares of a step that were computed once more.
        seconds: from the loss to this.
        how: other workers carry the ranks, or a new one does; or a loader's batches were fetched again.
    """

    worker: int
    ranks: tuple[int, ...]
    cause: WorkerLost | LoaderDied
    step: int
    redone: int
    seconds: float
    how: Literal["carried", "replaced", "refetched"]


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A new worker has taken over ranks."""

    worker: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Resized:
    """This many processes carry the ranks now: as many as requested, or as were available."""

    processes: int


@dataclass(frozen=True, kw_only=True)
class ReplacingStopped:
    """No more workers are built for this group, which continues with those it has.

    Attributes:
        tries: how many in a row could not be built, or did not join.
        cause: of the latest one; None: the state could not be shared with it, for ``why``.
    """

    tries: int
    cause: Cause | None
    why: str = ""


Report = Recovered | Joined | Resized | ReplacingStopped | Straggler
"""Events that are worth telling but change nothing for whoever waits for a call."""
Action = Send | Returned | Raised | Report
