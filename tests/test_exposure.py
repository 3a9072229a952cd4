"""What others on the machine can reach while a run is going on: nothing."""

from __future__ import annotations

import os
import socket
import stat
import sys
from pathlib import Path

import pytest
from programs import CREATORS, marked_processes, start_program

LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
LISTENING = "0A"
NOBODY = 65534

WAITING = (
    CREATORS
    + """
trainer = TorchTrainer(**CREATORS)
trainer.train(num_steps=2)
print("ready", flush=True)
sys.stdin.read() or input()
"""
)


@pytest.fixture
def program(tmp_path):
    """A program in the middle of its run, its workers alive and idle."""
    text = WAITING.replace("sys.stdin.read() or input()", "import signal; signal.pause()")
    running = start_program(tmp_path, text, whole=True, SECRET_TOKEN="do-not-tell")
    running.wait_for("ready")
    yield running
    running.process.kill()
    running.finish()
    running.assert_nothing_left()


def listening_inodes(pid: int) -> list[tuple[str, str]]:
    """Addresses and inodes of sockets that listen in a process's network namespace."""
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == LISTENING:
                found.append((parts[1].split(":")[0], parts[9]))
    return found


def test_nothing_listens_beyond_loopback(program) -> None:
    for line in marked_processes(program.mark):
        pid = int(line.split()[0])
        own = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        for address, inode in listening_inodes(pid):
            if f"socket:[{inode}]" in own:
                assert address in LOOPBACK, f"{line} listens on {address}"


def test_sockets_and_files_are_behind_a_private_directory(program) -> None:
    (root,) = [p for p in program.temporary.iterdir() if p.name.startswith("torchtrainer-")]
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert (root / "control.ipc").is_socket()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can try as somebody else")
def test_another_user_cannot_reach_the_control_socket(program) -> None:
    (root,) = [p for p in program.temporary.iterdir() if p.name.startswith("torchtrainer-")]
    program.temporary.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            socket.socket(socket.AF_UNIX).connect(str(root / "control.ipc"))
        except PermissionError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_no_environment_value_shows_in_a_command_line(program) -> None:
    assert not [line for line in marked_processes(program.mark) if "do-not-tell" in line]


LISTENS = """
import os, signal
import torch.distributed as dist
dist.init_process_group("gloo")
os.write(1, b"here\\n")
signal.pause()
"""


@pytest.mark.parametrize("options", ["", "--standalone", "--master-addr localhost --master-port {port}"])
def test_a_launcher_on_one_machine_listens_on_loopback_only(tmp_path, options) -> None:
    (tmp_path / "listens.py").write_text(LISTENS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        given = options.format(port=probe.getsockname()[1]).split()
    command = [sys.executable, "-m", "torchtrainer", "run", "--nproc-per-node", "2", *given, "listens.py"]
    running = start_program(tmp_path, f"import os; os.execv({command[0]!r}, {command!r})", OMP_NUM_THREADS="1")
    for _ in range(2):
        running.wait_for("here")
    pid = running.process.pid
    own = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    found = {address for address, inode in listening_inodes(pid) if f"socket:[{inode}]" in own}
    running.process.terminate()
    running.finish()
    running.assert_nothing_left()
    assert found, "it hosts the rendezvous"
    assert found <= LOOPBACK
