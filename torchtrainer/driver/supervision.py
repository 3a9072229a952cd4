"""What the driver notices by the clock: workers that do not come, hang, are slow, or do not go. Pure, like the machine.

A worker that hangs is asked for its stacks, then killed; what follows is what follows any death. Where it cannot be replaced, the
whole group is killed.
"""

# ruff: noqa: ARG001 - functions that take events, or follow each other, share their signature

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torchtrainer.control.messages import DumpStacks, KillWorker, Stacks
from torchtrainer.driver.agreement import ask, save_is_due
from torchtrainer.driver.calling import settle
from torchtrainer.driver.causes import StartTimedOut, WorkerHung
from torchtrainer.driver.ending import close, kill
from torchtrainer.driver.events import Action, Send, Tick
from torchtrainer.driver.hangs import find_hung, is_silent, silent_s
from torchtrainer.driver.policies import STEPPING_METHODS
from torchtrainer.driver.reassign import release_late
from torchtrainer.driver.recovery import lose_for_good, lose_newcomer, may_retry
from torchtrainer.driver.states import (
    Calling,
    Diagnosis,
    Ending,
    Idle,
    Killing,
    Machine,
    PendingKill,
    Result,
    Starting,
    in_turn,
)
from torchtrainer.driver.stragglers import find_straggler
from torchtrainer.driver.views import WorkerTable, WorkerView

DRIVER_GAP_S = 5.0
"""When the driver looks so much later than before, it was stopped itself, or its machine: no worker is blamed for that time."""


def on_tick(machine: Machine, event: Tick, now: float) -> Result:
    """Sent at least a few times a second while the user waits."""
    machine = _forgive_own_absence(machine, now)
    state = machine.state
    if isinstance(state, Ending | Killing):
        return _end_late(machine, state, now)
    if isinstance(state, Starting | Calling) and state.settle_at is not None:
        return settle(machine, now) if now >= state.settle_at else (machine, ())
    checks = (_save_if_due, _check_start, _check_newcomers, _end_diagnosis, _check_pending_kills, _check_progress)
    return in_turn(machine, now, *checks, release_late, _check_sharing, _check_leavers, _tell_straggler)


def on_stacks(machine: Machine, event: Stacks, now: float) -> Result:
    """Sent with the Python stacks of a worker, after they were asked for."""
    diagnosis = machine.diagnosis
    if diagnosis is None or event.worker != diagnosis.worker:
        return machine, ()
    return _condemn(machine, replace(diagnosis.cause, stacks=event.text), event.worker, now)


# The driver itself


def _forgive_own_absence(machine: Machine, now: float) -> Machine:
    gap_s = now - machine.ticked_at
    machine = replace(machine, ticked_at=now)
    if gap_s <= DRIVER_GAP_S:
        return machine
    views = WorkerTable(
        replace(v, heard_at=min(now, v.heard_at + gap_s), phase_since=min(now, v.phase_since + gap_s))
        for v in machine.views
    )
    return replace(machine, views=views)


def _save_if_due(machine: Machine, now: float) -> Result:
    state = machine.state
    if not isinstance(state, Calling) or not save_is_due(machine, state, now):
        return machine, ()
    return ask(machine, replace(state, save=True), now)


# Workers that do not come, or do not go


def _check_start(machine: Machine, now: float) -> Result:
    if not isinstance(machine.state, Starting):
        return machine, ()
    late = late_start(machine, machine.views, now)
    return (machine, ()) if late is None else kill(machine, late, now)


def late_start(machine: Machine, views: Iterable[WorkerView], now: float) -> StartTimedOut | None:
    """Whether workers that are being built did not come to be, or do not report, in time."""
    limits = machine.timeouts
    unborn = [view for view in views if not view.pid]
    if unborn and max(now - view.phase_since for view in unborn) > limits.engine_start_s:
        ranks = tuple(view.rank for view in unborn)
        return StartTimedOut(ranks=ranks, setting="engine_start_s", limit_s=limits.engine_start_s)
    mute = [view for view in views if view.pid and not view.spoke and view.busy]
    if mute and max(now - view.heard_at for view in mute) > limits.worker_connect_s:
        ranks = tuple(view.rank for view in mute)
        return StartTimedOut(ranks=ranks, setting="worker_connect_s", limit_s=limits.worker_connect_s)
    return None


def _check_newcomers(machine: Machine, now: float) -> Result:
    """A newcomer that does not come, or hangs while it is built, is given up."""
    actions: tuple[Action, ...] = ()
    for view in machine.newcomers:
        if view.ready or not isinstance(machine.state, Idle | Calling):
            continue
        cause: StartTimedOut | WorkerHung | None = late_start(machine, (view,), now)
        if cause is None and view.spoke and is_silent(view, machine.hang_timeout_s, now):
            cause = _hung(view, machine.hang_timeout_s, now)
        if cause is not None:
            machine, lost = lose_newcomer(machine, view, cause, now)
            actions += (Send(message=KillWorker(group=machine.group, worker=view.worker)), *lost)
    return machine, actions


def _check_leavers(machine: Machine, now: float) -> Result:
    late = [v.worker for v in machine.views if v.leaving_by is not None and now >= v.leaving_by]
    for worker in late:
        machine = machine.without(worker)
    return machine, tuple(Send(message=KillWorker(group=machine.group, worker=worker)) for worker in late)


def _end_late(machine: Machine, state: Ending | Killing, now: float) -> Result:
    if now < state.until:
        return machine, ()
    if isinstance(state, Ending):
        return kill(machine, None, now)
    return close(machine, state.cause, retry=state.retry, why=state.why)


# Workers that hang


def _check_progress(machine: Machine, now: float) -> Result:
    state = machine.state
    if machine.diagnosis is not None or machine.pending_kills or isinstance(state, Idle):
        return machine, ()
    if isinstance(state, Calling) and state.method not in STEPPING_METHODS:
        return machine, ()  # a user's function may take as long as it likes
    paused: frozenset[int] = frozenset()
    if isinstance(state, Calling):
        paused = frozenset(state.boundaries or ()) if state.deciding else frozenset()
        paused |= machine.move.paused if machine.move is not None else frozenset()
    found = find_hung(
        machine.carriers,
        now,
        machine.hang_timeout_s,
        learnt=isinstance(state, Calling) and machine.failure.hang_timeout_s == "auto",
        paused=paused,
        excused=bool(machine.uncarried),
    )
    if found is None:
        return machine, ()
    view, limit_s = found
    until = now + machine.timeouts.stack_dump_s
    diagnosis = Diagnosis(worker=view.worker, cause=_hung(view, limit_s, now), until=until)
    return replace(machine, diagnosis=diagnosis), (Send(message=DumpStacks(group=machine.group)),)


def _hung(view: WorkerView, limit_s: float, now: float) -> WorkerHung:
    return WorkerHung(
        ranks=view.ranks or (view.like,),
        pid=view.pid,
        machine=view.machine,
        phase=view.phase,
        step=view.step,
        silent_s=silent_s(view, now),
        limit_s=limit_s,
    )


def _end_diagnosis(machine: Machine, now: float) -> Result:
    diagnosis = machine.diagnosis
    if diagnosis is None or now < diagnosis.until:
        return machine, ()
    return _condemn(machine, diagnosis.cause, diagnosis.worker, now)


def _condemn(machine: Machine, cause: WorkerHung, worker: int, now: float) -> Result:
    """Kills a worker that hangs, unless it went on meanwhile; the whole group, if it cannot go on without it."""
    machine = replace(machine, diagnosis=None)
    view = machine.view(worker)
    if view is None or not view.ranks or silent_s(view, now) < cause.silent_s:
        return machine, ()
    if isinstance(machine.state, Starting):
        return kill(machine, cause, now)
    if not machine.recovers:
        return lose_for_good(machine, cause, now)
    pending_kills = PendingKill(worker=worker, cause=cause, until=now + machine.timeouts.cleanup_s)
    machine = replace(machine, pending_kills=(*machine.pending_kills, pending_kills))
    return machine, (Send(message=KillWorker(group=machine.group, worker=worker)),)


def _check_pending_kills(machine: Machine, now: float) -> Result:
    """A process that even a kill does not end, such as one that waits for a broken disk, takes the group with it."""
    late = next((one for one in machine.pending_kills if now >= one.until), None)
    if late is None:
        return machine, ()
    return kill(machine, late.cause, now, retry=may_retry(machine, late.cause), why="it could not be killed by itself")


def _check_sharing(machine: Machine, now: float) -> Result:
    """A worker that has nothing else to do and yet does not share its state, or does not join, hangs."""
    move, limit_s = machine.move, machine.timeouts.pause_s
    if machine.pending_kills or (move is not None and move.pause):
        return machine, ()
    sharing = [v for v in machine.carriers if move is not None and v.worker == move.sharer and now >= move.until]
    joining = [view for view in machine.carriers if view.reading]
    late = [view for view in (*sharing, *joining) if not view.busy and now - view.phase_since >= limit_s]
    if not late:
        return machine, ()
    return _condemn(machine, _hung(late[0], limit_s, now), late[0].worker, now)


# Workers that are slow


def _tell_straggler(machine: Machine, now: float) -> Result:
    state = machine.state
    if not isinstance(state, Calling) or state.method not in STEPPING_METHODS:
        return machine, ()
    found = find_straggler(machine.carriers)
    if found is None or found.worker in state.slow:
        return machine, ()
    return machine.to(replace(state, slow=state.slow | {found.worker})), (found,)
