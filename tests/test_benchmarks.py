"""The benchmark programs: what they make of what commands print, and that a failing command spoils nothing but its own row."""

# ruff: noqa: E402 - the programs are found on a path that has to be added first

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from programs import DEADLINE_S

import torchtrainer

BENCHMARKS = Path(torchtrainer.__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # programs, not a package

import all as every
from commands import run_command, values_in
from compare import PROGRAMS, TORCHRUN
from estimate import Assumptions, estimated
from figures import Spread, arrivals_of, rows_of, wanted_accuracy
from page import page_of
from peers import OURS, OURS_BF16, PEERS, PLAIN, machine, versions

LIMIT_S = 30.0


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def sample(ms: float, weights: str = "a", curve: list[tuple[float, float]] | None = None) -> dict[str, object]:
    found = {"MS_PER_STEP": [[str(ms)]], "SAMPLES_PER_S": [[str(1000 / ms)]], "WEIGHTS": [[weights]]}
    if curve:
        found["ACCURACY"] = [[str(seconds), str(accuracy)] for seconds, accuracy in curve]
    return found


MLP = {
    PLAIN: [sample(2.0), sample(4.0), sample(3.0)],
    "Accelerate": [sample(6.0, "b")],
    OURS: [sample(1.0), sample(2.0), sample(1.5)],
}
DIGITS = {
    PLAIN: [sample(2.0, curve=[(5.0, 0.5), (6.0, 0.8), (7.0, 1.0)])],
    "Accelerate": [sample(2.0, curve=[(5.0, 0.5), (6.0, 0.6)])],
    OURS: [sample(1.0, curve=[(2.0, 0.5), (2.5, 0.95)]), sample(1.0, curve=[(3.0, 0.9)])],
}


# Commands


def test_values_are_taken_from_lines_that_begin_with_a_label() -> None:
    text = "MS_PER_STEP 1.5\nsome words\nACCURACY 1 0.5\nACCURACY 2 0.6\nALONE\n[rank0] NO 1\n"
    assert values_in(text) == {"MS_PER_STEP": [["1.5"]], "ACCURACY": [["1", "0.5"], ["2", "0.6"]]}


def test_a_command_that_fails_says_how_and_what_it_measured_before() -> None:
    ran = run_command(script("import sys; print('MS_PER_STEP 2'); sys.exit('out of luck')"), LIMIT_S)
    assert ran.code == 1 and "out of luck" in ran.last_lines
    assert ran.said(["MS_PER_STEP"]) and not ran.said(["MS_PER_STEP", "WEIGHTS"])


def test_a_command_that_does_not_end_is_killed_with_its_children() -> None:
    hangs = (
        "import signal, subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']); "
    )
    began = time.monotonic()
    ran = run_command(script(hangs + "signal.pause()"), limit_s=1.0)  # the child keeps our pipes open until it is gone
    assert ran.code is None and "killed" in ran.last_lines
    assert time.monotonic() - began < LIMIT_S


def test_one_failing_command_leaves_the_others_going(capsys: pytest.CaptureFixture[str]) -> None:
    says = script("print('MS_PER_STEP 2'); print('SAMPLES_PER_S 3'); print('WEIGHTS x')")
    jobs = [
        every.Job(
            name="bad",
            command=script("raise SystemExit('no memory')"),
            work="mlp",
            peer="bad",
            labels=("A",),
            seconds=1,
        ),
        every.Job(name="good", command=says, work="mlp", peer="good", labels=every.PACE, seconds=1),
        every.Job(name="part", command=script("raise SystemExit('no disk')"), seconds=1),
    ]
    found = every.go(jobs)
    assert list(found["works"]["mlp"]) == ["good"] and found["parts"] == {}
    assert [failure["name"] for failure in found["failed"]] == ["bad", "part"]
    shown = capsys.readouterr().out
    assert "no memory" in shown and "no disk" in shown and "exit code 1" in shown


# The plan


def options(**given: object) -> argparse.Namespace:
    known = {"quick": False, "repeats": 3, "only": [*every.WORKS, *every.PARTS], "data": None}
    return argparse.Namespace(**{**known, **given})


def test_repetitions_take_turns_instead_of_following_each_other() -> None:
    names = [job.peer for job in every.jobs_for(options(only=["mlp"]))]
    once = names[: len(names) // 3]
    assert names == once * 3 and {PLAIN, OURS} <= set(once)


def test_a_peer_that_is_not_installed_is_left_out_and_listed() -> None:
    assert not replace(PEERS[0], package="no_such_package").installed
    missing = [peer.name for peer in PEERS if not peer.installed]
    assert not set(missing) & {job.peer for job in every.jobs_for(options())}
    assert versions()["torch"][0].isdigit()
    assert all(versions()[peer.package] == "not installed" for peer in PEERS if not peer.installed)


def test_our_own_options_are_rows_of_resnet_alone() -> None:
    jobs = every.jobs_for(options(repeats=1))
    assert {job.work for job in jobs if job.peer == OURS_BF16} == {"resnet"}


def test_a_quick_run_is_announced_as_less_than_three_minutes_and_runs_each_part_at_most_once() -> None:
    jobs = every.jobs_for(options(quick=True, repeats=5))
    assert sum(job.seconds for job in jobs) <= 180
    assert len({job.name for job in jobs}) == len(jobs)


@pytest.mark.parametrize("wrong", [["--repeats", "0"], ["--data", "/nowhere"], ["--only", "nothing"]])
def test_what_cannot_work_is_refused_before_anything_runs(wrong: list[str]) -> None:
    command = [sys.executable, str(BENCHMARKS / "all.py"), *wrong]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2 and wrong[0] in done.stderr


# Figures


def test_medians_ratios_and_equal_weights() -> None:
    plain, accelerate, ours = rows_of(MLP, PLAIN)
    assert plain.ms_per_step == Spread(median=3.0, smallest=2.0, largest=4.0, count=3) and plain.ratio == 1.0
    assert accelerate.ratio == 2.0 and accelerate.same_weights is False
    assert ours.ratio == 0.5 and ours.same_weights is True


def test_without_the_plain_loop_there_are_no_ratios() -> None:
    (ours,) = rows_of({OURS: MLP[OURS]}, PLAIN)
    assert ours.ratio is None and ours.same_weights is None
    assert wanted_accuracy({OURS: DIGITS[OURS]}, PLAIN) is None


def test_time_to_accuracy_is_until_the_first_validation_that_has_it() -> None:
    wanted = wanted_accuracy(DIGITS, PLAIN)
    assert wanted == pytest.approx(0.9)
    plain, accelerate, ours = arrivals_of(DIGITS, wanted)
    assert plain.seconds is not None and plain.seconds.median == 7.0
    assert accelerate.seconds is None
    assert ours.seconds is not None and ours.seconds.median == 2.75


def test_the_estimate_scales_what_was_measured() -> None:
    cost = {"ranks": 1000, "start_s": 0.1, "beat_s": 0.05, "failure_s": 0.2}
    given = Assumptions(ranks=10_000, mtbf_years=1.0, replace_s=8.0, checkpoint_every_s=20.0)
    found = estimated(cost, given)
    assert found.heartbeats_per_s == 10_000
    assert found.driver_share == pytest.approx(0.5)
    assert (found.start_s, found.failure_s) == (pytest.approx(1.0), pytest.approx(2.0))
    assert found.failures_per_day == pytest.approx(10_000 / 365.25)
    assert found.lost_share == pytest.approx(found.failures_per_day * 20 / 86_400)


# The page

COSTS = [
    {"ranks": ranks, "start_s": 1e-4 * ranks, "call_s": 1e-4 * ranks, "beat_s": 5e-5 * ranks, "failure_s": 2e-4 * ranks}
    | {"watching_s": 0.01}
    for ranks in (16, 1024, 10_000)
]
SCALE = [
    {"workers": workers, "start_s": 0.1, "ms_per_step": 0.5, "driver_share": 0.01, "supervision_share": 0.02}
    | {"supervision_us_per_step": 4.0, "messages_per_s": 7.0, "worker_bytes": 1 << 25}
    for workers in (2, 4)
]
RESULTS = {
    "taken": "2026-01-02T03:04+00:00",
    "quick": False,
    "real_images": False,
    "machine": machine(),
    "versions": {"torch": "2.14.1", "ray": "not installed"},
    "works": {"mlp": MLP, "digits": DIGITS},
    "parts": {
        "control_plane": COSTS,
        "scale": SCALE,
        "start": {PLAIN: [5.0], OURS: [2.0]},
        "launch": {"hello": {"torchrun": [5.0], "torchtrainer": [2.0]}},
        "checkpoint": {"stall_s": {"torchtrainer": [0.01]}},
        "recovery": {"torchtrainer": [{"seconds": [0.1]}], "torchrun": [4.0]},
        "exchange": {"2": {"1024": {"shared": 1e-5, "gloo": 1e-3}}},
        "memory": {"workers": 4, "resident_bytes": 1 << 30, "proportional_bytes": 1 << 28},
    },
}


def test_the_page_has_every_section_and_all_of_its_pictures(tmp_path: Path) -> None:
    text = page_of(RESULTS, tmp_path)
    pictures = {line.partition("(")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {file.name for file in tmp_path.iterdir()} and len(pictures) == 5
    for words in ("Time per step", "Time to accuracy", "1,024 synthetic ranks", "10,000 GPUs", "Not installed: ray"):
        assert words in " ".join(text.split())
    assert f"| {OURS} | 1.50 (1.00 to 2.00) | 0.50 |" in text


def test_the_page_of_the_same_samples_is_the_same(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        text = page_of(RESULTS, tmp_path / name)
        written.append([text, *(file.read_text() for file in sorted((tmp_path / name).iterdir()))])
    assert written[0] == written[1]


@pytest.mark.parametrize("part", ["nothing", *RESULTS["parts"]])
def test_a_page_of_some_of_the_benchmarks_has_these_alone(part: str, tmp_path: Path) -> None:
    parts = {name: samples for name, samples in RESULTS["parts"].items() if name == part}
    text = page_of({**RESULTS, "works": {}, "parts": parts}, tmp_path)
    assert ("## More processes" in text) == (part == "scale")
    assert ("10,000 GPUs" in text) == (part == "control_plane")


# For real


@pytest.mark.slow
@pytest.mark.soak
def test_the_same_work_ends_with_the_plain_loops_weights() -> None:
    sizes = ["--work", "mlp", "--samples", "640", "--epochs", "1"]
    found = {}
    for name, starter in (("peer_by_hand.py", TORCHRUN), ("peer_torchtrainer.py", (sys.executable,))):
        ran = run_command([*starter, str(PROGRAMS / name), *sizes], DEADLINE_S)
        assert ran.said(every.PACE), ran.last_lines
        found[name] = ran.values["WEIGHTS"]
    assert found["peer_by_hand.py"] == found["peer_torchtrainer.py"]
