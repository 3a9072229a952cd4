"""The driver's decisions about one worker group: ``handle(machine, event, now) -> (machine, actions)``.

Pure: no clock, socket, process or log. The controller feeds it what workers and host say and what the user wants, and
performs the actions. Every message kind that can arrive has a function named after it, here or in the module of its idea.

    Starting ──all ready──> Idle <──────settled────── Calling
        │                    │ └────call requested───────^ │
        └───────failed───────┴──────────> Killing <────────┘
                             │               │
                             └──> Ending ────┴──> Closed

Whatever an event says becomes part of the machine first; what has become possible or necessary by it, `advance` then does. So a
lost worker, a replacement that is ready, or a change of carriers that is half done is dealt with in one place, in whatever order
things happen. A failed group is taken down before its error is reported, so that whoever sees the error finds nothing left running.

    a call and its outcome   `calling`, `agreement`
    a worker is lost         `recovery`
    a worker joins, leaves   `reassign`, `layout`
    by the clock             `supervision`, `hangs`, `stragglers`
    the group ends           `ending`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torchtrainer.control.messages import (
    Bound,
    Boundary,
    CheckpointEnded,
    EndWorker,
    EngineFailed,
    Failure,
    GroupFailed,
    GroupGone,
    Heartbeat,
    KillWorker,
    LoaderLost,
    Paused,
    RanksAdopted,
    Reply,
    Stacks,
    StateSent,
    WorkerExited,
    WorkerReady,
    WorkerStarted,
)
from torchtrainer.driver.agreement import decide
from torchtrainer.driver.calling import (
    lose_in_failed_call,
    on_boundary,
    on_call_requested,
    on_failure,
    on_reply,
    on_save_requested,
    on_stop_requested,
    settle_if_all_reported,
    start_pending,
)
from torchtrainer.driver.causes import EngineLost, WorkerDied, WorkerLost
from torchtrainer.driver.ending import close, kill
from torchtrainer.driver.events import (
    CallRequested,
    EndRequested,
    Event,
    HostLost,
    ResizeRequested,
    Returned,
    SaveRequested,
    Send,
    StopRequested,
    Tick,
)
from torchtrainer.driver.policies import root_cause, save_interval_s
from torchtrainer.driver.reassign import begin, end_resizing, on_paused, on_state_sent, proceed, start_missing, trim
from torchtrainer.driver.recovery import (
    lose,
    lose_for_good,
    lose_newcomer,
    note_step,
    on_bound,
    on_ranks_adopted,
    recover,
    refetched,
)
from torchtrainer.driver.states import Calling, Closed, Ending, Idle, Killing, Machine, Result, Starting, in_turn
from torchtrainer.driver.stragglers import with_phase_times
from torchtrainer.driver.supervision import on_stacks, on_tick
from torchtrainer.driver.views import WorkerView, seen_in


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
    machine, actions = on_event(machine, event, now)
    machine, more = advance(machine, now)
    return machine, (*actions, *more)


def advance(machine: Machine, now: float) -> Result:
    """Does what is possible and necessary as things are now; again, it does nothing."""
    if not machine.at_work:
        return machine, ()
    steps = (recover, proceed, decide, trim, start_missing, begin, end_resizing, start_pending)
    return in_turn(machine, now, *steps)


# What workers and host say


def on_worker_started(machine: Machine, event: WorkerStarted, now: float) -> Result:
    """Sent when the process of a worker exists. One that was given up meanwhile is ended."""
    if machine.view(event.worker) is None:
        return machine, (Send(message=KillWorker(group=machine.group, worker=event.worker)),)
    return machine.see(event.worker, pid=event.pid, machine=event.machine, heard_at=now, phase_since=now), ()


def on_heartbeat(machine: Machine, event: Heartbeat, now: float) -> Result:
    """Sent every so often by every worker; one that was sent before the running call says nothing about it."""
    view = machine.view(event.worker)
    if view is None:
        return machine, ()
    machine = machine.see(event.worker, heard_at=now, spoke=True)
    if event.call != machine.call and view.ready:
        return machine, ()
    machine = machine.see(
        event.worker,
        reading=view.reading and not view.busy,
        phase_times=with_phase_times(view, event),
        **seen_in(event, now),
    )
    return note_step(machine, event.step), ()


def on_worker_ready(machine: Machine, event: WorkerReady, now: float) -> Result:
    """Sent when a worker is built."""
    state = machine.state
    if machine.view(event.worker) is None:
        return machine, ()
    machine = machine.see(event.worker, device=event.device, busy=False, ready=True, phase="idle", heard_at=now)
    if not isinstance(state, Starting):
        return machine, ()
    if event.worker == 0:
        machine = replace(machine, facts=event.facts, record=event.record)
    machine = machine.to(replace(state, ready=state.ready | {event.worker}))
    if state.failures or state.deaths:
        return settle_if_all_reported(machine, now)
    if len(state.ready) + 1 < machine.world_size:
        return machine, ()
    return machine.to(Idle()), (Returned(call=0, replies=()),)


def on_worker_exited(machine: Machine, event: WorkerExited, now: float) -> Result:
    """Sent when the process of a worker is gone, asked for or not."""
    state, view = machine.state, machine.view(event.worker)
    if view is None or isinstance(state, Ending | Killing):
        return machine.see(event.worker, phase="gone", busy=False), ()
    view = replace(view, step=max(view.step, event.step))
    machine = machine.see(event.worker, step=view.step)
    cause = _cause_of(machine, view, event)
    machine = _forget(machine, event.worker)
    if view.leaving_by is not None:
        return machine.without(event.worker), ()
    if view.newcomer:
        return lose_newcomer(machine, view, cause, now)
    if isinstance(state, Starting) or (isinstance(state, Calling) and (state.failures or not machine.recovers)):
        return lose_in_failed_call(machine, cause, event.worker, now)
    if not machine.recovers:
        machine = machine.see(event.worker, phase="gone", busy=False, lost=True)
        return lose_for_good(machine, cause, now)
    return lose(machine, view, cause, now)


def _cause_of(machine: Machine, view: WorkerView, event: WorkerExited) -> WorkerLost:
    hung = next((one.cause for one in machine.pending_kills if one.worker == event.worker), None)
    return hung or WorkerDied(
        ranks=view.ranks or (view.like,),
        pid=event.pid,
        machine=view.machine,
        exit_code=event.exit_code,
        phase=view.phase,
        step=view.step,
        stderr_tail=event.stderr_tail,
        crash=event.crash,
        max_rss_bytes=event.max_rss_bytes,
        oom=event.oom,
    )


def _forget(machine: Machine, worker: int) -> Machine:
    """The machine without what was under way about a worker that is gone."""
    diagnosis = machine.diagnosis
    return replace(
        machine,
        pending_kills=tuple(one for one in machine.pending_kills if one.worker != worker),
        diagnosis=None if diagnosis is not None and diagnosis.worker == worker else diagnosis,
    )


def on_loader_lost(machine: Machine, event: LoaderLost, now: float) -> Result:
    """Sent when a process of a loader died and was replaced; how often that may happen at one batch, the rank itself knows."""
    return (machine, ()) if machine.view(event.worker) is None else (machine, (refetched(event),))


def on_checkpoint_ended(machine: Machine, event: CheckpointEnded, now: float) -> Result:
    """Sent when a snapshot was written, or could not be."""
    machine = replace(machine, ended=event)
    if machine.save_cheaply and event.stall_s:
        machine = replace(machine, save_every_s=save_interval_s(event.stall_s, event.seconds))
    return machine, ()


def on_group_gone(machine: Machine, event: GroupGone, now: float) -> Result:
    """Sent when no process of the group is left."""
    state = machine.state
    if isinstance(state, Killing):
        return close(machine, state.cause, retry=state.retry, why=state.why)
    if isinstance(state, Starting | Calling) and (state.deaths or state.failures):
        return close(machine, root_cause(state.failures, state.deaths))
    if isinstance(state, Ending):
        return close(machine, None)
    return close(machine, EngineLost(text="its processes were ended by somebody else"))


def on_group_failed(machine: Machine, event: GroupFailed, now: float) -> Result:
    """Sent when the processes of the group could not be started."""
    if isinstance(machine.state, Killing):
        return machine, ()
    return kill(machine, EngineLost(text=event.text), now)


def on_engine_failed(machine: Machine, event: EngineFailed, now: float) -> Result:
    """Sent when workers can no longer be started, or the spawner and with it all workers are gone."""
    return _lost_engine(machine, event.text)


def on_host_lost(machine: Machine, event: HostLost, now: float) -> Result:
    """Sent by the connection when the host process is gone."""
    return _lost_engine(machine, event.text)


def _lost_engine(machine: Machine, text: str) -> Result:
    state = machine.state
    if isinstance(state, Killing) and state.cause is not None:
        return close(machine, state.cause, retry=state.retry, why=state.why)
    if isinstance(state, Killing | Ending):
        return close(machine, None)
    return close(machine, EngineLost(text=text))


# What the user wants


def on_resize_requested(machine: Machine, event: ResizeRequested, now: float) -> Result:
    """Sent when the user wants the ranks to be carried by another number of processes; it was checked that they can be."""
    return replace(machine, processes=event.processes, resizing=True, unbuilt=0), ()


def on_end_requested(machine: Machine, event: EndRequested, now: float) -> Result:
    """Sent when the user is done with the group."""
    if isinstance(machine.state, Ending | Killing):
        return machine, ()
    if event.force or not isinstance(machine.state, Idle):
        return kill(machine, None, now)
    ending = Ending(until=now + machine.timeouts.shutdown_s)
    newcomers = tuple(  # which may take long to build, and have nothing to clean up
        Send(message=KillWorker(group=machine.group, worker=view.worker)) for view in machine.views if view.newcomer
    )
    return machine.to(ending), (Send(message=EndWorker(group=machine.group)), *newcomers)


_ON: dict[type, Callable[[Machine, Any, float], Result]] = {
    WorkerStarted: on_worker_started,
    Heartbeat: on_heartbeat,
    WorkerReady: on_worker_ready,
    Reply: on_reply,
    Failure: on_failure,
    WorkerExited: on_worker_exited,
    Boundary: on_boundary,
    Paused: on_paused,
    StateSent: on_state_sent,
    RanksAdopted: on_ranks_adopted,
    Bound: on_bound,
    LoaderLost: on_loader_lost,
    CheckpointEnded: on_checkpoint_ended,
    Stacks: on_stacks,
    GroupFailed: on_group_failed,
    GroupGone: on_group_gone,
    EngineFailed: on_engine_failed,
    HostLost: on_host_lost,
    CallRequested: on_call_requested,
    StopRequested: on_stop_requested,
    SaveRequested: on_save_requested,
    ResizeRequested: on_resize_requested,
    EndRequested: on_end_requested,
    Tick: on_tick,
}
TOLD = frozenset(_ON)
"""Kinds of events that the machine looks at."""
