"""Which worker is slower than the others: by the time it works per step, not the time it waits. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from torchtrainer.control.messages import Heartbeat
from torchtrainer.driver.views import PhaseTimes, WorkerView

STRAGGLER_STEPS = 20
"""Number of latest steps over which workers are compared."""
STRAGGLER_FACTOR = 2.0
"""A worker that takes more than this many times as long as the others is a straggler."""
WAITING_PHASES = frozenset({"exchange", "pause", "idle"})
"""Phases in which a worker does no work of its own."""


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A worker that holds the others up, though it gets on.

    Attributes:
        worker, ranks: which one.
        factor: time per step and rank, as a multiple of the median of the others.
        phase: the one in which it loses most.
    """

    worker: int
    ranks: tuple[int, ...]
    factor: float
    phase: str


def with_phase_times(view: WorkerView, heartbeat: Heartbeat) -> tuple[PhaseTimes, ...]:
    """The phase times of a worker with that of a heartbeat; of the earlier ones stay those that span `STRAGGLER_STEPS` steps."""
    if not heartbeat.spent_s or not view.ranks:
        return view.phase_times
    earlier = tuple(times for times in view.phase_times if times.step < heartbeat.step)
    while len(earlier) > 1 and heartbeat.step - earlier[1].step >= STRAGGLER_STEPS:
        earlier = earlier[1:]
    return (*earlier, PhaseTimes(step=heartbeat.step, spent_s=heartbeat.spent_s))


def find_straggler(views: Iterable[WorkerView]) -> Straggler | None:
    """Finds the slowest worker, if it is much slower than the others.

    Args:
        views: of the workers that carry ranks.
    """
    working = {view.worker: view for view in views}
    times = {worker: _per_step(view) for worker, view in working.items()}
    known = {worker: time for worker, time in times.items() if time is not None}
    if len(known) < 2 or len(known) < len(working):
        return None
    slowest = max(known, key=lambda worker: sum(known[worker].values()))
    others = [known[worker] for worker in known if worker != slowest]
    usual_s = median(sum(other.values()) for other in others)
    own_s = sum(known[slowest].values())
    if usual_s <= 0 or own_s <= STRAGGLER_FACTOR * usual_s:
        return None
    mine = known[slowest]
    phase = max(mine, key=lambda name: mine[name] - median(other.get(name, 0.0) for other in others))
    return Straggler(worker=slowest, ranks=working[slowest].ranks, factor=own_s / usual_s, phase=phase)


def _per_step(view: WorkerView) -> dict[str, float] | None:
    """Seconds of work per step and rank in each phase; None: too few steps were seen."""
    if not view.phase_times:
        return None
    first, last = view.phase_times[0], view.phase_times[-1]
    steps = last.step - first.step
    if steps < STRAGGLER_STEPS:
        return None
    return {
        phase: (spent_s - first.spent_s.get(phase, 0.0)) / steps / len(view.ranks)
        for phase, spent_s in last.spent_s.items()
        if phase not in WAITING_PHASES
    }
