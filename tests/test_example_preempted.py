"""The example under our launcher, on a machine that is taken away: what a user sees, and that nothing is done twice."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
from programs import Program, start_program

from torchtrainer.process.signals import EXIT_PREEMPTED

EXAMPLE = Path(__file__).parent.parent / "examples" / "cifar10" / "train.py"
LAUNCHER = (sys.executable, "-m", "torchtrainer", "run", "--num-workers", "2")
EPOCH = re.compile(r"^epoch +(\d+)/4 +(.*accuracy [\d.]+%)", re.MULTILINE)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def start(directory: Path) -> Program:
    text = EXAMPLE.read_text()
    return start_program(
        directory, text, "--dataset", "digits", "--epochs", "4", "--no-tqdm", python=LAUNCHER, OMP_NUM_THREADS="1"
    )


@pytest.mark.soak
def test_told_to_stop_in_the_second_epoch_the_same_command_finishes(tmp_path) -> None:
    stopped = start(tmp_path)
    stopped.wait_for("epoch   1/4")
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.finish() == EXIT_PREEMPTED, stopped.errors
    assert len(re.findall("torchtrainer: got SIGTERM; the state after step", stopped.errors)) == 1
    assert "stopped for a preemption, state saved" in stopped.errors
    finished = start(tmp_path)
    assert finished.finish() == 0, finished.errors
    finished.assert_nothing_left()
    assert [int(number) for number, _ in EPOCH.findall(finished.output)] == [1, 2, 3, 4]
    before = EPOCH.findall(stopped.output)
    assert before == EPOCH.findall(finished.output)[: len(before)]
    (history,) = (tmp_path / "runs").glob("*/*/history.jsonl")
    steps = [(line["kind"], line["step"]) for line in map(json.loads, history.read_text().splitlines())]
    assert steps == [(kind, step) for step in (23, 46, 69, 92) for kind in ("train", "validate")]
