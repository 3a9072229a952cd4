"""Time from the start of a command to its first optimizer step, against torchrun, interleaved in one run.

    python benchmarks/start.py [--repeats 7] [--json FILE]

Only the ratios mean something: absolute times depend on the machine and on what else it does. Each repeat runs every
command once, one after the other, so that all see the same machine; the medians of the repeats are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = Path(__file__).resolve().parent / "programs"
TORCHRUN = "torchrun, 2 workers"
FRESH = "torchtrainer, fresh script"
PRESTART = "torchtrainer, prestart() first"
SECOND = "torchtrainer, second trainer in the process"
LIMIT_S = 120

COMMANDS = {
    TORCHRUN: [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        str(PROGRAMS / "first_step_torchrun.py"),
    ],
    FRESH: [sys.executable, str(PROGRAMS / "first_step_torchtrainer.py")],
    PRESTART: [sys.executable, str(PROGRAMS / "first_step_torchtrainer.py"), "--prestart"],
}


def seconds_to_first_step(command: list[str]) -> dict[str, float]:
    """Runs a command; returns the seconds that it printed, by their label."""
    environ = {**os.environ, "T0": str(time.time()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(("FIRST", "SECOND"))]
    return {label: float(seconds) for label, seconds in lines}


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    options = parser.parse_args()
    samples: dict[str, list[float]] = {name: [] for name in (*COMMANDS, SECOND)}
    for number in range(options.repeats + 1):
        for name, command in COMMANDS.items():
            found = seconds_to_first_step(command)
            if number == 0:
                continue  # a warm-up: files come into the page cache
            samples[name].append(found["FIRST"])
            if name == FRESH:
                samples[SECOND].append(found["SECOND"])
    base = statistics.median(samples[TORCHRUN])
    print(
        f"seconds to the first optimizer step, median of {options.repeats} (smallest to largest), and ratio to torchrun"
    )
    for name, values in samples.items():
        middle = statistics.median(values)
        print(f"{name:45s} {middle:6.2f} ({min(values):.2f} to {max(values):.2f})   {middle / base:5.2f}")
    if options.json:
        options.json.write_text(json.dumps(samples, indent=1))


if __name__ == "__main__":
    main()
