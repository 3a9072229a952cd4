"""Everything that a launcher waits for, in one place: workers' ends, signals, and calls that block.

One thread, that of the launcher, uses it. Signal handlers only remember the signal and write a byte.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

from torchtrainer.errors import EngineError
from torchtrainer.observe.notices import warn
from torchtrainer.process.starters import (
    ChildExited,
    ChildNotStarted,
    ChildStarted,
    PreloadFailed,
    Starter,
    StarterFailed,
)

T = TypeVar("T")
POLL_S = 0.05
"""Polling interval for exits of exec'd workers where the system does not report them."""
RUN_CHECK_S = 1.0
"""Time between two checks on a blocking call, in case its last byte is lost."""
START_TIMEOUT_S = 120.0
"""How long workers may take to exist; a spawner that is an interpreter of its own imports torch first."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a worker process ended.

    Attributes:
        exit_code: as `subprocess.Popen.returncode` gives it.
        max_rss_bytes: its peak of resident memory; 0: unknown.
        at_s, at_ns: when this launcher learned of it: monotonic, and wall clock in nanoseconds since 1970.
        order: counts ends.
    """

    exit_code: int
    max_rss_bytes: int
    at_s: float
    at_ns: int
    order: int


class Call(Generic[T]):
    """A call in a thread of its own."""

    def __init__(self) -> None:
        self.outcome: list[tuple[bool, Any]] = []

    @property
    def done(self) -> bool:
        """Whether the function has returned or raised."""
        return bool(self.outcome)

    def result(self) -> T:
        """What it returned; raises what it raised."""
        succeeded, value = self.outcome[0]
        if succeeded:
            return value  # type: ignore[no-any-return]
        raise value


class ProcessWatch:
    """Waits for workers and signals. A context: signal handlers are in place inside it, the earlier ones after it.

    Args:
        starter: starts the workers and tells of their ends.
        signals: those that end the launch; `on_signal` is called with them, from `wait` and `run`.
        reports: signals that ask for something, each with what to call; the launch continues.
        on_signal: raises.

    Attributes:
        ended: how workers ended that did, by pid.
        lost: the spawner is gone: its workers end with it, and nobody tells of that.
    """

    def __init__(
        self,
        starter: Starter,
        signals: Sequence[signal.Signals],
        reports: Mapping[signal.Signals, Callable[[], None]],
        on_signal: Callable[[signal.Signals], None],
    ) -> None:
        self.starter = starter
        self.ended: dict[int, Ended] = {}
        self._ends = 0
        self._started: dict[str, int] = {}
        self._signals = tuple(signals)
        self._reports = dict(reports)
        self._on_signal = on_signal
        self._received: list[signal.Signals] = []
        self._ending = False
        self.lost = False
        self._previous: dict[signal.Signals, Any] = {}
        self._calls: list[Call[Any]] = []
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)

    def __enter__(self) -> ProcessWatch:
        if threading.current_thread() is threading.main_thread():  # Python takes handlers from no other
            for signum in (*self._signals, *self._reports):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if previous is None else previous)
        if all(
            call.done for call in self._calls
        ):  # a thread that is still in one would write into whatever has the number then
            os.close(self._woken)
            os.close(self._wake)

    def start(self, specs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Starts workers and returns their pids by key once all exist.

        Raises:
            EngineError: they do not come to be.
        """
        for spec in specs:
            self.starter.start(spec)
        keys = [spec["key"] for spec in specs]
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(key in self._started for key in keys):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise EngineError(
                    f"no worker processes within {START_TIMEOUT_S:g} s (START_TIMEOUT_S): is memory short?"
                )
            self.wait(left_s)
        return {key: self._started.pop(key) for key in keys}

    def wait(self, timeout_s: float) -> None:
        """Returns at the first event, or after the time-out.

        Raises:
            EngineError: the spawner is gone.
            whatever ``on_signal`` raises.
        """
        self._select(0.0 if self._received else timeout_s)
        self._collect()
        self._handle_signals()

    def wait_quietly(self, timeout_s: float) -> bool:
        """Like `wait`, while workers are being stopped: returns whether a signal to end came, instead of raising.

        If that is the first one, because workers are stopped only to start again, the next `wait` raises it.
        """
        self._select(timeout_s)
        self._collect()
        ending = [s for s in self._received if s in self._signals]
        self._received = [] if self._ending else ending
        return bool(ending)

    def begin(self, function: Callable[[], T]) -> Call[T]:
        """Calls a function that may block for long, in a thread of its own, which ends a `wait` when it is done."""
        call = Call[T]()

        def run() -> None:
            try:
                call.outcome.append((True, function()))
            except BaseException as error:  # handed to whoever asks for the result
                call.outcome.append((False, error))
            _write_byte(self._wake)

        self._calls = [one for one in self._calls if not one.done] + [call]
        threading.Thread(target=run, name="torchtrainer-rendezvous", daemon=True).start()
        return call

    def finish(self, call: Call[T], meanwhile: Callable[[], None] = lambda: None) -> T:
        """Returns what the function of a call returns, or raises what it raises, while signals are answered.

        If a signal ends the launch, or ``meanwhile`` raises, the thread is left behind: it is a daemon.

        Args:
            call: as `begin` returned it.
            meanwhile: called about once a second until the function returns.
        """
        while not call.done:
            self.wait(RUN_CHECK_S)
            if not call.done:
                meanwhile()
        return call.result()

    def run(self, function: Callable[[], T], meanwhile: Callable[[], None] = lambda: None) -> T:
        """`begin` and `finish` in one."""
        return self.finish(self.begin(function), meanwhile)

    def _select(self, timeout_s: float) -> None:
        fds = self.starter.fds()
        # Two writers share the pipe, a handler and the thread of `run`; its bytes only say: look.
        ready, _, _ = select.select([self._woken, *fds], [], [], timeout_s if fds else min(timeout_s, POLL_S))
        if self._woken in ready:
            os.read(self._woken, 4096)

    def _collect(self) -> None:
        for event in self.starter.events():
            if isinstance(event, ChildStarted):
                self._started[event.key] = event.pid
                self.ended.pop(event.pid, None)  # the system gave an earlier worker's number again
            elif isinstance(event, ChildExited):
                self._ends += 1
                self.ended[event.pid] = Ended(
                    exit_code=event.exit_code,
                    max_rss_bytes=event.max_rss_bytes,
                    at_s=time.monotonic(),
                    at_ns=time.time_ns(),
                    order=self._ends,
                )
            elif isinstance(event, ChildNotStarted):
                raise EngineError(f"workers cannot be started: {event.text}")
            elif isinstance(event, PreloadFailed):
                warn(event.text)
            elif isinstance(event, StarterFailed):
                self.lost = True
                raise EngineError(f"workers cannot be started or watched any more: {event.text}")

    def _handle_signals(self) -> None:
        while self._received:
            signum = self._received.pop(0)
            if signum in self._reports:
                self._reports[signum]()
            else:
                self._ending = True
                self._on_signal(signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received.append(signal.Signals(signum))
        _write_byte(self._wake)


def _write_byte(fd: int) -> None:
    try:
        os.write(fd, b"!")
    except (BlockingIOError, OSError):  # full: whoever reads will look anyway; closed: nobody waits any more
        return
