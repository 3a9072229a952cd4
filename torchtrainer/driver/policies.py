"""Decides how to react to what happened. Pure: values in, values out; the reason for a decision is part of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from torchtrainer.control.messages import Failure
from torchtrainer.driver.causes import UserCodeFailed, WorkerDied, WorkerLost

MIN_SAVE_EVERY_S = 10.0
"""Shortest time between two checkpoints where it depends on their cost."""
STEPPING_METHODS = frozenset({"train", "validate"})
"""Calls that draw batches: they can be ended at a step boundary, and a rank that fails in one leaves the others waiting."""

MAX_SAVING_SHARE = 0.01
"""Largest share of the time that checkpoints may stop training, where their number depends on their cost."""


def save_interval_s(stall_s: float, write_s: float) -> float:
    """Seconds between two checkpoints that cost no more than a hundredth, and of which only one is being written.

    Args:
        stall_s: how long training stood still for the latest one.
        write_s: how long it was being written.
    """
    return max(MIN_SAVE_EVERY_S, stall_s / MAX_SAVING_SHARE, 2 * write_s)


class RecoveryAction(Enum):
    """What happens to ranks whose worker is lost."""

    ADOPT = "other workers carry them"
    WAIT = "the others wait for a replacement"
    RESTART = "a new group starts from the newest checkpoint"
    FAIL = "the run ends with the error"


@dataclass(frozen=True, kw_only=True)
class RecoveryDecision:
    """What happens, and why; the reason becomes part of the error, if there is one."""

    action: RecoveryAction
    reason: str


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a recovery depends on.

    Attributes:
        failures: in a row without a new optimizer step, this one included.
        max_failures: so many are allowed; see `FailureConfig`.
        lost_for_good: why the state of a lost worker is gone with it; empty: others can reproduce it.
        bound: why a worker can carry only the rank that it was built for; empty: it can carry any.
        carriers: living workers that carry ranks.
        min_workers: with fewer, ranks are not adopted.
        replacement_comes: enough workers are being built, or may be, to end a wait.
    """

    failures: int
    max_failures: int
    lost_for_good: str
    bound: str
    carriers: int
    min_workers: int
    replacement_comes: bool


def decide_recovery(at: Situation) -> RecoveryDecision:
    """What happens to the ranks of lost workers; the first line that applies decides."""
    if at.failures > at.max_failures:
        allowed = {0: "no failure", 1: "1 failure"}.get(at.max_failures, f"{at.max_failures} failures")
        reason = f"FailureConfig(max_failures={at.max_failures}) allows {allowed}"
        return RecoveryDecision(action=RecoveryAction.FAIL, reason=reason)
    if at.lost_for_good:
        return RecoveryDecision(action=RecoveryAction.RESTART, reason=at.lost_for_good)
    if not at.carriers:
        return RecoveryDecision(action=RecoveryAction.RESTART, reason="no worker was left that has the state")
    few = f"{at.carriers} workers are left, and min_workers={at.min_workers}" if at.carriers < at.min_workers else ""
    why_wait = at.bound or few
    if why_wait and at.replacement_comes:
        return RecoveryDecision(action=RecoveryAction.WAIT, reason=why_wait)
    if why_wait:
        return RecoveryDecision(
            action=RecoveryAction.RESTART, reason="a replacement is needed, and none could be built"
        )
    return RecoveryDecision(action=RecoveryAction.ADOPT, reason="any worker can carry any rank")


def root_cause(
    failures: tuple[Failure, ...], deaths: tuple[WorkerLost, ...], *, connected: bool = True
) -> UserCodeFailed | WorkerLost:
    """Tells the failure that the others followed from.

    A process that died without a word takes its connections with it, so that its peers raise too: the death is the cause.
    A rank that left by ``sys.exit`` likewise. Otherwise the first exception to arrive is it.

    Args:
        failures, deaths: in order of arrival.
        connected: ranks have connections to each other that a death breaks.
    """
    leaving = next((failure for failure in failures if failure.kind == "exit"), None)
    if leaving is not None:
        death = next((d for d in deaths if leaving.rank in d.ranks), None)
        return WorkerDied(
            ranks=(leaving.rank,),
            pid=death.pid if death else 0,
            machine=death.machine if death else "",
            exit_code=leaving.exit_code or 0,
            phase=leaving.phase,
            step=leaving.step,
            failure=leaving,
        )
    spoken = {failure.rank for failure in failures}
    silent = [death for death in deaths if spoken.isdisjoint(death.ranks)]
    if not silent or (failures and not connected):
        return UserCodeFailed(failures=failures)
    # Ranks step together: what the others say of the step is newer than the last heartbeat of the one that is gone.
    return replace(silent[0], step=max(silent[0].step, *(failure.step for failure in failures), 0))


def survives_failure(method: str, all_ranks_reported: bool) -> bool:
    """Whether a group can go on taking calls after an exception in one: not if its ranks may not agree on the step any more.

    Args:
        method: the call.
        all_ranks_reported: every rank has returned from the call, by a result or by an exception.
    """
    return method != "train" and all_ranks_reported


def why_not_resize(processes: int, *, world_size: int, min_workers: int, bound: str) -> str | None:
    """Says why a group cannot be carried by so many processes; None: it can.

    Args:
        processes: that are wanted.
        world_size: ranks of the group.
        min_workers: fewest processes that the user allows.
        bound: why a process can carry only the rank that it was built for; empty if it can carry any.
    """
    if not 1 <= processes <= world_size:
        return f"{world_size} ranks are carried by 1 to {world_size} processes, got {processes!r}"
    if processes < min_workers:
        return f"min_workers={min_workers} does not allow {processes} processes"
    if bound and processes != world_size:
        return f"every rank needs a process of its own here: {bound}"
    return None


class LostSteps:
    """Counts the steps that are repeated because all ranks were restarted, perhaps after several tries."""

    def __init__(self) -> None:
        self._reached = 0
        self._from: int | None = None
        self._in_vain = 0
        self._going_back = False

    def lost(self, step: int) -> None:
        """The ranks were lost.

        Args:
            step: they had completed so many, or fewer if they were on their way back.
        """
        if not self._going_back:
            self._reached = step
        elif self._from is not None:
            self._in_vain += max(step - self._from, 0)
        self._going_back, self._from = True, None

    def go_on_from(self, step: int) -> None:
        """The ranks are back, with the state of a step."""
        self._from = step

    def count(self) -> int:
        """How many steps are repeated: the ranks are back."""
        found = self._in_vain + max(self._reached - (self._from or 0), 0)
        self._in_vain, self._going_back = 0, False
        return found
