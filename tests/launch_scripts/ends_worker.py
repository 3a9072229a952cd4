"""Ends, or waits to be ended, in the way that its arguments name. The last rank does it; the others say that they are there and wait."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
STOPPING = (signal.SIGTERM, signal.SIGINT)
CHUNK_BYTES = 32 << 20
"""What a rank that wants too much memory takes at a time."""


def say(word: str) -> None:
    os.write(1, f"{word} {RANK}\n".encode())  # one call: lines of several ranks do not mix


def wait() -> NoReturn:
    # Not signal.pause(): a signal that comes just before it would be handled only after the next one.
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    say("ready")
    while True:
        os.read(woken, 1)


def raises() -> NoReturn:
    raise ValueError("boom")


def interrupted() -> NoReturn:
    raise KeyboardInterrupt


def takes_memory() -> NoReturn:
    Path("/proc/self/oom_score_adj").write_text("1000")  # the one to be killed, whatever else the group holds
    taken = []
    while True:
        taken.append(b"x" * CHUNK_BYTES)


def starts_process() -> None:
    subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])


def on_stop(action: Callable[[], None]) -> None:
    def stopped(number: int, frame: FrameType | None) -> None:
        action()

    for signum in STOPPING:
        signal.signal(signum, stopped)


def save_and_exit(code: int) -> NoReturn:
    say("saved")
    sys.exit(code)


def arrive() -> None:
    """Waits until all ranks have arrived: whoever ends first has the others stopped, wherever they are."""
    meeting = Path(f"arrived.{os.environ['TORCHELASTIC_RESTART_COUNT']}")
    meeting.mkdir(exist_ok=True)
    (meeting / str(RANK)).touch()
    while len(list(meeting.iterdir())) < WORLD_SIZE:
        os.sched_yield()


ENDS: dict[str, Callable[[], object]] = {
    "os._exit": lambda: os._exit(7),
    "raise": raises,
    "interrupt": interrupted,
    "text": lambda: sys.exit("no data in the folder"),
    "segfault": lambda: ctypes.string_at(0),
    "memory": takes_memory,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}

for way in sys.argv[1:]:
    word, _, number = way.partition("=")
    if word == "process":
        starts_process()
    elif word == "ignore":
        on_stop(lambda: say("told"))
    elif word == "save":
        on_stop(lambda code=int(number): save_and_exit(code))
    elif word == "done":
        sys.exit()
    elif word == "arrive":
        arrive()
    elif RANK == WORLD_SIZE - 1:
        if word == "exit":
            sys.exit(int(number))
        ENDS[word]()
wait()
