"""A forked worker sees what an exec'd one sees; what cannot be made equal is exec'd, and the launcher knows why."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from launched import RUN, SCRIPTS, launch
from programs import start_program

from torchtrainer.launcher.fork_safety import program_of
from torchtrainer.launcher.options import Form, parse
from torchtrainer.process.signals import STACK_DUMP_SIGNAL

SYMPY_FILTER = "SymPyDeprecationWarning"
"""Its filter is added with ``torch._dynamo``: a forked program has it from ``import torch`` on, an exec'd one later."""

ODD_SURROUNDINGS = """
import os, signal, sys
read, _ = os.pipe()
for fd in range(3, 10):
    os.dup2(read, fd, inheritable=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""What a shell, nohup or a batch system leaves to the programs that it starts."""

RUN_VARIABLES = {
    "FORK_FACTS",
    "MASTER_PORT",
    "TMPDIR",
    "TORCHELASTIC_ERROR_FILE",
    "TORCHELASTIC_RUN_ID",
    "TORCHTRAINER_LAUNCH_DIR",
    "TORCHTRAINER_TEST_MARK",
}
"""They belong to a launch, not to a way of starting its workers."""


def differences(forked: object, fresh: object, where: str = "") -> list[str]:
    """Where two reports are not the same, and how."""
    if isinstance(forked, dict) and isinstance(fresh, dict):
        names = sorted({*forked, *fresh})
        return [d for n in names for d in differences(forked.get(n), fresh.get(n), f"{where}/{n}")]
    return [] if forked == fresh else [f"{where}: forked {forked}, exec'd {fresh}"]


def comparable(facts: dict[str, Any]) -> dict[str, Any]:
    """The part of a report that has to be equal; what is known to differ is checked to be that and taken out."""
    before = facts["same"]["before"]
    for name in RUN_VARIABLES:
        before["environ"].pop(name, None)
    for found in (before["descriptors"], before["process"]["descriptors"]):
        stacks = [fd for fd, what in found.items() if what.endswith(".stacks")]
        assert all(int(fd) >= 200 for fd in stacks), found
        for fd in stacks:
            del found[fd]
    signals = before["process"]["signals"]
    caught = int(signals["SigCgt"], 16)
    assert STACK_DUMP_SIGNAL is not None
    signals["SigCgt"] = caught & ~(1 << (STACK_DUMP_SIGNAL - 1))  # an extra of forked workers
    torch = facts["same"]["torch"]
    torch["filters"] = [entry for entry in torch["filters"] if SYMPY_FILTER not in entry]
    return facts["same"]


def reports(tmp_path: Path, way: str, options: str) -> list[dict[str, Any]]:
    """What the two ranks of one launch saw."""
    (tmp_path / way).mkdir()
    shutil.copy(SCRIPTS / "report.py", tmp_path)
    program = launch(
        tmp_path,
        "fork_sees.py",
        "--lr",
        "1",
        options=f"--nproc-per-node 2 {options}",
        before=(sys.executable, "-c", ODD_SURROUNDINGS),
        environ={"FORK_FACTS": str(tmp_path / way)},
    )
    assert program.finish() == 0, program.errors
    program.assert_nothing_left()
    return [json.loads((tmp_path / way / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_forked_script_sees_what_an_execd_one_sees(tmp_path) -> None:
    forked = reports(tmp_path, "forked", "")
    fresh = reports(tmp_path, "fresh", "--start-fresh")
    assert any(".stacks" in what for what in forked[0]["same"]["before"]["descriptors"].values()), "it was not forked"
    for rank in range(2):
        assert differences(comparable(forked[rank]), comparable(fresh[rank])) == []
    drawn = [facts["own"] for facts in (*forked, *fresh)]
    for name in ("random", "numpy", "generator", "uuid", "name", "authkey", "pid"):
        assert len({own[name] for own in drawn}) == len(drawn), f"{name} is shared: {[own[name] for own in drawn]}"


ENDS = """
import importlib, os, sys, threading

def plain():
    raise ValueError("plain")

def chained():
    try:
        plain()
    except ValueError as error:
        raise RuntimeError("chained") from error

def does_not_compile():
    importlib.import_module("bro" + "ken")

def own_hook():
    sys.excepthook = lambda kind, value, trace: print("hook:", kind.__name__, value, trace.tb_lineno, file=sys.stderr)
    plain()

def failing_hook():
    sys.excepthook = lambda *_: 1 / 0
    plain()

def exit_with_text():
    sys.exit("the reason")

def in_thread():
    thread = threading.Thread(target=plain, name="other")
    thread.start()
    thread.join()
    sys.exit(3)

class Last:
    def __del__(self):
        print("collected at exit", file=sys.stderr)

def unflushed():
    global kept
    kept = Last(), open(os.environ["UNFLUSHED"], "w")
    kept[1].write("all of it")
    threading.Timer(0.01, lambda: print("thread was waited for", file=sys.stderr)).start()
    sys.exit(4)

KINDS = (plain, chained, does_not_compile, own_hook, failing_hook, exit_with_text, in_thread, unflushed)
KINDS[int(os.environ["TORCHELASTIC_RESTART_COUNT"])]()
"""
KINDS = 8
"""Attempts of one launch, each of which ends in another way."""


def ends(tmp_path: Path, way: str, options: str) -> list[str]:
    """Standard error of each attempt."""
    (tmp_path / "broken.py").write_text("def f(:\n    pass\n")
    logs, unflushed = tmp_path / way, tmp_path / f"{way}.txt"
    command = (*RUN, "--max-restarts", str(KINDS - 1), "--redirects", "3", "--log-dir", str(logs), *options.split())
    program = start_program(tmp_path, ENDS, python=command, whole=True, OMP_NUM_THREADS="1", UNFLUSHED=str(unflushed))
    assert program.finish() == 1, program.errors
    assert unflushed.read_text() == "all of it"
    return [next(logs.glob(f"*/attempt_{n}/0/stderr.log")).read_text() for n in range(KINDS)]


@pytest.mark.slow
def test_a_forked_script_ends_with_the_text_of_an_execd_one(tmp_path) -> None:
    forked, fresh = ends(tmp_path, "forked", ""), ends(tmp_path, "fresh", "--start-fresh")
    for kind, (ours, expected) in enumerate(zip(forked, fresh, strict=True)):
        assert ours == expected, f"attempt {kind}"
    assert "plain" in forked[0] and "direct cause" in forked[1] and "collected at exit" in forked[-1]


PACKAGE = """
import json, os, sys
loaded = [name for name in ("torch", "numpy") if name in sys.modules]
import torch
main = sys.modules["__main__"]
print(json.dumps({
    "same": [sys.argv, sys.path, main.__file__, main.__package__, main.__spec__.name, repr(sys.flags), loaded,
             torch.get_num_threads(), sys.orig_argv],
    "seed": torch.initial_seed(),
}))
"""


@pytest.mark.soak
@pytest.mark.slow
def test_a_forked_package_sees_what_an_execd_one_sees_and_each_draws_a_seed(tmp_path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(PACKAGE)
    seen = []
    for options in ("", "--start-fresh"):
        python = (*RUN, *options.split(), "-m", "package", "an argument")
        program = start_program(tmp_path, "", python=python, whole=True, OMP_NUM_THREADS="2")
        assert program.finish() == 0, program.errors
        seen.append(json.loads(program.output))
    assert seen[0]["same"] == seen[1]["same"]
    assert seen[0]["seed"] != seen[1]["seed"]


def exec_reason(tmp_path: Path, command: str, **environ: str) -> str | None:
    """Why a command line's workers are exec'd."""
    return program_of(parse(command.split(), Form.RUN), environ, [str(tmp_path)]).exec_reason


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "program.py"
    path.write_text("import os\nimport torch\nprint(os.environ['OMP_NUM_THREADS'])\n")
    return path


def test_a_plain_script_module_or_package_is_forked(tmp_path, script) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text("import torch\n")
    for command in ("program.py", "-m program", "-m package"):
        assert exec_reason(tmp_path, command) is None
    assert exec_reason(tmp_path, "program.py", PYTHON_EXEC=sys.executable) is None


@pytest.mark.parametrize(
    ("command", "environ", "reason"),
    [
        ("--start-fresh program.py", {}, "--start-fresh"),
        ("--no-python program.py", {}, "need not be Python"),
        ("--numa-binding node program.py", {}, "numactl"),
        ("program.py", {"PYTHON_EXEC": "/other/python"}, "another interpreter"),
        ("missing.py", {}, "not a source file"),
        ("-m missing", {}, "not a source file"),
    ],
)
def test_a_launch_that_cannot_fork_says_why(tmp_path, script, command, environ, reason) -> None:
    assert reason in (exec_reason(tmp_path, command, **environ) or "")


@pytest.mark.parametrize(
    "line",
    [
        "os.environ['OMP_NUM_THREADS'] = '3'",
        "os.environ.setdefault('TORCH_LOGS', 'dynamo')",
        "os.environ.update(MKL_NUM_THREADS='1')",
        "os.environ[name] = '1'",
        "os.environ |= dict(OMP_NUM_THREADS='1')",
        "del os.environ['TORCH_LOGS']",
        "os.putenv('KMP_AFFINITY', 'none')",
        "load_dotenv()",
        "environ.pop('OMP_NUM_THREADS', None)",
    ],
)
@pytest.mark.parametrize("imported", [False, True])
def test_a_program_that_sets_what_libraries_read_is_execd(tmp_path, script, line, imported) -> None:
    own = tmp_path / "settings.py" if imported else script
    own.write_text(f"import os\n{line}\n")
    if imported:
        script.write_text("import settings\nimport torch\n")
    found = exec_reason(tmp_path, "program.py") or ""
    assert "line 2 sets" in found
    assert ("settings.py" in found) is imported


@pytest.mark.parametrize("line", ["os.environ['MY_FLAG'] = '1'", "os.environ.get('OMP_NUM_THREADS')"])
def test_a_program_that_sets_or_reads_anything_else_is_forked(tmp_path, script, line) -> None:
    script.write_text(f"import os\n{line}\n")
    assert exec_reason(tmp_path, "program.py") is None


@pytest.mark.parametrize("name", ["random.py", "torch.py", "typing_extensions.py", "torch/__init__.py"])
def test_a_program_with_a_module_of_a_loaded_ones_name_is_execd(tmp_path, script, name) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    assert "name of a module that is loaded already" in (exec_reason(tmp_path, "program.py") or "")


def test_a_program_that_does_not_compile_or_is_no_plain_file_is_execd(tmp_path, script) -> None:
    script.write_text("def f(:\n")
    assert "does not compile" in (exec_reason(tmp_path, "program.py") or "")
    script.write_bytes(b"x = 1\n\0")
    assert "not a source file" in (exec_reason(tmp_path, "program.py") or "")
    os.mkfifo(tmp_path / "pipe")
    assert "not a source file" in (exec_reason(tmp_path, "pipe") or "")
