"""Running small programs as users do, and finding what they leave behind."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import weakref
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from forked import ForkedProcess, can_be_forked

TORCH = tuple(int(part) for part in version("torch").split(".")[:2])
MARK = "TORCHTRAINER_TEST_MARK"
DEADLINE_S = 100.0
"""Only a deadlock takes this long."""
GONE_S = 10.0
"""How long after its end a program's processes and files may still be there."""

TORCH_ABORT = "terminate called without an active exception"
"""What torch 2.14 says when Gloo's threads outlive the interpreter of a process that is done. It happens now and then under any
launcher, to plain DDP scripts too, and not to our own worker processes, which do not dismantle the interpreter."""

CREATORS = """
import os, sys, time
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchtrainer import BATCH_SIZE, FailureConfig, TorchTrainer, TrainingOperator

def model_creator(config):
    return torch.nn.Linear(20, 5)

def dataset(n, seed):
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 20, generator=g), torch.randint(0, 5, (n,), generator=g))

def data_creator(config):
    return DataLoader(dataset(64, 0), batch_size=4), DataLoader(dataset(21, 1), batch_size=4)

def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.1)

CREATORS = dict(model_creator=model_creator, data_creator=data_creator, optimizer_creator=optimizer_creator,
                loss_creator=torch.nn.CrossEntropyLoss, num_workers=2)
"""
"""The start of most programs: a model, data for 2 x 8 batches of 4 in training and 21 samples in validation."""


@dataclass
class Program:
    """A Python program that runs in a process of its own."""

    path: Path
    process: subprocess.Popen[str] | ForkedProcess
    mark: str
    temporary: Path
    output: str = ""
    errors: str = ""
    _lines: list[str] = field(default_factory=list)

    def wait_for(self, text: str) -> str:
        """Reads standard output up to a line with the text; returns that line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            if text in line:
                return line
        self.finish()
        raise AssertionError(f"the program ended without printing {text!r}\n{self.output}\n{self.errors}")

    def finish(self, deadline_s: float = DEADLINE_S) -> int:
        """Waits for the end; returns the exit code."""
        try:
            rest, self.errors = self.process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            rest, self.errors = self.process.communicate()
            raise AssertionError(f"not done after {deadline_s} s\n{rest}\n{self.errors}") from None
        self.output = "".join(self._lines) + rest
        return self.process.returncode

    def ended_well(self) -> bool:
        """Whether the program came to its end: with exit code 0, or with torch's own abort after it was done."""
        return self.process.returncode == 0 or TORCH_ABORT in self.errors

    def assert_nothing_left(self) -> None:
        """Fails if a process of the program, or a private directory, is still there after the time it is given."""
        deadline = time.monotonic() + GONE_S
        while (left := marked_processes(self.mark) or self.private_directories()) and time.monotonic() < deadline:
            os.sched_yield()
        assert not left, f"left behind: {left}"

    def private_directories(self) -> list[str]:
        """What is in the program's temporary directory, but for what torch keeps there: up to 2.7 an empty directory, too."""
        torchs = ("torchinductor_", "tmp") if TORCH < (2, 8) else ("torchinductor_",)
        return [str(e) for e in self.temporary.iterdir() if not e.name.startswith(torchs)]


def start_program(
    tmp_path: Path, text: str, *arguments: str, python: tuple[str, ...] = (), whole: bool = False, **environ: str
) -> Program:
    """Starts a program in ``tmp_path``, with a temporary directory of its own.

    Args:
        tmp_path: where it runs.
        text: of the program.
        arguments: of the program.
        python: what is called with it; empty for this interpreter.
        whole: it runs in an interpreter of its own in any case, from its first line to its last, as a user's does. Without
            it a script, or our launcher, has one that is forked and looks fresh: it imports torch in no time.
        environ: more variables.
    """
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(text))
    # Sockets have short paths; a directory below pytest's own would be too deep for one.
    temporary = Path(tempfile.mkdtemp(prefix="tt-"))
    mark = secrets.token_hex(8)
    env = {k: v for k, v in os.environ.items() if k not in ("XDG_RUNTIME_DIR", "RANK", "WORLD_SIZE")}
    env.update({MARK: mark, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", **environ})
    words = (*(python or (sys.executable,)), str(path), *arguments)
    if not whole and can_be_forked(words, environ):
        forked = ForkedProcess(words[1:], tmp_path, env)
        return _owned(Program(path=path, process=forked, mark=mark, temporary=temporary))
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return _owned(Program(path=path, process=process, mark=mark, temporary=temporary))


def _owned(program: Program) -> Program:
    weakref.finalize(program, shutil.rmtree, program.temporary, ignore_errors=True)
    return program


def run_program(tmp_path: Path, text: str, *arguments: str, **options: object) -> Program:
    """Runs a program to its end."""
    program = start_program(tmp_path, text, *arguments, **options)  # type: ignore[arg-type]
    program.finish()
    return program


def marked_processes(mark: str) -> list[str]:
    """Command lines of living processes that inherited a mark through their environment."""
    found = []
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"{entry.name} {command}")
        except OSError:  # gone meanwhile, or not ours
            continue
    return found
