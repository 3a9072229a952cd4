"""``torchtrainer doctor``: what it finds, what it says to do, and that it always comes to an end."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from programs import DEADLINE_S, marked_processes, start_program

import torchtrainer
from torchtrainer.launcher import doctor, doctor_checks, doctor_torch
from torchtrainer.launcher.doctor import Check, as_text, run_check
from torchtrainer.launcher.doctor_checks import (
    PACKAGES,
    Finding,
    check_environment,
    check_host_name,
    check_shared_memory,
    package_finding,
)

COMMAND = """
import argparse, sys
from torchtrainer.launcher import doctor
parser = argparse.ArgumentParser()
doctor.add_arguments(parser)
sys.exit(doctor.main(parser.parse_args()))
"""


def named(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_this_machine_is_well(tmp_path):
    program = start_program(tmp_path, COMMAND, "--json", whole=True)
    assert program.finish() == 0, program.output + program.errors
    findings = [Finding(**values) for values in json.loads(program.output)]
    assert program.errors == ""  # no progress bar where there is no terminal
    names = {finding.name for finding in findings}
    assert {"python", "torch", "processors", "memory", "import of torch", "gloo", "open files", "loopback"} <= names
    assert named(findings, "torchtrainer").value == torchtrainer.__version__
    assert "1 thread after import of torch; a forked process computes" in named(findings, "fork after import").value
    assert "2 processes summed their numbers" in named(findings, "gloo").value
    assert "gloo yes" in named(findings, "torch.distributed").value
    assert named(findings, "time-out timeout_s").value == "1800 s; TorchTrainer(timeout_s=...)"
    assert "time-out Timeouts.worker_connect_s" in names
    program.assert_nothing_left()


def test_lines_for_people():
    findings = [
        Finding(name="memory", level="ok", value="much"),
        Finding(name="host name", level="warn", value="slow", advice="hurry"),
        Finding(name="gloo", level="fail", value="silent", advice="speak"),
    ]
    assert as_text(findings, took_s=1.25).splitlines() == [
        "ok    memory     much",
        "warn  host name  slow",
        "                 -> hurry",
        "fail  gloo       silent",
        "                 -> speak",
        "1 ok, 1 warn, 1 fail (1.2 s)",
    ]


@pytest.mark.parametrize(("level", "advice"), [("ok", "do"), ("warn", ""), ("fail", "")])
def test_a_finding_has_advice_exactly_if_something_is_to_be_done(level, advice):
    with pytest.raises(ValueError, match="advice exactly if"):
        Finding(name="x", level=level, value="y", advice=advice)


def test_ctrl_c_ends_it_with_what_is_known(tmp_path):
    program = start_program(tmp_path, COMMAND)
    deadline = time.monotonic() + DEADLINE_S
    while not any("check_torch" in line for line in marked_processes(program.mark)):
        assert time.monotonic() < deadline
        assert program.process.poll() is None
    program.process.send_signal(signal.SIGINT)
    assert program.finish() == doctor.EXIT_INTERRUPTED
    assert "ok    python" in program.output
    assert re.fullmatch(r"torchtrainer doctor: stopped by Ctrl-C after \d+ of \d+ checks\n", program.errors)
    program.assert_nothing_left()


def test_a_killed_command_leaves_nothing(tmp_path):
    program = start_program(tmp_path, COMMAND)
    deadline = time.monotonic() + DEADLINE_S
    while not any("check_" in line for line in marked_processes(program.mark)):
        assert time.monotonic() < deadline
    program.process.kill()
    program.finish()
    program.assert_nothing_left()


STRANGE_CHECKS = """
import os, signal, sys, time
from torchtrainer.launcher.doctor_checks import Finding

def raises():
    raise ValueError("no such\\nthing")

def crashes():
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = os.fork()
    open(os.environ["PIDS"], "a").write(f"{os.getpid()}\\n")
    time.sleep(1000)

def chatters():
    print("torchtrainer-doctor", flush=True)
    os.write(1, b"\\xff half a line")
    return [Finding(name="a", level="ok", value="b")]
"""


def strange_check(tmp_path: Path, name: str, deadline_s: float = DEADLINE_S) -> list[Finding]:
    (tmp_path / "strange_checks.py").write_text(STRANGE_CHECKS)
    environ = {"PYTHONPATH": str(tmp_path), "PIDS": str(tmp_path / "pids")}
    sys.path.insert(0, str(tmp_path))
    try:
        import strange_checks

        look = getattr(strange_checks, name)
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["strange_checks"]
    return run_check(Check(name="strange", look=look, deadline_s=deadline_s, advice="look away", environ=environ))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("raises", "its process exited with code 1: thing"),
        ("crashes", "its process was killed by SIGSEGV: nothing was printed"),
    ],
)
def test_a_check_that_breaks_is_a_finding(tmp_path, name, value):
    assert strange_check(tmp_path, name) == [Finding(name="strange", level="fail", value=value, advice="look away")]


def test_a_check_that_hangs_is_a_finding_and_gone_with_its_children(tmp_path):
    (finding,) = strange_check(tmp_path, "hangs", deadline_s=2.0)
    assert finding == Finding(name="strange", level="fail", value="no answer within 2 s", advice="look away")
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + DEADLINE_S
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline


def is_running(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be reaped by init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_libraries_print_is_no_finding(tmp_path):
    assert strange_check(tmp_path, "chatters") == [Finding(name="a", level="ok", value="b")]


def test_a_thread_that_python_starts_with_makes_forking_unsafe(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    environ = {"PYTHONPATH": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"}
    findings = run_check(Check(name="threads", look=doctor_torch.check_library_threads, environ=environ))
    assert named(findings, "threads of python").level == "warn"
    assert "sitecustomize" in named(findings, "threads of python").advice
    findings = run_check(Check(name="torch", look=doctor_torch.check_torch, deadline_s=DEADLINE_S, environ=environ))
    fork = named(findings, "fork after import")
    assert fork.level == "warn"
    assert fork.value.startswith("2 threads after import of torch")
    assert "--start-fresh" in fork.advice


def test_gloo_over_an_interface_that_is_not_there():
    check = Check(
        name="gloo", look=doctor_torch.check_gloo, deadline_s=DEADLINE_S, environ={"GLOO_SOCKET_IFNAME": "nosuch0"}
    )
    (finding,) = run_check(check)
    assert finding.level == "fail"
    assert "nosuch0" in finding.value
    assert "GLOO_SOCKET_IFNAME" in finding.advice


def test_a_forked_process_ends_at_its_limit():
    assert doctor_torch.run_forked(lambda: signal.pause() or 0, limit_s=1) == -signal.SIGALRM
    assert doctor_torch.run_forked(lambda: 7, limit_s=60) == 7


def test_packages_missing_old_and_new():
    missing = package_finding("torchtrainer-nowhere", (1, 2))
    assert (missing.level, missing.value) == ("fail", "not installed")
    assert missing.advice == 'pip install "torchtrainer-nowhere>=1.2"'
    assert package_finding("torchtrainer-nowhere", None).level == "ok"
    assert package_finding("cloudpickle", (999,)).level == "fail"
    assert package_finding("cloudpickle", (1, 0)).level == "ok"


def test_packages_are_those_of_the_project():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    block = text.partition("dependencies = [")[2].partition("]")[0]
    wanted = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', block))
    assert {name: ".".join(map(str, oldest)) for name, oldest in PACKAGES.items() if oldest} == wanted
    oldest_python = ".".join(map(str, doctor_checks.OLDEST_PYTHON))
    assert f'requires-python = ">={oldest_python}"' in text


def test_few_open_files_are_a_warning():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))\n"
        "from torchtrainer.launcher.doctor_checks import check_limits\n"
        "print([(f.level, f.value, f.advice) for f in check_limits() if f.name == 'open files'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    assert "('warn', '256', 'ulimit -n 512" in done.stdout


def test_shared_memory_that_is_not_there(tmp_path):
    (finding,) = check_shared_memory(tmp_path / "nowhere")
    assert finding.level == "fail"
    assert "--shm-size" in finding.advice
    assert check_shared_memory(tmp_path)[0].value.endswith("writable")


@pytest.mark.parametrize(
    ("name", "value"),
    [("", "does not resolve"), ("x" * 64 + ".invalid", "does not resolve"), ("192.0.2.1", "is 192.0.2.1")],
)
def test_a_host_name_that_leads_nowhere(name, value):
    (finding,) = check_host_name(name or "a..b")
    assert finding.level == "warn"
    assert value in finding.value
    assert "--local-addr" in finding.advice


def test_a_host_name_that_leads_here():
    (finding,) = check_host_name("127.0.0.1")
    assert "loopback" in finding.value


def test_temporary_directory_that_is_not_there(tmp_path):
    environ = {"TMPDIR": str(tmp_path / "nowhere")}
    (finding,) = run_check(Check(name="tmp", look=doctor_checks.check_temporary_directory, environ=environ))
    assert finding.level == "warn"
    environ = {"TMPDIR": "/tmp/", "XDG_RUNTIME_DIR": ""}
    (finding,) = run_check(Check(name="tmp", look=doctor_checks.check_temporary_directory, environ=environ))
    assert finding.level == "ok", finding


def test_temporary_directory_too_deep_for_sockets(tmp_path):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    environ = {"TMPDIR": str(deep), "XDG_RUNTIME_DIR": ""}
    (finding,) = run_check(Check(name="tmp", look=doctor_checks.check_temporary_directory, environ=environ))
    assert finding.level == "warn"
    assert "TMPDIR" in finding.advice
    assert list(deep.iterdir()) == []


def test_variables_that_change_what_training_does():
    environ = {
        "HOME": "/root",
        "RANK": "0",
        "MASTER_ADDR": "x",
        "PET_NNODES": "2",
        "CUDA_VISIBLE_DEVICES": "",
        "NCCL_DEBUG": "INFO\x1b[2J" + "x" * 1000,
        "OMP_NUM_THREADS": "4",
    }
    levels = {f.name.removeprefix("variable "): f.level for f in check_environment(environ)}
    assert levels == {
        "CUDA_VISIBLE_DEVICES": "warn",
        "MASTER_ADDR": "warn",
        "NCCL_DEBUG": "ok",
        "OMP_NUM_THREADS": "ok",
        "PET_NNODES": "warn",
        "RANK": "warn",
    }
    shown = named(check_environment(environ), "variable NCCL_DEBUG").value
    assert "\x1b" not in shown and len(shown) < 200
    (finding,) = check_environment({})
    assert finding.name == "variable OMP_NUM_THREADS"


def test_every_check_is_found_by_its_name_in_another_process():
    for check in doctor.CHECKS:
        assert getattr(sys.modules[check.look.__module__], check.look.__name__) is check.look


def test_a_wrong_option_is_a_wrong_usage(capsys):
    parser = argparse.ArgumentParser(prog="torchtrainer doctor")
    doctor.add_arguments(parser)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--jsn", "x"])
    assert stop.value.code == 2


def test_a_terminal_gets_a_progress_bar(tmp_path):
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    program = tmp_path / "program.py"
    program.write_text(COMMAND)
    process = subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=follower
    )
    os.close(follower)
    drawn = b""
    try:
        while chunk := os.read(leader, 4096):
            drawn += chunk
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(leader)
    assert process.wait(DEADLINE_S) == 0
    assert b"check 6 of 14: torch" in drawn
