"""A call, from the user's wish to its outcome: one result per rank, or an error. Pure, like the machine.

A call is done when every rank has replied, whichever worker carries it by then. What user code raises is never tried again.
"""

# ruff: noqa: ARG001 - functions that take events, or follow each other, share their signature

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchtrainer.control.messages import Boundary, Call, Failure, KillWorker, Reply, SignalWorkers
from torchtrainer.driver.agreement import ask
from torchtrainer.driver.causes import UserCodeFailed, WorkerLost
from torchtrainer.driver.ending import kill
from torchtrainer.driver.events import Action, CallRequested, Raised, Returned, SaveRequested, Send, StopRequested
from torchtrainer.driver.policies import STEPPING_METHODS, root_cause, survives_failure
from torchtrainer.driver.recovery import done, lose_newcomer, may_retry, note_step
from torchtrainer.driver.states import Calling, Idle, Machine, Result, Starting
from torchtrainer.driver.views import WorkerTable

NOT_IN_PLACE = "the ranks exchange data in ways that break when one of them is lost"

# What the user wants


def on_call_requested(machine: Machine, event: CallRequested, now: float) -> Result:
    """Sent when the user calls something and the group is idle. It waits while a worker joins."""
    assert isinstance(machine.state, Idle), machine.state
    assert machine.pending is None, machine.pending
    return replace(machine, pending=event), ()


def start_pending(machine: Machine, now: float) -> Result:
    """Starts the pending call, if all ranks have a carrier and nobody is about to join."""
    call = machine.pending
    if call is None or not isinstance(machine.state, Idle) or machine.move is not None or machine.uncarried:
        return machine, ()
    number = machine.call + 1
    views = WorkerTable(
        replace(v, busy=True, phase=call.method, phase_since=now, heard_at=now, phase_times=()) if v.carries else v
        for v in machine.views
    )
    state = Calling(method=call.method, blob=call.blob)
    stop = machine.pending_stop
    machine = replace(machine, call=number, views=views, state=state, pending=None, pending_stop=None)
    calls = tuple(
        Send(message=Call(group=machine.group, worker=v.worker, call=number, method=call.method, blob=call.blob))
        for v in sorted(machine.carriers, key=lambda v: v.worker)
    )
    if stop is None:
        return machine, calls
    machine, more = on_stop_requested(machine, stop, now)
    return machine, (*calls, *more)


def on_stop_requested(machine: Machine, event: StopRequested, now: float) -> Result:
    """Sent when the user interrupts a call. One that has not begun yet then never does."""
    state = machine.state
    if machine.pending is not None:
        return replace(machine, pending=None if event.signum is not None else machine.pending, pending_stop=event), ()
    if not isinstance(state, Calling) or state.stop:
        return machine, ()
    if state.method not in STEPPING_METHODS:
        if event.signum is None:
            return machine, ()
        return machine, (Send(message=SignalWorkers(group=machine.group, signum=event.signum)),)
    return ask(machine, replace(state, stop=True, save=state.save or event.save), now)


def on_save_requested(machine: Machine, event: SaveRequested, now: float) -> Result:
    """Sent when the user's machine may go soon."""
    state = machine.state
    if not isinstance(state, Calling) or state.method not in STEPPING_METHODS or state.stop:
        return machine, ()
    return ask(machine, replace(state, save=True), now)


# What workers say


def on_reply(machine: Machine, event: Reply, now: float) -> Result:
    """Sent when a call has returned for a rank."""
    state, view = machine.state, machine.view(event.worker)
    if view is None or not isinstance(state, Calling) or event.call != machine.call or event.rank in state.replied:
        return machine, ()
    machine = machine.to(replace(state, replies={**state.replies, event.rank: event}))
    seen: dict[str, Any] = {"reading": False, "step": event.step, "epoch": event.epoch, "heard_at": now}
    if not machine.owing(view.ranks):
        seen |= {"busy": False, "phase": "idle", "phase_since": now}
    machine = note_step(machine.see(event.worker, **seen), event.step)
    machine, recovered = done(machine, [event.rank], now)
    machine, actions = settle_if_all_reported(machine, now)
    return machine, (*recovered, *actions)


def on_failure(machine: Machine, event: Failure, now: float) -> Result:
    """Sent when user code raised on a rank. The others get a moment to say the same."""
    state, view = machine.state, machine.view(event.worker)
    if view is not None and view.newcomer and isinstance(state, Idle | Calling):
        return _newcomer_failed(machine, event, now)
    if not isinstance(state, Starting | Calling) or event.call != machine.call:
        return machine, ()
    lost = [loss for loss in machine.losses if loss.worker != event.worker]
    if machine.bound and lost and view is not None and event.kind == "error":
        why = f"rank {event.rank} raised {event.type_name} when it was gone: they exchange data in ways of their own"
        return kill(machine, lost[0].cause, now, retry=True, why=why)
    machine = machine.see(event.worker, busy=False)
    machine = machine.to(replace(state, failures=(*state.failures, event), settle_at=settle_at(machine, now)))
    return settle_if_all_reported(machine, now)


def _newcomer_failed(machine: Machine, event: Failure, now: float) -> Result:
    view = machine.view(event.worker)
    assert view is not None
    machine, actions = lose_newcomer(machine, view, root_cause((event,), ()), now)
    return machine, (Send(message=KillWorker(group=machine.group, worker=event.worker)), *actions)


def on_boundary(machine: Machine, event: Boundary, now: float) -> Result:
    """Sent when a worker holds at a step boundary because it was asked to."""
    state = machine.state
    if not isinstance(state, Calling) or event.call != machine.call or event.round != state.round:
        return machine, ()
    if not state.deciding or state.boundaries is None or machine.view(event.worker) is None:
        return machine, ()
    return machine.to(replace(state, boundaries={**state.boundaries, event.worker: event.boundary})), ()


# The outcome


def lose_in_failed_call(machine: Machine, death: WorkerLost, worker: int, now: float) -> Result:
    """A worker is gone while others fail, or from a group that cannot recover: it counts with what the others say."""
    state = machine.state
    assert isinstance(state, Starting | Calling)
    machine = machine.see(worker, phase="gone", busy=False, lost=True)
    machine = machine.to(replace(state, deaths=(*state.deaths, death), settle_at=settle_at(machine, now)))
    return settle_if_all_reported(machine, now)


def settle_at(machine: Machine, now: float) -> float:
    """When the ranks that have not failed yet were given long enough to do so too."""
    state = machine.state
    assert isinstance(state, Starting | Calling)
    return state.settle_at if state.settle_at is not None else now + machine.timeouts.error_gather_s


def settle_if_all_reported(machine: Machine, now: float) -> Result:
    """Ends the call, or the start, if every rank has said how it went or is gone."""
    return settle(machine, now) if _all_reported(machine) else (machine, ())


def settle(machine: Machine, now: float) -> Result:
    """Every rank has reported, or those that failed waited long enough for the others."""
    state = machine.state
    assert isinstance(state, Starting | Calling)
    if not state.failures and not state.deaths:
        assert isinstance(state, Calling)
        replies = tuple(sorted(state.replies.values(), key=lambda r: r.rank))
        machine = replace(machine, budget=replace(machine.budget, progressed=True))
        return machine.to(Idle()), (Returned(call=machine.call, replies=replies),)
    cause = root_cause(state.failures, state.deaths, connected=bool(machine.bound) or not machine.recovers)
    if isinstance(state, Starting):
        return kill(machine, cause, now)
    survives = survives_failure(state.method, _all_reported(machine))
    if not survives or state.deaths or not isinstance(cause, UserCodeFailed):
        retry = not isinstance(cause, UserCodeFailed) and may_retry(machine, cause)
        return kill(machine, cause, now, retry=retry, why=NOT_IN_PLACE if retry else "")
    actions: tuple[Action, ...] = (Raised(cause=cause, usable=True),)
    return machine.to(Idle()), actions


def _all_reported(machine: Machine) -> bool:
    state = machine.state
    assert isinstance(state, Starting | Calling)
    if not state.failures and not state.deaths:  # as with every reply
        return len(state.ready if isinstance(state, Starting) else state.replied) == machine.world_size
    reported = set(state.ready) if isinstance(state, Starting) else set(state.replied)
    for failure in state.failures:
        reported.add(failure.rank)
        view = machine.view(failure.worker)
        if view is not None and not machine.losses:  # else it may not have adopted yet what it was told to carry
            reported.update(view.ranks)
    reported.update(rank for death in state.deaths for rank in death.ranks)
    return len(reported) == machine.world_size
