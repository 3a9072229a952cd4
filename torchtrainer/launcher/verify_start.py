"""One start of a script that is being verified: in a process of its own, with private run directories, ended where wanted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchtrainer.config import DIGESTS, VERIFY_RUNS
from torchtrainer.errors import TorchTrainerError
from torchtrainer.observe.digest_log import HELD, ORDERS, DigestOrders, Spot, last_step, tail
from torchtrainer.process.guard import be_killed_with_parent

Signal = Literal["SIGTERM", "SIGKILL"]
POLL_S = 0.01
"""Time between two checks on a start."""
FIRST_REPORT_S, LONGEST_REPORT_S = 2.0, 60.0
"""A long start is reported after the first of these, and then less and less often."""
GIVE_WAY_S = 5.0
"""How long after a SIGTERM ranks still hold: long enough for the notice to reach them."""
SLURM_JOB = ("SLURM_JOB_ID", "SLURM_JOBID")
"""Variables that a start does not get: a script with ``requeue=True`` would restart the job."""


class StartTimeoutError(TorchTrainerError):
    """A start did not end in the time that it was given."""


class NothingKeptError(TorchTrainerError):
    """The script keeps no run directory, so that there is nothing to continue with."""


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """Where and how a start is ended.

    Attributes:
        spot: the ranks hold there.
        step: optimizer steps that are completed there.
        signal: sent to the driver.
    """

    spot: Spot
    step: int
    signal: Signal

    def __str__(self) -> str:
        trainer = f" of trainer {self.spot.trainer}" if self.spot.trainer > 1 else ""
        return f"{self.signal} at step {self.step}{trainer}"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a start ended.

    Attributes:
        logs: directory with the logs of its ranks.
        output: file with all that it printed.
        exit_code: as `subprocess.Popen.returncode` gives it.
        interrupted: the interruption took place.
        seconds: how long it took.
    """

    logs: Path
    output: Path
    exit_code: int
    interrupted: bool
    seconds: float

    def last_lines(self, count: int) -> list[str]:
        """The end of what it printed."""
        return tail(self.output).splitlines()[-count:]


@dataclass(frozen=True, kw_only=True)
class Script:
    """A script with its arguments.

    Attributes:
        command: the script and its arguments.
        timeout_s: longest for one start.
        say: tells the user something.
    """

    command: Sequence[str]
    timeout_s: float
    say: Callable[[str], None]

    def start(
        self, logs: Path, runs: Path, name: str, orders: DigestOrders, interruption: Interruption | None = None
    ) -> Ended:
        """Runs the script to its end, or to where it is interrupted.

        Args:
            logs: a directory for the logs of this start, to be made.
            runs: where its run directories go.
            name: of the start, for reports.
            orders: for its ranks.
            interruption: where to end it; ``orders`` has the ranks hold there.

        Raises:
            StartTimeoutError: it did not end in time.
            NothingKeptError: it keeps no run directory.
        """
        logs.mkdir()
        orders.write(logs)
        environ = {name: value for name, value in os.environ.items() if name not in SLURM_JOB}
        environ.update({DIGESTS: str(logs), VERIFY_RUNS: str(runs)})
        output = logs / "output.txt"
        began_s = time.monotonic()
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *self.command],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                preexec_fn=be_killed_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509  # no threads here
            )
            try:
                interrupted = self._watch(process, logs, runs, name, interruption)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return Ended(
            logs=logs,
            output=output,
            exit_code=process.returncode,
            interrupted=interrupted,
            seconds=time.monotonic() - began_s,
        )

    def _watch(
        self, process: subprocess.Popen[bytes], logs: Path, runs: Path, name: str, interruption: Interruption | None
    ) -> bool:
        """Waits for the end; returns whether the interruption took place."""
        began_s = time.monotonic()
        report_after_s = FIRST_REPORT_S
        signalled_s: float | None = None
        while not _ended(process):
            age_s = time.monotonic() - began_s
            if age_s > self.timeout_s:
                raise StartTimeoutError(f"{name} did not end within {self.timeout_s:g} s (--timeout)")
            if age_s > report_after_s:
                report_after_s += min(report_after_s, LONGEST_REPORT_S)
                self._report(logs, runs, name, age_s)
            if interruption is not None and signalled_s is None and (logs / HELD).exists():
                signalled_s = age_s
                process.kill() if interruption.signal == "SIGKILL" else process.terminate()
            if signalled_s is not None and age_s > signalled_s + GIVE_WAY_S:
                (logs / ORDERS).unlink(missing_ok=True)
        return signalled_s is not None

    def _report(self, logs: Path, runs: Path, name: str, age_s: float) -> None:
        written = sorted(logs.glob("trainer-*-rank-0.log"))
        if written and not any(runs.rglob("run.json")):
            raise NothingKeptError("its trainer has run_dir=None")
        step = last_step(written[-1]) if written else None
        where = "starting" if step is None else f"at step {step}"
        self.say(f"{name}: {where} after {age_s:.0f} s")


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return False
    return True
