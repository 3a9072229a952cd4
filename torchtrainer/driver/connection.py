"""The driver's connection to its host process: starts it, talks to it, notices when it is gone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections import deque
from dataclasses import replace

from torchtrainer.config import Timeouts
from torchtrainer.control.channel import Dealer
from torchtrainer.control.messages import EngineFailed, Quit
from torchtrainer.control.wire import Message
from torchtrainer.driver.events import HostLost
from torchtrainer.process.guard import open_pidfd, stop_signals_blocked
from torchtrainer.process.oom import OomWatch
from torchtrainer.process.paths import EnginePaths
from torchtrainer.process.signals import describe_exit
from torchtrainer.process.starters import interpreter
from torchtrainer.process.streams import open_standard_descriptors

POLL_S = 0.05
"""Longest single wait; between two waits the caller checks its deadlines."""

Incoming = Message | HostLost


class HostConnection:
    """The host process of this driver, and the channel to it.

    Messages are sorted into one inbox per worker group. Several trainers, in several threads if need be, share a connection:
    a lock keeps their turns at the socket apart.

    Args:
        start_method: ``fork`` or ``exec``.
        timeouts: deadlines; ``cleanup_s`` is used here.

    Attributes:
        write_s: how long a checkpoint that is being written is waited for at the end.
    """

    def __init__(self, start_method: str, timeouts: Timeouts) -> None:
        open_standard_descriptors()
        self._timeouts = timeouts
        self.paths = EnginePaths.create()
        with stop_signals_blocked():
            self._process = subprocess.Popen(
                interpreter("torchtrainer.engines.host", str(self.paths.root), str(os.getpid()), start_method),
                stdin=subprocess.PIPE,  # never written to: its end tells the host that we are gone
                start_new_session=True,  # the terminal's Ctrl-C is for the user's process alone
            )
        self._oom = OomWatch()
        self._pidfd = open_pidfd(self._process.pid)
        self._dealer = Dealer(self.paths.endpoint, "driver")
        self._lock = threading.RLock()
        self._inboxes: dict[str, deque[Incoming]] = {}
        self._lost: str | None = None
        self._closed = False
        self.write_s = 0.0
        self.owner_pid = os.getpid()

    @property
    def alive(self) -> bool:
        """Whether a new group can be started here."""
        if self._closed or self._lost is not None or self.owner_pid != os.getpid():
            return False
        with self._lock:
            self.poll(0.0)
        return self._lost is None

    def open_inbox(self, group: str) -> None:
        """Begins to keep what is said about a group."""
        self._inboxes[group] = deque()

    def close_inbox(self, group: str) -> None:
        """Forgets a group."""
        self._inboxes.pop(group, None)

    def send(self, message: Message) -> None:
        """Sends to the host."""
        with self._lock:
            if not self._closed:
                self._dealer.send(message)

    def poll(self, timeout_s: float = POLL_S) -> None:
        """Waits for messages and sorts them into the inboxes."""
        with self._lock:
            if self._closed:
                return
            self._dealer.wait([] if self._pidfd is None else [self._pidfd], timeout_s)
            while (message := self._dealer.receive()) is not None:
                self._sort(message)
            code = self._process.poll()
            if code is not None:
                self._lose(f"the host process (pid {self._process.pid}) {describe_exit(code)}{self._oom.explain(code)}")

    def take(self, group: str) -> Incoming | None:
        """Next message about a group; None if there is none."""
        inbox = self._inboxes.get(group)
        return inbox.popleft() if inbox else None

    def close(self) -> None:
        """Ends the host and everything below it; returns when nothing is left. Idempotent."""
        if self.owner_pid != os.getpid():
            return  # a forked copy: the processes are the original's
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tell_all(HostLost(text="the engine was closed"))
            self._dealer.send(Quit())
            self._dealer.close(flush_s=self._timeouts.cleanup_s)
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                self._process.wait(max(self._timeouts.cleanup_s, self.write_s))  # it may still write a checkpoint
            except subprocess.TimeoutExpired:
                self._process.kill()  # the kernel then kills the spawner, and with it the workers
                self._process.wait()
            self._release()

    def _sort(self, message: Message) -> None:
        if isinstance(message, EngineFailed):
            self._tell_all(message)
            self._lost = message.text
        else:
            inbox = self._inboxes.get(getattr(message, "group", ""))
            if inbox is not None:
                inbox.append(message)

    def _lose(self, text: str) -> None:
        self._lost = text
        self._closed = True
        self._tell_all(HostLost(text=text))
        self._dealer.close()
        self._release()

    def _tell_all(self, message: Incoming) -> None:
        for inbox in self._inboxes.values():
            inbox.append(replace(message))

    def _release(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self.paths.remove()
