"""How the host starts processes: forked by a spawner where that is safe, and as new interpreters where it is not, or not any more."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torchtrainer.engines.preload import PRELOAD
from torchtrainer.process.child import ChildSpec
from torchtrainer.process.starters import ExecStarter, Starter, StarterEvent, StarterReady, preloaded_starter


class Starters:
    """Used by the host's only thread.

    Args:
        start_method: ``fork`` or ``exec``.
    """

    def __init__(self, start_method: str) -> None:
        environ = dict(os.environ)
        self._first: Starter = preloaded_starter(PRELOAD, environ) if start_method == "fork" else ExecStarter()
        self._second: ExecStarter | None = None
        self._waiting: list[ChildSpec] | None = []  # until the first is ready; sending earlier could block

    def fds(self) -> list[int]:
        """Descriptors that become readable when there are events."""
        return [fd for starter in self._both() for fd in starter.fds()]

    def events(self) -> list[StarterEvent]:
        """What happened since this was asked last."""
        return [event for starter in self._both() for event in starter.events()]

    def start(self, spec: ChildSpec) -> None:
        """Starts a process, or does so when that becomes possible.

        Raises:
            OSError: there are no more processes.
        """
        if self._waiting is not None:
            self._waiting.append(spec)
        else:
            (self._second or self._first).start(spec)

    def forget(self, group: str) -> bool:
        """Leaves out what was not started yet of a group; returns whether nothing of it can have been started."""
        if self._waiting is None:
            return False
        self._waiting = [spec for spec in self._waiting if spec["key"].rsplit("/", 1)[0] != group]
        return True

    def preload(self, modules: Sequence[str]) -> None:
        """Has later processes find these modules imported."""
        self._first.preload(modules)

    def on_ready(self, event: StarterReady) -> None:
        """The spawner is ready: starts what waits for it, in another way if it has threads."""
        if event.threads > 1:
            self.exec_from_now_on()  # a fork would copy one thread and the others' locks
        waiting, self._waiting = self._waiting or [], None
        for spec in waiting:
            self.start(spec)

    def exec_from_now_on(self) -> None:
        """No process is forked any more."""
        self._second = self._second or ExecStarter()

    def close(self) -> None:
        """Ends the starters themselves, not the processes they started."""
        for starter in self._both():
            starter.close()

    def _both(self) -> list[Starter]:
        return [one for one in (self._first, self._second) if one is not None]
