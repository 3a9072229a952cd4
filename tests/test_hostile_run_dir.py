"""Run directories in which somebody else, a crash or an archive has left what no run leaves.

Whatever is there: a run goes on, begins anew or is refused in clear words, at once. Nothing outside is written or run, nothing is
waited for, and no control character of a file reaches the terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from torchtrainer.checkpoint.journal import Journal
from torchtrainer.checkpoint.store import CheckpointStore
from torchtrainer.config import CheckpointConfig
from torchtrainer.driver.run_dir import RUNS, RunDirectory, program_name
from torchtrainer.driver.run_record import this_script_run, wanted_run
from torchtrainer.errors import RunDirectoryError, TorchTrainerError
from torchtrainer.launcher.run_state import NotARunDirectoryError, read_runs, read_status
from torchtrainer.launcher.status import describe, list_runs
from torchtrainer.observe.history import HistoryFile
from torchtrainer.observe.shown import Shown
from torchtrainer.process.child import _redirect_output
from torchtrainer.process.logs import LogTail, last_text
from torchtrainer.process.paths import RankPaths
from torchtrainer.process.whole_file import append_line
from torchtrainer.resume import OpenRun, open_run

pytestmark = pytest.mark.timeout(30)
"""Only what waits for the other end of a pipe takes as long."""

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
NOBODY = 65534
HUGE_BYTES = 3 * 1024**3
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes owners and makes devices: needs root")

FILES = (
    "lock",
    "run.json",
    "calls.jsonl",
    "calls/0.pt",
    "history.jsonl",
    "shown",
    "logs/rank_0/stdout.log",
    "logs/rank_0/stderr.log",
    "logs/rank_0/error.json",
    "logs/rank_0/stacks.txt",
)
OF_CHECKPOINT = ("manifest.json", "state.pt")
DIRECTORIES = ("calls", "checkpoints", "compiled", "logs", "logs/rank_0", "traces")
TEXTS = ("run.json", "calls.jsonl", "history.jsonl", "logs/rank_0/error.json")

# What may be in the place of a file or directory


def a_link(path: Path, outside: Path) -> None:
    remove(path)
    path.symlink_to(outside / ("directory" if path.name in ("logs", "calls") else "file"))


def a_link_to_nothing(path: Path, outside: Path) -> None:
    remove(path)
    path.symlink_to(outside / "new")


def a_hard_link(path: Path, outside: Path) -> None:
    remove(path)
    os.link(outside / "file", path)


def a_pipe(path: Path, outside: Path) -> None:
    remove(path)
    os.mkfifo(path)


def a_socket(path: Path, outside: Path) -> None:
    remove(path)
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def a_device(path: Path, outside: Path) -> None:
    remove(path)
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # as /dev/zero


def a_directory(path: Path, outside: Path) -> None:
    remove(path)
    path.mkdir()
    (path / "file").touch()


def a_file(path: Path, outside: Path) -> None:
    remove(path)
    path.write_text("x")


def a_hole(path: Path, outside: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE_BYTES)


def somebody_elses(path: Path, outside: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


def open_to_all(path: Path, outside: Path) -> None:
    path.chmod(0o777)


def no_utf8(path: Path, outside: Path) -> None:
    path.write_bytes(b'{"\xff\xfe": 1}\n')


def deep_nesting(path: Path, outside: Path) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000 + "\n")


def nothing(path: Path, outside: Path) -> None:
    path.write_bytes(b"")


def of_another_type(value: object) -> Callable[[Path, Path], None]:
    """Every field of the file's first object has another value."""

    def spoil(path: Path, outside: Path) -> None:
        first = (
            json.loads(path.read_text().splitlines()[0]) if path.suffix == ".jsonl" else json.loads(path.read_text())
        )
        path.write_text(json.dumps(dict.fromkeys(first, value)) + "\n")

    return spoil


def escapes(path: Path, outside: Path) -> None:
    """Every text that the file has says something to the terminal."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    path.write_text("".join(f"{json.dumps(told(json.loads(line)))}\n" for line in lines))


def told(value: object) -> object:
    if isinstance(value, str):
        return value if value in ("running", "train") else ESCAPE + value
    if isinstance(value, dict):
        return {key: told(one) for key, one in value.items()}
    return value


def escapes_for_a_newer_version(path: Path, outside: Path) -> None:
    path.write_text(json.dumps({"format": 10**6, "version": ESCAPE}))


def another_format(path: Path, outside: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": ESCAPE}))


def a_call_of_escapes(path: Path, outside: Path) -> None:
    path.write_text(json.dumps({"call": ESCAPE, "step": 1, "epoch": 1, "lost": ESCAPE}) + "\n")


def a_copy_elsewhere(path: Path, outside: Path) -> None:
    line = {"call": "state_dict()", "step": 1, "epoch": 1, "copy": f"../../{outside.name}/file"}
    path.write_text(json.dumps(line) + "\n")


def a_pid_of_escapes(path: Path, outside: Path) -> None:
    path.write_text(ESCAPE)


KINDS = (a_link, a_link_to_nothing, a_hard_link, a_pipe, a_socket, a_directory, a_hole, open_to_all)
CASES = [
    *((name, kind) for name in FILES for kind in KINDS),
    *((name, kind) for name in DIRECTORIES for kind in (a_link, a_link_to_nothing, a_pipe, a_file, open_to_all)),
    *((name, kind) for name in TEXTS for kind in (no_utf8, deep_nesting, nothing, escapes)),
    *((name, of_another_type(value)) for name in TEXTS for value in (None, "x", -1, 1e308, [], {}, [[]], True)),
    *((".run.json.unready", kind) for kind in (a_link, a_link_to_nothing, a_pipe, a_directory)),
    *((".0.pt.unready", kind) for kind in (a_link, a_pipe)),
    *((name, kind) for name in OF_CHECKPOINT for kind in (a_link, a_pipe, a_directory, a_hole, nothing)),
    *(("checkpoints/generation-0001", kind) for kind in (a_link, a_link_to_nothing, a_pipe, a_directory, a_hole)),
    *(("checkpoints/generation-0002", kind) for kind in (a_link, a_link_to_nothing, a_pipe, a_directory)),
    *(("reached", kind) for kind in (a_link, a_pipe, a_directory, a_hole, no_utf8)),
    (".", open_to_all),
    ("run.json", escapes_for_a_newer_version),
    ("run.json", another_format),
    ("calls.jsonl", a_call_of_escapes),
    ("calls.jsonl", a_copy_elsewhere),
    ("lock", a_pid_of_escapes),
    *(
        pytest.param(name, kind, marks=needs_root)
        for name, kind in (
            *((name, somebody_elses) for name in (*FILES, *DIRECTORIES, ".", "compiled/kernel.so")),
            *((name, a_device) for name in FILES),
        )
    ),
]


def named(case: object) -> str:
    return getattr(case, "__qualname__", str(case)).replace(".<locals>", "")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for one in path.iterdir():
            remove(one)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


# A run to spoil, and what must not change


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Files that are not the run's: they are afterwards as before."""
    place = tmp_path / "outside"
    (place / "directory").mkdir(parents=True)
    (place / "file").write_text('{"kind": "mine"}')
    yield place
    assert sorted(str(path.relative_to(place)) for path in place.rglob("*")) == ["directory", "file"]
    assert (place / "file").read_text() == '{"kind": "mine"}'


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # in a notebook a run is resumed only on request


def opened(run_dir: str | Path, resume: bool | str = "auto") -> OpenRun:
    reached = {"config": {"lr": 0.1}}
    this_script_run().trainers = 0  # each time the script's first trainer
    return open_run(run_dir, resume=resume, config=CheckpointConfig(), reached=reached, world_size=2)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "run"
    make_run(root)
    return root


def copy_of(run: Path, root: Path) -> Path:
    """A copy of a run, as it is after a crash or out of an archive."""
    shutil.copytree(run, root)
    return root


def make_run(root: Path) -> None:
    """A run that was cut off after two calls, with everything that a run can have in its directory."""
    this_script_run().trainers = 0
    directory = RunDirectory(root)
    wanted_run({"config": {"lr": 0.1}}, world_size=2, may_change=()).write(root)
    journal = Journal(root, [], writes=True)
    journal.add("apply_all_operators(look)", torch.ones(2), step=0, epoch=0)
    journal.add("train()", {"train_loss": 0.5}, step=4, epoch=1)
    HistoryFile(directory.history).append("train", epoch=1, step=4, metrics={"train_loss": 0.5, "note": "x"})
    Shown(directory.shown_steps).is_new(0, 1)
    paths = RankPaths.of(directory.logs, 0)
    paths.root.mkdir(0o700)
    for path in paths.all():
        path.write_text("x\n")
        path.chmod(0o600)
    error = {"message": {"message": "ValueError: x", "extraInfo": {"timestamp": "1", "py_callstack": "x"}}}
    paths.error.write_text(json.dumps(error))
    for name in ("compiled", "traces"):
        (root / name).mkdir(0o700)
    (root / "compiled" / "kernel.so").write_text("x")
    store = CheckpointStore(root / "checkpoints", keep=2, generation=1, on_problem=pytest.fail)
    store.write(4, {"index": 1}, {"state.pt": lambda file: file.write(b"state")})
    directory.close()


def spoil(root: Path, name: str, kind: Callable[[Path, Path], None], outside: Path) -> None:
    if name in OF_CHECKPOINT:
        (checkpoint,) = (root / "checkpoints").glob("step-*")
        kind(checkpoint / name, outside)
    else:
        kind(root / "calls" / name if name == ".0.pt.unready" else root / name, outside)


def use(run: OpenRun) -> None:
    """Does all that a run does in its directory; the disk may refuse, in an error of its kind."""
    root = run.directory.root
    journal = Journal(root, run.records, writes=True)
    for record in list(run.records):
        with contextlib.suppress(TorchTrainerError):
            journal.expect(record["call"])
    journal.add("one()", torch.zeros(1), step=5, epoch=2)
    journal.add("two()", 1.0, step=5, epoch=2)
    HistoryFile(run.directory.history).append("train", epoch=2, step=8, metrics={})
    Shown(run.directory.shown_steps).is_new(9, 9)
    run.note("failed", step=8, epoch=2)


def said_by(action: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """What the user sees of an action: what it prints, and its error, which has to be one of this package's."""
    error = ""
    try:
        action()
    except TorchTrainerError as raised:
        error = str(raised)
        assert len(error) < 2000
    shown = capsys.readouterr()
    text = f"{shown.out}{shown.err}{error}"
    assert all(character.isprintable() or character == "\n" for character in text), repr(text)
    return text


@pytest.mark.parametrize(("name", "kind"), CASES, ids=named)
def test_a_run_that_is_asked_for_by_name_goes_on_or_is_refused(
    whole_run, tmp_path, outside, capsys, name, kind
) -> None:
    root = copy_of(whole_run, tmp_path / "run")
    spoil(root, name, kind, outside)

    def start() -> None:
        run = opened(root)
        use(run)
        run.directory.close()

    said_by(start, capsys)


@pytest.mark.parametrize(("name", "kind"), CASES, ids=named)
def test_a_neighbour_keeps_nobody_from_starting(whole_run, tmp_path, outside, capsys, name, kind) -> None:
    runs = tmp_path / RUNS / program_name()
    copy_of(whole_run, runs / "spoilt")
    spoil(runs / "spoilt", name, kind, outside)
    found: list[OpenRun] = []
    text = said_by(lambda: found.append(opened("auto")), capsys)
    if not found:
        assert name == "calls.jsonl", text  # the run would go on there, and is told why it cannot
        return
    use(found[0])
    found[0].directory.close()
    if found[0].directory.root != runs / "spoilt":
        assert text.count("\n") <= 1, text
    with contextlib.suppress(NotARunDirectoryError):
        said_by(lambda: print(describe(read_status(runs / "spoilt"), now_s=0.0)), capsys)
    said_by(lambda: print(list_runs(read_runs(runs), now_s=0.0)), capsys)


@pytest.mark.parametrize(
    "kind", [no_utf8, deep_nesting, nothing, of_another_type([]), a_pipe, a_link, a_hole, open_to_all], ids=named
)
def test_a_spoilt_record_of_a_neighbour_is_told_in_one_line(whole_run, tmp_path, outside, capsys, kind) -> None:
    runs = tmp_path / RUNS / program_name()
    spoilt = copy_of(whole_run, runs / f"spoilt-{tmp_path.name}")
    spoil(spoilt, "run.json", kind, outside)
    for _ in range(2):  # two trainers of a script say it once
        run = opened("auto", resume="auto")
        assert run.directory.root != spoilt
        run.directory.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if spoilt.name in line]
    assert len(lines) == 1, lines
    assert "is skipped" in lines[0]


@pytest.mark.parametrize("kind", [a_link, a_link_to_nothing, a_hard_link, a_pipe, a_socket, a_directory], ids=named)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_worker_writes_to_no_log_that_is_not_its_own(tmp_path, outside, stream, kind) -> None:
    paths = RankPaths(tmp_path / "rank_0")
    paths.root.mkdir(0o700)
    kind(paths.stream(stream), outside)
    pid = os.fork()
    if pid == 0:
        try:
            _redirect_output(paths)
            os.write(1, b"mine")
            os.write(2, b"mine")
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert LogTail(paths.stream(stream)).new_text(flush=True) in ("", (outside / "file").read_text())
    if not paths.stream(stream).is_file():
        assert last_text(paths.stream(stream)) == ""


def test_a_directory_that_others_may_write_to_is_theirs_no_longer_or_refused(tmp_path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    root.chmod(0o777)
    RunDirectory(root).close()
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    RunDirectory(root).close()
    root.chmod(0o777)
    with pytest.raises(RunDirectoryError, match=r"other users may write to it \(mode 777\): run chmod go-w"):
        RunDirectory(root)
    assert stat.S_IMODE(root.stat().st_mode) == 0o777, "whoever looks at it finds it as it was"
    root.chmod(0o775)
    with pytest.raises(RunDirectoryError, match="mode 775"):
        RunDirectory(root)


def test_a_torn_line_is_removed_however_long_the_file_is(tmp_path) -> None:
    path = tmp_path / "lines"
    whole = b"x" * (3 * 1024**2) + b"\n"
    path.write_bytes(whole * 2 + b"torn" * 1024**2)
    append_line(path, b"next\n")
    assert path.read_bytes() == whole * 2 + b"next\n"
    path.write_bytes(b"torn")
    append_line(path, b"next\n")
    assert path.read_bytes() == b"next\n"
    with path.open("ab") as file:
        file.truncate(HUGE_BYTES)
    with pytest.raises(OSError, match="have no line end"):
        append_line(path, b"more\n")
    assert path.stat().st_size == HUGE_BYTES
