"""Ranks change their carriers while nobody is missed, or go to a newcomer: replacements, and more or fewer processes. Pure.

    missing ──StartWorker──> newcomer is built ──WorkerReady──> begin
    begin ──a train call runs──> agree on a boundary ──Paused by all──┐
      └──idle, or all wait for the newcomer's ranks anyway────────────┴──SendState──> StateSent ──> Join to it, SetRanks to the others

Whoever is lost on the way is dealt with as always; what is left of the change then goes on or is given up, and those that pause are
let go.
"""

# ruff: noqa: ARG001 - functions that take events, or follow each other, share their signature

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchtrainer.control.messages import (
    EndWorker,
    Join,
    KillWorker,
    Paused,
    SendState,
    SetRanks,
    StartWorker,
    StateSent,
)
from torchtrainer.driver.agreement import ask, ask_for_the_rest, ask_newcomer, orders_for_newcomer
from torchtrainer.driver.ending import kill
from torchtrainer.driver.events import Action, ReplacingStopped, Resized, Send
from torchtrainer.driver.layout import dealt, taken
from torchtrainer.driver.recovery import with_ranks
from torchtrainer.driver.states import Calling, Idle, Machine, Move, Result, in_turn
from torchtrainer.driver.views import WorkerTable, WorkerView

# What becomes possible after any event


def trim(machine: Machine, now: float) -> Result:
    """Lets newcomers go that are not needed any more."""
    moving = None if machine.move is None else machine.move.newcomer
    unneeded = [view for view in machine.newcomers if view.worker != moving]
    extra = machine.carrier_count + len(machine.newcomers) - machine.processes
    actions: tuple[Action, ...] = ()
    for view in reversed(unneeded):
        if extra <= 0:
            break
        machine, sent = _dismiss(machine, view, now)
        actions += sent
        extra -= 1
    return machine, actions


def start_missing(machine: Machine, now: float) -> Result:
    """Has replacements built, and whatever more is wanted."""
    if not machine.recovers or not machine.replacing:
        return machine, ()
    wanted = 0
    if machine.bound or machine.failure.replace or machine.resizing:
        wanted = machine.processes
    elif machine.uncarried:
        wanted = machine.min_workers
    if wanted <= machine.carrier_count + len(machine.newcomers):
        return machine, ()
    present = (*machine.carriers, *machine.newcomers)
    lost = machine.uncarried
    vacant = sorted(set(range(machine.world_size)) - {v.like for v in present}, key=lambda r: (r not in lost, r))
    actions: list[Action] = []
    for rank in vacant[: wanted - len(present)]:
        number = machine.next_worker
        view = WorkerView(worker=number, like=rank, phase_since=now, heard_at=now)
        machine = replace(machine, views=WorkerTable((*machine.views, view)), next_worker=number + 1)
        message = StartWorker(group=machine.group, worker=number, rank=rank, record=machine.record)
        actions.append(Send(message=message))
    return machine, tuple(actions)


def begin(machine: Machine, now: float) -> Result:
    """Begins the next change of carriers, where the group can make it."""
    if machine.move is not None or machine.pending_kills or machine.diagnosis is not None:
        return machine, ()
    ready = _ready(machine)
    if machine.uncarried:
        awaited = machine.awaited
        ready = [view for view in ready if not machine.bound or view.like in awaited]
        missing = len(awaited) if machine.bound else machine.min_workers - machine.carrier_count
        if not awaited or not ready or len(ready) < missing:
            return machine, ()
        return _begin_here(machine, ready[0].worker, now)
    spare = ready[0].worker if ready else None
    if machine.carrier_count > machine.processes:
        spare = None
    elif spare is None or machine.carrier_count == machine.processes:
        return machine, ()
    if any(view.reading for view in machine.carriers):
        return machine, ()  # it may be the next one to leave, and has to have read what was shared for it first
    if isinstance(machine.state, Idle):
        return _begin_here(machine, spare, now)
    if not _can_hold(machine):
        return machine, ()
    assert isinstance(machine.state, Calling)
    move = Move(newcomer=spare, pause=True, until=now + machine.timeouts.pause_s / 2)
    return ask(replace(machine, move=move), replace(machine.state, pause=True), now)


def _ready(machine: Machine) -> list[WorkerView]:
    return [view for view in machine.newcomers if view.ready]


def _begin_here(machine: Machine, newcomer: int | None, now: float) -> Result:
    machine = replace(machine, move=Move(newcomer=newcomer, pause=False, until=now + machine.timeouts.pause_s))
    return proceed(machine, now)


def _can_hold(machine: Machine) -> bool:
    state = machine.state
    if not isinstance(state, Calling) or state.method != "train" or state.stop or state.replies:
        return False
    return not state.deciding and not machine.losses


def proceed(machine: Machine, now: float) -> Result:
    """Takes the next step of the change that is under way, or gives it up."""
    move = machine.move
    if move is None:
        return machine, ()
    if move.newcomer is not None and machine.view(move.newcomer) is None:
        return release(machine, now)
    if move.pause:
        if not isinstance(machine.state, Calling) or machine.state.replies or machine.uncarried:
            return release(machine, now)  # the call ends, or somebody waits for a rank and will never come to pause
        missing = move.boundary is None or len(move.paused) < machine.carrier_count
        if missing or any(view.worker not in move.paused for view in machine.carriers):
            return machine, ()
    if move.newcomer is None:
        return _redeal(machine, now)
    if move.sharer is not None:
        if any(view.worker == move.sharer for view in machine.able):
            return machine, ()
        if not move.pause:
            return release(machine, now)  # to begin again: more may be missed now
    return _ask_to_share(machine, move, now)


def end_resizing(machine: Machine, now: float) -> Result:
    """Says that as many processes carry the ranks as were asked for, or that there will not be more."""
    if not machine.resizing or machine.move is not None:
        return machine, ()
    carriers = machine.carrier_count
    stuck = carriers < machine.processes and not machine.replacing and not machine.newcomers
    if carriers != machine.processes and not stuck:
        return machine, ()
    return replace(machine, resizing=False, processes=carriers), (Resized(processes=carriers),)


# Steps of a change


def _ask_to_share(machine: Machine, move: Move, now: float) -> Result:
    able = sorted(machine.able, key=lambda view: (view.joining, view.worker))
    if not able or any(view.reading for view in machine.carriers):
        return machine, ()  # those that are left are being killed, or what was shared before is still needed
    until = move.until if move.pause else now + machine.timeouts.pause_s
    takes = _takes(machine)
    ranks = sorted(takes.values()) if machine.uncarried else _wanted(machine, move.newcomer)
    move = replace(move, sharer=able[0].worker, number=machine.shares + 1, takes=takes, until=until)
    message = SendState(group=machine.group, worker=able[0].worker, number=move.number, ranks=ranks)
    return replace(machine, move=move, shares=move.number), (Send(message=message),)


def _takes(machine: Machine) -> dict[int, int]:
    """Which newcomer takes which of the ranks that are waited for."""
    lost = list(machine.awaited)
    takes: dict[int, int] = {}
    for view in _ready(machine):
        if view.like in lost or (lost and not machine.bound):
            takes[view.worker] = view.like if view.like in lost else lost[0]
            lost.remove(takes[view.worker])
    return takes


def _wanted(machine: Machine, newcomer: int | None) -> list[int]:
    """The ranks that a newcomer takes from others that carry them."""
    view = None if newcomer is None else machine.view(newcomer)
    given = {} if view is None else taken(view.like, {one.worker: one.ranks for one in machine.carriers})
    return sorted(rank for ranks in given.values() for rank in ranks)


def on_paused(machine: Machine, event: Paused, now: float) -> Result:
    """Sent when a worker holds. Where nothing is to change any more, it is let go at once."""
    move, view = machine.move, machine.view(event.worker)
    if view is None or not machine.at_work:
        return machine, ()
    if event.call == machine.call and move is not None and move.pause and move.boundary == event.boundary:
        return replace(machine, move=replace(move, paused=move.paused | {event.worker})), ()
    return machine, (_assign(machine, view),)


def on_state_sent(machine: Machine, event: StateSent, now: float) -> Result:
    """Sent when a worker has written its state for the newcomer, or could not."""
    move = machine.move
    if move is None or event.number != move.number or move.newcomer is None:
        return machine, ()
    if not machine.at_work:
        return replace(machine, move=None), ()  # to begin again, should the group stay usable
    newcomer = machine.view(move.newcomer)
    if newcomer is None or machine.view(event.worker) is None:
        return machine, ()
    if event.error:
        return _refused(machine, newcomer, event.error, now)
    if isinstance(machine.state, Idle) and event.call:
        return _ask_to_share(machine, move, now)  # that was inside the call, which has ended since
    if machine.uncarried:
        return _join_for_lost(machine, event, now)
    return _join_for_others(machine, newcomer, event, now)


def _join_for_lost(machine: Machine, event: StateSent, now: float) -> Result:
    """Newcomers take over ranks that nobody carries; the others wait for them, and change nothing."""
    move = machine.move
    assert move is not None
    actions: tuple[Action, ...] = ()
    for worker, rank in move.takes.items():
        newcomer = machine.view(worker)
        if newcomer is None or rank not in machine.awaited:
            continue
        views = WorkerTable(
            replace(view, ranks=tuple(r for r in view.ranks if r != rank)) if view.lost else view
            for view in machine.views
        )
        losses = tuple(replace(loss, replaced=loss.replaced or rank in loss.left) for loss in machine.losses)
        machine = replace(machine, views=WorkerTable(v for v in views if v.ranks or not v.lost), losses=losses)
        machine, joined = _join(machine, newcomer, (rank,), event, now)
        actions += joined
    return replace(machine, move=None), actions


def _join_for_others(machine: Machine, newcomer: WorkerView, event: StateSent, now: float) -> Result:
    """The newcomer takes over some of the others' ranks, all of which wait."""
    move = machine.move
    assert move is not None
    given = taken(newcomer.like, {view.worker: view.ranks for view in machine.carriers})
    views = {view.worker: view for view in machine.views}
    for worker, ranks in given.items():
        left = tuple(rank for rank in views[worker].ranks if rank not in ranks)
        views[worker] = with_ranks(machine, views[worker], left, "pause", now)
    machine = replace(machine, views=WorkerTable(views.values()))
    told = [view for view in machine.carriers if move.pause or view.worker in given]
    machine, joined = _join(machine, newcomer, tuple(rank for ranks in given.values() for rank in ranks), event, now)
    actions = (*joined, *(_assign(machine, view) for view in told))
    machine, more = ask_for_the_rest(machine, now)
    return machine, (*actions, *more)


def _join(machine: Machine, newcomer: WorkerView, ranks: tuple[int, ...], event: StateSent, now: float) -> Result:
    state = machine.state
    running: dict[str, Any] = {}
    if isinstance(state, Calling) and machine.owing(ranks):
        running = {"call": machine.call, "method": state.method, "blob": state.blob}
        running["orders"] = orders_for_newcomer(state)
    join = Join(
        group=machine.group,
        worker=newcomer.worker,
        number=event.number,
        ranks=sorted(ranks),
        at=event.at,
        **running,
    )
    views = WorkerTable(
        _joining(with_ranks(machine, view, ranks, "join", now), now) if view.worker == newcomer.worker else view
        for view in machine.views
    )
    machine = replace(machine, views=views, move=None)
    machine, told = ask_newcomer(machine, newcomer.worker) if running else (machine, ())
    return machine, (Send(message=join), *told)


def _joining(view: WorkerView, now: float) -> WorkerView:
    return replace(view, joining=True, reading=True, phase="join", phase_since=now, heard_at=now)


def _redeal(machine: Machine, now: float) -> Result:
    """Deals all ranks to fewer workers; the others leave."""
    numbers = sorted(view.worker for view in machine.carriers)
    blocks = dealt(machine.world_size, numbers[: machine.processes])
    views = {view.worker: view for view in machine.views}
    actions: list[Action] = []
    machine = replace(machine, move=None)
    for worker in numbers:
        views[worker] = with_ranks(machine, views[worker], blocks.get(worker, ()), "pause", now)
        actions.append(_assign(machine, views[worker]))
    machine = replace(machine, views=WorkerTable(views.values()))
    for worker in numbers[machine.processes :]:
        machine, sent = _dismiss(machine, views[worker], now)
        actions += sent
    machine, more = ask_for_the_rest(machine, now)
    return machine, (*actions, *more)


def release(machine: Machine, now: float) -> Result:
    """Gives the change up: those that pause go on as they are, and those that come to pause are let go then."""
    move = machine.move
    assert move is not None
    actions = tuple(_assign(machine, view) for view in machine.carriers if view.worker in move.paused)
    machine = replace(machine, move=None)
    if isinstance(machine.state, Calling):
        machine = machine.to(replace(machine.state, pause=False))
    machine, more = ask_for_the_rest(machine, now)
    return machine, (*actions, *more)


def release_late(machine: Machine, now: float) -> Result:
    """Gives up a change for which workers have paused too long, and the newcomer or the new number with it."""
    move = machine.move
    if move is None or not move.pause or now < move.until:
        return machine, ()
    newcomer = None if move.newcomer is None else machine.view(move.newcomer)
    if newcomer is None:
        machine = replace(machine, processes=len(machine.carriers))
        return release(machine, now)
    machine = replace(machine, unbuilt=machine.unbuilt + 1)
    return in_turn(machine, now, release, lambda machine, now: _dismiss(machine, newcomer, now))


def _refused(machine: Machine, newcomer: WorkerView, error: str, now: float) -> Result:
    why = f"the state could not be shared with a new worker: {error}"
    if machine.uncarried:
        return kill(machine, machine.losses[0].cause, now, retry=True, why=why)
    machine = replace(machine, unbuilt=machine.tries)
    machine, actions = in_turn(machine, now, release, lambda machine, now: _dismiss(machine, newcomer, now))
    return machine, (*actions, ReplacingStopped(tries=1, cause=None, why=why))


def _dismiss(machine: Machine, view: WorkerView, now: float) -> Result:
    """Has a worker leave that carries nothing: by itself, if it is built."""
    if not view.ready:
        return machine.without(view.worker), (Send(message=KillWorker(group=machine.group, worker=view.worker)),)
    machine = machine.see(view.worker, ranks=(), busy=False, leaving_by=now + machine.timeouts.shutdown_s)
    return machine, (Send(message=EndWorker(group=machine.group, worker=view.worker)),)


def _assign(machine: Machine, view: WorkerView) -> Send:
    return Send(message=SetRanks(group=machine.group, worker=view.worker, ranks=list(view.ranks)))
