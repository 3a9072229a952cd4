"""Two ways to start worker processes, alike from outside: forked from a preloaded spawner, or exec'd one by one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torchtrainer.process.child import ChildSpec
from torchtrainer.process.frames import FrameSocket
from torchtrainer.process.guard import signal_process
from torchtrainer.process.oom import OomWatch
from torchtrainer.process.signals import describe_exit

RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
"""Unit of the peak memory that the system reports of a process that has ended."""
PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True, kw_only=True)
class StarterReady:
    """Workers can be started from now on; with how many threads the spawner has."""

    pid: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class StarterFailed:
    """No worker can be started any more. ``lost``: whoever would start them is gone, without a word."""

    text: str
    lost: bool = False


@dataclass(frozen=True, kw_only=True)
class ChildStarted:
    """A process exists."""

    key: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class ChildExited:
    """A process is gone."""

    pid: int
    exit_code: int
    max_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class ChildNotStarted:
    """There was no memory for a process, or there are too many processes."""

    key: str
    text: str


@dataclass(frozen=True, kw_only=True)
class PreloadFailed:
    """A module could not be imported ahead; processes import it themselves, if they can."""

    text: str


StarterEvent = StarterReady | StarterFailed | ChildStarted | ChildNotStarted | ChildExited | PreloadFailed


class Starter(Protocol):
    """Starts worker processes and tells when they exist and when they are gone. Used by the host's only thread."""

    def fds(self) -> list[int]:
        """Descriptors that become readable when there are events."""

    def pids(self) -> set[int]:
        """Children of this process that the starter waits for itself."""

    def start(self, spec: Any) -> None:
        """Asks for a process; what it becomes is a matter between the caller and the process."""

    def preload(self, modules: Sequence[str]) -> None:
        """Has later processes find these modules imported, where that is possible."""

    def events(self) -> list[StarterEvent]:
        """Events since the last call."""

    def close(self) -> None:
        """Ends the starter itself, not the processes it started."""


BOOT = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import runpy
parent, module = sys.argv[1:3]
if parent not in sys.path:
    site = [i for i, entry in enumerate(sys.path) if entry.endswith(("site-packages", "dist-packages"))]
    sys.path.insert(site[0] if site else len(sys.path), parent)
sys.argv[:3] = []
sys.argv.insert(0, module)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""Starts a module of this package in a new interpreter: found where the user's process found it, but behind the standard
library, and without the current directory, where a file may have the name of a module that is needed."""


def interpreter(module: str, *arguments: str) -> list[str]:
    """Command line of one of our own interpreters.

    Args:
        module: what it runs.
        arguments: its ``sys.argv[1:]``.
    """
    return [sys.executable, "-c", BOOT, PACKAGE_PARENT, module, *arguments]


class SpawnerStarter:
    """Has a spawner process fork workers: what is common to the ways of getting one.

    Args:
        link: our end of the socket that the spawner serves.
        pid: of the spawner, a child of this process.
    """

    def __init__(self, link: FrameSocket, pid: int) -> None:
        self._link = link
        self._pid = pid
        self._lost = False
        self._oom = OomWatch()
        self._failed = False

    def fds(self) -> list[int]:
        """The spawner's socket."""
        return [] if self._lost else [self._link.fileno()]

    def pids(self) -> set[int]:
        """The spawner."""
        return set() if self._lost else {self._pid}

    def start(self, spec: Mapping[str, Any]) -> None:
        """Asks the spawner for a fork; it waits there until the imports are done."""
        self._ask({"fork": spec})

    def preload(self, modules: Sequence[str]) -> None:
        """Asks the spawner to import more modules."""
        self._ask({"preload": list(modules)})

    def _ask(self, request: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionError):  # it is gone, as `events` will say
            self._link.send(request)

    def events(self) -> list[StarterEvent]:
        """The spawner's messages since the last call."""
        events: list[StarterEvent] = []
        for value in self._link.receive_available():
            ((kind, body),) = value.items()
            if kind == "ready":
                events.append(StarterReady(**body))
            elif kind == "started":
                events.append(ChildStarted(**body))
            elif kind == "exited":
                events.append(ChildExited(**body))
            elif kind == "unforked":
                events.append(ChildNotStarted(**body))
            elif kind == "unloaded":
                events.append(PreloadFailed(**body))
            else:
                self._failed = True
                events.append(StarterFailed(text=body))
        if self._link.closed_by_peer and not self._lost:
            self._lost = True
            code = self._wait()
            if not self._failed:  # it has said why
                ended = f"{describe_exit(code)}{self._oom.explain(code)}"
                text = f"the spawner process (pid {self._pid}) {ended}"
                events.append(StarterFailed(text=text, lost=True))
        return events

    def close(self) -> None:
        """Ends the spawner; the kernel ends its children with it. Idempotent."""
        self._link.close()
        self._kill()
        self._wait()

    def _kill(self) -> None:
        signal_process(self._pid, signal.SIGKILL)

    def _wait(self) -> int | None:
        try:
            _, status = os.waitpid(self._pid, 0)
        except ChildProcessError:  # reaped before
            return None
        return os.waitstatus_to_exitcode(status)


class ForkStarter(SpawnerStarter):
    """Forks workers from a spawner that is an interpreter of its own.

    Args:
        command: what to run, from the socket's descriptor; the descriptor is passed on.
        environ: complete environment of the spawner.
        stdin: standard input of the spawner, as `subprocess` names it; None: ours, for workers that read it.
        inherited: other descriptors that the spawner gets.
    """

    def __init__(
        self,
        command: Callable[[int], list[str]],
        environ: Mapping[str, str],
        stdin: int | None = subprocess.DEVNULL,
        inherited: Sequence[int] = (),
    ) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            self._process = subprocess.Popen(command(fd), env=environ, stdin=stdin, pass_fds=[fd, *inherited])
        super().__init__(FrameSocket(ours), self._process.pid)

    def _kill(self) -> None:
        self._process.kill()

    def _wait(self) -> int | None:
        return self._process.wait()


def preloaded_starter(modules: Sequence[str], environ: Mapping[str, str], lifeline: int | None = None) -> ForkStarter:
    """Makes the starter of a trainer's host.

    Args:
        modules: that its spawner imports first.
        environ: of the spawner.
        lifeline: a pipe of which this process holds the other end: what is forked ends with this process, not with the spawner.
    """
    quiet = {
        # numpy's OpenBLAS starts threads when imported, unless told not to; a process that forks must have one.
        "OPENBLAS_NUM_THREADS": "1",
        # Sets of strings then have one order in all runs, as far as the user did not ask for something else.
        "PYTHONHASHSEED": environ.get("PYTHONHASHSEED", "0"),
    }

    def command(fd: int) -> list[str]:
        tie = "" if lifeline is None else str(lifeline)
        return interpreter("torchtrainer.process.spawner", str(fd), str(os.getpid()), ",".join(modules), tie)

    return ForkStarter(command, {**environ, **quiet}, inherited=[] if lifeline is None else [lifeline])


class ExecStarter:
    """Starts each worker as a new interpreter: slower, for systems and programs where a fork is not safe."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._events: list[StarterEvent] = [StarterReady(pid=os.getpid(), threads=1)]

    def fds(self) -> list[int]:
        """None: exits are found by asking, at the host's tick."""
        return []

    def pids(self) -> set[int]:
        """All that it started."""
        return {process.pid for process in self._processes}

    def start(self, spec: ChildSpec) -> None:
        """Starts an interpreter."""
        process = subprocess.Popen(
            interpreter("torchtrainer.process.exec_child", str(os.getpid())),
            env=spec["environ"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(json.dumps(spec).encode())
        self._processes.append(process)
        self._events.append(ChildStarted(key=spec["key"], pid=process.pid))

    def preload(self, modules: Sequence[str]) -> None:
        """Nothing: a new interpreter imports for itself."""

    def events(self) -> list[StarterEvent]:
        """Events since the last call."""
        events, self._events = self._events, []
        for process in list(self._processes):
            code = process.poll()
            if code is not None:
                self._processes.remove(process)
                events.append(ChildExited(pid=process.pid, exit_code=code, max_rss_bytes=0))
        return events

    def close(self) -> None:
        """Kills what it started."""
        for process in self._processes:
            process.kill()
            process.wait()
