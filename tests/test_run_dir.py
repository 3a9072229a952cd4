"""The directory of a run: whose it is, and what is said when it cannot be used."""

from __future__ import annotations

import os
import stat
from datetime import datetime

import pytest
from programs import CREATORS, run_program, start_program

from torchtrainer import InvalidArgumentTypeError, RunDirectoryError
from torchtrainer.driver.run_dir import RunDirectory, automatic_root, open_run_dir


def test_a_directory_is_made_for_its_owner_only(tmp_path) -> None:
    run = RunDirectory(tmp_path / "a" / "b")
    assert run.logs.is_dir()
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700
    assert (run.root / "lock").read_text() == f"{os.getpid()}\n"
    assert run.shown == str(tmp_path / "a" / "b")
    run.close()
    run.close()


def test_a_directory_can_be_used_again_after_its_run(tmp_path) -> None:
    RunDirectory(tmp_path / "run").close()
    RunDirectory(tmp_path / "run").close()


def test_a_directory_of_another_trainer_here(tmp_path) -> None:
    first = RunDirectory(tmp_path / "run")
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory(tmp_path / "run")
    assert "in use by another trainer of this process: shut that trainer down" in str(caught.value)
    assert "kill" not in str(caught.value)
    first.close()


def test_a_directory_of_a_live_run(tmp_path) -> None:
    text = CREATORS + "trainer = TorchTrainer(run_dir='run', **CREATORS)\nprint('there'); time.sleep(60)"
    other = start_program(tmp_path, text)
    other.wait_for("there")
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory(tmp_path / "run")
    pid = other.process.pid
    assert f"is in use by a live run (pid {pid}): stop that run (kill {pid}), or pass another run_dir" in str(
        caught.value
    )
    other.process.kill()
    other.finish()
    other.assert_nothing_left()
    RunDirectory(tmp_path / "run").close()  # the lock goes with its process, however that ends


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.write_text("x"), "is not a directory"),
        (lambda path: path.symlink_to(path.parent), "is a symbolic link; give the directory that it points to"),
        (lambda path: path.symlink_to("nowhere"), "is a symbolic link"),
    ],
)
def test_something_else_in_the_way(tmp_path, make, text) -> None:
    make(tmp_path / "run")
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory(tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)
    assert text in str(caught.value)
    assert "Pass run_dir=<a directory you can write to>, or run_dir=None" in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_a_file_where_a_parent_should_be(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match=r"cannot be used: .*file"):
        RunDirectory(tmp_path / "file" / "run")


def test_a_file_where_the_logs_should_be(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logs").write_text("x")
    with pytest.raises(RunDirectoryError, match="logs is not a directory"):
        RunDirectory(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_not_writable(tmp_path) -> None:
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(RunDirectoryError, match=r"cannot be used: .*Permission denied"):
        RunDirectory(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    os.chown(tmp_path / "run", 12345, -1)
    with pytest.raises(RunDirectoryError, match="belongs to user id 12345, not to you"):
        RunDirectory(tmp_path / "run")


def test_without_a_directory_nothing_is_made() -> None:
    run = open_run_dir(None)
    assert run.shown is None
    assert not run.logs.exists()
    run.close()


def test_what_is_no_path() -> None:
    with pytest.raises(InvalidArgumentTypeError, match=r'run_dir must be a path, "auto" or None, got 3'):
        open_run_dir(3)


def test_automatic_directories_do_not_collide(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    now = datetime.fromisoformat("2026-01-02T03:04:05")
    first = automatic_root(now)
    assert first.name == "2026-01-02_03-04-05"
    first.mkdir(parents=True)
    assert automatic_root(now).name == "2026-01-02_03-04-05_2"


def test_a_failed_start_lets_go_of_the_directory(tmp_path) -> None:
    program = run_program(
        tmp_path,
        CREATORS
        + """
def broken(config):
    raise ValueError("broken")
for number in range(2):
    try:
        TorchTrainer(run_dir="run", **{**CREATORS, "model_creator": broken})
    except ValueError as error:
        print(number, error)
""",
    )
    assert program.output.splitlines() == ["0 broken", "1 broken"], program.errors
    program.assert_nothing_left()
