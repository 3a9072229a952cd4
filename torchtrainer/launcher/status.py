"""``torchtrainer status``: shows the runs below ``./runs``, or one of them: whether it lives, its results, errors and logs."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from torchtrainer.driver.run_dir import RUNS
from torchtrainer.launcher.run_state import (
    MAX_LINE,
    Liveness,
    NotARunDirectoryError,
    RunStatus,
    read_runs,
    read_status,
)
from torchtrainer.observe.table import text_table
from torchtrainer.process.own_files import printable

EXIT_USAGE = 2
MAX_CELL = 40
"""Longest text of a cell of a table, in characters."""
MAX_LISTED = 8
"""Maximum number of errors and logs listed."""
LAST_RESULTS = 5
CURVE_WIDTH = 60
"""Maximum number of characters of a curve; more values than that are averaged in groups."""
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = ".:-=+*%#"
"""For terminals that cannot show the others."""
LOSS_KEYS = ("train_loss", "loss")
COUNTS = frozenset({"num_samples", "batch_count", "epoch"})
MAX_DRAWN = 1e100
"""A curve leaves larger losses out: their sums overflow."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``torchtrainer status``."""
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", nargs="?", help=f"a run's directory; default: list those in ./{RUNS}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Prints the state of one run, or of all runs below ``./runs``.

    Args:
        args: as `add_arguments` describes them.

    Returns:
        0, or 2 if the path is not a run's directory.
    """
    now = time.time()
    if args.run_dir is None:
        runs = sorted(read_runs(Path(RUNS)), key=lambda run: run.active_s, reverse=True)
        data: dict[str, Any] = {"runs": [asdict(run) for run in runs]}
        text = list_runs(runs, now_s=now)
    else:
        try:
            status = read_status(Path(args.run_dir))
        except NotARunDirectoryError as error:
            print(f"torchtrainer status: {error}", file=sys.stderr)
            return EXIT_USAGE
        data = asdict(status)
        text = describe(status, now_s=now, bars=bars_for(sys.stdout))
    said = json.dumps(data, indent=2) if args.json else text
    encoding = sys.stdout.encoding or "ascii"
    print(said.encode(encoding, "replace").decode(encoding))  # results may hold what the terminal cannot show
    return 0


def describe(status: RunStatus, *, now_s: float, bars: str = BARS) -> str:
    """The state of a run in several lines.

    Args:
        status: the run.
        now_s: wall clock, seconds since 1970.
        bars: characters for the curve, from low to high.
    """
    lines = [
        f"{printable(status.run_dir, MAX_LINE)}: {_headline(status.liveness)}, last written {_age(now_s - status.active_s)} ago"
    ]
    if status.results:
        lines += ["", f"last of {len(status.results)} results:", _results_table(status.results[-LAST_RESULTS:])]
        losses = _losses(status.results)
        if len(losses) > 1:
            lines += ["", f"training loss {losses[0]:.4g} {curve(losses, bars)} {losses[-1]:.4g}"]
    else:
        lines.append("no results yet" if status.liveness.state == "running" else "no results")
    if status.damaged_lines:
        lines.append(f"{status.damaged_lines} damaged lines of history.jsonl were left out")
    if status.errors:
        said = [f"rank {error.rank}: {error.text or 'the file is damaged'}  ({error.path})" for error in status.errors]
        lines += ["", "errors, root cause first:", *_some(said)]
    if status.logs:
        lines += ["", "logs:", *_some(status.logs)]
    return "\n".join(lines)


def list_runs(runs: Iterable[RunStatus], *, now_s: float) -> str:
    """One line for each run, or one that says how to make one."""
    rows = []
    for run in runs:
        failed = f", {len(run.errors)} ranks failed" if len(run.errors) > 1 else ", 1 rank failed" * len(run.errors)
        last = _last_result(run.results) + failed
        pid = "" if run.liveness.pid is None else str(run.liveness.pid)
        rows.append(
            (printable(run.run_dir, MAX_LINE), run.liveness.state, pid, last, f"{_age(now_s - run.active_s)} ago")
        )
    if not rows:
        return f'no run directories in ./{RUNS}: TorchTrainer(run_dir="auto") makes one there for each run'
    return text_table(("run", "state", "pid", "last result", "written"), rows)


def bars_for(stream: TextIO) -> str:
    """The characters of a curve that a stream can show."""
    try:
        BARS.encode(stream.encoding or "ascii")
    except (UnicodeError, LookupError):
        return PLAIN_BARS
    return BARS


def curve(values: Sequence[float], bars: str = BARS) -> str:
    """Draws finite values as one line, at most ``CURVE_WIDTH`` characters, each the mean of as many values."""
    width = min(CURVE_WIDTH, len(values))
    edges = [index * len(values) // width for index in range(width + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (len(bars) - 1) or 1.0
    return "".join(bars[round((mean - low) / step)] for mean in means)


def _headline(liveness: Liveness) -> str:
    if liveness.pid is None:
        who = "" if liveness.state != "unknown" else " (its lock cannot be read)"
    elif liveness.state == "running":
        who = f", pid {liveness.pid}"
        if not liveness.pid_alive:
            who += " (gone from this machine; the lock is held by a process that it forked, or on another machine)"
    else:
        who = f", pid {liveness.pid} was its driver"
    return f"{liveness.state}{who}"


def _some(lines: Sequence[str]) -> list[str]:
    more = [f"  ... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return [f"  {printable(line)}" for line in lines[:MAX_LISTED]] + more


def _results_table(results: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    names = [name for name in names if name not in COUNTS and not name.startswith("last_") and name != "profile"]
    rows = [
        [_when(result.get("time")), *(_cell(result.get(key, "")) for key in ("kind", "epoch", "step"))]
        + [_cell(result["metrics"].get(name, "")) for name in names]
        for result in results
    ]
    return text_table(["time", "kind", "epoch", "step", *(printable(name, MAX_CELL) for name in names)], rows)


def _last_result(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "no result"
    result = results[-1]
    values = [
        f"{key} {_cell(result['metrics'][key])}" for key in ("train_loss", "val_loss") if key in result["metrics"]
    ]
    return " ".join([_cell(result["kind"]), "epoch", _cell(result.get("epoch", "?")), *values])


def _losses(results: Iterable[Mapping[str, Any]]) -> list[float]:
    found = (
        next((r["metrics"][key] for key in LOSS_KEYS if key in r["metrics"]), None)
        for r in results
        if r["kind"] == "train"
    )
    numbers = [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]
    return [float(number) for number in numbers if abs(number) < MAX_DRAWN]


def _when(text: Any) -> str:
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, TypeError, OverflowError):
        return "?"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value), MAX_CELL)
