"""What workers are doing, seen from outside: steps they count, processor time they use, and their stacks."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchtrainer.process.guard import signal_process
from torchtrainer.process.logs import last_text
from torchtrainer.process.signals import STACK_DUMP_SIGNAL

STEP_COUNTER = struct.Struct("<q")
"""What a progress file holds: the number of steps done, a little-endian 64-bit integer."""
IDLE_SHARE = 0.01
"""A worker that uses less than this share of one processor is idle: it waits for something."""
STACK_DUMP_WAIT_S = 1.0
"""How long a worker gets to write its stacks."""
STACK_DUMP_CHECK_S = 0.02
PY_SPY_TIMEOUT_S = 20.0
_OUR_DIRECTORY = f"{Path(__file__).parent}{os.sep}"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The activity of one worker up to one moment.

    Attributes:
        step: steps that it counted; 0: it counts none.
        cpu_s: processor time of it and of the children that it has waited for, in seconds.
    """

    step: int
    cpu_s: float


def read_step(path: Path) -> int:
    """Reads a progress file; 0 if there is none."""
    try:
        data = path.read_bytes()
    except OSError:
        return 0
    return int(STEP_COUNTER.unpack_from(data)[0]) if len(data) >= STEP_COUNTER.size else 0


def sample(pid: int, progress: Path) -> Sample:
    """Looks at a worker."""
    return Sample(step=read_step(progress), cpu_s=_cpu_s(pid))


class HangDetector:
    """Says when no worker of this machine has made progress for too long.

    A worker that counts its steps makes progress when the count grows. Of any other, using the processor counts as progress:
    ranks that wait for each other, or for a lock, a file or the network, use none.

    Args:
        timeout_s: seconds without progress.
        now_s: monotonic time.
    """

    def __init__(self, timeout_s: float, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._since_s = now_s
        self._then: dict[int, Sample] = {}

    def silent_s(self, samples: Mapping[int, Sample], now_s: float) -> float | None:
        """Seconds without progress if they are too many, None otherwise.

        Args:
            samples: by local rank, of the workers that live.
            now_s: monotonic time.
        """
        silent_s = now_s - self._since_s
        if set(samples) != set(self._then) or any(
            _progressed(self._then[rank], now, silent_s) for rank, now in samples.items()
        ):
            self._then, self._since_s = dict(samples), now_s
            return None
        return silent_s if silent_s >= self._timeout_s else None


def _progressed(then: Sample, now: Sample, elapsed_s: float) -> bool:
    if now.step != then.step:
        return True
    return now.step == 0 and now.cpu_s - then.cpu_s > max(IDLE_SHARE * elapsed_s, 2 / _TICKS_PER_S)


def stacks_of(pid: int, stacks: Path) -> str:
    """The Python stacks of a worker, or what the system knows of it where it cannot tell.

    Args:
        pid: of the worker.
        stacks: where a forked worker writes them when it is signalled; an exec'd one has no such file.
    """
    if stacks.exists() and STACK_DUMP_SIGNAL is not None:
        before = stacks.stat().st_size
        signal_process(pid, STACK_DUMP_SIGNAL)
        deadline = time.monotonic() + STACK_DUMP_WAIT_S
        size = before
        while time.monotonic() < deadline:
            time.sleep(STACK_DUMP_CHECK_S)
            grown = stacks.stat().st_size
            if grown > before and grown == size:
                return _without_our_frames(last_text(stacks, limit_bytes=grown - before))
            size = grown
        return f"no answer within {STACK_DUMP_WAIT_S:g} s; {_system_view(pid)}"
    spy = shutil.which("py-spy")
    if spy is not None:
        try:
            done = subprocess.run(
                [spy, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=PY_SPY_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return _system_view(pid)
        if done.returncode == 0:
            return done.stdout.strip()
    return f"{_system_view(pid)}; Python stacks of a worker that was exec'd need py-spy on the PATH"


def _without_our_frames(text: str) -> str:
    """Leaves out how a forked worker came to run its program."""
    return "\n".join(line for line in text.splitlines() if f'File "{_OUR_DIRECTORY}' not in line)


def _system_view(pid: int) -> str:
    """State and kernel function of a process, in a line."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return f"pid {pid} cannot be looked at"
    state = next(
        (line.partition(":")[2].strip() for line in status.splitlines() if line.startswith("State:")), "unknown"
    )
    try:
        waits_in = Path(f"/proc/{pid}/wchan").read_text().strip("0")
    except OSError:
        waits_in = ""
    return f"the system says: {state}{f', in {waits_in}' if waits_in else ''}"


def _cpu_s(pid: int) -> float:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS_PER_S
