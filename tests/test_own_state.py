"""State of an operator's own that changes in the update: whatever happens to processes, it is as if nothing had."""

from __future__ import annotations

import pytest
import torch
from recovery_programs import (
    Job,
    Strike,
    assert_as_undisturbed,
    epochs_of,
    one_epoch,
    wait_for,
)

from torchtrainer import CheckpointConfig, InvalidArgumentError

pytestmark = pytest.mark.usefixtures("no_worker_left")

EPOCHS = 3
KILLED = "was killed by SIGKILL"
IN_THE_UPDATE = ("averaged", "teacher", "swa", "norms")


EACH_RANK_ONCE = {
    2: (Strike(phase="forward", rank=1, at=4), Strike(phase="moved", rank=0, at=17)),
    3: (
        Strike(phase="moved", rank=2, at=4),
        Strike(phase="backward", rank=0, at=13),
        Strike(phase="stepped", rank=1, at=21),
    ),
}
"""One in each epoch, before, in and after the change."""


def replaced_epochs_of(trainer, job: Job) -> list:
    """Trains and measures, with every rank in a process of its own when an epoch begins."""
    found = []
    for _ in range(EPOCHS):
        wait_for(lambda: [one.ranks for one in trainer.status().processes] == [(rank,) for rank in range(job.ranks)])
        found.append(one_epoch(trainer))
    return found


@pytest.mark.parametrize(
    ("operator", "ranks"),
    [
        pytest.param(operator, ranks, marks=[pytest.mark.soak] if ranks == 2 and operator != "averaged" else [])
        for ranks in (2, 3)
        for operator in IN_THE_UPDATE
    ],
)
def test_each_rank_is_killed_once_and_the_state_is_as_undisturbed(plan_of, operator, ranks) -> None:
    job, strikes = Job(ranks=ranks, operator=operator), EACH_RANK_ONCE[ranks]
    with job.trainer(plan_of(*strikes)) as trainer:
        assert_as_undisturbed(replaced_epochs_of(trainer, job), job)
        assert [one.how for one in trainer.status().failures] == ["carried"] * len(strikes)


@pytest.mark.parametrize(
    "operator", ["averaged", "swa", *(pytest.param(one, marks=pytest.mark.soak) for one in ("teacher", "norms"))]
)
def test_the_state_is_the_same_on_any_number_of_processes(operator) -> None:
    job = Job(ranks=3, operator=operator)
    with job.trainer() as trainer:
        found = []
        for processes in (2, 1, 3):
            trainer.resize(processes)
            found.append(one_epoch(trainer))
        assert_as_undisturbed(found, job)


def test_a_checkpoint_of_several_ranks_in_a_process_has_the_state_of_each(plan_of, tmp_path) -> None:
    job, plan = Job(ranks=3, operator="averaged"), plan_of(Strike(phase="moved", rank=0, at=13))
    with job.trainer(plan, run_dir=tmp_path / "run", checkpoint=CheckpointConfig(every_steps=2)) as trainer:
        trainer.resize(1)
        assert_as_undisturbed(epochs_of(trainer, EPOCHS), job)
        assert [one.how for one in trainer.status().failures] == ["restarted"]


def test_what_is_changed_between_calls_is_changed_for_all_ranks_of_a_process() -> None:
    job = Job(ranks=3, operator="averaged")

    def reset(operator):
        operator.seen.zero_()
        operator.average["layers.0.bias"] = torch.ones(16)

    def told(processes):
        with job.trainer() as trainer:
            trainer.resize(processes)
            first = one_epoch(trainer)
            trainer.apply_all_operators(reset)
            trainer.resize(3)
            found = [first, one_epoch(trainer)]
            return found, trainer.apply_all_operators(lambda operator: operator.seen.item())

    expected = told(3)
    assert told(1) == expected
    assert len(set(expected[1])) == 3


@pytest.mark.parametrize(("operator", "how"), [("own averaged", "replaced"), ("unlike", "restarted")])
def test_a_rank_that_only_its_own_process_can_go_on_with(plan_of, operator, how, capfd) -> None:
    job = Job(operator=operator)
    with job.trainer(plan_of(Strike(phase="forward", rank=1, at=7))) as trainer:
        assert_as_undisturbed(epochs_of(trainer, EPOCHS), job)
        assert [one.how for one in trainer.status().failures] == [how]
        told = "baseline in the state_dict() of Unlike changes in the update, and is not the same on ranks 0 and 1"
        assert (told in capfd.readouterr().err) == (operator == "unlike")
        if operator == "unlike":
            with pytest.raises(InvalidArgumentError, match="every rank needs a process of its own here: baseline"):
                trainer.resize(1)
