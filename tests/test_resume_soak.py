"""Runs that are interrupted at random places and moments, in any way and of any kind: each ends as an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import time
from dataclasses import dataclass, field

import pytest
from resume_programs import (
    EXIT_PREEMPTED,
    EXIT_TERMINATED,
    KINDS,
    Interruption,
    Run,
    Undisturbed,
    assert_each_sample_once,
    assert_same,
    explained,
    results_of,
)

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

SEEDS = 50
MOST_INTERRUPTIONS = 3
FAILPOINTS = (
    "checkpoint.publish:slow",
    "checkpoint.directory.fsync:slow",
    "checkpoint.manifest.write:kill",
    "checkpoint.verify:kill",
)
PLACES: dict[str, tuple[int, int]] = {
    "train": (0, 32),
    "validate": (0, 17),
    "epoch_end": (1, 3),
    "validate_end": (1, 3),
    "script": (1, 6),
    "setup": (0, 0),
    "saved": (1, 4),
}
"""Where an interruption may be, and the counts there."""
LATEST_S = 6.0
"""When a signal from outside comes at the latest, after the start."""


@pytest.fixture(scope="module")
def undisturbed():
    runs = Undisturbed()
    yield runs
    runs.close()


@dataclass
class Plan:
    """One way to interrupt a start of the script.

    Attributes:
        place: in the script; None: from outside.
        signum, after_s: from outside.
        environ: of the start.
    """

    place: Interruption | None = None
    signum: int = 0
    after_s: float = 0.0
    environ: dict[str, str] = field(default_factory=dict)


def plan(draw: random.Random) -> Plan:
    """Chooses how a start is interrupted."""
    environ = {"TORCHTRAINER_FAILPOINT": draw.choice(FAILPOINTS)} if draw.random() < 0.25 else {}
    if draw.random() < 0.3:
        signum = draw.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1))
        return Plan(signum=signum, after_s=draw.uniform(1.0, LATEST_S), environ=environ)
    where = draw.choice(("train", "train", "train", *PLACES))
    how = draw.choice(("TERM", "TERM", "KILL", "WORKERS", "TWICE"))
    if where not in ("train", "validate") and how in ("WORKERS", "TWICE"):
        how = "KILL"  # these are for places inside of a worker that trains
    return Plan(place=(where, draw.randint(*PLACES[where]), how), environ=environ)


def run_once(run: Run, how: Plan) -> int:
    """Starts the script, interrupts it, and returns its exit code; nothing of it may be left."""
    if how.place is not None:
        return run.once(how.place, **how.environ).process.returncode
    program = run.start(None, **how.environ)
    time.sleep(how.after_s)  # the moment is what is drawn; nothing waits for anything
    program.process.send_signal(how.signum)
    code = program.finish()
    program.assert_nothing_left()
    return code


def is_finished(run: Run, undisturbed: Run) -> bool:
    """Whether the script came to its end; a signal after that does not matter any more."""
    if len(results_of(run.programs[-1])) < len(results_of(undisturbed.programs[-1])):
        return False
    return all(json.loads((path / "run.json").read_text())["state"] == "finished" for path in run.directories)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_randomly_interrupted_runs_end_as_undisturbed_ones(tmp_path, undisturbed, seed) -> None:
    draw = random.Random(seed)
    kind = draw.choice(sorted(KINDS))
    plans = [plan(draw) for _ in range(draw.randint(1, MOST_INTERRUPTIONS))]
    run = Run(tmp_path, KINDS[kind])
    print(f"seed {seed}: {kind}, {plans}")
    other = undisturbed.get(run.options)
    for how in plans:
        code = run_once(run, how)
        assert code in (0, 1, EXIT_PREEMPTED, EXIT_TERMINATED, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1), (
            explained(run)
        )
        assert code != 1 or (how.place is not None and how.place[2] == "WORKERS"), explained(run)
        if is_finished(run, other):
            break
    else:
        run.once()
    sudden = any(how.place is None or how.place[2] != "TERM" or how.environ for how in plans)
    assert_same(run, other, redone=sudden, cut_off=any(how.signum for how in plans))
    if run.options.get("script") not in ("early", "saves"):
        assert_each_sample_once(run)
