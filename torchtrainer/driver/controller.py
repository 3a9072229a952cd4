"""Performs what the machine decides: the only place of the driver that waits, sends and raises. Runs in the user's thread."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torchtrainer.config import Timeouts
from torchtrainer.control.messages import Beat, CheckpointEnded, Heard, Output, Reply, StartGroup
from torchtrainer.driver.causes import Cause
from torchtrainer.driver.connection import POLL_S, HostConnection, Incoming
from torchtrainer.driver.interrupts import HeldInterrupts
from torchtrainer.driver.machine import handle
from torchtrainer.driver.policies import RankView
from torchtrainer.driver.report import Scene, error_of, short_cause
from torchtrainer.driver.states import (
    Calling,
    CallRequested,
    Closed,
    EndRequested,
    Event,
    Idle,
    Machine,
    Raised,
    Returned,
    SaveRequested,
    Send,
    StopRequested,
    Tick,
)
from torchtrainer.errors import TrainerBusyError, TrainerClosedError


class Listener(Protocol):
    """Gets to see what happens while the driver waits, in the user's thread."""

    def on_waiting(self, doing: str) -> None:
        """The driver still waits."""

    def on_beat(self, beat: Beat) -> None:
        """A rank told where it is."""

    def on_output(self, output: Output) -> None:
        """Rank 0 wrote lines."""

    def on_checkpoint(self, ended: CheckpointEnded) -> None:
        """A checkpoint was written, or could not be."""

    def on_heard(self, heard: Heard) -> None:
        """A signal that warns of a preemption came to a rank."""

    def on_failure(self, cause: Cause, error: BaseException) -> None:
        """The group failed."""


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
        timeouts, hang_timeout_s: deadlines.
        listener: sees progress and output.
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
        self._unshown: deque[Incoming] = deque()
        self._calling = threading.Lock()
        self._turning = threading.RLock()
        self._machine = Machine.start(
            group=start.group,
            world_size=start.world_size,
            timeouts=timeouts,
            hang_timeout_s=hang_timeout_s,
            now=clock(),
            save_every_s=save_every_s,
        )

    @property
    def views(self) -> tuple[RankView, ...]:
        """What is known of each rank."""
        return self._machine.views

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
        with HeldInterrupts(), self._turning:
            self._handle(StopRequested(signum=None, save=True))

    def save(self) -> None:
        """Has the state saved at the next step boundary of the running call; from a callback of the listener."""
        with HeldInterrupts(), self._turning:
            self._handle(SaveRequested())

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
        with HeldInterrupts(), self._turning:
            self._handle(EndRequested(force=force))
        while not self.closed:
            self._turn()
        self._connection.close_inbox(self._machine.group)

    def look(self) -> None:
        """Takes what has arrived, without waiting; while a call is running, whoever waits for it does so."""
        if self._owner_pid == os.getpid() and not self._calling.locked():
            self._turn(0.0)

    # The loop

    def _await_outcome(self, request: CallRequested | None = None) -> Returned:
        try:
            if request is not None:
                with HeldInterrupts(), self._turning:
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
        with HeldInterrupts(), self._turning:
            self._connection.poll(timeout_s)
            while (message := self._connection.take(self._machine.group)) is not None:
                self._unshown.append(message)
                self._handle(message)
            self._handle(Tick())
        while self._unshown:
            self._show(self._unshown.popleft())
        self._listener.on_waiting(self._doing)

    def _show(self, message: Incoming) -> None:
        if isinstance(message, Beat):
            self._listener.on_beat(message)
        elif isinstance(message, Output):
            self._listener.on_output(message)
        elif isinstance(message, CheckpointEnded):
            self._listener.on_checkpoint(message)
        elif isinstance(message, Heard):
            self._listener.on_heard(message)

    def _handle(self, event: Event) -> None:
        self._machine, actions = handle(self._machine, event, self._clock())
        for action in actions:
            if isinstance(action, Send):
                self._connection.send(action.message)
            else:
                self._outcome = action

    # Interrupts and errors

    def _on_interrupt(self) -> None:
        """Asks for an early end, and gives the ranks a moment to come to a step boundary."""
        if not isinstance(self._machine.state, Calling):
            return
        with HeldInterrupts(), self._turning:
            self._handle(StopRequested(signum=int(signal.SIGINT)))
        deadline = self._clock() + self._timeouts.interrupt_s
        while self._outcome is None and self._clock() < deadline:
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
            pids={view.rank: view.pid for view in self.views},
            doing=self._doing,
        )
        error = error_of(raised.cause, scene)
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
