"""Processes of a trainer die or hang, wherever they are, and the training ends with the bits of one to which nothing happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recovery_programs import (
    DEADLINE_S,
    RAISE,
    WAIT,
    Job,
    Plan,
    Strike,
    UserError,
    assert_as_undisturbed,
    digest,
    engine_use,
    epochs_of,
    one_epoch,
    undisturbed,
    wait_for,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import CheckpointConfig, FailureConfig, TorchTrainer, TrainingOperator, WorkerDiedError

pytestmark = pytest.mark.usefixtures("no_worker_left")

SOAK = pytest.mark.soak
EPOCHS = 3
LONG = 100
"""More epochs than any delay here lasts."""
KILLED = "was killed by SIGKILL"


def run(job: Job, plan: Plan, *, epochs: int = EPOCHS, **arguments):
    """Trains; the result is that of an undisturbed run. Returns the status at the end."""
    with job.trainer(plan, **arguments) as trainer:
        assert_as_undisturbed(epochs_of(trainer, epochs), job)
        return trainer.status()


def forward(rank: int, at: int = 5, **more) -> Strike:
    return Strike(phase="forward", rank=rank, at=at, **more)


# Deaths, phase by phase

TWO, THREE, FOUR = Job(), Job(ranks=3), Job(ranks=4)
IN_ANY_PHASE = {
    "forward, and backward of rank 0": (TWO, (forward(1), Strike(phase="backward", rank=0, at=18))),
    "before the optimizer step, and after it": (
        TWO,
        (Strike(phase="step", rank=0, at=4), Strike(phase="stepped", rank=1, at=20)),
    ),
    "in the step of momentum, and in the scheduler's": (
        replace(THREE, optimizer="momentum"),
        (Strike(phase="step", rank=2, at=3), Strike(phase="scheduler", rank=0, at=11)),
    ),
    "between exchange and update, with a state of its own": (
        replace(THREE, operator="stateful"),
        (Strike(phase="exchanged", rank=0, at=9), forward(1, 12)),
    ),
    "loading, in the process itself": (
        THREE,
        (Strike(phase="load", rank=0, at=7), Strike(phase="load", rank=2, at=41)),
    ),
    "loading, in a loader's process": (
        replace(TWO, loader_workers=2),
        (Strike(phase="load", rank=1, at=6), Strike(phase="load", rank=0, at=40)),
    ),
    "validation, of rank 0 too": (
        FOUR,
        (Strike(phase="validation", rank=3, at=1), Strike(phase="validation", rank=0, at=3)),
    ),
    "while its state is asked for, with a state of its own": (
        replace(THREE, operator="stateful"),
        (Strike(phase="save", rank=0, at=2),),
    ),
    "every rank once": (
        FOUR,
        (
            forward(0, 3),
            Strike(phase="backward", rank=1, at=8),
            Strike(phase="stepped", rank=2, at=11),
            Strike(phase="load", rank=3, at=60),
        ),
    ),
    "the first step, and the uneven tail of a pass": (FOUR, (forward(0, 1), forward(2, 6))),
    "the last step": (THREE, (Strike(phase="scheduler", rank=1, at=1 + EPOCHS * 8),)),
}


@pytest.mark.parametrize(("job", "strikes"), IN_ANY_PHASE.values(), ids=IN_ANY_PHASE)
def test_a_death_in_any_phase_costs_nothing(plan_of, job, strikes) -> None:
    status = run(job, plan_of(*strikes))
    assert [one.cause for one in status.failures] == [KILLED] * len(strikes)
    assert all(one.seconds is not None for one in status.failures)


def test_a_death_between_two_calls_costs_nothing() -> None:
    job = replace(THREE, operator="stateful")
    with job.trainer() as trainer:
        found = epochs_of(trainer, 1)
        first = trainer.status().processes[0]
        assert 0 in first.ranks
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: first.pid not in [one.pid for one in trainer.status().processes])
        last = replace(found[-1], digest=digest(trainer.state_dict()))  # of the rank's own state, which another has now
        assert_as_undisturbed([last, *epochs_of(trainer, 2)], job)


class DyingBeforeItsReply:
    """Standard output of a process that dies when it is written out: right before a reply is sent."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        self.mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Silenced(TrainingOperator):
    """Makes its updates itself; in the call that ``config["method"]`` names, rank 1 dies after all work is done."""

    def setup(self, config: dict) -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        self.model, self.optimizer, self.criterion = self.register(
            models=model, optimizers=torch.optim.Adam(model.parameters()), criterion=nn.MSELoss()
        )
        data = TensorDataset(torch.arange(66.0).view(22, 3) / 66, torch.ones(22, 1))
        self.register_data(
            train_loader=DataLoader(data, batch_size=2), validation_loader=DataLoader(data, batch_size=3)
        )

    def train_batch(self, batch, batch_info=None):
        return super().train_batch(batch, batch_info)

    def train_epoch(self, iterator, info=None, num_steps=None, epoch_idx=0):
        found = super().train_epoch(iterator, info, num_steps, epoch_idx)
        self.silence("train")
        return {**found, "rank_sum": sum(range(100)), "odd": float(self.world_rank)}

    def validate(self, val_iterator, info=None):
        found = super().validate(val_iterator, info)
        self.silence("validate")
        return found

    def silence(self, method: str) -> None:
        mark = self.config["mark"]
        if self.config["method"] == method and self.world_rank == 1 and not mark.exists():
            sys.stdout = DyingBeforeItsReply(mark)


def silence(operator: Silenced) -> int:
    next(operator.model.parameters()).data.mul_(0.5)  # must not be done twice
    operator.silence("apply")
    return operator.world_rank


@pytest.mark.parametrize("method", ["train", "validate", "apply"])
def test_a_death_between_the_end_of_a_call_and_its_reply(tmp_path, method) -> None:
    ends = []
    for name in ("none", method):
        config = {"mark": tmp_path / f"{name}.died", "method": name}
        with TorchTrainer(training_operator_cls=Silenced, config=config, num_workers=2, run_dir=None) as trainer:
            results = [trainer.train(reduce_results=False), trainer.validate(), trainer.apply_all_operators(silence)]
            results += [trainer.train(num_steps=3), trainer.train()]
            state = trainer.state_dict()["models"][0]
            ends.append(([str(one) for one in results], {key: value.tolist() for key, value in state.items()}))
            assert [one.how for one in trainer.status().failures] == ([] if name == "none" else ["replaced"])
        assert config["mark"].exists() == (name != "none")
    assert ends[0] == ends[1]


def test_a_death_while_the_others_wait_in_the_exchange(plan_of) -> None:
    slow = forward(1, 7, signum=WAIT)
    plan = plan_of(slow)
    with FOUR.trainer(plan) as trainer:

        def kill_when_the_others_wait():
            pid = plan.pid(slow)
            wait_for(lambda: [p.phase for p in trainer.status().processes if p.pid != pid] == ["exchange"] * 3)
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_when_the_others_wait)
        killer.start()
        assert_as_undisturbed(epochs_of(trainer, EPOCHS), FOUR)
        killer.join(DEADLINE_S)
        assert [one.cause for one in trainer.status().failures] == [KILLED]


def test_deaths_between_calls(plan_of) -> None:
    with TWO.trainer(plan_of()) as trainer:
        found = []
        for victim in (1, 0, 1):
            wait_for(lambda: [process.ranks for process in trainer.status().processes] == [(0,), (1,)])
            pids = [process.pid for process in trainer.status().processes]
            os.kill(pids[victim], signal.SIGKILL)
            found.append(one_epoch(trainer))
        assert_as_undisturbed(found, TWO)
        assert len(trainer.status().failures) == 3


def test_deaths_while_checkpoints_are_taken(plan_of, tmp_path) -> None:
    plan = plan_of(Strike(phase="save", rank=1, at=4), Strike(phase="save", rank=0, at=15))
    run(THREE, plan, run_dir=tmp_path / "run", checkpoint=CheckpointConfig(every_steps=1))
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    expected = [part for epoch in undisturbed(THREE)[:EPOCHS] for part in (epoch.train, epoch.validate)]
    assert [line["metrics"] for line in history if line["kind"] in ("train", "validate")] == expected


# Several deaths


@pytest.mark.parametrize(
    "delay_s", [0.0, pytest.param(0.03, marks=SOAK), 0.1, pytest.param(0.25, marks=SOAK), pytest.param(0.5, marks=SOAK)]
)
def test_a_second_death_soon_after_the_first(plan_of, delay_s) -> None:
    first = forward(2)
    plan = plan_of(first)
    done = threading.Event()
    with FOUR.trainer(plan) as trainer:

        def kill_another():
            gone = plan.pid(first)
            pid = next(process.pid for process in trainer.status().processes if process.pid != gone)
            timer = threading.Timer(delay_s, lambda: (os.kill(pid, signal.SIGKILL), done.set()))
            timer.start()
            timer.join(DEADLINE_S)

        killer = threading.Thread(target=kill_another)
        killer.start()
        found = [one_epoch(trainer)]
        while not (done.is_set() and len(found) >= EPOCHS) and len(found) < LONG:
            found.append(one_epoch(trainer))
        killer.join(DEADLINE_S)
        assert_as_undisturbed(found, FOUR)
        assert len(trainer.status().failures) == 2


def test_three_of_four_die_in_one_step(plan_of) -> None:
    status = run(FOUR, plan_of(forward(1), Strike(phase="backward", rank=2, at=5), Strike(phase="load", rank=3, at=19)))
    assert len(status.failures) == 3


ALL_DIE = tuple(forward(rank, 9) for rank in range(4))


def test_when_all_die_the_run_goes_on_from_its_newest_checkpoint(plan_of, tmp_path) -> None:
    status = run(FOUR, plan_of(*ALL_DIE), run_dir=tmp_path / "run", checkpoint=CheckpointConfig(every_steps=2))
    assert any(one.seconds is not None for one in status.failures)


def test_when_all_die_in_a_run_that_keeps_nothing_it_begins_anew(plan_of) -> None:
    run(FOUR, plan_of(*ALL_DIE))


REPLACEMENT_DIES = {
    "is built": Strike(phase="build", rank=1, life=2),
    "joins": Strike(phase="join", rank=1, life=2),
    "has joined": forward(1, 1, life=2),
}


@pytest.mark.parametrize("strike", REPLACEMENT_DIES.values(), ids=REPLACEMENT_DIES)
@pytest.mark.parametrize("operator", ["", pytest.param("own batch", marks=SOAK)])
def test_a_replacement_dies_while_it(plan_of, strike, operator) -> None:
    job = Job(operator=operator)
    plan = plan_of(forward(1), strike)
    with job.trainer(plan) as trainer:
        found = [one_epoch(trainer)]
        while not (plan.fired(strike) and len(found) >= EPOCHS) and len(found) < LONG:
            found.append(one_epoch(trainer))
        wait_for(lambda: [process.ranks for process in trainer.status().processes] == [(0,), (1,)])
        found.append(one_epoch(trainer))
        assert_as_undisturbed(found, job)
        assert plan.lives(1) == 3


# Operators that make the update themselves


OWN_LOOPS = {
    "own train_batch": (Job(ranks=3, operator="own batch"), (forward(1), Strike(phase="backward", rank=0, at=11))),
    "with loader workers": (Job(operator="own batch", loader_workers=2), (Strike(phase="load", rank=1, at=11),)),
    "between its exchange and its update": (Job(operator="own batch"), (Strike(phase="own update", rank=1, at=5),)),
    "own train_epoch": (
        Job(operator="own epoch", optimizer="momentum"),
        (forward(1, 3), Strike(phase="backward", rank=0, at=15)),
    ),
    "after its update": (Job(operator="own epoch"), (Strike(phase="stepped", rank=0, at=5),)),
    "validation": (Job(operator="own epoch"), (Strike(phase="validation", rank=0, at=2),)),
}


@pytest.mark.parametrize(("job", "strikes"), OWN_LOOPS.values(), ids=OWN_LOOPS)
def test_own_loops_go_on_through_a_replacement(plan_of, job, strikes) -> None:
    status = run(job, plan_of(*strikes))
    assert [process.ranks for process in status.processes] == [(rank,) for rank in range(job.ranks)]


# Processes that stop


def test_a_process_that_is_stopped_for_a_second_is_waited_for(plan_of) -> None:
    stop = forward(1, 7, signum=signal.SIGSTOP)
    plan = plan_of(stop)

    def go_on():
        timer = threading.Timer(1.0, os.kill, (plan.pid(stop), signal.SIGCONT))
        timer.start()
        timer.join()

    waker = threading.Thread(target=go_on)
    waker.start()
    assert run(TWO, plan).failures == ()
    waker.join()


class Told:
    def __init__(self):
        self.events = []

    def on_failure(self, event):
        self.events.append(event)


@pytest.mark.parametrize("signum", [signal.SIGSTOP, WAIT], ids=["stopped", "waiting"])
def test_a_process_that_hangs_is_replaced(plan_of, signum) -> None:
    told = Told()
    plan = plan_of(forward(1, 7, signum=signum))
    with TWO.trainer(plan, failure=FailureConfig(hang_timeout_s=5), callbacks=[told]) as trainer:
        assert_as_undisturbed(epochs_of(trainer, EPOCHS), TWO)
        (failure,) = trainer.status().failures
        assert failure.cause.startswith("no progress for ")
        assert failure.seconds is not None
    (event,) = told.events
    assert event.cause.startswith("no progress for ")
    if signum == WAIT:  # a process that is stopped cannot write its stacks
        assert "wait_for_good" in event.message


# How many processes are wanted


def test_the_ranks_wait_for_a_replacement_where_fewer_processes_are_not_allowed(plan_of) -> None:
    status = run(TWO, plan_of(forward(1)), min_workers=2)
    assert [process.ranks for process in status.processes] == [(0,), (1,)]


def test_the_survivors_go_on_alone_where_nothing_is_replaced(plan_of) -> None:
    plan = plan_of(forward(1), forward(2, 9))
    status = run(FOUR, plan, failure=FailureConfig(replace=False))
    assert sorted(rank for process in status.processes for rank in process.ranks) == [0, 1, 2, 3]
    assert len(status.processes) == 2
    assert [plan.lives(rank) for rank in range(4)] == [1, 1, 1, 1]


# Failures that repeat


def test_a_replacement_that_dies_at_every_start_ends_with_its_last_error(plan_of) -> None:
    plan = plan_of(forward(1), Strike(phase="build", rank=1, life=2, once=False))
    with (
        pytest.raises(WorkerDiedError, match=r"crash loop: \d+ replacements") as caught,
        TWO.trainer(plan, min_workers=2) as trainer,
    ):
        trainer.train()
    assert KILLED in str(caught.value)


def test_a_replacement_that_cannot_be_built_is_done_without_where_that_is_allowed(plan_of, capfd) -> None:
    plan = plan_of(forward(1), Strike(phase="build", rank=1, life=2, once=False))
    said = ""
    with TWO.trainer(plan) as trainer:
        found = [one_epoch(trainer)]
        while "giving up on replacements" not in said and len(found) < LONG:
            found.append(one_epoch(trainer))
            said += capfd.readouterr().err
        assert_as_undisturbed(found, TWO)
        assert [process.ranks for process in trainer.status().processes] == [(0, 1)]


def test_a_step_that_kills_every_replacement_ends_the_run_and_leaves_it_resumable(plan_of, tmp_path) -> None:
    plan = plan_of(forward(1), forward(1, 1, life=2, once=False))
    job = Job(operator="own batch")
    options = {"run_dir": tmp_path / "run", "checkpoint": CheckpointConfig(every_steps=1)}
    with (
        pytest.raises(WorkerDiedError, match="crash loop: workers were lost 4 times in a row") as caught,
        job.trainer(plan, **options) as trainer,
    ):
        trainer.train()
    assert KILLED in str(caught.value)
    plan.disarm()
    with job.trainer(plan, resume=True, **options) as trainer:
        assert_as_undisturbed(epochs_of(trainer, EPOCHS), job)


def test_a_step_that_kills_whoever_takes_it_ends_the_run(plan_of) -> None:
    plan = plan_of(Strike(phase="forward", at=5, once=False))
    with pytest.raises(WorkerDiedError, match=KILLED), TWO.trainer(plan) as trainer:
        trainer.train()
    assert plan.lives(0) < 10


@pytest.mark.parametrize("operator", ["", "own batch"])
def test_what_user_code_raises_is_not_tried_again(plan_of, operator) -> None:
    plan = plan_of(forward(1, signum=RAISE))
    with (
        pytest.raises(UserError, match="raised by intent"),
        Job(operator=operator).trainer(plan) as trainer,
    ):
        trainer.train()
    assert [plan.lives(rank) for rank in range(2)] == [1, 1]


# Again and again

GROWTH_BYTES = 16 << 20
"""Allocators keep some; a leak of one model, or of one worker's region, per cycle would be more."""


def both_there(trainer) -> bool:
    return [process.ranks for process in trainer.status().processes] == [(0,), (1,)]


@pytest.mark.parametrize("cycles", [15, pytest.param(100, marks=SOAK)])
def test_many_deaths_in_one_run_leave_nothing_behind(cycles) -> None:
    uses = []
    with TWO.trainer() as trainer:
        for cycle in range(cycles):
            wait_for(lambda: both_there(trainer))
            uses.append(engine_use())
            os.kill(trainer.status().processes[cycle % 2].pid, signal.SIGKILL)
            trainer.train()
            trainer.validate()
        wait_for(lambda: both_there(trainer))
        first, last = uses[len(uses) // 3], engine_use()
        assert len(trainer.status().failures) == cycles
    assert last.threads <= first.threads
    assert last.descriptors == first.descriptors
    assert last.shared_bytes <= first.shared_bytes
    assert last.resident_bytes <= first.resident_bytes + GROWTH_BYTES


class Killer:
    """Kills processes of a trainer from outside, at moments that are drawn."""

    def __init__(self, trainer, draw: random.Random, kills: int) -> None:
        self._trainer, self._draw, self._kills = trainer, draw, kills
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._kill)
        self.said: list[str] = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stopped.set()
        self._thread.join(DEADLINE_S)

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def _kill(self) -> None:
        for _ in range(self._kills):
            if self._stopped.wait(self._draw.choice((0.001, 0.02, self._draw.uniform(0.05, 0.5)))):
                return
            processes = self._trainer.status().processes
            if processes:
                victim = self._draw.choice(processes)
                with contextlib.suppress(ProcessLookupError):  # it died by itself meanwhile: of the kill before
                    os.kill(victim.pid, signal.SIGKILL)
                self.said.append(f"ranks {victim.ranks} in {victim.phase} at step {victim.step}")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(50))
def test_kills_at_any_moment_cost_nothing(seed) -> None:
    draw = random.Random(seed)
    operator = draw.choice(("", "", "stateful", "own batch"))
    job = Job(ranks=draw.choice((2, 3, 4)), operator=operator, loader_workers=draw.choice((0, 0, 1)))
    print(job)
    with job.trainer(failure=FailureConfig(max_failures=20)) as trainer:
        with Killer(trainer, draw, kills=8) as killer:
            found = []
            while not killer.done and len(found) < LONG:
                found.append(one_epoch(trainer))
        print(*killer.said, sep="\n")
        found.append(one_epoch(trainer))
        assert_as_undisturbed(found, job)
