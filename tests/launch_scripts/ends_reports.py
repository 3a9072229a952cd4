"""Fails, hangs or goes on in the ways that reports of the launcher tell of; its first argument says which."""

from __future__ import annotations

import atexit
import os
import signal
import struct
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def until(path: str) -> None:
    """Waits for a file."""
    while not Path(path).exists():
        os.sched_yield()


def until_gone(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():
        os.sched_yield()


def root_ends_last() -> NoReturn:
    """Rank 1 raises, and ends only when rank 0, which fails because of it, is gone."""
    if RANK == 0:
        Path("pid").write_text(str(os.getpid()))
        Path("pid").rename("pid.0")
        until("raised.1")
        sys.exit(4)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    until("pid.0")
    pid = int(Path("pid.0").read_text())
    atexit.register(until_gone, pid)
    atexit.register(Path("raised.1").touch)  # called first, when the error is recorded
    raise ValueError("the first one")


def alike() -> NoReturn:
    """All ranks raise the same before any of them ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    atexit.register(until, f"raised.{1 - RANK}")
    atexit.register(Path(f"raised.{RANK}").touch)
    raise ValueError("on every rank")


def one_fails() -> NoReturn:
    if RANK == 1:
        until("ready.0")
        sys.exit(5)
    Path("ready.0").touch()
    waits_in_this_function()


def waits_in_this_function() -> NoReturn:
    # Not signal.pause(): a signal that comes just before it would be handled only after the next one.
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    say("ready")
    while True:
        os.read(woken, 1)


def always() -> NoReturn:
    sys.exit(6)


def count(step: int) -> None:
    path = Path(os.environ["TORCHTRAINER_LAUNCH_DIR"]) / f"progress.{os.environ['LOCAL_RANK']}"
    path.write_bytes(struct.pack("<q", step))


def gets_further() -> NoReturn:
    count(ATTEMPT + 1)
    sys.exit(0 if int(sys.argv[2]) == ATTEMPT else 6)


def gets_no_further() -> NoReturn:
    count(min(ATTEMPT + 1, int(sys.argv[2])))
    sys.exit(6)


def goes_on() -> None:
    """Ends well when somebody sends SIGUSR1: whatever was sent before did no harm."""

    def finish(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit()

    signal.signal(signal.SIGUSR1, finish)
    say(f"pid {os.getpid()}")
    waits_in_this_function()


say(f"attempt {ATTEMPT}")
{
    function.__name__: function
    for function in (
        root_ends_last,
        alike,
        one_fails,
        waits_in_this_function,
        always,
        gets_further,
        gets_no_further,
        goes_on,
    )
}[sys.argv[1]]()
