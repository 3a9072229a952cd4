"""The driver's decisions about one worker group: ``handle(machine, event, now) -> (machine, actions)``.

Pure: no clock, socket, process or log. The controller feeds it what workers and host say and what the user wants, and
performs the actions. Every message kind that can arrive has a method here named after it.

    Starting ──all ready──> Idle <──────settled────── Calling
        │                    │ └────call requested───────^ │
        └───────failed───────┴──────────> Killing <────────┘
                             │               │
                             └──> Ending ────┴──> Closed

A failed group is taken down before its error is reported, so that whoever sees the error finds nothing left running.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torchtrainer.control.messages import (
    Beat,
    Boundary,
    Call,
    CheckpointEnded,
    DumpStacks,
    EndWorker,
    EngineFailed,
    Failure,
    GroupFailed,
    GroupGone,
    KillGroup,
    Reply,
    SignalWorkers,
    Stacks,
    WorkerExited,
    WorkerReady,
    WorkerStarted,
)
from torchtrainer.driver.agreement import ask, decide, save_is_due
from torchtrainer.driver.causes import Cause, EngineLost, StartTimedOut, UserCodeFailed, WorkerDied, WorkerHung
from torchtrainer.driver.policies import STEPPING_METHODS, Stop, after_failure, find_hung, root_cause, save_interval_s
from torchtrainer.driver.states import (
    Action,
    Calling,
    CallRequested,
    Closed,
    Diagnosing,
    Ending,
    EndRequested,
    Event,
    HostLost,
    Idle,
    Killing,
    Machine,
    Raised,
    Returned,
    SaveRequested,
    Send,
    Starting,
    StopRequested,
    Tick,
)

Result = tuple[Machine, tuple[Action, ...]]


def handle(machine: Machine, event: Event, now: float) -> Result:
    """Takes one event.

    Args:
        machine: everything known so far.
        event: what happened.
        now: monotonic seconds.
    """
    on_event: Callable[[Machine, Any, float], Result] | None = _ON.get(type(event))
    if on_event is None or isinstance(machine.state, Closed):
        return machine, ()
    return on_event(machine, event, now)


# What workers and host say


def on_worker_started(machine: Machine, event: WorkerStarted, now: float) -> Result:
    """Sent when the process of a rank exists."""
    return machine.see(event.rank, pid=event.pid, heard_at=now, phase_since=now), ()


def on_beat(machine: Machine, event: Beat, now: float) -> Result:
    """Sent every so often by every rank at work; one that was sent before the running call says nothing about it."""
    if event.call != machine.call:
        return machine.see(event.rank, heard_at=now, spoke=True), ()
    return (
        machine.see(
            event.rank,
            phase=event.phase,
            phase_since=now - event.phase_age_s,
            heard_at=now,
            spoke=True,
            step=event.step,
            epoch=event.epoch,
            batch=event.batch,
            rss_bytes=event.rss_bytes,
            cpu_s=event.cpu_s,
        ),
        (),
    )


def on_worker_ready(machine: Machine, event: WorkerReady, now: float) -> Result:
    """Sent when a rank is built."""
    state = machine.state
    if not isinstance(state, Starting):
        return machine, ()
    machine = machine.see(event.rank, device=event.device, busy=False, phase="idle", heard_at=now)
    if event.rank == 0:
        machine = replace(machine, facts=event.facts)
    ready = state.ready | {event.rank}
    if len(ready) < machine.world_size:
        return machine.to(replace(state, ready=ready)), ()
    return machine.to(Idle()), (Returned(call=0, replies=()),)


def on_reply(machine: Machine, event: Reply, now: float) -> Result:
    """Sent when a call has returned on a rank."""
    state = machine.state
    if not isinstance(state, Calling) or event.call != machine.call:
        return machine, ()
    machine = machine.see(event.rank, busy=False, phase="idle", step=event.step, epoch=event.epoch, heard_at=now)
    state = replace(state, replies=(*state.replies, event))
    return _settle_or_wait(machine, state, now)


def on_failure(machine: Machine, event: Failure, now: float) -> Result:
    """Sent when user code raised on a rank. The others get a moment to say the same."""
    state = machine.state
    if not isinstance(state, Starting | Calling) or event.call != machine.call:
        return machine, ()
    machine = machine.see(event.rank, busy=False)
    state = replace(state, failures=(*state.failures, event), settle_at=_settle_at(machine, state, now))
    return _settle_or_wait(machine, state, now)


def on_worker_exited(machine: Machine, event: WorkerExited, now: float) -> Result:
    """Sent when the process of a rank is gone, asked for or not."""
    state = machine.state
    view = machine.views[event.rank]
    death = WorkerDied(
        rank=event.rank,
        pid=event.pid,
        exit_code=event.exit_code,
        phase=view.phase,
        step=view.step,
        stderr_tail=event.stderr_tail,
        max_rss_bytes=event.max_rss_bytes,
    )
    machine = machine.see(event.rank, phase="gone", busy=False)
    if isinstance(state, Starting | Calling):
        state = replace(state, deaths=(*state.deaths, death), settle_at=_settle_at(machine, state, now))
        return _settle_or_wait(machine, state, now)
    if isinstance(state, Idle | Diagnosing):
        return _kill(machine, death, now)
    return machine, ()


def on_boundary(machine: Machine, event: Boundary, now: float) -> Result:
    """Sent when a rank holds at a step boundary because a stop was asked for."""
    state = machine.state
    if not isinstance(state, Calling) or event.call != machine.call or state.boundaries is None:
        return machine, ()
    if event.round != state.round:
        return machine, ()
    return decide(machine, replace(state, boundaries={**state.boundaries, event.rank: event.boundary}))


def on_checkpoint_ended(machine: Machine, event: CheckpointEnded, now: float) -> Result:
    """Sent when a snapshot was written, or could not be."""
    machine = replace(machine, ended=event)
    if machine.save_cheaply and event.stall_s:
        machine = replace(machine, save_every_s=save_interval_s(event.stall_s, event.seconds))
    return machine, ()


def on_stacks(machine: Machine, event: Stacks, now: float) -> Result:
    """Sent with the Python stacks of a rank, after they were asked for."""
    state = machine.state
    if not isinstance(state, Diagnosing) or event.rank != state.cause.rank:
        return machine, ()
    return _kill(machine, replace(state.cause, stacks=event.text), now)


def on_group_gone(machine: Machine, event: GroupGone, now: float) -> Result:
    """Sent when no process of the group is left."""
    state = machine.state
    if isinstance(state, Killing):
        return _close(machine, state.cause)
    if isinstance(state, Starting | Calling) and (state.deaths or state.failures):
        return _close(machine, root_cause(state.failures, state.deaths))
    if isinstance(state, Ending):
        return _close(machine, None)
    return _close(machine, EngineLost(text="its processes were ended by somebody else"))


def on_group_failed(machine: Machine, event: GroupFailed, now: float) -> Result:
    """Sent when the processes of the group could not be started."""
    return _kill(machine, EngineLost(text=event.text), now)


def on_engine_failed(machine: Machine, event: EngineFailed, now: float) -> Result:
    """Sent when workers can no longer be started, or the spawner and with it all workers are gone."""
    if isinstance(machine.state, Killing | Ending):
        return _close(machine, machine.state.cause if isinstance(machine.state, Killing) else None)
    return _close(machine, EngineLost(text=event.text))


def on_host_lost(machine: Machine, event: HostLost, now: float) -> Result:
    """Sent by the connection when the host process is gone."""
    cause = machine.state.cause if isinstance(machine.state, Killing) else EngineLost(text=event.text)
    return _close(machine, cause)


# What the user wants, and time


def on_call_requested(machine: Machine, event: CallRequested, now: float) -> Result:
    """Sent when the user calls something and the group is idle."""
    assert isinstance(machine.state, Idle), machine.state
    number = machine.call + 1
    views = tuple(replace(v, busy=True, phase=event.method, phase_since=now, heard_at=now) for v in machine.views)
    machine = replace(machine, call=number, views=views, state=Calling(method=event.method))
    call = Call(group=machine.group, call=number, method=event.method, blob=event.blob)
    return machine, (Send(message=call),)


def on_stop_requested(machine: Machine, event: StopRequested, now: float) -> Result:
    """Sent when the user interrupts a call."""
    state = machine.state
    if not isinstance(state, Calling) or state.stop:
        return machine, ()
    if state.method not in STEPPING_METHODS:
        if event.signum is None:
            return machine, ()
        return machine, (Send(message=SignalWorkers(group=machine.group, signum=event.signum)),)
    return ask(machine, replace(state, stop=True, save=event.save), now)


def on_save_requested(machine: Machine, event: SaveRequested, now: float) -> Result:
    """Sent when the user's machine may go soon."""
    state = machine.state
    if not isinstance(state, Calling) or state.method not in STEPPING_METHODS or state.stop:
        return machine, ()
    return ask(machine, replace(state, save=True), now)


def on_end_requested(machine: Machine, event: EndRequested, now: float) -> Result:
    """Sent when the user is done with the group."""
    if isinstance(machine.state, Ending | Killing):
        return machine, ()
    if event.force or not isinstance(machine.state, Idle):
        return _kill(machine, None, now)
    ending = Ending(until=now + machine.timeouts.shutdown_s)
    return machine.to(ending), (Send(message=EndWorker(group=machine.group)),)


def on_tick(machine: Machine, event: Tick, now: float) -> Result:
    """Sent at least a few times a second while the user waits."""
    state = machine.state
    if isinstance(state, Starting | Calling):
        if state.settle_at is not None:
            return _settle(machine, state, now) if now >= state.settle_at else (machine, ())
        if isinstance(state, Calling) and save_is_due(machine, state, now):
            return ask(machine, replace(state, save=True), now)
        if isinstance(state, Starting):
            late = _late_start(machine, state, now)
            if late is not None:
                return _kill(machine, late, now)
        return _check_progress(machine, state, now)
    if isinstance(state, Diagnosing) and now >= state.until:
        return _kill(machine, state.cause, now)
    if isinstance(state, Ending) and now >= state.until:
        return _kill(machine, None, now)
    if isinstance(state, Killing) and now >= state.until:
        return _close(machine, state.cause)
    return machine, ()


_ON: dict[type, Callable[[Machine, Any, float], Result]] = {
    WorkerStarted: on_worker_started,
    Beat: on_beat,
    WorkerReady: on_worker_ready,
    Reply: on_reply,
    Failure: on_failure,
    WorkerExited: on_worker_exited,
    Boundary: on_boundary,
    CheckpointEnded: on_checkpoint_ended,
    Stacks: on_stacks,
    GroupFailed: on_group_failed,
    GroupGone: on_group_gone,
    EngineFailed: on_engine_failed,
    HostLost: on_host_lost,
    CallRequested: on_call_requested,
    StopRequested: on_stop_requested,
    SaveRequested: on_save_requested,
    EndRequested: on_end_requested,
    Tick: on_tick,
}

# Steps of the decisions above


def _settle_at(machine: Machine, state: Starting | Calling, now: float) -> float:
    return state.settle_at if state.settle_at is not None else now + machine.timeouts.error_gather_s


def _reported(machine: Machine, state: Starting | Calling) -> frozenset[int]:
    done = state.ready if isinstance(state, Starting) else frozenset(r.rank for r in state.replies)
    return done | {f.rank for f in state.failures} | {d.rank for d in state.deaths}


def _settle_or_wait(machine: Machine, state: Starting | Calling, now: float) -> Result:
    if len(_reported(machine, state)) == machine.world_size:
        return _settle(machine, state, now)
    if isinstance(state, Calling) and state.boundaries is not None:
        return decide(machine, state)
    return machine.to(state), ()


def _settle(machine: Machine, state: Starting | Calling, now: float) -> Result:
    """Every rank has reported, or those that failed waited long enough for the others."""
    if not state.failures and not state.deaths:
        assert isinstance(state, Calling)
        replies = tuple(sorted(state.replies, key=lambda r: r.rank))
        return machine.to(Idle()), (Returned(call=machine.call, replies=replies),)
    cause = root_cause(state.failures, state.deaths)
    all_reported = len(_reported(machine, state)) == machine.world_size
    method = state.method if isinstance(state, Calling) else "train"
    decision = after_failure(method, all_reported)
    if isinstance(decision, Stop) or not isinstance(cause, UserCodeFailed) or isinstance(state, Starting):
        return _kill(machine.to(state), cause, now)
    return machine.to(Idle()), (Raised(cause=cause, usable=True),)


def _late_start(machine: Machine, state: Starting, now: float) -> StartTimedOut | None:
    unborn = tuple(v.rank for v in machine.views if not v.pid)
    limits = machine.timeouts
    if unborn and now - state.since > limits.engine_start_s:
        return StartTimedOut(ranks=unborn, setting="engine_start_s", limit_s=limits.engine_start_s)
    mute = tuple(v.rank for v in machine.views if v.pid and not v.spoke and v.busy)
    if mute and max(now - machine.views[r].heard_at for r in mute) > limits.worker_connect_s:
        return StartTimedOut(ranks=mute, setting="worker_connect_s", limit_s=limits.worker_connect_s)
    return None


def _check_progress(machine: Machine, state: Starting | Calling, now: float) -> Result:
    if isinstance(state, Calling) and state.method not in STEPPING_METHODS:
        return machine, ()  # a user's function may take as long as it likes
    hung = find_hung(machine.views, machine.hang_timeout_s, now)
    if hung is None:
        return machine, ()
    cause = WorkerHung(
        rank=hung.rank,
        pid=hung.pid,
        phase=hung.phase,
        step=hung.step,
        silent_s=now - min(hung.phase_since, hung.heard_at),
        limit_s=machine.hang_timeout_s,
    )
    diagnosing = Diagnosing(cause=cause, until=now + machine.timeouts.stack_dump_s)
    return machine.to(diagnosing), (Send(message=DumpStacks(group=machine.group)),)


def _kill(machine: Machine, cause: Cause | None, now: float) -> Result:
    killing = Killing(cause=cause, until=now + machine.timeouts.cleanup_s)
    return machine.to(killing), (Send(message=KillGroup(group=machine.group)),)


def _close(machine: Machine, cause: Cause | None) -> Result:
    actions: tuple[Action, ...] = () if cause is None else (Raised(cause=cause, usable=False),)
    return machine.to(Closed(cause=cause)), actions
