"""What a launcher tells: the root cause first, restarts, hangs, start and end, and one line for what is wrong with a command."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from launched import RUN, launch
from programs import Program, run_program, start_program

import torchtrainer.launch
import torchtrainer.run
from torchtrainer.launcher.script import _answer_stack_dumps
from torchtrainer.process.signals import STACK_DUMP_SIGNAL

SCRIPT = "ends_reports.py"
TWO = "--nproc-per-node 2"
FORMS = {"forked": "", "exec'd": "--start-fresh"}
FIRST_LINE = "torchtrainer run: "


def report(tmp_path: Path, *arguments: str, options: str = TWO, code: int) -> Program:
    """Runs the launcher to its end."""
    program = launch(tmp_path, SCRIPT, *arguments, options=options)
    assert program.finish() == code, program.errors
    program.assert_nothing_left()
    return program


def attempts(program: Program) -> int:
    """How many attempts a program of one rank says that it made."""
    return len(re.findall(r"^attempt \d+$", program.output, re.MULTILINE))


# The root cause


def test_the_rank_that_raised_first_is_the_root_cause_though_another_ended_first(tmp_path):
    errors = report(tmp_path, "root_ends_last", options=f"{TWO} --shutdown-timeout 1000", code=1).errors
    assert re.search(r"rank 1 failed: ValueError: the first one \(exited with code 1\)", errors), errors
    traceback = errors.index("Traceback", errors.index("rank 1 failed"))
    assert traceback < errors.index("then rank 0: exited with code 4"), errors


def test_the_same_error_of_several_ranks_is_told_once_with_the_ranks(tmp_path):
    errors = report(tmp_path, "alike", options=f"{TWO} --shutdown-timeout 1000", code=1).errors
    match = re.search(r"ranks (0, 1|1, 0) failed: ValueError: on every rank", errors)
    assert match is not None, errors
    told = errors[match.start() :]
    assert told.count("Traceback") == 1 and "then rank" not in told, errors


def test_a_rank_that_the_launcher_stopped_is_not_blamed(tmp_path):
    errors = report(tmp_path, "one_fails", code=1).errors
    assert "rank 1 failed: exited with code 5" in errors
    assert "stopped because of it: rank 0" in errors
    assert "rank 0 failed" not in errors and "then rank 0" not in errors


def test_the_report_names_the_file_that_holds_stderr(tmp_path):
    errors = report(tmp_path, "one_fails", options=f"{TWO} -r 3 --log-dir {tmp_path}/logs", code=1).errors
    (named,) = re.findall(r"^  stderr: (.+)$", errors, re.MULTILINE)
    assert Path(named).is_file() and Path(named).match("attempt_0/1/stderr.log"), errors


# Restarts


def test_each_restart_is_told_and_the_last_line_counts_them(tmp_path):
    program = report(tmp_path, "always", options="--max-restarts 2", code=1)
    assert attempts(program) == 3
    assert re.findall(r"restarting all workers \((\d) of 2 restarts left\)", program.errors) == ["1", "0"]
    assert re.findall(r"of attempt (\d)", program.errors) == ["0", "1", "2"]
    last = program.errors.splitlines()[-1]
    assert re.fullmatch(FIRST_LINE + r"failed after [\d.]+ s, 2 restarts, [\d.]+ s lost between attempts", last)


def test_progress_gives_the_restarts_back(tmp_path):
    program = report(tmp_path, "gets_further", "4", options="--max-restarts 1", code=0)
    assert attempts(program) == 5
    assert re.findall(r"\((\d) of 1 restarts left\)", program.errors) == ["0"] * 4


def test_a_crash_loop_without_progress_is_stopped(tmp_path):
    program = report(tmp_path, "gets_no_further", "2", options="--max-restarts 1", code=1)
    assert attempts(program) == 3, "two with progress, and one that gets no further than the second"


# Hangs


@pytest.mark.parametrize("form", FORMS)
def test_a_hang_is_reported_with_the_stacks_of_every_rank(form, tmp_path):
    options = f"{TWO} --hang-timeout 3 {FORMS[form]}"
    errors = report(tmp_path, "waits_in_this_function", options=options, code=1).errors
    assert "(--hang-timeout 3); their stacks follow, then they are stopped" in errors
    assert_stacks(errors, form)
    assert "launcher/script.py" not in errors, "only the program's own frames"
    assert "ranks 0, 1 had to be killed: no rank failed by itself" in errors
    assert "out of memory" not in errors


@pytest.mark.parametrize("form", FORMS)
def test_sigusr2_prints_stacks_and_the_launch_goes_on(form, tmp_path):
    program = launch(tmp_path, SCRIPT, "goes_on", options=f"{TWO} {FORMS[form]}")
    pids = [int(program.wait_for("pid ").split()[1]) for _ in range(2)]
    program.process.send_signal(signal.SIGUSR2)
    assert program.process.stderr is not None
    lines: list[str] = []
    while "rank 1 (pid" not in "".join(lines[-1:]):
        lines.append(program.process.stderr.readline())
        assert lines[-1], "the launcher ended"
    lines.append(program.process.stderr.readline())
    if form == "forked":
        while "program.py" not in lines[-1]:
            lines.append(program.process.stderr.readline())
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    assert program.finish() == 0
    program.assert_nothing_left()
    assert_stacks("".join(lines), form)


def test_stacks_are_asked_for_only_once_the_worker_can_answer(tmp_path, monkeypatch):
    stacks = tmp_path / "stacks"
    there = []
    register = faulthandler.register

    def look(*arguments, **options):
        there.append(stacks.exists())
        register(*arguments, **options)

    monkeypatch.setattr(faulthandler, "register", look)
    try:
        _answer_stack_dumps(str(stacks))
        assert there == [False], "who sees the file sends the signal, which would have ended the worker"
        os.kill(os.getpid(), STACK_DUMP_SIGNAL)
        assert "test_stacks_are_asked_for" in stacks.read_text()
    finally:
        faulthandler.unregister(STACK_DUMP_SIGNAL)


def assert_stacks(text: str, form: str) -> None:
    for rank in (0, 1):
        part = text[text.index(f"rank {rank} (pid") :]
        part = part[: part.index("\nrank") if "\nrank" in part[1:] else None]
        if form == "forked":
            assert "in waits_in_this_function" in part, text
        else:
            assert "the system says: " in part, text
            assert "need py-spy on the PATH" in part, text


# Start and end


def test_the_first_and_the_last_line_sum_up(tmp_path):
    program = report(tmp_path, "gets_further", "0", code=0)
    first, last = program.errors.splitlines()
    assert re.fullmatch(FIRST_LINE + r"2 ranks on (\d+ CPU cores?|\d+ GPUs?), started in [\d.]+ s", first)
    assert re.fullmatch(FIRST_LINE + r"done after [\d.]+ s", last)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_standard_streams_change_nothing(closed, tmp_path):
    program = launch(
        tmp_path, SCRIPT, "gets_further", "0", options=TWO, before=("sh", "-c", f'exec "$@" {closed}', "sh")
    )
    assert program.finish() == 0, program.errors
    program.assert_nothing_left()


# What is wrong with a command


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A command that cannot work.

    Attributes:
        id: its name.
        command: options and script; ``{port}`` is in use.
        says: a pattern that the line on standard error matches.
        code: 2 for what the options alone show.
    """

    id: str
    command: str
    says: str
    code: int = 1
    environ: dict[str, str] = field(default_factory=dict)


ONE_MACHINE_OF_TWO = "--nnodes 2 --rdzv-backend c10d --rdzv-id job"
BAD = (
    Bad(id="script missing", command="missing.py", says=r"script 'missing.py' does not exist \(looked in .+\)"),
    Bad(id="script is a directory", command="folder", says=r"'folder' is a directory without __main__.py"),
    Bad(id="log directory is a file", command="--log-dir taken ok.py", says=r"taken"),
    Bad(id="log directory below a file", command="--log-dir taken/logs ok.py", says=r"taken"),
    Bad(id="logs specs unknown", command="--logs-specs nosuch ok.py", says=r"nosuch"),
    Bad(id="rendezvous unknown", command="--rdzv-backend nosuch --rdzv-endpoint x:1 ok.py", says=r"nosuch"),
    Bad(id="event log unknown", command="--event-log-handler nosuch ok.py", says=r"nosuch"),
    Bad(
        id="no GPU",
        command="--nproc-per-node gpu ok.py",
        says=r"(?i)(gpu|cuda)",
        environ={"CUDA_VISIBLE_DEVICES": ""},
    ),
    Bad(
        id="port in use",
        command="--master-addr localhost --master-port {port} ok.py",
        says=r"localhost:{port}.*(in use|EADDRINUSE)",
    ),
    Bad(
        id="endpoint unresolvable",
        command=f"{ONE_MACHINE_OF_TWO} --rdzv-endpoint no-such-host.invalid:29500 --rdzv-conf read_timeout=1 ok.py",
        says=r"no-such-host.invalid:29500",
    ),
    Bad(
        id="machines missing",
        command=f"{ONE_MACHINE_OF_TWO} --rdzv-endpoint localhost:0 --rdzv-conf join_timeout=1 ok.py",
        says=r"the machines did not come together: wanted 2, .*",
    ),
    Bad(id="number of workers", command="--nproc-per-node 0 ok.py", says=r"--nproc-per-node.*'0'", code=2),
)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.id)
def test_a_command_that_cannot_work_is_answered_with_one_line(bad, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken").touch()
    (tmp_path / "ok.py").touch()
    with socket.create_server(("localhost", 0)) as busy:
        port = busy.getsockname()[1]
        command = bad.command.format(port=port).split()
        driver = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
        program = run_program(tmp_path, driver, *RUN, *command, OMP_NUM_THREADS="1", **bad.environ)
    assert program.process.returncode == bad.code, program.errors
    program.assert_nothing_left()
    lines = [line for line in program.errors.splitlines() if not line.startswith("usage: ")]
    assert len(lines) == 1, program.errors
    assert re.search(bad.says.replace("{port}", str(port)), lines[0]), program.errors
    assert lines[0].startswith(FIRST_LINE.rstrip(": ")), program.errors


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_script_that_cannot_be_read(tmp_path):
    """Root reads everything, so the launcher runs without that right."""
    (tmp_path / "secret.py").touch(mode=0o000)
    driver = """
    import ctypes, os, sys
    CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24
    for right in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, right, 0, 0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
    """
    program = run_program(tmp_path, driver, *RUN, "secret.py")
    assert program.process.returncode == 1
    program.assert_nothing_left()
    assert program.errors == f"{FIRST_LINE}script 'secret.py' cannot be read: check its permissions\n"


# Within a program

IN_PROCESS = """
import signal, sys, threading
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
import torchtrainer.run

def here():
    before = signal.getsignal(signal.SIGTERM)
    try:
        torchtrainer.run.main(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print("ChildFailedError", sorted(error.failures), rank, failure.exitcode, type(failure.timestamp).__name__)
    except SignalException as error:
        print("SignalException", repr(error.sigval))
    else:
        print("returned")
    assert signal.getsignal(signal.SIGTERM) is before

stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
here()
stop.set()
thread.join()
"""


def in_process(tmp_path: Path, *arguments: str, options: str = TWO) -> Program:
    """Starts a program with a thread that calls the launcher."""
    (tmp_path / "script.py").write_text((Path(__file__).parent / "launch_scripts" / SCRIPT).read_text())
    command = (*options.split(), "script.py", *arguments)
    return start_program(tmp_path, IN_PROCESS, *command, OMP_NUM_THREADS="1")


def test_a_program_gets_the_error_that_torch_would_raise(tmp_path):
    program = in_process(tmp_path, "one_fails")
    assert program.finish() == 0, program.errors
    program.assert_nothing_left()
    assert "ChildFailedError [0, 1] 1 5 int" in program.output


def test_a_program_goes_on_after_a_launch(tmp_path):
    program = in_process(tmp_path, "gets_further", "0")
    assert program.finish() == 0, program.errors
    program.assert_nothing_left()
    assert program.output.splitlines()[-1] == "returned"


def test_a_program_gets_the_signal_that_ended_the_launch(tmp_path):
    program = in_process(tmp_path, "waits_in_this_function")
    for _ in range(2):
        program.wait_for("ready")
    program.process.send_signal(signal.SIGTERM)
    assert program.finish() == 0, program.errors
    program.assert_nothing_left()
    assert program.output.splitlines()[-1] == f"SignalException {signal.Signals.SIGTERM!r}"


@pytest.mark.parametrize("who", ["torchrun", "accelerate"])
def test_a_program_that_makes_torchruns_options_can_launch_here_in_its_place(tmp_path, who):
    (tmp_path / "script.py").write_text(
        "import os, sys\nos.write(1, f'{os.environ[\"RANK\"]} {sys.argv[1:]}\\n'.encode())"
    )
    launching = {
        "torchrun": "torchrun.main(['--nproc-per-node=2', '--master-port=0', 'script.py', '--x'])",
        "accelerate": """
from accelerate.commands.launch import launch_command_parser, multi_gpu_launcher
known = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no script.py --x"
multi_gpu_launcher(launch_command_parser().parse_args(known.split()))
""",
    }[who]
    text = f"""
import torch.distributed.run as torchrun
import torchtrainer.run
torchrun.run = torchtrainer.run.run
{launching}
print("returned")
"""
    program = run_program(tmp_path, text, OMP_NUM_THREADS="1")
    assert program.process.returncode == 0, program.errors
    assert sorted(program.output.splitlines()) == ["0 ['--x']", "1 ['--x']", "returned"]
    assert "2 ranks on" in program.errors, "it is ours that launched"


WRONG_VALUES = {
    "--nproc-per-node=many x": "nproc_per_node",  # may be a device that only torch knows
    "--nproc-per-node=0 x": "--nproc-per-node",
    "--nnodes=3:1 x": "--nnodes",
    "--max-restarts=-1 x": "--max-restarts",
    "--no-python --module x": "--no-python and --module exclude",
    "--rdzv-conf=nothing x": "--rdzv-conf",
    "--local-ranks-filter=a x": "--local-ranks-filter",
}


@pytest.mark.parametrize("launcher", [torchtrainer.run, torchtrainer.launch])
@pytest.mark.parametrize("line", WRONG_VALUES)
def test_a_program_gets_an_exception_for_wrong_values_and_no_exit(launcher, line):
    options = ["--use-env", *line.split()] if launcher is torchtrainer.launch else line.split()
    with pytest.raises(ValueError, match=WRONG_VALUES[line]):
        launcher.main(options)
    with pytest.raises(SystemExit, match="2"):
        launcher.main(["--no-such-option", "x"])
