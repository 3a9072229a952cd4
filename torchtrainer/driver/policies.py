"""What to make of what was seen. Pure: values in, values out; the reason for a decision is part of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torchtrainer.control.messages import Failure
from torchtrainer.driver.causes import Cause, UserCodeFailed, WorkerDied

MIN_SAVE_EVERY_S = 10.0
"""Shortest time between two checkpoints where it follows from what they cost."""
STEPPING_METHODS = frozenset({"train", "validate"})
"""Calls that draw batches: they can be ended at a step boundary, and a rank that fails in one leaves the others waiting."""

EXCHANGING = "backward"
"""The phase in which a rank waits for the others."""


MAX_SAVING_SHARE = 0.01
"""Largest part of the time for which training may stand still for checkpoints, where their number follows from that."""


def save_interval_s(stall_s: float, write_s: float) -> float:
    """Seconds between two checkpoints that cost no more than a hundredth, and of which only one is being written.

    Args:
        stall_s: how long training stood still for the latest one.
        write_s: how long it was being written.
    """
    return max(MIN_SAVE_EVERY_S, stall_s / MAX_SAVING_SHARE, 2 * write_s)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """The group can go on taking calls."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Every process of the group has to end; ``reason`` ends in the error."""

    reason: str


def root_cause(failures: tuple[Failure, ...], deaths: tuple[WorkerDied, ...]) -> Cause:
    """Tells the failure that the others followed from.

    A process that died without a word takes its connections with it, so that its peers raise too: the death is the cause.
    A rank that left by ``sys.exit`` likewise. Otherwise the first exception to arrive is it.
    """
    leaving = next((failure for failure in failures if failure.kind == "exit"), None)
    if leaving is not None:
        death = next((d for d in deaths if d.rank == leaving.rank), None)
        return WorkerDied(
            rank=leaving.rank,
            pid=death.pid if death else 0,
            exit_code=leaving.exit_code or 0,
            phase=leaving.phase,
            step=leaving.step,
            failure=leaving,
        )
    spoken = {failure.rank for failure in failures}
    silent = [death for death in deaths if death.rank not in spoken]
    if not silent:
        return UserCodeFailed(failures=failures)
    # Ranks step together: what the others say of the step is newer than the last heartbeat of the one that is gone.
    return replace(silent[0], step=max(silent[0].step, *(failure.step for failure in failures), 0))


def after_failure(method: str, all_ranks_reported: bool) -> Keep | Stop:
    """Decides whether a group survives an exception in a call.

    Args:
        method: the call.
        all_ranks_reported: every rank has returned from the call, by a result or by an exception.
    """
    if method == "train":
        return Stop(reason="a rank failed inside train(), so that the ranks may not agree on the step any more")
    if not all_ranks_reported:
        return Stop(reason="some ranks wait for a rank that failed")
    return Keep()


@dataclass(frozen=True, kw_only=True)
class RankView:
    """What is known of a rank, from its heartbeats.

    Attributes:
        pid: 0 before the process exists.
        phase, phase_since: what its training thread does, and since when (monotonic).
        heard_at: when it was heard of last (monotonic).
        spoke: it has sent a heartbeat.
        busy: it is being built, or has not answered the running call.
    """

    rank: int
    pid: int = 0
    phase: str = "start"
    phase_since: float = 0.0
    heard_at: float = 0.0
    spoke: bool = False
    busy: bool = True
    step: int = 0
    epoch: int = 0
    batch: int = 0
    device: str = ""
    rss_bytes: int = 0
    cpu_s: float = 0.0


def find_hung(views: Iterable[RankView], limit_s: float, now: float) -> RankView | None:
    """Finds the rank that holds the others up, once any rank has shown no progress for too long.

    In a collective every rank looks hung, and those that wait may be over the limit before the one they wait for, whose
    heartbeats may be older. So of all busy ranks the one at the lowest step and batch is it; among equals one that is not
    exchanging gradients, which is waiting; among those the one that entered its present phase first.
    """
    busy = [view for view in views if view.busy and view.spoke]
    if not any(_silent_s(view, now) > limit_s for view in busy):
        return None
    return min(busy, key=lambda view: (view.step, view.batch, view.phase == EXCHANGING, view.phase_since))


def _silent_s(view: RankView, now: float) -> float:
    """Seconds since the rank last showed progress: entered a phase, or, when it is silent, was heard of."""
    return now - min(view.phase_since, view.heard_at)
