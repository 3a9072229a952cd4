"""Performs what the machine decides: the only place of the driver that waits, sends and raises. Runs in the user's thread."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from torchtrainer.config import FailureConfig, Timeouts
from torchtrainer.control.messages import (
    CheckpointEnded,
    Heard,
    Heartbeat,
    Logged,
    Output,
    Reply,
    StartGroup,
)
from torchtrainer.driver.causes import Cause
from torchtrainer.driver.connection import POLL_S, HostConnection, Incoming
from torchtrainer.driver.event_journal import EventJournal
from torchtrainer.driver.events import (
    CallRequested,
    EndRequested,
    Event,
    Joined,
    Raised,
    Recovered,
    ReplacingStopped,
    Report,
    ResizeRequested,
    Returned,
    SaveRequested,
    Send,
    StopRequested,
    Tick,
)
from torchtrainer.driver.interrupts import DeferredInterrupts
from torchtrainer.driver.policies import why_not_resize
from torchtrainer.driver.report import Scene, error_of, short_cause
from torchtrainer.driver.states import Calling, Closed, Idle, Machine
from torchtrainer.driver.stragglers import Straggler
from torchtrainer.driver.views import WorkerView
from torchtrainer.errors import InvalidArgumentError, TrainerBusyError, TrainerClosedError


class Listener(Protocol):
    """Gets to see what happens while the driver waits, in the user's thread."""

    def on_waiting(self, doing: str) -> None:
        """The driver still waits."""

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        """A rank told where it is."""

    def on_output(self, output: Output) -> None:
        """Rank 0 wrote lines."""

    def on_logged(self, logged: Logged) -> None:
        """A worker, or the host, has something to tell the user."""

    def on_checkpoint(self, ended: CheckpointEnded) -> None:
        """A checkpoint was written, or could not be."""

    def on_heard(self, heard: Heard) -> None:
        """A signal that warns of a preemption came to a rank."""

    def on_failure(self, cause: Cause, error: BaseException) -> None:
        """The group failed."""

    def on_recovered(self, record: Recovered) -> None:
        """A worker was lost, and what it had left undone is done."""

    def on_joined(self, joined: Joined) -> None:
        """A new worker has taken over ranks."""

    def on_straggler(self, straggler: Straggler) -> None:
        """A worker is much slower than the others."""

    def on_replacing_stopped(self, stopped: ReplacingStopped) -> None:
        """No more workers are built; the group continues with those it has."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call ended: replies in rank order, whether it was stopped early, the latest snapshot."""

    replies: tuple[Reply, ...]
    stopped: bool
    snapshot: int


class Controller:
    """One worker group, from start to end.

    Args:
        connection: to the host.
        start: what to start.
        logs_stay: whether the log directory outlives the run.
        timeouts, hang_timeout_s: deadlines; the latter where none is learnt from step times.
        listener: sees progress and output.
        failure: what to do about workers that are lost; None: as by default, with ``hang_timeout_s`` as it is.
        min_workers: fewer workers than these do not carry all ranks.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        connection: HostConnection,
        start: StartGroup,
        *,
        logs_stay: bool,
        timeouts: Timeouts,
        hang_timeout_s: float,
        listener: Listener,
        failure: FailureConfig | None = None,
        min_workers: int = 1,
        save_every_s: float | Literal["auto"] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._start = start
        self._logs_stay = logs_stay
        self._timeouts = timeouts
        self._listener = listener
        self._clock = clock
        self._doing = "start"
        self._outcome: Returned | Raised | None = None
        self._owner_pid = os.getpid()
        self._unshown: deque[Incoming | Report] = deque()
        self._retryable = False
        self._calling = threading.Lock()
        self._turning = threading.RLock()
        self._journal = EventJournal(Path(start.log_dir) if logs_stay else None)
        self._machine = Machine.start(
            group=start.group,
            world_size=start.world_size,
            timeouts=timeouts,
            hang_timeout_s=hang_timeout_s,
            failure=failure,
            min_workers=min_workers,
            now=clock(),
            save_every_s=save_every_s,
        )

    @property
    def views(self) -> tuple[WorkerView, ...]:
        """What is known about each worker that carries ranks, or did when the group was lost; by lowest rank."""
        return tuple(sorted((view for view in self._machine.views if view.ranks), key=lambda view: view.rank))

    @property
    def retryable(self) -> bool:
        """Whether the latest failure is one after which a new group may continue from a saved state."""
        return self._retryable

    @property
    def closed(self) -> bool:
        """Whether the group takes no calls any more."""
        return isinstance(self._machine.state, Closed)

    def wait_until_ready(self) -> None:
        """Waits until every rank is built.

        Raises:
            BaseException: what user code raised while building; `EngineError` and its kind if processes were lost.
        """
        self._doing = "start"
        self._connection.open_inbox(self._start.group)
        self._connection.send(self._start)
        self._start = replace(self._start, blob=b"")  # the creators may be large, and are on their way
        self._await_outcome()

    def call(self, method: str, blob: bytes) -> Outcome:
        """Runs a method on every rank and waits for all of them.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C; a pass is then ended at a step boundary, and the group stays usable.
            TrainerBusyError: another call is running, in another thread or around this callback.
            BaseException: what user code raised; `WorkerDiedError` and its kind if processes were lost.
        """
        if not self._calling.acquire(blocking=False):
            raise TrainerBusyError(
                f"{method}() was called while {self._doing} is running: a trainer does one thing at a time. A callback "
                "gets what it needs with its event; call the trainer when the running call has returned"
            )
        try:
            return self._call(method, blob)
        finally:
            self._calling.release()

    def _call(self, method: str, blob: bytes) -> Outcome:
        if self._owner_pid != os.getpid():
            raise TrainerClosedError(
                f"this process (pid {os.getpid()}) is a forked copy of the one that made the trainer (pid "
                f"{self._owner_pid}), which alone can use it: create a new TorchTrainer here"
            )
        self._finish_interrupted_call()
        if isinstance(self._machine.state, Closed):
            self._raise_closed()
        self._doing = f"{method}()"
        self._outcome = None
        returned = self._await_outcome(CallRequested(method=method, blob=blob))
        return Outcome(
            replies=returned.replies,
            stopped=any(reply.stopped for reply in returned.replies),
            snapshot=max((reply.snapshot for reply in returned.replies), default=0),
        )

    def stop(self) -> None:
        """Has the running call end at the next step boundary, with the state saved; from a callback of the listener."""
        with DeferredInterrupts(), self._turning:
            self._handle(StopRequested(signum=None, save=True))

    def save(self) -> None:
        """Has the state saved at the next step boundary of the running call; from a callback of the listener."""
        with DeferredInterrupts(), self._turning:
            self._handle(SaveRequested())

    def resize(self, processes: int) -> None:
        """Has the ranks carried by so many workers, and waits until they are; inside a call, from a callback, it happens later.

        Raises:
            InvalidArgumentError: they cannot be.
        """
        machine = self._machine
        bound = machine.bound or ("" if machine.recovers else "workers of this group can neither join nor leave it")
        why = why_not_resize(processes, world_size=machine.world_size, min_workers=machine.min_workers, bound=bound)
        if why is not None:
            raise InvalidArgumentError(f"resize({processes!r}): {why}")
        with DeferredInterrupts(), self._turning:
            self._handle(ResizeRequested(processes=processes))
        while isinstance(self._machine.state, Idle) and self._machine.resizing:
            self._turn()

    def await_checkpoint(self, snapshot: int, timeout_s: float) -> CheckpointEnded | None:
        """Waits until a snapshot is on disk, or cannot be; None if it took too long."""
        deadline = self._clock() + timeout_s
        while not self.closed and self._clock() < deadline:
            ended = self._machine.ended
            if ended is not None and ended.number >= snapshot:
                return ended
            self._turn()
        return None

    def end(self, force: bool = False) -> None:
        """Ends the group and waits until nothing of it is left. Idempotent."""
        if self._owner_pid != os.getpid():
            return  # a forked copy of the driver: the workers are not its own
        self._doing = "shutdown"
        with DeferredInterrupts(), self._turning:
            self._handle(EndRequested(force=force))
        while not self.closed:
            self._turn()
        self._write_journal()
        self._connection.close_inbox(self._machine.group)

    def look(self) -> None:
        """Takes what has arrived, without waiting; while a call is running, whoever waits for it does so."""
        if self._owner_pid == os.getpid() and not self._calling.locked():
            self._turn(0.0)

    # The loop

    def _await_outcome(self, request: CallRequested | None = None) -> Returned:
        try:
            if request is not None:
                with DeferredInterrupts(), self._turning:
                    self._handle(request)
            while self._outcome is None:
                if self.closed:  # shut down meanwhile, from a callback or another thread
                    self._raise_closed()
                self._turn()
        except BaseException:  # Ctrl-C, or a callback that raised
            self._on_interrupt()
            raise
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, Raised):
            raise self._error(outcome)
        return outcome

    def _turn(self, timeout_s: float = POLL_S) -> None:
        with DeferredInterrupts(), self._turning:
            self._connection.poll(timeout_s)
            while (message := self._connection.take(self._machine.group)) is not None:
                self._unshown.append(message)
                self._handle(message)
            self._handle(Tick())
            self._write_journal()
        while self._unshown:
            self._show(self._unshown.popleft())
        self._listener.on_waiting(self._doing)

    def _show(self, news: Incoming | Report) -> None:
        if isinstance(news, Heartbeat):
            self._listener.on_heartbeat(news)
        elif isinstance(news, Output):
            self._listener.on_output(news)
        elif isinstance(news, Logged):
            self._listener.on_logged(news)
        elif isinstance(news, CheckpointEnded):
            self._listener.on_checkpoint(news)
        elif isinstance(news, Heard):
            self._listener.on_heard(news)
        elif isinstance(news, Recovered):
            self._listener.on_recovered(news)
        elif isinstance(news, Joined):
            self._listener.on_joined(news)
        elif isinstance(news, Straggler):
            self._listener.on_straggler(news)
        elif isinstance(news, ReplacingStopped):
            self._listener.on_replacing_stopped(news)

    def _handle(self, event: Event) -> None:
        self._machine, actions = self._journal.handle(self._machine, event, self._clock())
        for action in actions:
            if isinstance(action, Send):
                self._connection.send(action.message)
            elif isinstance(action, Returned | Raised):
                self._outcome = action
            else:
                self._unshown.append(action)

    def _write_journal(self) -> None:
        if problem := self._journal.flush():
            group, pid = self._machine.group, os.getpid()
            self._unshown.append(
                Logged(group=group, worker=-1, rank=None, pid=pid, level=logging.WARNING, text=problem)
            )

    # Interrupts and errors

    def _on_interrupt(self) -> None:
        """Asks for an early end, and gives the ranks a moment to come to a step boundary."""
        if not isinstance(self._machine.state, Calling) and self._machine.pending is None:
            return
        with DeferredInterrupts(), self._turning:
            self._handle(StopRequested(signum=int(signal.SIGINT)))
        deadline = self._clock() + self._timeouts.interrupt_s
        while isinstance(self._machine.state, Calling) and self._outcome is None and self._clock() < deadline:
            self._turn()

    def _finish_interrupted_call(self) -> None:
        """Waits for a call that was interrupted earlier and had not ended yet; its outcome is nobody's any more."""
        self._turn(0.0)  # a worker may have died since
        while not isinstance(self._machine.state, Idle | Closed):
            self._turn()

    def _error(self, raised: Raised) -> BaseException:
        scene = Scene(
            log_dir=self._start.log_dir,
            logs_stay=self._logs_stay,
            pids={rank: view.pid for view in self.views for rank in view.ranks},
            machines={rank: view.machine for view in self.views for rank in view.ranks},
            doing=self._doing,
            why=raised.why,
        )
        self._retryable = raised.retry
        error = error_of(raised.cause, scene)
        if not raised.usable:  # an exception of the user's that ends no more than its call is theirs alone
            self._listener.on_failure(raised.cause, error)
        return error

    def _raise_closed(self) -> None:
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, Raised):
            raise self._error(outcome)
        state = self._machine.state
        why = f" ({short_cause(state.cause)})" if isinstance(state, Closed) and state.cause is not None else ""
        raise TrainerClosedError(
            f"the workers of this trainer have ended after an earlier failure{why}: create a new TorchTrainer"
        )
