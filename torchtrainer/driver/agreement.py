"""Where the ranks stop or save: at the highest step boundary that any of them is at or on its way to. Pure, like the machine.

ask ──> ranks hold at their next boundary and say which ──> decide ──> all go on to the highest, and do it there
"""

from __future__ import annotations

from dataclasses import replace

from torchtrainer.control.messages import PrepareStop, StopAt
from torchtrainer.driver.policies import STEPPING_METHODS
from torchtrainer.driver.states import TO_THE_END, Action, Calling, Machine, Send

Result = tuple[Machine, tuple[Action, ...]]


def decide(machine: Machine, state: Calling) -> Result:
    """Says where to stop once every rank holds or has come to the end."""
    assert state.boundaries is not None
    answered = set(state.boundaries) | {r.rank for r in state.replies}
    if state.decided or len(answered) < machine.world_size or not state.boundaries:
        return machine.to(state), ()
    boundary = TO_THE_END if state.replies else max(state.boundaries.values())
    order = StopAt(
        group=machine.group,
        call=machine.call,
        round=state.round,
        boundary=boundary,
        stop=state.stop,
        save=state.save,
    )
    return machine.to(replace(state, decided=True, save=False)), (Send(message=order),)


def ask(machine: Machine, state: Calling, now: float) -> Result:
    """Asks the ranks where they are, unless they are being asked: what is wanted is then decided with it."""
    if state.save:
        machine = replace(machine, saved_at=now)
    if state.boundaries is not None and not state.decided:
        return machine.to(state), ()
    state = replace(state, boundaries={}, decided=False, round=state.round + 1)
    return machine.to(state), (Send(message=PrepareStop(group=machine.group, call=machine.call, round=state.round)),)


def save_is_due(machine: Machine, state: Calling, now: float) -> bool:
    """Whether it is time for a checkpoint, and the ranks can be asked."""
    if machine.save_every_s is None or state.method not in STEPPING_METHODS or state.stop or state.replies:
        return False
    if state.boundaries is not None and not state.decided:
        return False
    return now - machine.saved_at >= machine.save_every_s
