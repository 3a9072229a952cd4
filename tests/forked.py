"""Commands in forks of a process that has imported torch, where how an interpreter starts is not what a test is about."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from torchtrainer.process.fresh import IMPORT_TIME_PREFIXES

ZYGOTE = Path(__file__).with_name("zygote.py")
UNMARKED = {"TORCHTRAINER_TEST_MARK": "0" * 16}
"""Room for the mark of a program."""
LIKE_A_SPAWNER = {"PYTHONHASHSEED": "0"}
"""What the spawner of a program is started with."""
ANSWER_S = 200.0
"""Only a deadlock takes this long."""
MODULES = ("torch._dynamo", "torchtrainer.trainer", "torchtrainer.worker.main")
"""What programs import sooner or later, besides torch itself."""
LAUNCHER = ("-m", "torchtrainer", "run")
READ_AT_START = (*IMPORT_TIME_PREFIXES, "LOGLEVEL", "PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "GLIBC_", "CUDA_")
"""Beginnings of the names of variables that an interpreter, or what it imports, reads once."""
AT_START = dict(os.environ)
GIVEN_TO_FORKS = ("OMP_NUM_THREADS", "PYTHONPATH", "PYTHONUNBUFFERED")
"""Those of them that a fork is told."""


class Started(Protocol):
    """A running command: ``subprocess.Popen`` is one."""

    pid: int

    def wait(self, timeout: float) -> int: ...


class ZygoteEndedError(Exception):
    """The process that runs the commands is gone."""


class Zygote:
    """Has imported torch's launchers once, and more modules if asked to, and runs each command in a fork of itself."""

    def __init__(self, environ: Mapping[str, str], *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(ZYGOTE), *modules],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._ended: dict[int, int] = {}
        self._rest = b""
        self._reading = threading.Lock()

    def start(self, request: Mapping[str, Any]) -> Started:
        """Starts a command with the fields that ``zygote.py`` describes."""
        return _Forked(pid=self.fork(request), zygote=self)

    def fork(self, request: Mapping[str, Any]) -> int:
        """The same; returns the pid."""
        assert self._process.stdin is not None
        with self._reading:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            while True:
                message = self._next(time.monotonic() + ANSWER_S)
                if "exit_code" not in message:
                    return message["pid"]
                self._ended[message["pid"]] = message["exit_code"]

    def wait(self, pid: int, timeout_s: float | None) -> int:
        """The exit code of a command, once.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        with contextlib.suppress(ProcessLookupError):  # it has ended, and the zygote has seen it
            descriptor = os.pidfd_open(pid)
            try:  # where nobody is kept from starting another one
                if not select.select([descriptor], [], [], timeout_s)[0]:
                    raise subprocess.TimeoutExpired("a command of the zygote", timeout_s or 0.0)
            finally:
                os.close(descriptor)
        with self._reading:
            while pid not in self._ended:
                message = self._next(time.monotonic() + ANSWER_S)
                self._ended[message["pid"]] = message["exit_code"]
            return self._ended.pop(pid)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(ANSWER_S)
        self._process.stdout.close()

    def _next(self, deadline: float) -> dict[str, int]:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                raise subprocess.TimeoutExpired("a command of the zygote", left_s)
            more = os.read(self._process.stdout.fileno(), 65536)
            if not more:
                raise ZygoteEndedError
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


@dataclass(frozen=True)
class _Forked:
    pid: int
    zygote: Zygote

    def wait(self, timeout: float) -> int:
        return self.zygote.wait(self.pid, timeout)


class ForkedProcess:
    """A command in a fork of the zygote, with what a test does with a `subprocess.Popen` in text mode.

    Args:
        words: what would follow ``python``: a script or our launcher, with arguments.
        directory: where it runs.
        environ: all of it.
        session: it has one of its own, and so a process group.
    """

    def __init__(
        self, words: Sequence[str], directory: Path, environ: Mapping[str, str], *, session: bool = False
    ) -> None:
        self._zygote = zygote()
        self.returncode: int | None = None
        self._read: dict[str, str] = {}
        self._readers: list[threading.Thread] = []
        self.args = [sys.executable, *words]
        theirs, ours = {}, {}
        for stream in ("stdout", "stderr"):
            ours[stream], theirs[stream] = os.pipe()
        request = {
            "program": "command",
            "arguments": [*words],
            "directory": str(directory),
            "environ": {**UNMARKED, **environ},
        }
        request |= {stream: f"/proc/{os.getpid()}/fd/{descriptor}" for stream, descriptor in theirs.items()}
        self.pid = self._zygote.fork(
            {**request, "session": session, "stdin": os.devnull, "read_at_start": READ_AT_START}
        )
        if not select.select([ours["stdout"]], [], [], ANSWER_S)[0]:
            raise ZygoteEndedError(f"a fork did not open its streams within {ANSWER_S} s")
        os.read(ours["stdout"], 1)
        for descriptor in theirs.values():
            os.close(descriptor)
        self.stdin = None
        self.stdout: IO[str] = os.fdopen(ours["stdout"])
        self.stderr: IO[str] = os.fdopen(ours["stderr"])
        weakref.finalize(self, _close, self.stdout, self.stderr)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._zygote.wait(self.pid, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._readers:
            self._readers = [
                threading.Thread(target=self._read_all, args=(name,), daemon=True) for name in ("stdout", "stderr")
            ]
            for reader in self._readers:
                reader.start()
        for reader in self._readers:
            reader.join(_left(deadline))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.wait(_left(deadline))
        return self._read["stdout"], self._read["stderr"]

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read_all(self, name: str) -> None:
        stream: IO[str] = getattr(self, name)
        self._read[name] = "" if stream.closed else stream.read()
        stream.close()


def can_be_forked(words: Sequence[str], given: Mapping[str, str]) -> bool:
    """Whether a command is a script or our launcher, and nothing of its own variables is read when an interpreter starts."""
    if words[:1] != (sys.executable,) or (words[1:4] != LAUNCHER and words[1].startswith("-")):
        return False
    return not any(_is_read_at_start(name) for name in given)


def _is_read_at_start(name: str) -> bool:
    return name.startswith(READ_AT_START) and name not in GIVEN_TO_FORKS


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _close(*streams: IO[str]) -> None:
    for stream in streams:
        stream.close()


_started: list[Zygote] = []


def zygote() -> Zygote:
    """The one of this process, which ends with it."""
    if not _started:
        _started.append(Zygote({**AT_START, **UNMARKED, **LIKE_A_SPAWNER}, *MODULES))
    return _started[0]
