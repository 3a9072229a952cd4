"""Signals to stop, to any process of a run and at any moment: the state is saved where it can be, and nothing is left."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import CREATORS, DEADLINE_S, Program, marked_processes, start_program

from torchtrainer.process.signals import EXIT_PREEMPTED, STOP_SIGNALS

LAUNCH = (sys.executable, "-m", "torchtrainer", "run", "--nproc-per-node", "2")
EXIT_TERMINATED = 143
SEEDS = 100

PROGRAM = (
    """
print("begun", flush=True)
import signal, sys

def init():  # what ray.init() does to the signal
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))

if "before" in sys.argv:
    init()
"""
    + CREATORS
    + """
import hashlib
from torchtrainer import CheckpointConfig

class Slow(TrainingOperator):
    def train_batch(self, batch, batch_info):
        time.sleep(0.03)
        if self.world_rank == 0:
            print("step", self.global_step, flush=True)
        return super().train_batch(batch, batch_info)

trainer = TorchTrainer(**CREATORS, training_operator_cls=Slow, run_dir="run", seed=1,
                       checkpoint=CheckpointConfig(every_steps=2))
if "after" in sys.argv:
    init()
print("made", flush=True)
for _ in range(2):
    trainer.train()
weights = trainer.state_dict()["models"][0].values()
print("digest", hashlib.sha256(b"".join(one.numpy().tobytes() for one in weights)).hexdigest(), flush=True)
trainer.shutdown()
"""
)
"""Two passes of eight steps, a checkpoint after every second one."""


def digest_of(program: Program) -> str:
    (line,) = {line for line in program.output.splitlines() if line.startswith("digest")}
    return line


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[str, float]:
    """The digest of a run to which nothing happens, and how long it takes from its first line to its end."""
    program = start_program(tmp_path_factory.mktemp("undisturbed"), PROGRAM)
    program.wait_for("begun")
    began_s = time.monotonic()
    assert program.finish() == 0, program.errors
    return digest_of(program), time.monotonic() - began_s


def gone_on(tmp_path: Path) -> str:
    """Starts the script again; returns the digest at its end."""
    program = start_program(tmp_path, PROGRAM)
    assert program.finish() == 0, program.errors
    program.assert_nothing_left()
    return digest_of(program)


# Who is who


def children_of(pid: int) -> list[int]:
    try:
        return [
            int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def leads_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except OSError:
        return False


def hosts(program: Program) -> list[int]:
    return children_of(program.process.pid)


def spawners(program: Program) -> list[int]:
    return [pid for host in hosts(program) for pid in children_of(host) if not leads_session(pid)]


def forked(program: Program) -> list[int]:
    return [pid for spawner in spawners(program) for pid in children_of(spawner)]


def ranks(program: Program) -> list[int]:
    """The first two processes that were forked."""
    return sorted(forked(program))[:2]


def writers(program: Program) -> list[int]:
    """Those that were forked later: no rank is lost here."""
    return sorted(forked(program))[2:]


PROCESSES: dict[str, Callable[[Program], list[int]]] = {
    "driver": lambda program: [program.process.pid],
    "host": hosts,
    "spawner": spawners,
    "writer": writers,
    "rank": ranks,
}


def strike(program: Program, who: str, signum: signal.Signals) -> bool:
    """Sends a signal to a process as soon as there is one; False if the program ends before."""
    while program.process.poll() is None:
        if found := PROCESSES[who](program):
            try:
                os.kill(found[-1], signum)
            except ProcessLookupError:  # it was on its way to become another one
                continue
            return True
        os.sched_yield()
    return False


# The tests


@pytest.mark.parametrize("who", ["host", "spawner"])
def test_those_who_serve_leave_signals_to_stop_to_the_others(tmp_path, undisturbed, who) -> None:
    """From their first moment on: these are not forks of the test's."""
    program = start_program(tmp_path, PROGRAM, whole=True)
    for at in ("begun", "made", "step 3"):
        program.wait_for(at)
        for name in STOP_SIGNALS:
            assert strike(program, who, signal.Signals[name])
    assert program.finish() == 0, program.errors
    assert digest_of(program) == undisturbed[0]
    assert "spawner process" not in program.errors
    program.assert_nothing_left()


@pytest.mark.parametrize("everybody", [True, False], ids=["everybody", "the spawner"])
def test_a_launch_saves_its_state_whichever_of_its_processes_a_scheduler_signals(
    tmp_path, undisturbed, everybody
) -> None:
    program = start_program(tmp_path, PROGRAM, python=LAUNCH)
    program.wait_for("step 3")
    pids = [int(line.split()[0]) for line in marked_processes(program.mark)]
    for pid in pids if everybody else children_of(program.process.pid):
        os.kill(pid, signal.SIGTERM)
    assert program.finish() == (EXIT_PREEMPTED if everybody else 0), program.errors
    assert list((tmp_path / "run").rglob("manifest.json"))
    program.assert_nothing_left()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SEEDS))
def test_at_any_moment(tmp_path, undisturbed, seed) -> None:
    digest, lasts_s = undisturbed
    chance = random.Random(seed)
    who = list(PROCESSES)[seed % len(PROCESSES)]
    signum = chance.choice([signal.SIGTERM, signal.SIGINT])
    ray = chance.choice(["before", "after", "without"])
    program = start_program(tmp_path, PROGRAM, ray, whole=True)
    program.wait_for("begun")
    time.sleep(chance.uniform(0.0, lasts_s))  # the moment is what is tested
    struck = strike(program, who, signum)
    code = program.finish(DEADLINE_S)
    print(f"seed {seed}: {signum.name} to {who}, ray {ray}: {'struck' if struck else 'too late'}, exit code {code}")
    assert code in codes(program, who, signum, ray), f"exit code {code}\n{program.output}\n{program.errors}"
    program.assert_nothing_left()
    if code == 0:
        assert digest_of(program) == digest
    else:
        if code == EXIT_PREEMPTED:
            assert list((tmp_path / "run").rglob("manifest.json"))
        assert gone_on(tmp_path) == digest


def codes(program: Program, who: str, signum: signal.Signals, ray: str) -> set[int]:
    """The exit codes that the pages allow."""
    trains, over = "step" in program.output, "digest" in program.output
    if who not in ("driver", "rank") or (who == "rank" and signum == signal.SIGINT):
        return {0}
    if signum == signal.SIGINT:
        return {0, -signum} if over else {-signum}
    allowed = {EXIT_PREEMPTED, EXIT_TERMINATED}
    if who == "rank":
        return allowed | {0}
    if over or not trains:  # nobody watches yet, or no more
        allowed |= {signum if ray != "without" else -signum, -signum}
    return allowed | {0} if over else allowed
