"""The process that forks workers is killed: a new one is started, the workers go on, and training has the same bits."""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from programs import CREATORS, marked_processes, start_program
from recovery_programs import (
    DEADLINE_S,
    Job,
    Plan,
    Strike,
    assert_as_undisturbed,
    epochs_of,
    one_epoch,
    undisturbed,
    wait_for,
)
from test_process import child

from torchtrainer import CheckpointConfig
from torchtrainer.engines.local import shared_engine
from torchtrainer.engines.starting import MAX_LOST, SpawnerReplaced, Starters
from torchtrainer.process.starters import ChildExited, ChildStarted, StarterReady

pytestmark = pytest.mark.usefixtures("no_worker_left")

SOAK = pytest.mark.soak
EPOCHS = 2
TOLD = "; a new one is started, and the workers continue"


def children_of(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def spawners() -> list[int]:
    """The processes that fork workers for this one: those below the host that lead no session."""
    return [pid for host in children_of(os.getpid()) for pid in children_of(host) if is_spawner(pid)]


def is_spawner(pid: int) -> bool:
    try:
        return b"spawner" in Path(f"/proc/{pid}/cmdline").read_bytes() and os.getsid(pid) != pid
    except OSError:
        return False


def kill_spawner() -> int:
    """Kills it when it is there; returns its process id."""
    wait_for(spawners)
    (pid,) = spawners()
    os.kill(pid, signal.SIGKILL)
    return pid


def spawner(phase: str, at: int = 2) -> Strike:
    return Strike(phase=phase, rank=1, at=at, spawner=True)


def plan_of(tmp_path, *strikes: Strike) -> Plan:
    directory = tmp_path / "strikes"
    directory.mkdir()
    return Plan(directory=str(directory), strikes=strikes)


OWN = Job(operator="own batch")
PHASES = {
    "forward": (Job(), spawner("forward", 4)),
    "own update": (OWN, spawner("own update", 4)),
    "build": (Job(), spawner("build", 1)),
    "load": (Job(loader_workers=1), spawner("load", 6)),
    **{
        phase: pytest.param(Job(), spawner(phase), marks=SOAK)
        for phase in ("backward", "step", "stepped", "scheduler", "validation")
    },
    "three ranks": pytest.param(Job(ranks=3), spawner("backward"), marks=SOAK),
    "own loop": pytest.param(Job(operator="own epoch"), spawner("forward", 5), marks=SOAK),
}


@pytest.mark.parametrize(("job", "strike"), PHASES.values(), ids=PHASES)
def test_it_costs_nothing_in_any_phase(tmp_path, capfd, job, strike) -> None:
    plan = plan_of(tmp_path, strike)
    with job.trainer(plan) as trainer:
        assert_as_undisturbed(epochs_of(trainer, EPOCHS), job)
        assert plan.missing() == []
        assert trainer.status().failures == ()
    assert TOLD in capfd.readouterr().err


@pytest.mark.parametrize("job", [Job(), OWN], ids=["built in", "own batch"])
def test_a_rank_that_dies_with_it_is_replaced_by_the_new_one(tmp_path, job) -> None:
    plan = plan_of(tmp_path, spawner("forward", 4), Strike(phase="backward", rank=1, at=4))
    with job.trainer(plan) as trainer:
        assert_as_undisturbed(epochs_of(trainer, EPOCHS), job)
        assert plan.missing() == []
        assert [one.ranks for one in trainer.status().failures] == [(1,)]


def test_it_is_made_up_for_while_a_checkpoint_is_taken(tmp_path) -> None:
    plan = plan_of(tmp_path, spawner("save", 2))
    job = Job()
    with job.trainer(plan, run_dir=str(tmp_path / "run"), checkpoint=CheckpointConfig(every_steps=4)) as trainer:
        assert_as_undisturbed(epochs_of(trainer, EPOCHS), job)
        assert plan.missing() == []
        told = trainer.status().failures
    assert told == ()
    # A new spawner imports torch first, and the end of the trainer does not wait for that.
    wait_for(lambda: list((tmp_path / "run").rglob("manifest.json")))


def test_a_checkpoint_is_written_even_if_its_workers_are_killed_before_there_is_a_new_one(tmp_path) -> None:
    run = tmp_path / "run"
    with Job().trainer(run_dir=str(run), checkpoint=CheckpointConfig(every_steps=4)) as trainer:
        kill_spawner()  # and with it whoever could start a writer, for as long as an import of torch takes
        one_epoch(trainer)
        trainer.shutdown(force=True)
    wait_for(lambda: list(run.rglob("manifest.json")))


def test_again_and_again_between_calls_and_before_it_is_ready() -> None:
    job = Job()
    with job.trainer() as trainer:
        found = []
        for _ in range(EPOCHS):
            kill_spawner()
            found.append(one_epoch(trainer))
        assert_as_undisturbed(found, job)
    first = kill_spawner()  # the next group is asked for while there is none, or while the new one imports torch
    with job.trainer() as trainer:
        wait_for(lambda: spawners() not in ([], [first]))
        assert_as_undisturbed([one_epoch(trainer)], job)


def until(starters: Starters, kind: type) -> Any:
    """The next event of a kind."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for event in starters.events():
            if isinstance(event, StarterReady):
                starters.on_ready(event)
            if isinstance(event, kind):
                return event
        select.select(starters.fds(), [], [], 0.05)
    raise AssertionError(f"no {kind.__name__} within {DEADLINE_S} s")


def test_after_many_losses_in_a_row_processes_are_started_without_one(tmp_path) -> None:
    starters = Starters("fork")
    try:
        until(starters, StarterReady)
        starters.start(child(tmp_path, "stay"))
        first = until(starters, ChildStarted).pid
        wait_for((tmp_path / "out.done").exists)
        told: list[str] = []
        while len(told) <= MAX_LOST:
            wait_for(lambda: any(map(is_spawner, children_of(os.getpid()))))
            (pid,) = filter(is_spawner, children_of(os.getpid()))
            os.kill(pid, signal.SIGKILL)
            told.append(until(starters, SpawnerReplaced).text)
        assert [text.rpartition("; ")[2] for text in told[-2:]] == [
            "a new one is started",
            "processes are started without one from now on",
        ]
        starters.start({**child(tmp_path, "look"), "key": "a/1"})
        assert until(starters, ChildExited).exit_code == 0
        os.kill(first, signal.SIGKILL)
        assert until(starters, ChildExited).pid == first, "it had gone on, and its end is seen"
    finally:
        starters.close()


DIES = """
import os, signal, sys
from torchtrainer.process import spawner

me, tell = os.getpid(), spawner._tell_started

def tell_and_die(*start):
    if os.getpid() != me:
        return tell(*start)
    if not {before!r}:
        tell(*start)
    os.kill(me, signal.SIGKILL)

spawner._tell_started = tell_and_die
sys.exit(spawner.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("before", [True, False], ids=["before it has told of it", "after it has told of it"])
def test_a_process_that_it_was_just_forking_goes_on_and_is_told_of_once(tmp_path, monkeypatch, before) -> None:
    def dying(module: str, *arguments: str) -> list[str]:
        monkeypatch.undo()  # only the first one
        return [sys.executable, "-c", DIES.format(before=before), *arguments]

    monkeypatch.setattr("torchtrainer.process.starters.interpreter", dying)
    starters = Starters("fork")
    try:
        until(starters, StarterReady)
        starters.start(child(tmp_path, "look"))
        started = until(starters, ChildStarted)
        seen: list[Any] = []
        while not any(isinstance(event, ChildExited) for event in seen):
            select.select(starters.fds(), [], [], 0.05)
            seen += starters.events()
        (ended,) = [event for event in seen if isinstance(event, ChildExited)]
        assert (ended.pid, ended.exit_code) == (started.pid, 0)
        assert not any(isinstance(event, ChildStarted) for event in seen)
        assert (tmp_path / "out").exists()
    finally:
        starters.close()


def test_when_the_host_dies_after_it_nothing_is_left(tmp_path) -> None:
    program = start_program(
        tmp_path,
        CREATORS
        + """
class Forever(TrainingOperator):
    def train_epoch(self, iterator, info):
        if self.world_rank == 0:
            spawner = os.getppid()
            os.kill(spawner, 9)
            while os.getppid() == spawner:
                os.sched_yield()
            print("orphan")
        while True:
            time.sleep(0.01)

TorchTrainer(training_operator_cls=Forever, **CREATORS).train()
""",
        whole=True,
    )
    program.wait_for("orphan")
    host = min(int(line.split()[0]) for line in marked_processes(program.mark) if ".host " in line)
    os.kill(host, signal.SIGKILL)
    assert program.finish() == 1
    assert "EngineError" in program.errors
    program.assert_nothing_left()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=SOAK) for seed in range(1, 30))])
def test_at_any_moment(seed) -> None:
    job = (Job(), OWN, Job(ranks=3), Job(loader_workers=1))[seed % 4]
    undisturbed(job)
    shared_engine().close()  # after many losses in a row a host does without
    chance = random.Random(seed)
    done, killed = threading.Event(), []

    def kill() -> None:
        while not done.wait(chance.uniform(0.0, 1.5)):
            if (found := spawners()) and len(killed) < 3:
                os.kill(found[0], signal.SIGKILL)
                killed.append(found[0])

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with job.trainer() as trainer:
            assert_as_undisturbed(epochs_of(trainer, EPOCHS), job)
            assert trainer.status().failures == ()
    finally:
        done.set()
        thread.join()
    print(f"seed {seed}: {len(killed)} spawners killed")
