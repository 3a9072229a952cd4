"""Run directories and checkpoints that cannot be used: a clear error or one warning, nothing lost, nothing run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resume_programs import (
    EXIT_PREEMPTED,
    KINDS,
    Run,
    Undisturbed,
    assert_same,
    explained,
    results_of,
    resuming,
    told,
)

from torchtrainer import CheckpointConfig, TorchTrainer
from torchtrainer.checkpoint.durable import FileDigest
from torchtrainer.checkpoint.manifest import MANIFEST, Manifest
from torchtrainer.checkpoint.verified import verify
from torchtrainer.errors import InvalidArgumentError, RunDirectoryError

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounts and changes owners: needs root")
NOBODY = 65534
PLAIN = KINDS["plain"]


@pytest.fixture(scope="module")
def undisturbed():
    runs = Undisturbed()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def preempted_once(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("preempted"), PLAIN)
    run.once(("train", 16, "TERM"))
    assert run.programs[0].process.returncode == EXIT_PREEMPTED, explained(run)
    return run


@pytest.fixture
def preempted(preempted_once, tmp_path) -> Run:
    """A copy of a run that was preempted in its second pass."""
    shutil.copytree(preempted_once.place, tmp_path, dirs_exist_ok=True)
    return Run(tmp_path, PLAIN, programs=list(preempted_once.programs))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, which can be filled."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], capture_output=True, timeout=60)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount: {mounted.stderr!r}")
    yield path
    subprocess.run(["umount", path], check=True, timeout=60)


def trainer(run_dir, **changes) -> TorchTrainer:
    """A trainer whose creators are never called, as its arguments are refused before."""

    def creator(config):
        raise AssertionError("not reached")

    def optimizer_creator(model, config):
        raise AssertionError("not reached")

    return TorchTrainer(
        model_creator=creator,
        data_creator=creator,
        optimizer_creator=optimizer_creator,
        loss_creator=torch.nn.CrossEntropyLoss,
        run_dir=run_dir,
        **changes,
    )


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_schedule_of_no_seconds_is_refused(seconds) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"every_seconds must be more than 0 seconds.*got {seconds}"):
        CheckpointConfig(every_seconds=seconds)


@needs_root
@pytest.mark.parametrize("resume", ["auto", True])
def test_a_run_directory_of_somebody_else_is_refused_and_left_as_it_is(preempted, resume) -> None:
    directory = preempted.directory
    for path in (directory, *directory.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    before = contents(directory)
    preempted.options = {**PLAIN, "trainer": {"run_dir": str(directory), "resume": resume}}
    program = preempted.once()
    assert program.process.returncode == 1
    assert "RunDirectoryError" in program.errors
    assert f"belongs to user id {NOBODY}, not to you" in program.errors
    assert contents(directory) == before


@needs_root
def test_an_empty_directory_of_somebody_else_is_refused(tmp_path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    with pytest.raises(RunDirectoryError, match=f"belongs to user id {NOBODY}, not to you"):
        trainer(tmp_path / "theirs")
    assert list((tmp_path / "theirs").iterdir()) == []


def test_a_link_to_a_run_is_refused_and_the_run_left_as_it_is(preempted) -> None:
    before = contents(preempted.directory)
    link = preempted.place / "link"
    link.symlink_to(preempted.directory)
    preempted.options = {**PLAIN, "trainer": {"run_dir": str(link)}}
    program = preempted.once()
    assert program.process.returncode == 1
    assert f"{link} is a symbolic link; give the directory that it points to" in program.errors
    assert contents(preempted.directory) == before


def test_a_record_of_a_newer_version_is_refused_and_left_as_it_is(preempted) -> None:
    path = preempted.directory / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3, "version": "9.9"}))
    before = contents(preempted.directory)
    for resume in ("auto", True):
        with pytest.raises(
            RunDirectoryError, match=r"made by torchtrainer 9\.9.*use that version, or pass another run_dir"
        ):
            trainer(preempted.directory, resume=resume)
    assert contents(preempted.directory) == before


def test_a_directory_in_use_names_the_process_and_how_to_stop_it(tmp_path, capsys) -> None:
    run = Run(tmp_path, {**PLAIN, "trainer": {"run_dir": str(tmp_path / "run")}})
    program = run.start(("train", 2, "STOP"))  # the driver lives, and does nothing until it is killed
    program.wait_for("DIRECTORY")
    said = f"is in use by a live run (pid {program.process.pid}): stop that run (kill {program.process.pid})"
    for resume in ("auto", False):
        with pytest.raises(RunDirectoryError, match=re.escape(said)):
            trainer(tmp_path / "run", resume=resume)
    assert "goes to" not in capsys.readouterr().err
    program.process.kill()
    program.finish()
    program.assert_nothing_left()


@needs_root
def test_a_directory_that_is_not_writable_is_refused(small_disk) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True, timeout=60)
    with pytest.raises(RunDirectoryError, match=r"Read-only file system.*Pass run_dir="):
        trainer(small_disk / "run")


@needs_root
@pytest.mark.parametrize("how", [pytest.param(one, marks=pytest.mark.soak) for one in ("FILL", "READONLY")])
def test_training_goes_on_with_one_warning_where_no_checkpoint_can_be_written(
    small_disk, tmp_path, undisturbed, how
) -> None:
    options = {**PLAIN, "checkpoint": {"path": str(small_disk / "checkpoints"), "asynchronous": False}}
    run = Run(tmp_path, options)
    program = run.once(("saved", 1, how), DISK=str(small_disk))
    assert program.process.returncode == 0, explained(run)
    assert len(run.noted("fired.jsonl")) == 1
    assert results_of(program) == results_of(undisturbed.get(PLAIN).programs[-1])
    assert len(told(program)) == 1, program.errors  # not one for each checkpoint
    found = [verify(path) for path in (small_disk / "checkpoints").glob("*/*/step-*")]
    assert found
    assert [path.name for path in (small_disk / "checkpoints").glob(".*")] == []


@needs_root
@pytest.mark.soak
def test_training_goes_on_with_one_warning_where_the_run_directory_is_full(small_disk, tmp_path, undisturbed) -> None:
    run = Run(tmp_path, {**PLAIN, "trainer": {"run_dir": str(small_disk / "run")}})
    program = run.once(("saved", 1, "FILL"), DISK=str(small_disk))
    assert program.process.returncode == 0, explained(run)
    assert results_of(program) == results_of(undisturbed.get(PLAIN).programs[-1])
    assert 1 <= len(told(program)) <= 3, program.errors
    for path in (small_disk / "run" / "checkpoints").glob("step-*"):
        verify(path)


def test_the_state_of_another_model_is_refused_by_key_and_shapes_and_stays_usable(preempted, undisturbed) -> None:
    program = preempted.once(HIDDEN="24")
    assert program.process.returncode == 1
    assert "first.weight has shape (16, 8) in the state and (24, 8) here" in program.errors
    preempted.programs.pop()
    preempted.once()
    assert_same(preempted, undisturbed.get(PLAIN), redone=False)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_bomb_in_the_place_of_a_state_is_refused_and_not_run(preempted) -> None:
    gone_off = preempted.place / "gone off"
    buffer = io.BytesIO()
    torch.save({"shared": Bomb(gone_off), "ranks": []}, buffer)
    content = buffer.getvalue()
    for path in preempted.directory.glob("checkpoints/step-*"):
        (path / "state.pt").write_bytes(content)
        manifest = Manifest.decode((path / MANIFEST).read_bytes(), "")
        digest = FileDigest(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        (path / MANIFEST).write_bytes(replace(manifest, files={"state.pt": digest}).encode())
        verify(path)
    program = preempted.once()
    assert not gone_off.exists()
    assert len(resuming(program)) == 1
    assert program.process.returncode == 1
    assert "state.pt" in program.errors


@pytest.mark.soak
def test_a_bomb_in_the_place_of_a_recorded_result_is_refused_and_not_run(tmp_path) -> None:
    run = Run(tmp_path, {"script": "early"})
    run.once(("train", 14, "TERM"))
    gone_off = tmp_path / "gone off"
    kept = list(run.directory.glob("calls/*.pt"))
    assert kept, explained(run)
    for path in kept:
        torch.save(Bomb(gone_off), path)
    program = run.once()
    assert not gone_off.exists()
    assert program.process.returncode == 1
    assert str(kept[0]) in program.errors
