"""Every benchmark, beside the peers that are installed: all commands in turn, several times over, in one run.

    python benchmarks/all.py [--quick] [--repeats 5] [--only mlp start ...] [--data DIR] [--page]

Works: mlp, resnet, transformer (time per step) and digits (time to accuracy), with 2 workers of 1 thread each. Parts: what else
this project measures about itself. ``--data DIR``: an image folder, DIR/train/<class>/*, for resnet; else its images are random.
All samples go to ``benchmarks/results/<time>.json``; ``--page`` writes docs/benchmarks.md and its pictures from them, and
``python benchmarks/page.py FILE`` does so later. Only ratios of one run mean anything. The exit code is 1 if a command failed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from commands import Ran, run_command
from figures import arrivals_of, rows_of, wanted_accuracy
from peers import OURS, PEERS, PLAIN, VARIANTS, Peer, machine, versions
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
LIMIT_S = 1800.0
"""Longest time of a command."""
QUICK_PEERS = (PLAIN, OURS)
"""Who runs in a quick run, but for mlp, where all do."""


@dataclass(frozen=True, kw_only=True)
class WorkPlan:
    """How a work is done.

    Attributes:
        quick: options for its program in a quick run; else it has its own sizes.
        labels: that a program which did the work has printed.
        seconds, quick_s: that a command takes on two cores, roughly.
        variants: our own options are rows of their own.
        everybody: also in a quick run.
    """

    quick: Sequence[str]
    labels: Sequence[str]
    seconds: float
    quick_s: float
    variants: bool = False
    everybody: bool = False


PACE = ("MS_PER_STEP", "SAMPLES_PER_S", "WEIGHTS")
WORKS = {
    "mlp": WorkPlan(quick=("--samples", "3200"), labels=PACE, seconds=14, quick_s=7, everybody=True),
    "resnet": WorkPlan(
        quick=("--samples", "64", "--warm-up", "0", "--epochs", "1"),
        labels=PACE,
        seconds=30,
        quick_s=8,
        variants=True,
    ),
    "transformer": WorkPlan(quick=("--samples", "128"), labels=PACE, seconds=15, quick_s=7),
    "digits": WorkPlan(quick=("--epochs", "12"), labels=(*PACE, "ACCURACY"), seconds=35, quick_s=12),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A program that compares by itself: it runs once, and writes its samples to a file.

    Attributes:
        options, quick: for it; quick None: it is left out of a quick run.
        seconds, quick_s: that it takes on two cores, roughly.
    """

    options: Sequence[str]
    seconds: float
    quick: Sequence[str] | None = None
    quick_s: float = 0.0


PARTS = {
    "start": Part(options=("--repeats", "5"), seconds=110, quick=("--repeats", "1"), quick_s=35),
    "launch": Part(options=("--repeats", "3"), seconds=300),
    "checkpoint": Part(options=("--checkpoints", "40"), seconds=80),
    "recovery": Part(
        options=("--kills", "40", "--restarts", "5"),
        seconds=150,
        quick=("--kills", "2", "--restarts", "0"),
        quick_s=12,
    ),
    "exchange": Part(options=("--processes", "2", "4"), seconds=60),
    "memory": Part(options=("--workers", "16"), seconds=10, quick=("--workers", "4"), quick_s=6),
    "scale": Part(options=(), seconds=70, quick=("--workers", "2", "4"), quick_s=12),
    "control_plane": Part(options=(), seconds=40, quick=("--ranks", "16", "128"), quick_s=4),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command.

    Attributes:
        name: as it is shown.
        command: to run; of a part, without the file that it writes to.
        work, peer: what is done by whom; empty: it is a part.
        labels: that it has to print.
        seconds: that it takes, roughly.
    """

    name: str
    command: Sequence[str]
    work: str = ""
    peer: str = ""
    labels: Sequence[str] = ()
    seconds: float


def jobs_for(options: argparse.Namespace) -> list[Job]:
    """All commands of a run, in their order: each repetition has every peer on every work once."""
    repeats = 1 if options.quick else options.repeats
    once = [job for work in WORKS if work in options.only for job in _jobs_of_work(work, options)]
    parts = [_job_of_part(name, options) for name in PARTS if name in options.only]
    return [*(once * repeats), *(job for job in parts if job is not None)]


def _jobs_of_work(work: str, options: argparse.Namespace) -> list[Job]:
    plan = WORKS[work]
    peers: Sequence[Peer] = [*PEERS, *(VARIANTS if plan.variants else ())]
    if options.quick and not plan.everybody:
        peers = [peer for peer in peers if peer.name in QUICK_PEERS or peer in VARIANTS]
    sizes = [*(plan.quick if options.quick else ()), *(("--data", options.data) if options.data else ())]
    return [
        Job(
            name=f"{work}: {peer.name}",
            command=peer.command(work, *sizes),
            work=work,
            peer=peer.name,
            labels=plan.labels,
            seconds=plan.quick_s if options.quick else plan.seconds,
        )
        for peer in peers
        if peer.installed
    ]


def _job_of_part(name: str, options: argparse.Namespace) -> Job | None:
    part = PARTS[name]
    given = part.quick if options.quick else part.options
    if given is None:
        return None
    command = [sys.executable, str(HERE / f"{name}.py"), *given]
    return Job(name=name, command=command, seconds=part.quick_s if options.quick else part.seconds)


def go(jobs: Sequence[Job]) -> dict[str, Any]:
    """Runs the commands; one that fails is reported, and the others go on.

    Returns:
        ``works``: samples by work and peer; ``parts``: what each wrote; ``failed``: who, and its last lines.
    """
    found: dict[str, Any] = {"works": {}, "parts": {}, "failed": []}
    bar = tqdm(jobs, unit="command", disable=None)
    for job in bar:
        bar.set_description(job.name)
        if job.work:
            ran = run_command(job.command, LIMIT_S)
            failed = not ran.said(job.labels)
            if not failed:
                found["works"].setdefault(job.work, {}).setdefault(job.peer, []).append(dict(ran.values))
        else:
            ran, samples = _run_part(job)
            failed = samples is None
            if not failed:
                found["parts"][job.name] = samples
        if failed:
            found["failed"].append({"name": job.name, "code": ran.code, "last_lines": ran.last_lines})
            tqdm.write(_failure(job, ran))
    return found


def _run_part(job: Job) -> tuple[Ran, Any]:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "samples.json")
        ran = run_command([*job.command, "--json", str(file)], LIMIT_S)
        return ran, json.loads(file.read_text()) if file.exists() else None


def _failure(job: Job, ran: Ran) -> str:
    ended = f"exit code {ran.code}" if ran.code is not None else "killed"
    return f"{job.name} failed ({ended}): {shlex.join(job.command)}\n{ran.last_lines}\n"


def table(found: dict[str, Any]) -> str:
    """What the works came to, as text."""
    lines = []
    for work, samples in found["works"].items():
        lines.append(f"\n{work}: ms per step, samples/s, ratio of ms per step to '{PLAIN}'")
        for row in rows_of(samples, PLAIN):
            ratio = "" if row.ratio is None else f"{row.ratio:6.2f}"
            same = {True: "same weights", False: "other weights", None: ""}[row.same_weights]
            lines.append(
                f"  {row.name:36s} {row.ms_per_step.shown():28s} {row.samples_per_s.shown(0):28s} {ratio}  {same}"
            )
        wanted = wanted_accuracy(samples, PLAIN)
        if wanted is None:
            continue
        lines.append(f"  seconds from the start of the command to {wanted:.1%} of validation accuracy")
        for arrival in arrivals_of(samples, wanted):
            seconds = "never" if arrival.seconds is None else arrival.seconds.shown()
            lines.append(f"  {arrival.name:36s} {seconds:28s} final {arrival.final.median:.1%}")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*WORKS, *PARTS]
    parser.add_argument("--quick", action="store_true", help="small sizes, once: for whether it runs, not for figures")
    parser.add_argument("--repeats", type=int, default=5, help="of the works (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--data", metavar="DIR", help="image folder for resnet")
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks.md from the results")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR", help="where the JSON goes")
    options = parser.parse_args()
    if options.data is not None and not (Path(options.data) / "train").is_dir():
        parser.error(f"--data {options.data} has no folder train/")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    return options


def main() -> int:
    """Measures, reports, and returns the exit code."""
    options = parsed()
    jobs = jobs_for(options)
    for package, found in versions().items():
        print(f"{package:14s} {found}")
    minutes = sum(job.seconds for job in jobs) / 60
    images = f"images of {options.data}" if options.data else "random images (give --data DIR for real ones)"
    print(f"resnet trains on {images}\n{len(jobs)} commands, about {minutes:.0f} minutes on two cores", flush=True)
    taken = datetime.now().astimezone()
    about = {"taken": taken.isoformat(timespec="minutes"), "quick": options.quick, "real_images": bool(options.data)}
    results = {**about, "machine": machine(), "versions": versions(), **go(jobs)}
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{taken:%Y-%m-%d-%H%M%S}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results), f"\nsamples: {file}")
    if options.page:
        from page import write_page

        write_page(results)
    for failure in results["failed"]:
        print(f"failed: {failure['name']}", file=sys.stderr)
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
