"""The calls of one trainer in the order of the script: replayed if done before, else made; a notice ends them.

Nothing here knows what a call does. The trainer asks before each one whether its result is known; if it is not, the ranks are
first brought to where the script is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from torchtrainer.checkpoint.copies import made
from torchtrainer.checkpoint.journal import Journal, Recorded
from torchtrainer.checkpoint.verified import Checkpoint
from torchtrainer.config import Timeouts
from torchtrainer.driver.policies import STEPPING_METHODS, LostSteps
from torchtrainer.driver.run_record import check_function, function_of_call
from torchtrainer.engines.base import CallResult, Group
from torchtrainer.errors import EngineError, Preempted, ResumeError
from torchtrainer.observe.failures import taken_again
from torchtrainer.observe.notices import notice, warn
from torchtrainer.preempt.notice import Notice
from torchtrainer.preempt.slurm import requeue
from torchtrainer.preempt.watch import NoticeWatch
from torchtrainer.process.leaving import keep_exit_code
from torchtrainer.process.signals import EXIT_PREEMPTED
from torchtrainer.topology import current

T = TypeVar("T")
EXIT_TERMINATED = 143
"""Stopped without a saved state, as a process that SIGTERM ended."""
STATE = "state.pt"
MOVING_METHODS = STEPPING_METHODS | {"update_scheduler", "load_state_dict"}
"""Calls that change the state."""
SETTING_METHODS = frozenset({"apply_worker", "apply_operator"})
"""Calls that may change what no state holds, such as which parameters are trained; repeated when a run is resumed."""


def nothing(values: list[Any]) -> None:
    """For calls without a result: the ranks return None."""


class Made(NamedTuple):
    """A call that was made, or is under way.

    Attributes:
        text: as the user would write it.
        method, keywords: what the ranks were asked to do for it.
    """

    text: str
    method: str
    keywords: dict[str, Any]


class CallReplay:
    """Replays, makes and ends the calls of a trainer. Used from the user's thread.

    Args:
        journal: what was called before.
        checkpoint: the state to continue from; None: from the beginning.
        notices: warnings of a preemption; None: nobody watches.
        timeouts: ``write_s``, ``preempt_s``.
        requeue: have Slurm start the job again.
        on_error: notes an error, `Preempted` among them, that leaves a call.
        newest: finds the newest checkpoint of this run.
        max_failures: how often the ranks are restarted in a row, without a new step between.
        speaks: this process tells the user what all ranks do alike; under a launcher rank 0 does.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        checkpoint: Checkpoint | None,
        notices: NoticeWatch | None,
        timeouts: Timeouts,
        requeue: bool,
        on_error: Callable[[type[BaseException]], None],
        newest: Callable[[], Checkpoint | None],
        max_failures: int,
        speaks: bool = True,
    ) -> None:
        self.journal = journal
        self._checkpoint = checkpoint
        self._from = int(checkpoint.meta["index"]) if checkpoint is not None else 0
        self._made: list[Made] = []
        self._asked: Made | None = None
        self._max_failures = max_failures
        self._newest = newest
        self._on_restart: Callable[[int, float], None] | None = None
        self._losses, self._lost_at = 0, -1
        self._lost_steps = LostSteps()
        self._caught_up = checkpoint is None and not journal.replaying
        self._reached = 0  # calls that the ranks have made, or that the state they restored came after
        self._notices = notices
        self._timeouts = timeouts
        self._requeue = requeue
        self._on_error = on_error
        self._speaks = speaks
        self._group: Group | None = None
        self._calling = self._leaving = self._ended = False
        self._stopping_since: float | None = None
        self._hinted = False
        self.saved_step: int | None = checkpoint.step if checkpoint is not None else None

    def attach(self, group: Group, on_restart: Callable[[int, float], None]) -> None:
        """The ranks are there.

        Args:
            group: the ranks.
            on_restart: told, when they were restarted, how many steps are repeated and how many seconds it took.
        """
        self._group = group
        self._on_restart = on_restart

    # Calls

    def recorded(self, text: str, method: str, **keywords: Any) -> Recorded | None:
        """The result of the next call if it is known; else the ranks are where the script is when this returns.

        Args:
            text: the call, as the user would write it.
            method, keywords: what the ranks are asked to do for it; the keywords of `run`.

        Raises:
            CallMismatchError: the script asks for something else than it did before.
            Preempted: a notice came.
        """
        under_way = self._checkpoint.meta.get("call") if self._checkpoint is not None else None
        expected = under_way if self.journal.index == self._from else None
        with self._noting_errors():
            known = self.journal.expect(text, expected)
            if known is not None:
                check_function(text, known.function, function_of_call(keywords))
                self._made.append(Made(text, method, keywords))
                return known
            self._asked = Made(text, method, keywords)
            self.leave_if_noticed()  # before the state is restored: a call that is half done is continued by the call alone
            self.catch_up()
        return None

    def run(self, method: str, text: str = "", **keywords: Any) -> CallResult:
        """Makes a call on every rank.

        Raises:
            Preempted: a notice came, and the call was stopped for it.
        """
        with self._noting_errors():
            return self.retrying(lambda: self._make(self.journal.index, text, method, keywords))

    def retrying(self, make: Callable[[], T]) -> T:
        """Makes a call; if the processes are lost in it beyond recovery, starts them anew from the newest state, and makes it again.

        Raises:
            BaseException: what the call raises, once it was lost ``max_failures`` times without a new step between.
        """
        again = False
        while True:
            try:
                if again:
                    self._go_back()
                return make()
            except Exception as error:
                if self._ended or not self._living().retryable or not self._may_go_back():
                    raise
                warn(f"{str(error).splitlines()[0]} Restarting all ranks")
                again = True

    def _may_go_back(self) -> bool:
        step = self._step()
        self._losses = self._losses + 1 if step <= self._lost_at else 1
        self._lost_at = max(
            step, self._lost_at
        )  # the count of ranks that died may be one behind: that is no new step later
        self._lost_steps.lost(step)
        return self._losses <= self._max_failures

    def _go_back(self) -> None:
        """Starts the ranks anew, and brings them to where the script is."""
        began = time.monotonic()
        self._living().restart()
        self._checkpoint = self._newest()
        self._from = int(self._checkpoint.meta["index"]) if self._checkpoint is not None else 0
        self._caught_up, self._reached = False, 0
        reached = self._checkpoint.step if self._checkpoint is not None else 0
        self._lost_steps.go_on_from(reached)
        self.catch_up()
        where = f"the checkpoint of step {reached}" if self._checkpoint is not None else "the beginning"
        redone, seconds = self._lost_steps.count(), time.monotonic() - began
        notice(f"continuing from {where} after {seconds:.1f} s: {taken_again(redone)}")
        if self._on_restart is not None:
            self._on_restart(redone, seconds)

    def _step(self) -> int:
        return max((view.step for view in self._living().views), default=0)

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._on_error(type(error))
            raise

    def _make(self, index: int, text: str, method: str, keywords: dict[str, Any]) -> CallResult:
        if method in STEPPING_METHODS:
            keywords = {**keywords, "mark": {"index": index, "call": text}}
        self._calling = True
        try:
            if self._stopping_since is not None:  # noticed by the thread that looks, between two calls
                self._living().stop()
            result = self._living().call(method, **keywords)
        finally:
            self._calling = False
        if result.stopped and (found := self._agreed()) is not None:
            self._leave(found, result.snapshot)
        return result

    def done(self, text: str, result: Any, *, step: int, epoch: int, is_state: bool = False) -> None:
        """Remembers a call that has been completed; ``is_state``: it returned the state of the training."""
        function = None
        if self._asked is not None:
            function = function_of_call(self._asked.keywords)
            self._made.append(self._asked)
            self._asked = None
        if self._caught_up:
            self._reached = len(self._made)
        lost = self.journal.add(text, result, step=step, epoch=epoch, is_state=is_state, function=function)
        if lost is not None:
            warn(f"the result of {text} is not recorded, as {lost}. This run cannot be resumed beyond it")

    def catch_up(self) -> None:
        """Brings the ranks to where the script is: by the checkpoint, and by the calls after it."""
        if self._caught_up:
            return
        self._caught_up = True
        self._advance(len(self._made))

    def _advance(self, end: int) -> None:
        """Brings the ranks to where they were before a call, by the checkpoint if it is of an earlier one, and by the calls since."""
        for one in self._made[self._reached : end]:
            for given in one.keywords.values():
                made(given)  # a state that has to be made again first
        for index in range(self._reached, end):
            if index == self._from:
                self._restore()
            one = self._made[index]
            if one.method in SETTING_METHODS or (index >= self._from and one.method in MOVING_METHODS):
                self._make(index, one.text, one.method, one.keywords)
        if end <= self._from:
            self._restore()
        self._reached = end

    def make_again(self, index: int, make: Callable[[], T]) -> T:
        """The result of an earlier call that returned the state, of which no copy is kept: the ranks are trained again up to there.

        Args:
            index: place of the call.
            make: asks the ranks for it.

        Raises:
            ResumeError: this process does not start the ranks.
        """
        why = f"the script looks at what {self._made[index].text} returned as call {index + 1}, of which {self.journal.copies.rule}"
        if self._caught_up or not 0 < self._reached <= index:
            try:
                self._living().restart()
            except EngineError as error:
                raise ResumeError(
                    f"{why}. trainer.save(path) needs no copy; pass resume=False to start anew"
                ) from error
            notice(f"{why}: training is repeated up to that call. trainer.save(path) needs no copy")
            self._reached = 0
        if self._from > index:
            self._checkpoint, self._from = None, 0
        self._advance(index)
        result = make()
        if self._caught_up:
            self._advance(len(self._made))
        return result

    def _restore(self) -> None:
        if self._checkpoint is not None:
            self._living().call("restore_complete", path=str(self._checkpoint.file(STATE)))

    def _living(self) -> Group:
        assert self._group is not None
        return self._group

    # Notices

    def look(self) -> None:
        """Looks for a notice while the ranks work, several times a second; the running call is then stopped.

        In the user's thread where that only waits for the ranks; in one beside it where it is a rank itself.

        Raises:
            Preempted: there is no time left, or the user does not want to wait.
        """
        if self._notices is None or self._ended:
            return
        found = self._notices.pending()
        if found is None:
            return
        if self._notices.urgent:
            self._end(EXIT_TERMINATED, f"{found.source} came again: leaving at once")
        if self._leaving:
            return
        if self._group is None:  # the ranks are being built
            if found.must_stop:
                self._end(self._code(), f"{found.text}; {self._saved()}")
            return
        if not found.must_stop:
            self._save_for(found)
        elif self._stopping_since is None:
            self._stopping_since = time.monotonic()
            if self._calling:
                self._living().stop()
        elif self._seconds_left(found) <= 0:
            self._end(self._code(), f"{found.text}: no step boundary was reached within preempt_s; {self._saved()}")

    def leave_if_noticed(self) -> None:
        """Between two calls: saves the state and leaves, if there is a notice.

        Raises:
            Preempted: there is one.
        """
        found = self._agreed()
        if self._notices is None or found is None:
            return
        if self._notices.urgent:
            self._end(EXIT_TERMINATED, f"{found.source} came again: leaving at once")
        if not found.must_stop or self._group is None:
            return
        self._stopping_since = self._stopping_since or time.monotonic()
        if not self._caught_up:
            self._end(self._code(), f"{found.text}; {self._saved()}")
        mark = {"index": self.journal.index, "call": None}
        self._leave(found, self._living().call("save_complete", mark=mark).snapshot)

    def heard(self, signum: int) -> None:
        """A signal that warns of a preemption came to a rank."""
        if self._notices is not None:
            self._notices.hear(signum)

    def noted(self, step: int) -> None:
        """A checkpoint is on disk."""
        self.saved_step = step

    def _agreed(self) -> Notice | None:
        """The notice that all ranks act upon, whichever of their processes got it."""
        if self._notices is None or self._group is None:
            return None
        return self._group.noticed(self._notices.pending())

    def _leave(self, found: Notice, snapshot: int) -> None:
        assert self._notices is not None
        self._leaving = True
        self._stopping_since = self._stopping_since or time.monotonic()
        ended = self._living().await_checkpoint(snapshot, min(self._timeouts.write_s, self._seconds_left(found)))
        if ended is not None and not ended.error:
            self.noted(ended.step)
            self._notices.acknowledge()
        self._end(self._code(), f"{found.text}; {self._saved()}", told=self._speaks)

    def _end(self, code: int, text: str, *, told: bool = True) -> None:
        self._ended = True
        self._on_error(Preempted)
        if code == EXIT_PREEMPTED and current() is not None:
            keep_exit_code(code)
        if code == EXIT_PREEMPTED and self._requeue and (said := requeue(os.environ)):
            text = f"{text}; {said}"
        if told:
            notice(text)
        raise Preempted(code, text)

    def _code(self) -> int:
        return EXIT_TERMINATED if self.saved_step is None else EXIT_PREEMPTED

    def _saved(self) -> str:
        if self.saved_step is None:
            return "nothing was saved yet"
        return f"the state after step {self.saved_step} is saved: start the same command again to continue"

    def _seconds_left(self, found: Notice) -> float:
        if (left := found.seconds_left()) is not None:
            return left
        now = time.monotonic()
        return max(0.0, (self._stopping_since or now) + self._timeouts.preempt_s - now)

    def _save_for(self, hint: Notice) -> None:
        if not self._hinted:
            self._hinted = True
            notice(f"{hint.text}: a checkpoint is saved, and the run continues")
            if self._calling:
                self._living().save()
