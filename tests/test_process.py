"""Processes below the trainer: what a forked worker sees, how ends are reported, how logs are read. No torch here."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchtrainer.process.child import ChildSpec
from torchtrainer.process.error_file import write_error_file
from torchtrainer.process.frames import FrameSocket
from torchtrainer.process.guard import is_alive
from torchtrainer.process.logs import LogTail, last_text, size_of
from torchtrainer.process.paths import SOCKET_PATH_LIMIT, EnginePaths, private_directory
from torchtrainer.process.signals import STACK_DUMP_SIGNAL, describe_exit
from torchtrainer.process.starters import (
    ChildExited,
    ChildNotStarted,
    ChildStarted,
    ExecStarter,
    StarterEvent,
    StarterFailed,
    StarterReady,
    preloaded_starter,
)

DEADLINE_S = 30.0

ENTRY = """
import json, os, signal, sys, threading, time

def look(arguments):
    seen = dict(
        arguments=arguments,
        environ=dict(os.environ),
        cwd=os.getcwd(),
        path=sys.path,
        session_leader=os.getsid(0) == os.getpid(),
        descriptors=sorted(int(fd) for fd in os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        stdin=sys.stdin.read() if sys.stdin else None,
        sigterm=signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        sigint=signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        wakeup_fd=signal.set_wakeup_fd(-1),
    )
    print("to stdout")
    print("to stderr", file=sys.stderr)
    with open(arguments["out"], "w") as file:
        json.dump(seen, file)
    return arguments["code"]

def wait(arguments):
    while not os.path.exists(arguments["out"]):
        time.sleep(0.001)
    return arguments["code"]

def stay(arguments):
    with open(arguments["out"], "w") as file:
        file.write(str(os.getpid()))
    os.rename(arguments["out"], arguments["out"] + ".done")
    while True:
        signal.pause()
"""


def child(tmp_path: Path, function: str, ignored_signals: tuple[str, ...] = (), **arguments) -> ChildSpec:
    (tmp_path / "entry.py").write_text(ENTRY)
    (tmp_path / "logs").mkdir(exist_ok=True)
    return ChildSpec(
        key="a/0",
        entry=f"entry:{function}",
        arguments={"out": str(tmp_path / "out"), "code": 0, **arguments},
        environ={"ONLY": "this", "PATH": os.environ["PATH"]},
        cwd=str(tmp_path),
        sys_path=[str(tmp_path), *sys.path],
        log_dir=str(tmp_path / "logs"),
        rank=0,
        multiprocessing_dir=str(tmp_path / "mp"),
        ignored_signals=list(ignored_signals),
    )


def wait_for(starter, kind: type[StarterEvent]) -> StarterEvent:
    """The next event of a kind; others before it are dropped."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for event in starter.events():
            if isinstance(event, kind):
                return event
            assert not isinstance(event, StarterFailed), event.text
        select.select(starter.fds(), [], [], 0.05)
    raise AssertionError(f"no {kind.__name__} within {DEADLINE_S} s")


@pytest.fixture(params=["fork", "exec"])
def starter(request):
    environ = dict(os.environ)
    made = preloaded_starter(["json"], environ) if request.param == "fork" else ExecStarter()
    yield made
    made.close()


def test_a_worker_sees_what_its_spec_says_and_nothing_else(tmp_path, starter) -> None:
    spec = child(tmp_path, "look", code=7)
    wait_for(starter, StarterReady)
    starter.start(spec)
    pid = wait_for(starter, ChildStarted).pid
    exited = wait_for(starter, ChildExited)
    assert (exited.pid, exited.exit_code) == (pid, 7)
    seen = json.loads((tmp_path / "out").read_text())
    expected = {**spec["environ"]}
    seen["environ"].pop("LC_CTYPE", None)  # CPython sets it in a C locale
    assert seen["environ"] == expected
    assert (seen["cwd"], seen["path"]) == (spec["cwd"], spec["sys_path"])
    assert seen["session_leader"] and seen["sigterm"] and seen["sigint"]
    assert (seen["threads"], seen["wakeup_fd"], seen["stdin"]) == (1, -1, "")
    # stdin, stdout, stderr, the files for stacks and for a crash, and the directory that is being listed
    assert len(seen["descriptors"]) == 6, seen["descriptors"]
    assert (tmp_path / "logs" / "rank_0" / "stdout.log").read_text() == "to stdout\n"
    assert (tmp_path / "logs" / "rank_0" / "stderr.log").read_text() == "to stderr\n"


def test_a_kill_is_reported_with_its_signal(tmp_path, starter) -> None:
    starter.start(child(tmp_path, "stay"))
    pid = wait_for(starter, ChildStarted).pid
    os.kill(pid, signal.SIGKILL)
    assert wait_for(starter, ChildExited).exit_code == -signal.SIGKILL


def test_an_entry_that_raises_ends_with_its_traceback_in_the_log(tmp_path, starter) -> None:
    starter.start(child(tmp_path, "missing"))
    assert wait_for(starter, ChildExited).exit_code == 1
    assert "AttributeError" in (tmp_path / "logs" / "rank_0" / "stderr.log").read_text()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while any(map(alive, pids)) and time.monotonic() < deadline:
        os.sched_yield()
    assert not any(map(alive, pids))


def test_workers_end_with_their_spawner_and_it_with_the_process_that_started_it(tmp_path) -> None:
    program = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_process import preloaded_starter, StarterReady, ChildStarted, child, wait_for
from pathlib import Path
starter = preloaded_starter(["json"], dict(os.environ))
spawner = wait_for(starter, StarterReady).pid
starter.start(child(Path(sys.argv[1]), "stay"))
print(spawner, wait_for(starter, ChildStarted).pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        spawner, worker = map(int, parent.stdout.readline().split())
        assert alive(spawner) and alive(worker)
        parent.kill()
    wait_until_gone(spawner, worker)


def test_a_module_that_cannot_be_imported_fails_the_spawner_with_its_traceback() -> None:
    starter = preloaded_starter(["json", "no_such_module_at_all"], dict(os.environ))
    try:
        deadline = time.monotonic() + DEADLINE_S
        events: list[StarterEvent] = []
        while not events and time.monotonic() < deadline:
            select.select(starter.fds(), [], [], 0.05)
            events = starter.events()
        assert isinstance(events[0], StarterFailed) and "no_such_module_at_all" in events[0].text
        events = events[1:]
        while starter.fds():  # until the process is gone, which is told no second time
            select.select(starter.fds(), [], [], DEADLINE_S)
            events += starter.events()
        assert events == []
    finally:
        starter.close()


def test_a_fork_that_fails_is_told_once_and_ends_nothing(tmp_path) -> None:
    (tmp_path / "few.py").write_text(
        """
import os
fork, failed = os.fork, []
def once_failing():
    if not failed:
        failed.append(True)
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()
os.fork = once_failing
"""
    )
    starter = preloaded_starter(["few"], {**os.environ, "PYTHONPATH": str(tmp_path)})
    try:
        wait_for(starter, StarterReady)
        starter.start(child(tmp_path, "look"))
        told = wait_for(starter, ChildNotStarted)
        assert (told.key, "Resource temporarily unavailable" in told.text) == ("a/0", True)
        starter.start(child(tmp_path, "look"))
        assert wait_for(starter, ChildExited).exit_code == 0
    finally:
        starter.close()


SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


def test_signals_that_a_child_ignores_do_nothing_from_its_first_instruction_on(tmp_path) -> None:
    starter = preloaded_starter(["json"], dict(os.environ))
    try:
        wait_for(starter, StarterReady)
        for number in range(24):
            out = tmp_path / f"go-{number}"
            starter.start(child(tmp_path, "wait", ignored_signals=SIGNALS, code=number, out=str(out)))
            pid = wait_for(starter, ChildStarted).pid
            os.kill(pid, getattr(signal, SIGNALS[number % len(SIGNALS)]))
            out.touch()
            assert wait_for(starter, ChildExited).exit_code == number
    finally:
        starter.close()


def test_a_spawner_tells_how_many_threads_it_has(tmp_path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    starter = preloaded_starter(["threaded"], {**os.environ, "PYTHONPATH": str(tmp_path)})
    try:
        assert wait_for(starter, StarterReady).threads == 2
    finally:
        starter.close()


def test_later_preloads_are_there_in_later_workers(tmp_path) -> None:
    (tmp_path / "later.py").write_text("import os\npid = os.getpid()\n")
    (tmp_path / "asks.py").write_text(
        "def main(arguments):\n    import later, os\n    return int(later.pid == os.getpid())\n"
    )
    starter = preloaded_starter(["json"], {**os.environ, "PYTHONPATH": str(tmp_path)})
    try:
        spec = {**child(tmp_path, "look"), "entry": "asks:main"}
        starter.start(spec)
        assert wait_for(starter, ChildExited).exit_code == 1, "imported by the worker itself"
        starter.preload(["later", "no_such_module_at_all"])
        starter.start(spec)
        assert wait_for(starter, ChildExited).exit_code == 0, "found imported"
    finally:
        starter.close()


def test_frames_arrive_whole_however_they_are_cut() -> None:
    left, right = socket.socketpair()
    link = FrameSocket(right)
    values = [{"a": 1}, "text " * 30000, None, [1, 2]]
    writer = FrameSocket(left)
    received = []
    pid = os.fork()
    if pid == 0:
        for value in values:
            writer.send(value)
        os._exit(0)
    writer.close()
    deadline = time.monotonic() + DEADLINE_S
    while not link.closed_by_peer and time.monotonic() < deadline:
        select.select([link.fileno()], [], [], 0.1)
        received += link.receive_available()
    os.waitpid(pid, 0)
    link.close()
    assert received == values


def test_a_log_is_followed_line_by_line(tmp_path) -> None:
    path = tmp_path / "log"
    tail = LogTail(path)
    assert tail.new_text() == ""
    with path.open("ab", buffering=0) as log:
        log.write(b"one\ntw")
        assert tail.new_text() == "one\n"
        log.write(b"o\n50%\r51")
        assert tail.new_text() == "two\n50%\r"
        assert tail.new_text(flush=True) == "51"
        log.write("ä".encode()[:1])
        assert tail.new_text() == ""
        log.write("ä".encode()[1:] + b"\n")
        assert tail.new_text() == "ä\n"
    tail.close()
    assert last_text(path, limit_bytes=11) == "50%\r51ä", "from the first whole line on"
    assert last_text(tmp_path / "none") == ""


def test_what_was_in_a_log_before_is_left_out(tmp_path) -> None:
    path = tmp_path / "log"
    path.write_text("of an earlier start\n")
    before = size_of(path)
    tail = LogTail(path, start=before)
    assert tail.new_text() == last_text(path, before) == ""
    with path.open("a") as log:
        log.write("new\n")
    assert tail.new_text() == "new\n"
    tail.close()
    assert last_text(path, before) == "new"
    assert size_of(tmp_path / "none") == 0


def test_the_first_error_file_stays(tmp_path) -> None:
    path = tmp_path / "error.json"
    write_error_file(path, type_name="ValueError", text="first", traceback="here")
    write_error_file(path, type_name="ValueError", text="second", traceback="there")
    record = json.loads(path.read_text())["message"]
    assert record["message"] == "ValueError: first"
    assert record["extraInfo"]["py_callstack"] == "here" and record["extraInfo"]["timestamp"].isdigit()


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "exited with code 0"), (3, "exited with code 3"), (-9, "was killed by SIGKILL"), (None, "unknown way")],
)
def test_exit_codes_in_words(code, text) -> None:
    assert text in describe_exit(code)


def test_the_stack_signal_leaves_the_users_signals_alone() -> None:
    assert STACK_DUMP_SIGNAL not in (None, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def test_private_directories_are_private(tmp_path) -> None:
    path = private_directory(tmp_path / "a" / "b")
    assert path.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic link"):
        private_directory(tmp_path / "link")
    paths = EnginePaths.create()
    try:
        assert paths.root.stat().st_mode & 0o777 == 0o700
        assert len(paths.socket) <= SOCKET_PATH_LIMIT
    finally:
        paths.remove()
    assert not paths.root.exists()


# Whether a process lives


@pytest.mark.parametrize("end", [lambda: os._exit(0), lambda: os.kill(os.getpid(), signal.SIGKILL)])
def test_a_process_that_ended_does_not_live_whether_or_not_its_parent_reaped_it(end) -> None:
    pid = os.fork()
    if pid == 0:
        end()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has reaped it
    os.kill(pid, 0)
    assert not is_alive(pid)
    os.waitpid(pid, 0)
    assert not is_alive(pid)


def test_a_process_that_is_stopped_or_somebody_elses_lives() -> None:
    with subprocess.Popen(["sleep", "60"]) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
        assert is_alive(stopped.pid)
        stopped.kill()
    assert is_alive(1)
    assert is_alive(os.getpid())
