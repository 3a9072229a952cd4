"""Programs written for torchrun run under our launcher unchanged, and print the same.

Accelerate's are those that its package ships to test itself, run where they are installed; each checks its own results.
Accelerate's other programs are not here: on processors ``test_ops.py`` and ``test_cli.py`` train in one process each, whichever
launcher starts them, ``test_distributed_data_loop.py`` hangs and ``test_ddp_comm_hook.py`` fails, under torchrun too.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from programs import TORCH_ABORT, Program, start_program

PROGRAMS = Path(__file__).parent / "launch_programs"
RANKS = 2
OPTIONS = ("--standalone", "--nproc-per-node", str(RANKS), "--redirects", "3", "--log-dir", "logs")
"""Each rank writes to a file of its own: on one terminal the lines of two ranks mix as chance has it."""

RUN = {"torch": ("-m", "torch.distributed.run"), "ours": ("-m", "torchtrainer", "run")}
LAUNCH = {"torch": ("-m", "torch.distributed.launch"), "ours": ("-m", "torchtrainer.launch")}

BECOME = "import os, sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
"""Becomes the interpreter with the arguments it is given: so a program is run from where it is, not from a copy."""

DURATION = re.compile(r"\d+\.\d s$|\d:\d\d:\d\d$", re.MULTILINE)
"""What the reference training prints of its own speed."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A program for two ranks.

    Attributes:
        script: below ``launch_programs``, or within the installed package if that is where it comes from.
        package: what the program needs to be installed.
        shipped: whether the package brings the program.
        says: what rank 0 prints only if both ranks took part.
    """

    id: str
    script: str
    says: str
    package: str = "torch"
    shipped: bool = False
    arguments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def path(self) -> Path:
        """Where the program is; skips the test if its package is not installed."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            pytest.skip(f"{self.package} is not installed")
        path = (Path(spec.origin).parent if self.shipped else PROGRAMS) / self.script
        if self.shipped and not path.exists():
            pytest.skip(f"this version of {self.package} ships no {self.script}")
        return path


ACCELERATE_SCRIPT = Training(
    id="accelerate script",
    package="accelerate",
    shipped=True,
    script="test_utils/scripts/test_script.py",
    says="Distributed environment: DistributedType.MULTI_CPU  Backend: gloo\nNum processes: 2",
)
ACCELERATE_SYNC = Training(
    id="accelerate sync",
    package="accelerate",
    shipped=True,
    script="test_utils/scripts/test_sync.py",
    says="Test Distributed `no_sync` context manager",
)
FABRIC = Training(id="fabric", package="lightning", script="fabric_training.py", says="ranks [0, 1]")
LIGHTNING = Training(
    id="lightning",
    package="lightning",
    script="lightning_training.py",
    arguments=("--output", "checkpoints"),
    says="environment TorchElasticEnvironment, 0 of 2",
)
REFERENCE = Training(
    id="reference",
    package="torchvision",
    script="reference_training/train.py",
    arguments=("--output-dir", "checkpoints"),
    says="world_size=2",
)
ELASTIC = Training(
    id="elastic",
    script="elastic_training.py",
    arguments=("--snapshot", "snapshot.pt"),
    options=("--max-restarts", "1"),
    says="attempt 1 of at most 1 restarts, from epoch 2",
)


def train(directory: Path, training: Training, launcher: tuple[str, ...]) -> tuple[Program, dict[str, str]]:
    """Runs a program to its end; returns it, and the standard output of each rank in each attempt."""
    directory.mkdir()
    words = (*launcher, *OPTIONS, *training.options, str(training.path()), *training.arguments)
    program = start_program(directory, BECOME, *words, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    code = program.finish()
    logs = {path.relative_to(directory): path.read_text() for path in sorted(directory.glob("logs/*/*/*/std*.log"))}
    if code and any(TORCH_ABORT in text for text in logs.values()):  # torch's own, now and then, under any launcher
        return train(directory.with_name(f"{directory.name}-again"), training, launcher)
    assert code == 0, f"{program.output}\n{program.errors}\n{logs}"
    # The first directory below logs is named after the run, which chance names.
    printed = {"/".join(path.parts[2:]): DURATION.sub("...", text) for path, text in logs.items()}
    return program, {where: text for where, text in printed.items() if where.endswith("stdout.log")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "form"),
    [
        pytest.param(ACCELERATE_SCRIPT, RUN, id="accelerate script"),
        pytest.param(ACCELERATE_SYNC, RUN, id="accelerate sync", marks=pytest.mark.soak),
        pytest.param(FABRIC, RUN, id="fabric", marks=pytest.mark.soak),
        pytest.param(LIGHTNING, RUN, id="lightning", marks=pytest.mark.soak),
        pytest.param(REFERENCE, RUN, id="reference", marks=pytest.mark.soak),
        pytest.param(REFERENCE, LAUNCH, id="reference by launch", marks=pytest.mark.soak),
    ],
)
def test_a_program_prints_the_same_under_both_launchers(tmp_path, training, form):
    _, expected = train(tmp_path / "torch", training, form["torch"])
    program, printed = train(tmp_path / "ours", training, form["ours"])
    program.assert_nothing_left()
    assert len(printed) == RANKS
    assert training.says in printed["attempt_0/0/stdout.log"].replace("'", "")
    assert printed == expected


@pytest.mark.slow
@pytest.mark.soak
def test_an_elastic_program_ends_as_if_no_worker_had_failed(tmp_path):
    # Against a run without a failure: torchrun itself hangs or fails on this restart, as torch 2.14 keeps the store of attempts before,
    # and with it the addresses of dead workers (see torchtrainer/elastic/store.py).
    undisturbed = replace(ELASTIC, arguments=(*ELASTIC.arguments, "--fail-in-epoch", "-1"))
    _, expected = train(tmp_path / "torch", undisturbed, RUN["torch"])
    program, printed = train(tmp_path / "ours", ELASTIC, RUN["ours"])
    program.assert_nothing_left()
    assert len(printed) == 2 * RANKS
    for rank in range(RANKS):
        first, *rest = printed[f"attempt_1/{rank}/stdout.log"].splitlines()
        assert first == ELASTIC.says
        assert rest == expected[f"attempt_0/{rank}/stdout.log"].splitlines()[-len(rest) :]
        assert len(rest) == 3  # two epochs and the weights
