"""How long ``torchtrainer run`` takes to start, to restart and to say what it can do, against torchrun, interleaved in one run.

    python benchmarks/launch.py [--repeats 7] [--only hello restart-kill] [--json FILE]

hello, first-step: seconds that the whole command takes, 2 workers. restart-*: seconds from the crash of a worker to the end of the
first all-reduce of the next attempt, for a worker that ends with os._exit, SIGKILL or an exception. help, run-help: seconds that
the command takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compare import LIMIT_S, PROGRAMS, TORCHRUN, figures

OWN_STORE = ("env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
"""torch 2.14's launcher keeps one store for all attempts, where those who come back find the addresses of the dead and fail, often
up to the last restart. This works around it, in torchrun's favour; ours gets no such setting."""
TORCH_ABORT = "terminate called without an active exception"
"""What torch 2.14 now and then says when a process ends, under any launcher."""
TORCHTRAINER = (sys.executable, "-m", "torchtrainer", "run", "--standalone", "--nproc-per-node", "2")
OURS_HELP = (sys.executable, "-m", "torchtrainer", "--help")
OURS_RUN_HELP = (sys.executable, "-m", "torchtrainer", "run", "--help")
THEIR_HELP = (sys.executable, "-m", "torch.distributed.run", "--help")


def whole(command: Sequence[str]) -> float:
    """Seconds that a command takes; it has to end well, and is run again where torch aborted a worker that was done."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    took = time.perf_counter() - began
    if done.returncode != 0 and TORCH_ABORT in done.stderr:
        return whole(command)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return took


def restart(command: Sequence[str]) -> float:
    """Seconds from a crash to the next attempt's first all-reduce, as the program prints them."""
    with tempfile.TemporaryDirectory() as directory:
        return figures([*command, str(Path(directory) / "crash_time")])["RESTART"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        theirs: torchrun's command.
        ours: our command.
        target: what is to be reached; a share of torchrun's time if relative, seconds otherwise.
        relative: which of the two.
        measure: runs a command; returns seconds.
    """

    theirs: Sequence[str]
    ours: Sequence[str]
    target: float
    relative: bool = True
    measure: Callable[[Sequence[str]], float] = whole


def script_row(target: float, script: str) -> Row:
    path = str(PROGRAMS / script)
    return Row(theirs=[*TORCHRUN, path], ours=[*TORCHTRAINER, path], target=target)


def restart_row(kind: str) -> Row:
    options = ["--max-restarts", "1", str(PROGRAMS / "crash.py"), kind]
    return Row(theirs=[*OWN_STORE, *TORCHRUN, *options], ours=[*TORCHTRAINER, *options], target=0.25, measure=restart)


ROWS = {
    "hello": script_row(0.6, "hello.py"),
    "first-step": script_row(0.75, "first_step.py"),
    "restart-exit": restart_row("exit"),
    "restart-kill": restart_row("kill"),
    "restart-raise": restart_row("raise"),
    "help": Row(theirs=THEIR_HELP, ours=OURS_HELP, target=0.2, relative=False),
    "run-help": Row(theirs=THEIR_HELP, ours=OURS_RUN_HELP, target=0.2, relative=False),
}


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):7.3f} ({min(values):.3f} to {max(values):.3f})"


def line(name: str, row: Row, theirs: Sequence[float], ours: Sequence[float]) -> str:
    """What is printed of one row."""
    ratio = statistics.median(ours) / statistics.median(theirs)
    reached, unit = (ratio, "x") if row.relative else (statistics.median(ours), "s")
    verdict = "met" if reached <= row.target else "not met"
    return f"{name:14s} {spread(theirs):26s} {spread(ours):26s} {ratio:6.2f}   <= {row.target:.2f} {unit}  {verdict}"


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    options = parser.parse_args()
    samples: dict[str, dict[str, list[float]]] = {name: {"torchrun": [], "torchtrainer": []} for name in options.only}
    for number in range(options.repeats + 1):
        for name, found in samples.items():
            row = ROWS[name]
            theirs, ours = row.measure(row.theirs), row.measure(row.ours)
            if number > 0:  # the first is a warm-up: files come into the page cache
                found["torchrun"].append(theirs)
                found["torchtrainer"].append(ours)
    print(f"seconds: median of {options.repeats} (smallest to largest), and ratio to torchrun")
    print(f"{'':14s} {'torchrun':26s} {'torchtrainer':26s}  ratio   target")
    for name, found in samples.items():
        print(line(name, ROWS[name], found["torchrun"], found["torchtrainer"]))
    if options.json:
        options.json.write_text(json.dumps(samples, indent=1))


if __name__ == "__main__":
    main()
