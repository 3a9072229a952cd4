"""Agrees where workers stop, save or pause: at the highest step boundary that any of them is at or heading for. Pure.

ask ──> workers pause at their next boundary and say which ──> decide ──> all go on to the highest, and do it there

Only workers that carry ranks are waited for, as they are when it is decided: one that is lost no longer, and one that joins
meanwhile too. A lost worker may have been a step ahead of all that answered, so that its ranks' part in that step is given
already: while its work is not done the boundary is one later, which they have not passed either.
"""

# ruff: noqa: ARG001 - functions that take events, or follow each other, share their signature

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from torchtrainer.control.messages import PrepareStop, StopAt
from torchtrainer.driver.events import Send
from torchtrainer.driver.policies import STEPPING_METHODS
from torchtrainer.driver.states import TO_THE_END, Calling, Machine, Result


def ask(machine: Machine, state: Calling, now: float) -> Result:
    """Asks the workers where they are, unless they are being asked: what is wanted is then decided with it.

    While workers pause for a change of carriers what is wanted waits for its end; see `ask_for_the_rest`.
    """
    if state.save:
        machine = replace(machine, saved_at=now)
    if state.deciding or (machine.move is not None and machine.move.pausing):
        return machine.to(state), ()
    state = replace(state, boundaries={}, decided=False, round=state.round + 1)
    return machine.to(state), (Send(message=PrepareStop(group=machine.group, call=machine.call, round=state.round)),)


def ask_for_the_rest(machine: Machine, now: float) -> Result:
    """Asks for a stop or a save that was wanted while workers paused."""
    state = machine.state
    if not isinstance(state, Calling) or not (state.stop or state.save):
        return machine, ()
    return ask(machine, state, now)


def decide(machine: Machine, now: float) -> Result:
    """Says where to stop once every worker holds or has come to the end."""
    state = machine.state
    if not isinstance(state, Calling) or not state.deciding or not state.boundaries:
        return machine, ()
    if len(state.boundaries) + len(state.replies) < machine.carrier_count:
        return machine, ()  # somebody has neither answered nor come to the end: no need to look who
    asked = [view for view in machine.carriers if not state.replied >= set(view.ranks)]
    if any(view.worker not in state.boundaries for view in asked):
        return machine, ()
    at_end = bool(state.replies)
    pause = state.pause and not state.stop and not at_end
    highest = max(state.boundaries.values()) + bool(machine.losses)
    order = StopAt(
        group=machine.group,
        call=machine.call,
        round=state.round,
        boundary=TO_THE_END if at_end else highest,
        stop=state.stop,
        save=state.save,
        pause=pause,
    )
    move = machine.move
    if move is not None and move.pause:
        move = replace(move, boundary=order.boundary) if pause else None
    orders = tuple(one for one in state.orders if one.boundary >= min(state.boundaries.values()))
    state = replace(state, decided=True, orders=(*orders, order), save=False, pause=False)
    return replace(machine, move=move, state=state), (Send(message=order),)


def ask_newcomer(machine: Machine, worker: int) -> Result:
    """Asks a worker that joins the running call what the others are being asked."""
    state = machine.state
    if not isinstance(state, Calling) or not state.deciding:
        return machine, ()
    message = PrepareStop(group=machine.group, worker=worker, call=machine.call, round=state.round)
    return machine, (Send(message=message),)


def orders_for_newcomer(state: Calling) -> list[dict[str, Any]]:
    """The orders that the others got, for `Join`; a newcomer need not pause."""
    return [{**asdict(order), "pause": False} for order in state.orders if order.stop or order.save]


def save_is_due(machine: Machine, state: Calling, now: float) -> bool:
    """Whether it is time for a checkpoint, and the workers can be asked."""
    if machine.save_every_s is None or state.method not in STEPPING_METHODS or state.stop or state.replies:
        return False
    if state.deciding or machine.move is not None:
        return False
    return now - machine.saved_at >= machine.save_every_s
