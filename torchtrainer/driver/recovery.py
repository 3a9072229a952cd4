"""What follows when a worker is lost: its ranks are carried by others, at once or by a replacement, or the group ends. Pure.

What happens to lost ranks, `policies.decide_recovery` decides from values: ranks are adopted (AdoptRanks to the survivors with the
fewest), wait for a replacement (see `reassign`), start again in a new group, or the run ends.

The survivors keep their memory and wait in the exchange in which the ranks are missed; `RanksAdopted` says that they have got past it.
"""

from __future__ import annotations

from dataclasses import replace

from torchtrainer.control.messages import AdoptRanks, Bound, LoaderLost, RanksAdopted
from torchtrainer.driver.causes import CrashLoop, LoaderDied, StartTimedOut, UserCodeFailed, WorkerDied, WorkerLost
from torchtrainer.driver.ending import kill
from torchtrainer.driver.events import Action, Joined, Recovered, ReplacingStopped, Send
from torchtrainer.driver.layout import spread
from torchtrainer.driver.policies import RecoveryAction, Situation, decide_recovery
from torchtrainer.driver.states import Budget, Calling, Idle, Loss, Machine, Result
from torchtrainer.driver.views import WorkerTable, WorkerView

ONLY_THERE = "its state existed only in that process"
"""Why a worker of a group that does not recover cannot be replaced."""
BURST_S = 0.1
"""Workers that are lost within this time of each other are one failure of the budget: whatever it was, it took them together."""


def lose(machine: Machine, view: WorkerView, cause: WorkerLost, now: float) -> Result:
    """A worker that carries ranks is gone, and did not say why; `recover` has others carry them, or `reassign` a replacement.

    Args:
        machine: of a group that can recover.
        view: of the worker.
        cause: how it was lost.
        now: monotonic seconds.
    """
    machine = spend(machine, now)
    step = max(view.step for view in machine.views)
    loss = Loss(worker=view.worker, ranks=view.ranks, cause=cause, step=step, since=now, left=frozenset(view.ranks))
    views = WorkerTable(
        replace(v, lost=True, busy=False, phase="gone") if v.worker == view.worker else v for v in machine.views
    )
    machine = replace(machine, views=views, losses=(*machine.losses, loss))
    decision = decide_recovery(situation(machine))
    if decision.action is not RecoveryAction.FAIL:
        return machine, ()  # `recover` does it, whenever it is possible
    if not machine.failure.max_failures:
        return kill(machine, cause, now, why=decision.reason)
    return kill(machine, CrashLoop(failures=machine.budget.failures, last=cause), now)


def lose_for_good(machine: Machine, cause: WorkerLost, now: float) -> Result:
    """A worker of a group that cannot recover is gone, or has to be killed: the group ends, and may start again."""
    decision = decide_recovery(situation(machine))
    return kill(machine, cause, now, retry=may_retry(machine, cause), why=decision.reason)


def may_retry(machine: Machine, cause: WorkerLost) -> bool:
    """Whether a new group may go on from a saved state after this loss: it was not what user code wanted, nor is it forbidden."""
    return getattr(cause, "failure", None) is None and machine.failure.max_failures > 0


def situation(machine: Machine) -> Situation:
    """What a recovery depends on, as things are now."""
    return Situation(
        failures=machine.budget.failures,
        max_failures=machine.failure.max_failures,
        lost_for_good="" if machine.recovers else ONLY_THERE,
        bound=machine.bound,
        carriers=machine.carrier_count,
        min_workers=machine.min_workers,
        replacement_comes=_enough_will_come(machine),
    )


def spend(machine: Machine, now: float) -> Machine:
    """The machine with one more failure in its budget, unless it belongs to the one before."""
    budget = machine.budget
    step = max((view.step for view in machine.views), default=0)
    if now - budget.since <= BURST_S:
        return replace(machine, budget=replace(budget, step=max(step, budget.step)))
    failures = 1 if budget.progressed else budget.failures + 1
    return replace(machine, budget=Budget(failures=failures, since=now, step=step))


def note_step(machine: Machine, step: int) -> Machine:
    """The machine after an optimizer step was completed, as far as it makes up for failures."""
    if machine.budget.progressed or step <= machine.budget.step:
        return machine
    return replace(machine, budget=replace(machine.budget, progressed=True))


def lose_newcomer(
    machine: Machine, view: WorkerView, cause: UserCodeFailed | WorkerLost | StartTimedOut, now: float
) -> Result:
    """A worker that was to join is gone, or will not come. What user code raises while it is built is not tried again."""
    if not machine.at_work:
        return machine.without(view.worker), ()
    tries = machine.unbuilt + 1
    users = isinstance(cause, UserCodeFailed) or (isinstance(cause, WorkerDied) and cause.failure is not None)
    stops = users or tries >= machine.tries
    machine = replace(machine.without(view.worker), unbuilt=max(tries, machine.tries) if stops else tries)
    if not stops:
        return machine, ()
    if machine.uncarried and decide_recovery(situation(machine)).action is not RecoveryAction.ADOPT:
        final = cause if users or tries == 1 else CrashLoop(failures=tries, last=cause, building=True)
        return kill(machine, final, now, why="the replacement of a lost worker could not be built")
    return machine, (ReplacingStopped(tries=tries, cause=cause),)


# What becomes possible after any event


def recover(machine: Machine, now: float) -> Result:
    """Does what is decided about ranks that nobody carries: nothing, while they wait for a replacement."""
    if not machine.uncarried:
        return machine, ()
    decision = decide_recovery(situation(machine))
    if decision.action is RecoveryAction.RESTART:
        return kill(machine, machine.losses[0].cause, now, retry=True, why=decision.reason)
    return _adopt(machine, now) if decision.action is RecoveryAction.ADOPT else (machine, ())


def _enough_will_come(machine: Machine) -> bool:
    """Whether the newcomers that are there, or may still be built, can end the wait."""
    if machine.replacing:
        return True
    if machine.bound:
        return set(machine.awaited) <= {view.like for view in machine.newcomers}
    return bool(machine.newcomers) and machine.carrier_count + len(machine.newcomers) >= machine.min_workers


def _adopt(machine: Machine, now: float) -> Result:
    """Has the survivors with the fewest ranks carry those that nobody carries."""
    lost, able = machine.uncarried, machine.able
    if not able:
        return machine, ()
    actions: list[Action] = []
    views = {view.worker: view for view in machine.views if not view.lost}
    for worker, ranks in spread(lost, {view.worker: view.ranks for view in able}).items():
        views[worker] = with_ranks(machine, views[worker], (*views[worker].ranks, *ranks), "carry", now)
        message = AdoptRanks(group=machine.group, worker=worker, call=machine.call, ranks=list(ranks))
        actions.append(Send(message=message))
    return replace(machine, views=WorkerTable(views.values())), tuple(actions)


def with_ranks(machine: Machine, view: WorkerView, ranks: tuple[int, ...], phase: str, now: float) -> WorkerView:
    """A worker's view when it carries these ranks; one that did nothing enters a phase, if the call goes on for it."""
    busy = machine.owing(ranks)
    view = replace(view, ranks=tuple(sorted(ranks)), phase_times=())
    if busy and not view.busy:
        return replace(view, busy=True, phase=phase, phase_since=now, heard_at=now)
    return replace(view, busy=busy)


# What workers say


def on_ranks_adopted(machine: Machine, event: RanksAdopted, now: float) -> Result:
    """Sent when all ranks have got past the step in which a worker was lost; also by a newcomer that has joined."""
    view = machine.view(event.worker)
    if view is None or not isinstance(machine.state, Idle | Calling):
        return machine, ()
    machine = note_step(machine, event.step)
    joined: tuple[Action, ...] = ()
    if view.joining:
        machine = replace(machine.see(event.worker, joining=False, reading=False), unbuilt=0)
        joined = (Joined(worker=event.worker, ranks=view.ranks),)
    machine, recovered = done(machine, event.ranks, now, event.redone)
    return machine, (*joined, *recovered)


def refetched(lost: LoaderLost) -> Recovered:
    """The recovery of which a rank tells."""
    return Recovered(
        worker=lost.worker,
        ranks=(lost.rank,),
        cause=LoaderDied(
            rank=lost.rank,
            loader=lost.loader,
            pid=lost.pid,
            exit_code=lost.exit_code,
            oom=lost.oom,
            stack=lost.stack,
        ),
        step=lost.step,
        redone=0,
        seconds=lost.seconds,
        how="refetched",
    )


def on_bound(machine: Machine, event: Bound, now: float) -> Result:
    """Sent when a worker was seen to use collectives of the user's: whoever is lost from now on takes the group along."""
    if machine.view(event.worker) is None:
        return machine, ()
    machine = replace(machine, facts={**machine.facts, "bound": event.bound, "recovers": False})
    if not machine.at_work or not machine.losses:
        return machine, ()
    return kill(machine, machine.losses[0].cause, now, retry=True, why=event.bound)


def done(machine: Machine, ranks: list[int], now: float, redone: int = 0) -> Result:
    """These ranks are carried, as far as they were lost."""
    losses: list[Loss] = []
    actions: list[Action] = []
    for loss in machine.losses:
        if loss.left.isdisjoint(ranks):
            losses.append(loss)
            continue
        rest = replace(loss, left=loss.left.difference(ranks), redone=loss.redone + redone)
        if rest.left:
            losses.append(rest)
        else:
            actions.append(_recovered(rest, now))
    return replace(machine, losses=tuple(losses)), tuple(actions)


def _recovered(loss: Loss, now: float) -> Recovered:
    return Recovered(
        worker=loss.worker,
        ranks=loss.ranks,
        cause=loss.cause,
        step=loss.step,
        redone=loss.redone,
        seconds=now - loss.since,
        how="replaced" if loss.replaced else "carried",
    )
