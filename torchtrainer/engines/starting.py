"""Starts processes for the host: forked by a spawner where that is safe, and as new interpreters where it is not.

A spawner that is killed is replaced. What it had forked goes on, as children of the host, and what it was asked for and had not
forked is asked of the new one.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torchtrainer.engines.preload import PRELOAD, preloadable
from torchtrainer.process.child import ChildSpec
from torchtrainer.process.guard import adopt_orphans
from torchtrainer.process.orphans import Orphans
from torchtrainer.process.starters import (
    ChildExited,
    ChildNotStarted,
    ChildStarted,
    ExecStarter,
    Starter,
    StarterEvent,
    StarterFailed,
    StarterReady,
    preloaded_starter,
)

MAX_LOST = 3
"""Spawners that may be lost in a row before any is ready; after that, processes are started without one."""


@dataclass(frozen=True, kw_only=True)
class SpawnerReplaced:
    """A spawner is gone, and something else takes its place. ``text``: how it was lost, and what that is."""

    text: str


class Starters:
    """Used by the host's only thread.

    Args:
        start_method: ``fork`` or ``exec``.
    """

    def __init__(self, start_method: str) -> None:
        self._environ = dict(os.environ)
        # What is forked is to end with this process, not with the spawner.
        self._lifeline = os.pipe() if start_method == "fork" and adopt_orphans() else None
        self._first: Starter = self._spawner() if start_method == "fork" else ExecStarter()
        self._second: ExecStarter | None = None
        self._waiting: list[ChildSpec] | None = []  # until the first is ready; sending earlier could block
        self._asked: dict[str, ChildSpec] = {}
        self._living: set[int] = set()
        self._orphans = Orphans()
        self._modules: list[str] = []
        self._lost = 0
        self._was_ready = False

    def _spawner(self) -> Starter:
        return preloaded_starter(PRELOAD, self._environ, None if self._lifeline is None else self._lifeline[0])

    def fds(self) -> list[int]:
        """Descriptors that become readable when there are events."""
        return [*(fd for starter in self._both() for fd in starter.fds()), *self._orphans.fds()]

    def events(self) -> list[StarterEvent | SpawnerReplaced]:
        """Events since the last call."""
        found: list[StarterEvent | SpawnerReplaced] = []
        for starter in self._both():
            for event in starter.events():
                found += self._noted(event)
        if self._lifeline is not None:
            waited_for = {pid for starter in self._both() for pid in starter.pids()}
            for event in self._orphans.reap(waited_for):
                found += self._noted(event)
        return found

    def _noted(self, event: StarterEvent) -> list[StarterEvent | SpawnerReplaced]:
        if isinstance(event, ChildStarted):
            if event.pid in self._living:  # told by a spawner that was killed, and by the process as well
                return []
            self._living.add(event.pid)
            self._asked.pop(event.key, None)
        elif isinstance(event, ChildNotStarted):
            self._asked.pop(event.key, None)
        elif isinstance(event, ChildExited):
            self._living.discard(event.pid)
        elif isinstance(event, StarterFailed) and event.lost and self._lifeline is not None:
            return self._replace(event)
        return [event]

    def _replace(self, lost: StarterFailed) -> list[StarterEvent | SpawnerReplaced]:
        """Adopts what the lost spawner had forked, and starts a new one, or does without if too many were lost."""
        gone = self._orphans.adopt(self._living)
        self._living.difference_update(event.pid for event in gone)
        self._lost += 1
        if self._lost > MAX_LOST and not self._was_ready:
            return [*gone, lost]
        if self._second is not None:
            return list(gone)
        self._waiting = [*(self._waiting or []), *self._asked.values()]
        self._asked.clear()
        self._first.close()
        again = self._lost <= MAX_LOST
        self._first = self._spawner() if again else ExecStarter()
        what = "a new one is started" if again else "processes are started without one from now on"
        return [*gone, SpawnerReplaced(text=f"{lost.text}; {what}")]

    def start(self, spec: ChildSpec) -> None:
        """Starts a process, or does so when that becomes possible.

        Raises:
            OSError: there are no more processes.
        """
        if self._waiting is not None:
            self._waiting.append(spec)
        elif self._second is not None:
            self._second.start(spec)
        else:
            self._asked[spec["key"]] = spec
            self._first.start(spec)

    def forget(self, keys: Collection[str]) -> bool:
        """Drops the processes with these keys that wait for a spawner; returns whether none of them can have been started."""
        if self._waiting is None:
            return False
        self._waiting = [spec for spec in self._waiting if spec["key"] not in keys]
        return True

    def preload(self, modules: Sequence[str]) -> None:
        """Has later processes find those of these modules imported that start no threads."""
        new = [name for name in modules if preloadable(name) and name not in self._modules]
        if new:
            self._modules += new
            self._first.preload(new)

    def on_ready(self, event: StarterReady) -> None:
        """The spawner is ready: starts what waits for it, in another way if it has threads."""
        if event.threads > 1:
            self._second = self._second or ExecStarter()  # a fork would copy one thread and the others' locks
        if self._lost and self._modules:  # what the spawner before was told
            self._first.preload(self._modules)
        self._lost, self._was_ready = 0, True
        waiting, self._waiting = self._waiting or [], None
        for spec in waiting:
            self.start(spec)

    def exec_from_now_on(self) -> None:
        """Stops forking and drops the requests so far."""
        self._second = self._second or ExecStarter()
        self._waiting = None
        self._asked.clear()

    def close(self) -> None:
        """Ends the starters themselves, not the processes they started."""
        for starter in self._both():
            starter.close()

    def _both(self) -> list[Starter]:
        return [one for one in (self._first, self._second) if one is not None]
