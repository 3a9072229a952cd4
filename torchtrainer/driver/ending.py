"""How a worker group ends: everything is killed first, then the error is told. Pure, like the machine."""

from __future__ import annotations

from torchtrainer.control.messages import KillGroup
from torchtrainer.driver.causes import Cause
from torchtrainer.driver.events import Action, Raised, Send
from torchtrainer.driver.states import Closed, Killing, Machine, Result


def kill(machine: Machine, cause: Cause | None, now: float, *, retry: bool = False, why: str = "") -> Result:
    """Orders every process of the group killed; the error is raised when they are gone.

    Args:
        machine: before.
        cause: of the error; None: the user wants it.
        now: monotonic seconds.
        retry, why: see `Raised`.
    """
    killing = Killing(cause=cause, until=now + machine.timeouts.cleanup_s, retry=retry, why=why)
    return machine.to(killing), (Send(message=KillGroup(group=machine.group)),)


def close(machine: Machine, cause: Cause | None, *, retry: bool = False, why: str = "") -> Result:
    """Nothing is left of the group; tells the error, if there is one."""
    actions: tuple[Action, ...] = ()
    if cause is not None:
        actions = (Raised(cause=cause, usable=False, retry=retry, why=why),)
    return machine.to(Closed(cause=cause)), actions
