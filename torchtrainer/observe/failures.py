"""What a run went through: each failure as a record, and in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from torchtrainer.driver.causes import (
    Cause,
    CrashLoop,
    LoaderDied,
    StartTimedOut,
    UserCodeFailed,
    WorkerDied,
    WorkerHung,
    WorkerLost,
)
from torchtrainer.driver.events import Recovered
from torchtrainer.driver.report import main_thread_first, short_cause, told_last
from torchtrainer.driver.views import WorkerView

How = Literal["carried", "replaced", "refetched", "restarted", ""]
FAILURE_COLUMNS = ("time", "ranks", "cause", "redone", "seconds")


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """One failure that the run went through.

    Attributes:
        time: wall clock, seconds since 1970, when it happened; for a process that hung, when it last made progress.
        ranks: those of the process that was lost, or whose loader lost one; empty: it is not a matter of certain ranks.
        cause: in a word or two, such as ``was killed by SIGKILL``.
        step: optimizer steps that were completed, as far as was known.
        epoch: passes over the training data that were started.
        redone: what was computed once more. If other processes took the ranks over: shares of a step, each the forward and
            backward of one rank. If all ranks were restarted: whole steps.
        seconds: for which training stood still, the waiting for a process that hung included; None: not recovered.
        how: ``carried``: other processes took the ranks over; ``replaced``: a new one did; ``refetched``: a process of a
            loader was lost, and new ones fetched its batches again; ``restarted``: all ranks were started anew from a checkpoint,
            or from the beginning; empty: not recovered.
    """

    time: float
    ranks: tuple[int, ...]
    cause: str
    step: int = 0
    epoch: int = 0
    redone: int = 0
    seconds: float | None = None
    how: How = ""

    @property
    def rank(self) -> int | None:
        """The rank, if it is one alone."""
        return self.ranks[0] if len(self.ranks) == 1 else None

    def cells(self) -> tuple[str, ...]:
        """This failure as a row under ``FAILURE_COLUMNS``, with the time in local time."""
        when = datetime.fromtimestamp(self.time).isoformat(sep=" ", timespec="seconds")
        seconds = "not recovered" if self.seconds is None else f"{self.seconds:.2f}"
        return when, ", ".join(map(str, self.ranks)), self.cause, self.redone_text(), seconds

    def redone_text(self) -> str:
        """What was computed once more, in words; empty if the failure was the end."""
        if self.seconds is None:
            return ""
        if not self.redone:
            return "nothing"
        if self.how == "restarted":
            return counted(self.redone, "step")
        return "1 rank's share of a step" if self.redone == 1 else f"{self.redone} ranks' shares of a step"


def ranks_of(cause: Cause) -> tuple[int, ...]:
    """The ranks that a cause points at."""
    if isinstance(cause, CrashLoop):
        return ranks_of(cause.last)
    if isinstance(cause, UserCodeFailed):
        return (cause.failures[0].rank,)
    return cause.ranks if isinstance(cause, WorkerDied | WorkerHung | StartTimedOut) else ()


def step_of(cause: Cause) -> int:
    """How many optimizer steps were completed, as far as the cause tells."""
    if isinstance(cause, CrashLoop):
        return step_of(cause.last)
    if isinstance(cause, UserCodeFailed):
        return cause.failures[0].step
    return cause.step if isinstance(cause, WorkerDied | WorkerHung) else 0


def recovery_line(found: Recovered, views: Iterable[WorkerView], lost_s: float) -> str:
    """Says in a line who was lost, who took over, and what it cost.

    Args:
        found: the recovery.
        views: the workers as they are now.
        lost_s: for how long training stood still.
    """
    if isinstance(found.cause, LoaderDied):
        return refetched_line(found.cause, found.step, lost_s)
    one = len(found.ranks) == 1
    who = f"{'' if one else 'the process of '}{named(found.ranks)} (pid {found.cause.pid})"
    stopped = "it was stopped, and " if isinstance(found.cause, WorkerHung) else ""
    takers = [view for view in views if view.carries and not set(view.ranks).isdisjoint(found.ranks)]
    taken = f"{stopped}{_takers(takers, found)} took {'it' if one else 'them'} over"
    return f"{who} {_what(found.cause)} at step {found.step}; {taken}, {spell_s(lost_s)} s lost"


def refetched_line(cause: LoaderDied, step: int | None, lost_s: float) -> str:
    """Says in a line which process of a loader was lost, and that its batches were fetched again.

    Args:
        cause: how it was lost.
        step: optimizer steps that were completed; None: nobody counts them.
        lost_s: for how long the rank waited.
    """
    at = "" if step is None else f" at step {step}"
    return (
        f"rank {cause.rank}: {short_cause(cause)} (pid {cause.pid}, {cause.loader} loader){at}; new ones fetched its batches "
        f"again, {spell_s(lost_s)} s lost"
    )


def joined_line(ranks: Collection[int], pid: int) -> str:
    """Says that a new process carries ranks that had been lost."""
    return f"a replacement (pid {pid}) carries {named(ranks)} again"


def details(cause: WorkerLost | LoaderDied) -> str:
    """What else is known of a loss: the stacks of a process that hung, or crashed, and its last words; often nothing."""
    if isinstance(cause, WorkerDied):
        return "\n".join(told_last(cause))
    if isinstance(cause, LoaderDied):
        title, lines = "It crashed here (most recent call first):", cause.stack.splitlines()
    else:
        title, lines = "Its stacks (most recent call first):", main_thread_first(cause.stacks) if cause.stacks else []
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""


def goodput_line(records: Iterable[FailureRecord], lost_s: float, total_s: float) -> str:
    """Says in a line what the failures of a run have cost; empty if none was recovered.

    Args:
        records: of the run.
        lost_s: for how long training stood still, all failures together.
        total_s: how long the run took.
    """
    recovered = [record for record in records if record.seconds is not None]
    if not recovered or total_s <= 0:
        return ""
    again = sum(record.redone for record in recovered if record.how == "restarted")
    steps = (
        "no step was lost" if not again else f"{counted(again, 'step')} {'was' if again == 1 else 'were'} taken again"
    )
    goodput = max(0.0, 100 * (1 - lost_s / total_s))
    return f"{counted(len(recovered), 'failure')} cost {spell_s(lost_s)} s of {spell_s(total_s)} s ({goodput:.1f} % goodput), {steps}"


def named(ranks: Collection[int]) -> str:
    """Ranks in a sentence: ``rank 1``, ``ranks 0, 2 and 3``."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {_listed(ranks)}"


def counted(number: int, what: str) -> str:
    """A number of things: ``1 step``, ``2 steps``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def taken_again(steps: int) -> str:
    """What is said of steps that were lost."""
    return f"{counted(steps, 'step') if steps else 'no step'} {'is' if steps < 2 else 'are'} taken again"


def spell_s(seconds: float) -> str:
    """Seconds with as many digits as matter."""
    return f"{seconds:.2f}" if seconds < 1 else f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"


def spell_age(seconds: float) -> str:
    """How long ago something was, in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _listed(numbers: Collection[int]) -> str:
    *most, last = map(str, sorted(numbers))
    return f"{', '.join(most)} and {last}" if most else last


def _what(cause: WorkerLost) -> str:
    if isinstance(cause, WorkerHung):
        return f"made no progress for {spell_s(cause.silent_s)} s in {cause.phase}"
    return short_cause(cause)


def _takers(views: Collection[WorkerView], found: Recovered) -> str:
    if found.how == "replaced":
        pids = _listed([view.pid for view in views]) if views else "?"
        return f"a replacement (pid {pids})" if len(views) < 2 else f"replacements (pids {pids})"
    owners = [min(own) for view in views if (own := set(view.ranks) - set(found.ranks))]
    if not owners:  # it changed hands again meanwhile
        return "other processes"
    return f"rank {owners[0]}'s process" if len(owners) == 1 else f"the processes of ranks {_listed(owners)}"
