"""``torchtrainer status``: what it says about runs that live, have ended, were killed or are damaged; and that it disturbs none."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from programs import CREATORS, DEADLINE_S, run_program, start_program

from torchtrainer.driver.run_dir import RunDirectory
from torchtrainer.launcher import status
from torchtrainer.launcher.run_state import (
    NotARunDirectoryError,
    _every_lock_is_listed,
    find_runs,
    read_liveness,
    read_status,
)
from torchtrainer.launcher.status import BARS, CURVE_WIDTH, curve
from torchtrainer.process.error_file import write_error_file
from torchtrainer.process.own_files import printable

ONE_WORKER = CREATORS + "CREATORS['num_workers'] = 1\n"
THREE_EPOCHS = """
trainer = TorchTrainer(run_dir=sys.argv[1], **CREATORS)
for _ in range(3):
    trainer.train()
trainer.validate()
"""
COMMAND = """
import argparse, sys
from torchtrainer.launcher import status
parser = argparse.ArgumentParser()
status.add_arguments(parser)
sys.exit(status.main(parser.parse_args()))
"""


def shown(capsys, *arguments: str) -> str:
    """What the command prints; it must end well."""
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    assert status.main(parser.parse_args(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def files_of(run_dir: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in run_dir.rglob("*")
    }


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A directory with runs/train/first, a run that came to its end."""
    top = tmp_path_factory.mktemp("ended")
    program = run_program(top, ONE_WORKER + THREE_EPOCHS, "runs/train/first")
    assert program.ended_well(), program.errors
    return top


def test_an_ended_run(ended, monkeypatch, capsys):
    monkeypatch.chdir(ended)
    before = files_of(ended / "runs")
    text = shown(capsys, "runs/train/first")
    pid = (ended / "runs/train/first/lock").read_text().strip()
    assert text.startswith(f"runs/train/first: ended, pid {pid} was its driver, last written ")
    assert "last of 4 results:" in text
    columns = next(line for line in text.splitlines() if line.startswith("time")).split()
    assert columns == ["time", "kind", "epoch", "step", "train_loss", "val_loss", "val_accuracy"]
    assert "training loss 1.8" in text
    assert "█" in text and "▁" in text
    assert "runs/train/first/logs/rank_0/stderr.log" in text
    assert "error" not in text and "damaged" not in text
    assert files_of(ended / "runs") == before


def test_the_same_as_json(ended, monkeypatch, capsys):
    monkeypatch.chdir(ended)
    data = json.loads(shown(capsys, "runs/train/first", "--json"))
    assert data["run_dir"] == "runs/train/first"
    assert data["liveness"]["state"] == "ended"
    assert [result["kind"] for result in data["results"]] == ["train"] * 3 + ["validate"]
    assert data["damaged_lines"] == 0 and data["errors"] == []
    (listed,) = json.loads(shown(capsys, "--json"))["runs"]
    assert listed == data


def test_a_terminal_without_those_characters(ended):
    program = ended / "status_program.py"
    program.write_text(COMMAND)
    done = subprocess.run(
        [sys.executable, str(program), "runs/train/first"],
        cwd=ended,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert b"training loss 1.8" in done.stdout
    assert done.stdout.isascii()


def test_a_running_run_is_not_disturbed_and_a_killed_one_has_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "go")
    text = (
        ONE_WORKER
        + THREE_EPOCHS
        + "print('trained'); open('go').read()\ntrainer.train(); print('again'); open('go').read()"
    )
    program = start_program(tmp_path, text, "runs/here")
    program.wait_for("trained")
    running = shown(capsys, "runs/here")
    assert running.startswith(f"runs/here: running, pid {program.process.pid}, last written ")
    assert "last of 4 results:" in running
    row = shown(capsys).splitlines()[1].split()
    assert row[:3] == ["runs/here", "running", str(program.process.pid)]
    (tmp_path / "go").write_text("")
    program.wait_for("again")
    assert "last of 5 results:" in shown(capsys, "runs/here")
    program.process.kill()
    program.finish()
    program.assert_nothing_left()
    assert shown(capsys, "runs/here").startswith(f"runs/here: ended, pid {program.process.pid} was its driver")


def test_a_run_that_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = """
class Operator(TrainingOperator):
    def train_epoch(self, iterator, info=None):
        raise ValueError("bad \\033[2J batch\\nand more")
CREATORS = {"training_operator_cls": Operator, **CREATORS}
"""
    program = run_program(
        tmp_path, ONE_WORKER + "from torchtrainer import TrainingOperator" + text + THREE_EPOCHS, "runs/x"
    )
    assert program.process.returncode == 1
    assert (tmp_path / "runs/x/logs/rank_0/error.json").exists(), program.errors
    text = shown(capsys, "runs/x")
    assert "no results" in text
    assert "errors, root cause first:\n  rank 0: ValueError: bad ?[2J batch  (runs/x/logs/rank_0/error.json)" in text
    assert "no result, 1 rank failed" in shown(capsys)


def write_run(run_dir: Path, history: bytes = b"") -> Path:
    """A run's directory as a run of this process would leave it."""
    RunDirectory(run_dir).close()
    (run_dir / "history.jsonl").write_bytes(history)
    return run_dir


def fail(run_dir: Path, rank: int, text: str, written_s: float) -> Path:
    path = run_dir / "logs" / f"rank_{rank}" / "error.json"
    path.parent.mkdir()
    write_error_file(path, type_name="ValueError", text=text, traceback="")
    content = json.loads(path.read_text())
    content["message"]["extraInfo"]["timestamp"] = str(int(written_s))
    path.write_text(json.dumps(content))
    os.utime(path, (written_s, written_s))
    return path


def test_the_root_cause_is_the_error_that_was_written_first(tmp_path):
    run = write_run(tmp_path / "run")
    fail(run, 0, "later in the same second", 1000.75)
    fail(run, 1, "next second", 1001.0)
    fail(run, 2, "first", 1000.25)
    copied = fail(run, 3, "long before, and copied later", 900.0)
    os.utime(copied, (5000.0, 5000.0))
    (run / "logs/rank_4").mkdir()
    (run / "logs/rank_4/error.json").write_text('{"message": {"message": 3')
    os.utime(run / "logs/rank_4/error.json", (2000.0, 2000.0))
    errors = read_status(run).errors
    assert [error.rank for error in errors] == [3, 2, 0, 1, 4]
    assert errors[1].text == "ValueError: first"
    assert errors[4].text == ""
    assert "rank 4: the file is damaged" in status.describe(read_status(run), now_s=6000.0)


GOOD = (
    b'{"time": "2026-01-02T03:04:05+00:00", "kind": "train", "epoch": 1, "step": 8, "metrics": {"train_loss": 2.0}}\n'
)
DAMAGED_LINES = [
    b"\n",
    b"nonsense\n",
    b"\xff\xfe\x00\n",
    b"[]\n",
    b"3\n",
    b'{"kind": "train"}\n',
    b'{"kind": 3, "metrics": {}}\n',
    b'{"kind": "train", "metrics": []}\n',
    b'{"kind": "train", "metrics": {"train_loss": NaN}}\n',
    b'{"kind": "train", "metrics": {"train_loss": 1e999}}\n',
    b"[" * 100_000 + b"\n",
    b"1" * 100_000 + b"\n",
    b'{"kind": "train", "metrics": {}',  # torn
]


def test_damaged_lines_are_left_out_and_counted(tmp_path, capsys):
    run = write_run(tmp_path / "run", GOOD + b"".join(DAMAGED_LINES[:-1]) + GOOD + DAMAGED_LINES[-1])
    found = read_status(run)
    assert len(found.results) == 2
    assert found.damaged_lines == len(DAMAGED_LINES)
    assert f"{len(DAMAGED_LINES)} damaged lines of history.jsonl were left out" in shown(capsys, str(run))


def test_a_line_that_is_being_written_is_not_damaged(tmp_path):
    run = write_run(tmp_path / "run", GOOD + GOOD[:20])
    holder = RunDirectory(run)
    assert (len(read_status(run).results), read_status(run).damaged_lines) == (1, 0)
    holder.close()
    assert read_status(run).damaged_lines == 1


ODD_VALUES = [
    {"train_loss": 10**400},
    {"train_loss": 1e308},
    {"train_loss": "NaN"},
    {"train_loss": True},
    {"train_loss": None},
    {"train_loss": {"a": [1]}},
    {"train_loss\x1b[31m": "\ud800\x07" + "x" * 10_000},
    {},
]


def test_odd_values_are_shown_without_harm(tmp_path, capsys):
    records = [{"kind": "train\x1b[2J", "epoch": [], "step": {}, "time": 3, "metrics": {"train_loss": 1.5}}]
    records += [{"kind": "train", "metrics": metrics} for metrics in ODD_VALUES] * 2
    run = write_run(tmp_path / "run\x1b[2J", "".join(json.dumps(record) + "\n" for record in records).encode())
    text = shown(capsys, str(run))
    assert "last of 17 results" in text
    assert "\x1b" not in text and "\x07" not in text
    assert max(map(len, text.splitlines())) < 500
    assert len(json.loads(shown(capsys, str(run), "--json"))["results"]) == 17


def test_files_that_are_no_files(tmp_path):
    run = write_run(tmp_path / "run", GOOD)
    (run / "history.jsonl").unlink()
    os.mkfifo(run / "history.jsonl")  # reading it would never end
    (run / "logs/rank_0").mkdir()
    os.mkfifo(run / "logs/rank_0/error.json")
    (run / "logs/rank_x").mkdir()
    (run / "logs/rank_1").write_text("")
    found = read_status(run)
    assert (found.results, found.errors, found.logs) == ((), (), ())


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-1\n", b"0\n", b"99999999999999999999\n", b"\xff" * 100])
def test_a_damaged_lock(tmp_path, content):
    run = write_run(tmp_path / "run")
    (run / "lock").write_bytes(content)
    assert read_liveness(run / "lock").state == "ended"
    assert read_liveness(run / "lock").pid is None


def test_a_lock_that_is_not_there_or_no_file(tmp_path):
    run = write_run(tmp_path / "run", GOOD)
    (run / "lock").unlink()
    assert status.describe(read_status(run), now_s=0.0).startswith(f"{run}: unknown (its lock cannot be read)")
    (run / "lock").symlink_to("/dev/zero")
    assert read_status(run).liveness.state == "unknown"


def test_a_forked_process_that_outlives_its_driver_does_not_hold_the_lock(tmp_path):
    program = start_program(
        tmp_path,
        """
        import os, signal
        from torchtrainer.driver.run_dir import RunDirectory
        from pathlib import Path
        run = RunDirectory(Path("run"))
        child = os.fork()
        if child == 0:
            signal.pause()
        print("child", child, flush=True)
        os._exit(0)
        """,
    )
    child = int(program.wait_for("child").split()[1])
    program.process.wait(DEADLINE_S)
    found = read_liveness(tmp_path / "run/lock")
    os.kill(child, signal.SIGKILL)
    program.finish()
    assert (found.state, found.pid, found.pid_alive) == ("ended", program.process.pid, False)


@pytest.mark.skipif(not _every_lock_is_listed(), reason="not every process is visible here, so the lock is tried")
def test_looking_never_keeps_a_run_from_starting(tmp_path):
    write_run(tmp_path / "run", GOOD)
    stop = threading.Event()
    states = set()

    def look() -> None:
        while not stop.is_set():
            states.add(read_status(tmp_path / "run").liveness.state)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        while len(states) < 2:  # it has seen the run both living and ended
            RunDirectory(tmp_path / "run").close()  # raises if the lock is taken
    finally:
        stop.set()
        looker.join()


def test_runs_are_listed_newest_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["a/old", "b", "c/new"]):
        run = write_run(tmp_path / "runs" / name, GOOD)
        for path in (run / "lock", run / "history.jsonl"):
            os.utime(path, (1000.0 + number, 1000.0 + number))
    (tmp_path / "runs/tensorboard/events").mkdir(parents=True)
    (tmp_path / "runs/link").symlink_to(tmp_path / "runs/a")
    (tmp_path / "runs/file").write_text("")
    lines = shown(capsys).splitlines()
    assert lines[0].split() == ["run", "state", "pid", "last", "result", "written"]
    assert [line.split()[0] for line in lines[1:]] == ["runs/c/new", "runs/b", "runs/a/old"]
    assert "ended" in lines[1] and "train epoch 1 train_loss 2" in lines[1] and lines[1].endswith(" d ago")


@pytest.mark.parametrize(
    "make", [lambda top: None, lambda top: (top / "runs").mkdir(), lambda top: (top / "runs").write_text("")]
)
def test_no_runs(tmp_path, monkeypatch, capsys, make):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    assert shown(capsys) == 'no run directories in ./runs: TorchTrainer(run_dir="auto") makes one there for each run\n'
    assert json.loads(shown(capsys, "--json")) == {"runs": []}


def test_a_directory_that_is_no_runs(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "parent" / "run")
    texts = {}
    for name in ("empty", "file", "nowhere", "parent"):
        parsed = argparse.Namespace(run_dir=str(tmp_path / name), json=False)
        assert status.main(parsed) == status.EXIT_USAGE
        out, texts[name] = capsys.readouterr()
        assert out == "" and texts[name].count("\n") == 1
    assert "is not a run directory: it has neither lock nor history.jsonl" in texts["empty"]
    assert "is not a directory" in texts["file"] and "is not a directory" in texts["nowhere"]
    assert f"such as {tmp_path / 'parent' / 'run'}" in texts["parent"]


def test_find_runs_stops_at_its_depth(tmp_path):
    write_run(tmp_path / "a/b/c/d")
    assert find_runs(tmp_path) == []
    with pytest.raises(NotARunDirectoryError):
        read_status(tmp_path / "a")


def test_many_ranks_are_not_all_listed(tmp_path):
    run = write_run(tmp_path / "run")
    for rank in range(40):
        fail(run, rank, "same", 1000.0 + rank)
        (run / f"logs/rank_{rank}/stdout.log").write_text("")
    lines = status.describe(read_status(run), now_s=2000.0).splitlines()
    assert lines.count("  ... and 32 more") == 2
    assert len(lines) < 30


def test_a_curve():
    assert curve([3.0, 2.0, 1.0]) == "█▅▁"
    assert curve([1.0]) == BARS[0]
    assert curve([2.0, 2.0]) == BARS[0] * 2
    falling = curve([float(-value) for value in range(1000)])
    assert len(falling) == CURVE_WIDTH
    assert list(falling) == sorted(falling, reverse=True)


def test_printable():
    assert printable("a\x1b[0m\nb\u202e", 100) == "a?[0m?b?"
    assert printable("x" * 10, 3) == "xxx…"
