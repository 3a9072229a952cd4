"""A thread that asks one source for notices until it is told to stop, and is patient with one that does not answer."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from torchtrainer.preempt.notice import Notice
from torchtrainer.preempt.wake import Wake

FAILURES_TO_TELL = 4
"""Failures in a row after which the user is told, once."""
SLOWEST = 12
"""After failures the pause doubles, up to this many times the usual one (with 5 seconds: a minute)."""
JITTER = 0.5
"""A pause after a failure is shortened by up to this part, so that machines that failed together do not ask together."""


class Source(Protocol):
    """Something that knows when this machine or job will be taken away, and has to be asked."""

    @property
    def name(self) -> str:
        """For people, and the name of the thread."""

    @property
    def interval_s(self) -> float:
        """Pause between two questions."""

    def poll(self) -> Iterator[Notice]:
        """Asks once; gives each notice once. Raises anything if there is no usable answer."""


@runtime_checkable
class WaitingSource(Source, Protocol):
    """A source that wants to hear when the state is saved, and need not wait for us any longer."""

    def acknowledge(self) -> str | None:
        """Says that all state is saved; returns why that did not work, or None."""


class Poller:
    """Asks one source in a daemon thread.

    Args:
        source: what to ask.
        stop: ends the thread; sources that block watch it, too.
        offer: takes the notices, in the poller's thread.
        say: takes one line for the user, in the poller's thread.
    """

    def __init__(
        self, source: Source, *, stop: Wake, offer: Callable[[Notice], None], say: Callable[[str], None]
    ) -> None:
        self.source = source
        self.thread = threading.Thread(target=self._run, name=f"torchtrainer notices: {source.name}", daemon=True)
        self._stop = stop
        self._offer = offer
        self._say = say
        self._failures = 0
        self._told = False

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stop.wait(pause_s):
            try:
                for notice in self.source.poll():
                    self._offer(notice)
            except Exception as error:
                pause_s = self._after_failure(error)
            else:
                self._failures = 0
                pause_s = self.source.interval_s

    def _after_failure(self, error: Exception) -> float:
        """Counts a failure and tells the user if that is due; returns the pause in seconds."""
        self._failures += 1
        if self._failures == FAILURES_TO_TELL and not self._told and not self._stop.wait(0.0):
            self._told = True
            self._say(
                f"{self.source.name}: failed {self._failures} times in a row ({error}); polling less often from now on"
            )
        factor = min(2.0**self._failures, SLOWEST)
        return self.source.interval_s * factor * (1.0 - JITTER * random.random())  # noqa: S311 - spreads load, keeps no secret
