"""Runs commands in turn, several times over, and compares what they print about themselves.

Only the ratios mean something: absolute times depend on the machine and on what else it does. Each repeat runs every command
once, one after the other, so that all see the same machine; the medians of the repeats are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAMS = Path(__file__).resolve().parent / "programs"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LIMIT_S = 300


def figures(command: Sequence[str]) -> dict[str, float]:
    """Runs a command; returns the lines ``LABEL number`` that it printed."""
    environ = {**os.environ, "T0": str(time.time()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    lines = [line.split() for line in done.stdout.splitlines()]
    found = {line[0]: float(line[1]) for line in lines if len(line) == 2 and line[0].isupper()}
    if not found:  # torch now and then aborts while a process ends; what was measured before counts
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return found


def compare(
    commands: Mapping[str, Sequence[str]],
    *,
    rows: Mapping[str, tuple[str, str]],
    base: str,
    title: str,
    description: str | None,
) -> None:
    """Measures, and prints a table.

    Args:
        commands: by name.
        rows: of the table: the command and the label of each.
        base: the row that the others are compared with.
        title: what is measured.
        description: for ``--help``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    options = parser.parse_args()
    samples: dict[str, list[float]] = {row: [] for row in rows}
    for number in range(options.repeats + 1):
        found = {name: figures(command) for name, command in commands.items()}
        if number == 0:
            continue  # a warm-up: files come into the page cache
        for row, (command, label) in rows.items():
            samples[row].append(found[command][label])
    middle = statistics.median(samples[base])
    print(f"{title}: median of {options.repeats} (smallest to largest), and ratio to '{base}'")
    for row, values in samples.items():
        median = statistics.median(values)
        print(f"{row:45s} {median:8.3f} ({min(values):.3f} to {max(values):.3f})   {median / middle:5.2f}")
    if options.json:
        options.json.write_text(json.dumps(samples, indent=1))
