"""An interrupted run, started again, ends as if nobody had interrupted it; which runs are resumed, and which are not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resume_programs import (
    EXIT_PREEMPTED,
    EXIT_TERMINATED,
    KINDS,
    SCRIPT,
    TRIES,
    Run,
    Undisturbed,
    assert_each_sample_once,
    assert_same,
    assert_stopped_as_asked,
    explained,
    interrupt_and_compare,
    results_of,
    resuming,
    told,
)

from torchtrainer import TorchTrainer
from torchtrainer.errors import ResumeError

PLAIN = KINDS["plain"]


@pytest.fixture(scope="module")
def undisturbed():
    runs = Undisturbed()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def preempted_once(tmp_path_factory):
    """A run that was preempted in its second pass."""
    run = Run(tmp_path_factory.mktemp("preempted"), PLAIN)
    run.once(("train", 16, "TERM"))
    assert run.programs[0].process.returncode == EXIT_PREEMPTED, explained(run)
    return run


@pytest.fixture
def preempted(preempted_once, tmp_path) -> Run:
    """A copy of a run that was preempted in its second pass."""
    shutil.copytree(preempted_once.place, tmp_path, dirs_exist_ok=True)
    return Run(tmp_path, PLAIN, programs=list(preempted_once.programs))


def changed(options, **trainer):
    """The options of a script with other arguments of the trainer."""
    return {**options, "trainer": {**options.get("trainer", {}), **trainer}}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def checkpoints(run: Run) -> list[Path]:
    """Directories of the checkpoints, oldest first."""
    return sorted(run.directory.glob("checkpoints/step-*"), key=lambda path: path.name.split("-n")[-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# Interruptions

CASES = [
    ("updates", [("train", 6, "TERM"), ("train", 14, "KILL")]),
    ("workers", [("train", 6, "WORKERS"), ("validate", 1, "TERM")]),
    ("persistent", [("train", 9, "KILL")]),
    ("accumulate", [("train", 3, "TERM"), ("train", 8, "TERM")]),
    ("early", [("train", 14, "TERM"), ("script", 2, "TERM")]),
    ("two", [("train", 5, "TERM"), ("train", 14, "KILL")]),
    ("saves", [("train", 20, "KILL")]),
    ("fit", [("train", 6, "TERM"), ("validate", 2, "KILL")]),
    ("sampler", [("train", 3, "TERM"), ("train", 9, "KILL")]),
    ("sampler, seats", [("train", 9, "WORKERS"), ("train", 14, "TERM")]),
    ("alone", [("epoch_end", 1, "KILL"), ("validate_end", 2, "TERM")]),
]


IN_THE_DEFAULT_SUITE = {"updates", "early", "sampler"}


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        pytest.param(
            kind,
            places,
            id="-".join([kind, *(f"{how}@{where}{at}" for where, at, how in places)]),
            marks=[] if kind in IN_THE_DEFAULT_SUITE else [pytest.mark.soak],
        )
        for kind, places in CASES
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path, undisturbed, kind, places) -> None:
    interrupt_and_compare(Run(tmp_path, KINDS[kind]), undisturbed, places)


@pytest.mark.soak
def test_a_driver_killed_while_a_checkpoint_is_written_loses_nothing_that_was_copied(tmp_path, undisturbed) -> None:
    run = Run(tmp_path, {**PLAIN, "checkpoint": {"asynchronous": True}})
    killed = run.once(("train", 5, "KILL"), TORCHTRAINER_FAILPOINT="checkpoint.publish:slow")
    assert killed.process.returncode == -9, explained(run)
    last = run.once()
    assert_same(run, undisturbed.get(PLAIN), redone=True)
    assert "state after step 4 saved" in resuming(last)[0]


@pytest.mark.soak
def test_interruptions_while_it_starts_and_a_second_signal_tear_nothing(tmp_path, undisturbed) -> None:
    run = Run(tmp_path, PLAIN)
    other = undisturbed.get(PLAIN)
    first = run.once(("setup", 0, "TERM"))
    assert first.process.returncode in (EXIT_PREEMPTED, EXIT_TERMINATED), explained(run)
    assert sum("got SIGTERM" in line for line in told(first)) == 1
    second = run.once(("train", 9, "TWICE"))
    assert second.process.returncode == EXIT_TERMINATED, explained(run)
    assert sum("leaving at once" in line for line in told(second)) == 1
    assert run.once(("setup", 0, "KILL")).process.returncode == -9, explained(run)
    run.once()
    assert_same(run, other, redone=True)
    assert_each_sample_once(run)


def test_preempted_it_says_so_in_one_line_and_takes_no_step_again(preempted, undisturbed) -> None:
    first = preempted.programs[0]
    assert len(told(first)) == 1
    assert "start the same command again to continue" in told(first)[0]
    last = preempted.once()
    assert_same(preempted, undisturbed.get(PLAIN), redone=False)
    assert len(told(last)) == 1
    assert "(2 calls done, state after step" in resuming(last)[0]
    assert json.loads((preempted.directory / "run.json").read_text())["state"] == "finished"


# Checkpoints that are damaged


def test_a_damaged_newest_checkpoint_is_set_aside_loudly_and_an_older_one_used(preempted, undisturbed) -> None:
    *_, older, newest = checkpoints(preempted)
    flip_a_bit(newest / "state.pt")
    last = preempted.once()
    assert_same(preempted, undisturbed.get(PLAIN), redone=True)
    assert sum(f"{newest.name} is damaged and is not used" in line for line in told(last)) == 1
    step = int(older.name.split("-")[1])
    assert f"state after step {step} saved" in resuming(last)[0]


@pytest.mark.soak
def test_without_any_sound_checkpoint_the_recorded_calls_are_made_again(preempted, undisturbed) -> None:
    damaged = checkpoints(preempted)
    for path in damaged:
        flip_a_bit(path / "state.pt")
    last = preempted.once()
    assert_same(preempted, undisturbed.get(PLAIN), redone=True)
    assert sum("is damaged and is not used" in line for line in told(last)) == len(damaged)


# Other ranks than before


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 3, marks=pytest.mark.soak)])
def test_other_ranks_go_on_and_every_sample_is_dealt_once(tmp_path, before, after) -> None:
    options = {**PLAIN, "epochs": 2}
    run = Run(tmp_path, changed(options, num_workers=before))
    assert run.once(("train", 4, "TERM")).process.returncode == EXIT_PREEMPTED, explained(run)
    run.options = changed(options, num_workers=after)
    assert run.once().process.returncode == 0, explained(run)
    assert_each_sample_once(run)
    assert max(run.batches().values()) == 1
    assert {key[2] for key in run.batches()} == set(range(max(before, after)))
    results = results_of(run.programs[-1])
    assert [one["num_samples"] for one in results[:4]] == [86, 45, 86, 45]


# Which run is resumed

SHORT = {**PLAIN, "epochs": 0}


def test_a_finished_run_is_left_alone_and_a_line_says_so(undisturbed, tmp_path) -> None:
    shutil.copytree(undisturbed.get(PLAIN).place, tmp_path, dirs_exist_ok=True)
    run = Run(tmp_path, SHORT)
    old = run.directory
    before = contents(old)
    program = run.once()
    assert program.process.returncode == 0, explained(run)
    assert resuming(program) == []
    assert contents(old) == before
    assert len(run.directories) == 2
    assert sum("has finished" in line and "resume=True" in line for line in told(program)) == 1, program.errors


@pytest.mark.soak
def test_a_run_ended_with_ctrl_c_is_left_alone_and_a_line_says_so(tmp_path) -> None:
    run = Run(tmp_path, PLAIN)
    interrupted = run.once(("train", 5, "INT"))
    assert "KeyboardInterrupt" in interrupted.errors, explained(run)
    old = run.directory
    before = contents(old)
    run.options = SHORT
    program = run.once()
    assert program.process.returncode == 0, explained(run)
    assert resuming(program) == []
    assert contents(old) == before
    assert sum("Ctrl-C" in line and "resume=True" in line for line in told(program)) == 1, program.errors


@pytest.mark.parametrize(
    "what", [pytest.param("config", marks=pytest.mark.soak), "creator", pytest.param("false", marks=pytest.mark.soak)]
)
def test_what_changed_starts_anew_and_leaves_the_old_run_as_it_was(preempted, what) -> None:
    old = preempted.directory
    before = contents(old)
    preempted.options = SHORT
    if what == "config":
        preempted.options = {**SHORT, "config": {**PLAIN["config"], "hidden": 12}}
    elif what == "creator":
        preempted = replace(preempted, script=SCRIPT.replace("lr=0.01", "lr=0.02"))
    else:
        preempted.options = changed(SHORT, resume=False)
    program = preempted.once()
    assert program.process.returncode == 0, explained(preempted)
    assert resuming(program) == []
    assert contents(old) == before
    assert len(preempted.directories) == 2
    expected = {"config": "config['hidden'] was 16 and is 12", "creator": "optimizer_creator has changed"}
    assert [expected[what] in line for line in told(program)] == [True] if what in expected else told(program) == []


def test_resume_true_names_both_values_of_what_changed(preempted) -> None:
    before = contents(preempted.directory)
    preempted.options = changed({**PLAIN, "config": {**PLAIN["config"], "hidden": 12}}, resume=True)
    program = preempted.once()
    assert program.process.returncode == 1
    assert "ResumeError" in program.errors
    assert "config['hidden'] was 16 and is 12" in program.errors
    assert contents(preempted.directory) == before


def test_resume_true_needs_a_run_to_go_on_with(tmp_path) -> None:
    with pytest.raises(ResumeError, match=f"no run to resume in {tmp_path}.*resume=False"):
        TorchTrainer(
            model_creator=lambda config: None,
            data_creator=lambda config: None,
            optimizer_creator=lambda model, config: None,
            loss_creator=torch.nn.CrossEntropyLoss,
            run_dir=tmp_path / "run",
            resume=True,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_a_script_that_asks_for_other_calls_is_told_both_and_can_be_put_back(preempted, undisturbed) -> None:
    preempted.options = {**PLAIN, "script": "steps"}
    program = preempted.once()
    assert program.process.returncode == 1
    assert "CallMismatchError: the script asks for train(num_steps=8, info={'number': 0}) as call 1" in program.errors
    assert "had train()" in program.errors
    preempted.programs.pop()
    preempted.options = PLAIN
    preempted.once()
    assert_same(preempted, undisturbed.get(PLAIN), redone=False)


@pytest.mark.soak
def test_a_run_whose_script_failed_in_a_call_that_is_no_pass_is_gone_on_with(tmp_path, undisturbed) -> None:
    run = Run(
        tmp_path,
        PLAIN,
        script=SCRIPT.replace("def streams(operator):", "def streams(operator):\n    point('streams', 0)"),
    )
    program = run.once(("streams", 0, "WORKERS"))
    assert_stopped_as_asked(program, ("streams", 0, "WORKERS"))
    assert sum(line["kind"] == "failure" for line in run.history()) == TRIES
    run.once()
    assert_same(run, undisturbed.get(PLAIN), redone=True)
    assert len(resuming(run.programs[-1])) == 1
