"""Which worker hangs, and how long it may go without progress. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torchtrainer.driver.views import EXCHANGING, WorkerView

HANG_FLOOR_S = 120.0
"""Lower bound of the learnt limit for a worker that still sends heartbeats: disks have bad moments."""
MUTE_FLOOR_S = 30.0
"""The same for a worker that sends none: it was stopped, or native code blocks it."""
MUTE_AFTER_S = 5.0
"""A worker is mute when its last heartbeat is older than this."""
HANG_STEPS = 30
"""The learnt limit is this many times the longest recent step."""
STEP_PHASES = frozenset({"data", "forward", "step", *EXCHANGING})
"""The phases of a step, whose duration is learnt; others (set-up, hooks around a pass, a save) take their time."""


def limit_s(view: WorkerView, longest_s: float, given_s: float, *, learnt: bool, mute: bool = False) -> float:
    """How long a worker may go without progress.

    Args:
        view: of the worker.
        mute: it is not heard of.
        longest_s: the longest recent step of any worker; 0.0: not known yet.
        given_s: the limit where none can be learnt.
        learnt: whether step times count; else ``given_s`` always holds.
    """
    if not learnt or not longest_s or not view.longest_s or view.phase not in STEP_PHASES or not view.batch:
        return given_s
    return min(given_s, max(MUTE_FLOOR_S if mute else HANG_FLOOR_S, HANG_STEPS * longest_s))


def find_hung(
    views: Iterable[WorkerView],
    now: float,
    given_s: float,
    *,
    learnt: bool = False,
    paused: Collection[int] = (),
    excused: bool = False,
) -> tuple[WorkerView, float] | None:
    """Finds the worker that holds the others up, once it has shown no progress for too long.

    In an exchange every worker looks hung, so one that is heard of while it waits there, or holds at a boundary, is not it. Of
    the others that are over their limit it is the one at the lowest step and batch, among equals the one that entered its phase
    first. If all wait, the same order tells which of them is furthest behind.

    Args:
        views: of the workers that carry ranks.
        now: monotonic seconds.
        given_s, learnt: see `limit_s`.
        paused: workers that wait at a boundary for the driver's word.
        excused: some rank has no carrier, so that there is somebody to wait for.

    Returns:
        The worker and its limit in seconds.
    """
    busy = [view for view in views if view.busy and view.spoke and view.worker not in paused]
    longest_s = max((view.longest_s for view in busy), default=0.0)
    limits = {
        view.worker: limit_s(view, longest_s, given_s, learnt=learnt, mute=now - view.heard_at > MUTE_AFTER_S)
        for view in busy
    }
    over = [view for view in busy if is_silent(view, limits[view.worker], now)]
    mute = [view for view in over if now - view.heard_at > limits[view.worker]]
    working = [view for view in busy if view.phase not in EXCHANGING or view in mute]
    guilty = [view for view in over if view in working]
    if not working and not paused and not excused:
        guilty = over  # all wait, for each other: something inside the exchange is broken
    if not guilty:
        return None
    hung = min(guilty, key=lambda view: (view.step, view.batch, view.phase_since))
    return hung, limits[hung.worker]


def is_silent(view: WorkerView, limit_s: float, now: float) -> bool:
    """Whether a worker has shown no progress for longer than its limit.

    Its own heartbeat has to say so. Until the next one comes it may have entered another phase, a wait for others for instance;
    only one that sends none any more is judged without.
    """
    unheard_s = now - view.heard_at
    return view.heard_at - view.phase_since > limit_s or unheard_s > max(limit_s, MUTE_AFTER_S)


def silent_s(view: WorkerView, now: float) -> float:
    """Seconds since the worker last showed progress: entered a phase, or, when it is silent, was heard of."""
    return now - min(view.phase_since, view.heard_at)
