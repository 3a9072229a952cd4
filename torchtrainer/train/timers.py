"""How long the parts of a step take. Off unless a call is profiled; then each part costs two clock readings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

_OFF: AbstractContextManager[None] = nullcontext()

PHASES: Mapping[str, str] = {
    "data": "data",
    "copy": "copy",
    "fwd": "forward",
    "grad": "backward",
    "give": "exchange",
    "sync": "exchange",
    "apply": "optimizer",
    "snapshot": "snapshot",
}
"""The phases of a step, by the names of the timers that measure them."""


class TimerStat:
    """Durations of one part, in seconds; a context manager that measures one more. Not re-entrant, one thread.

    Args:
        synchronize: waits until the device has done what was queued, so that its work is counted where it was ordered.
        running: the phases that are being measured, the innermost last, of which this is one; None: it is no phase.

    Attributes:
        sum: of all durations.
        size: how many there are.
        last: the latest one.
        nested: how much of ``sum`` was spent in other phases inside of this one.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None, running: list[TimerStat] | None = None) -> None:
        self._synchronize = synchronize
        self._running = running
        self._started: float | None = None
        self.sum = 0.0
        self.size = 0
        self.last = 0.0
        self.nested = 0.0

    def push(self, seconds: float) -> None:
        """Adds one duration."""
        self.last = seconds
        self.sum += seconds
        self.size += 1
        if self._running:
            self._running[-1].nested += seconds

    @property
    def mean(self) -> float:
        """Mean duration in seconds; 0.0 if there is none."""
        return self.sum / self.size if self.size else 0.0

    def __enter__(self) -> None:
        if self._started is not None:
            raise RuntimeError("a timer was started while it was running; record each part under a name of its own")
        if self._synchronize is not None:
            self._synchronize()
        if self._running is not None:
            self._running.append(self)
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        started, self._started = self._started, None
        if self._running is not None:
            self._running.pop()
        if kind is not None or started is None:
            return
        if self._synchronize is not None:
            self._synchronize()
        self.push(time.perf_counter() - started)


class TimerCollection:
    """The timers of an operator: ``with self.timers.record("fwd"): ...`` in hooks, results under ``profile``.

    Args:
        synchronize: see `TimerStat`; None on the CPU.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self._timers: dict[str, TimerStat] = {}
        self._running: list[TimerStat] = []
        self._span: Callable[[str], AbstractContextManager[object]] | None = None
        self.enabled = False

    def record(self, key: str) -> AbstractContextManager[object]:
        """Measures a ``with`` block under a name; does nothing while the timers are off."""
        return self._recorder(key) if self.enabled else _OFF

    def push(self, key: str, seconds: float) -> None:
        """Adds a duration that was measured elsewhere; does nothing while the timers are off."""
        if self.enabled and self._span is None:
            self._timer(key).push(seconds)

    def enable(self, span: Callable[[str], AbstractContextManager[object]] | None = None) -> None:
        """Turns measuring on.

        Args:
            span: makes, from the name of a block, what surrounds it in a trace; nothing is measured then.
        """
        self._span = span
        self.enabled = True

    def disable(self) -> None:
        """Turns measuring off; what was measured stays."""
        self.enabled = False

    def reset(self) -> None:
        """Forgets what was measured."""
        self._timers.clear()

    def stats(self, mean: bool = True, last: bool = False) -> dict[str, float]:
        """Means over everything measured since the last reset, as ``mean_<name>_s``, and the latest as ``last_<name>_s``."""
        found: dict[str, float] = {}
        for key, timer in self._timers.items():
            if timer.size and mean:
                found[f"mean_{key}_s"] = timer.mean
            if timer.size and last:
                found[f"last_{key}_s"] = timer.last
        return found

    def total(self, key: str) -> float | None:
        """All seconds measured under a name; None if nothing was."""
        timer = self._timers.get(key)
        return timer.sum if timer is not None and timer.size else None

    def phases(self) -> dict[str, float]:
        """All seconds in each phase of a step; of a phase inside another one, they count for the inner one alone."""
        found = dict.fromkeys(PHASES.values(), 0.0)
        for key, phase in PHASES.items():
            timer = self._timers.get(key)
            if timer is not None:
                found[phase] += timer.sum - timer.nested
        return found

    def _recorder(self, key: str) -> AbstractContextManager[object]:
        return self._timer(key) if self._span is None else self._span(key)

    def _timer(self, key: str) -> TimerStat:
        timer = self._timers.get(key)
        if timer is None:
            timer = self._timers[key] = TimerStat(self._synchronize, self._running if key in PHASES else None)
        return timer
