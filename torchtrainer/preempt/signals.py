"""Signals as notices: what was installed before is called as well, comes back at the end, and stays in forked processes."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from torchtrainer.preempt.notice import Notice, is_more_urgent
from torchtrainer.preempt.slurm import deadline_near_limit
from torchtrainer.preempt.wake import Wake

GRACE_VARIABLE = "TORCHTRAINER_GRACE_S"
"""Environment variable: seconds from SIGTERM to SIGKILL, such as a pod's ``terminationGracePeriodSeconds``."""


class SignalWatch:
    """Turns signals of this process into notices.

    Args:
        names: of the signals; those that this system lacks, or that are ignored now, are left alone.
        grace_s: seconds from a signal to the end; None: unknown.
        repeat_s: the same signal again within this time is the same notice: a launcher passes on what its whole job got, too.
        environ: of this process, for the end of a Slurm job.
        news: set when there is a new notice.
    """

    def __init__(
        self, names: Sequence[str], *, grace_s: float | None, repeat_s: float, environ: Mapping[str, str], news: Wake
    ) -> None:
        self.notice: Notice | None = None
        self.urgent = False
        self._names = names
        self._grace_s = grace_s
        self._repeat_s = repeat_s
        self._environ = environ
        self._news = news
        self._before: dict[int, Callable[[int, FrameType | None], object] | int] = {}
        self._came_at: dict[int, float] = {}
        self._pid = 0
        self._closed = False
        self._passing_on = False

    def install(self) -> None:
        """Starts watching; does nothing outside the main thread of the main interpreter, where Python allows no other."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        for name in self._names:
            signum = getattr(signal, name, None)
            before = None if signum is None else signal.getsignal(signum)
            if signum is None or before in (
                None,
                signal.SIG_IGN,
                self._on_signal,
            ):  # None: not installed by Python code
                continue
            self._before[signum] = before
            try:
                signal.signal(signum, self._on_signal)
            except ValueError:  # the main thread of a sub-interpreter
                del self._before[signum]

    def renew(self) -> None:
        """Takes back a signal for which somebody else has installed something since, as ``ray.init()`` does; that is called as well."""
        if self._pid == os.getpid() and not self._closed:
            self.install()

    def close(self) -> None:
        """Puts back what was there before, unless somebody put something else in the place meanwhile; idempotent.

        In another thread than the main one, where Python does not allow that, signals do from now on what they did before.
        """
        self._closed = True
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in [signum for signum in self._before if signal.getsignal(signum) == self._on_signal]:
            signal.signal(signum, self._before.pop(signum))

    def hear(self, signum: int) -> None:
        """Takes a signal that came to another process of the run: a warning, if there was none before."""
        if self.notice is None:
            now = time.monotonic()
            self._came_at[signum] = now
            self.notice = self._notice_of(signum, now)
            self._news.set()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Runs in the main thread between two bytecodes: takes no lock, waits for nothing."""
        if self._closed or os.getpid() != self._pid:
            self._do_as_before(signum, frame)
            return
        now = time.monotonic()
        repeated = now - self._came_at.get(signum, -math.inf) < self._repeat_s
        if not repeated:
            self._came_at[signum] = now
            self.urgent = self.notice is not None
            notice = self._notice_of(signum, now)
            if is_more_urgent(notice, self.notice):
                self.notice = notice
            self._news.set()
        self._pass_on(signum, frame)

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        """Calls what was there before. It may not end the process, which is stopped once its state is saved."""
        before = self._before.get(signum)
        if not callable(before) or before is signal.default_int_handler or self._passing_on:
            return  # passing on: it was put over this one, and calls it in turn
        self._passing_on = True
        try:
            with contextlib.suppress(SystemExit):
                before(signum, frame)
        finally:
            self._passing_on = False

    def _notice_of(self, signum: int, now: float) -> Notice:
        name = signal.Signals(signum).name
        deadline = None if self._grace_s is None else now + self._grace_s
        limit = deadline_near_limit(self._environ) if signum != signal.SIGTERM else None
        if limit is not None and (deadline is None or limit < deadline):
            deadline = limit
        left = "" if deadline is None else f", {max(0.0, deadline - now):.0f} s are left"
        return Notice(source=name, deadline=deadline, must_stop=True, text=f"got {name}{left}")

    def _do_as_before(self, signum: int, frame: FrameType | None) -> None:
        """For a closed watch that could not be taken down, and for processes that were forked from this one.

        Schedulers send their early signals to every process of a job. The default action would end the data loaders of a run
        that is about to save its state, so in forked processes only SIGTERM, which `multiprocessing` ends them with, has it.
        """
        before = self._before.get(signum)
        if callable(before):
            before(signum, frame)
        elif signal.getsignal(signum) == self._on_signal and (signum == signal.SIGTERM or os.getpid() == self._pid):
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


def grace_from(environ: Mapping[str, str], *, say: Callable[[str], None]) -> float | None:
    """Seconds from SIGTERM to the end as the environment gives them; None, and a line for the user, if it is no number."""
    text = environ.get(GRACE_VARIABLE)
    if text is None:
        return None
    try:
        grace_s = float(text)
    except ValueError:
        grace_s = math.nan
    if 0 <= grace_s < math.inf:
        return grace_s
    say(f"{GRACE_VARIABLE}={text!r} is not a number of seconds: the time left after a notice is unknown")
    return None
