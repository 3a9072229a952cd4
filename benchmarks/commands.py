"""Runs one command and takes what it prints about itself: lines of a label in capitals and values."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LAST_LINES = 15
"""So much of what a command wrote is shown when it failed."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command did.

    Attributes:
        values: what it said, by label; one entry per line with that label.
        seconds: that it took.
        code: its exit code; None: it was killed after its time limit.
        last_lines: of what it wrote, both streams.
    """

    values: Mapping[str, list[list[str]]] = field(default_factory=dict)
    seconds: float
    code: int | None
    last_lines: str = ""

    def said(self, labels: Sequence[str]) -> bool:
        """Whether it came so far that it printed all of these.

        Its exit code is not asked: torch now and then aborts while a process ends, and what was measured before counts.
        """
        return all(label in self.values for label in labels)


def values_in(text: str) -> dict[str, list[list[str]]]:
    """The lines ``LABEL value ...`` of a text; other lines are left out."""
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        label, *values = line.split() or [""]
        if values and label.replace("_", "").isalpha() and label.isupper():
            found.setdefault(label, []).append(values)
    return found


def run_command(command: Sequence[str], limit_s: float) -> Ran:
    """Runs a command with one thread per process; what is left of it after its time limit is killed."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "T0": str(time.time())}
    began = time.perf_counter()
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
            code: int | None = process.returncode
        except BaseException as error:  # Ctrl-C too: its processes are in a session of their own
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code, err = None, f"{err}\nkilled: it took more than {limit_s:.0f} s"
    last = "\n".join([*out.splitlines(), *err.splitlines()][-LAST_LINES:])
    return Ran(values=values_in(out), seconds=time.perf_counter() - began, code=code, last_lines=last)
