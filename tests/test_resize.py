"""The ranks of a run are carried by any number of processes, which changes at any time, and the training is the same, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from recovery_programs import (
    Job,
    Plan,
    Strike,
    assert_as_undisturbed,
    digest,
    epochs_of,
    one_epoch,
    wait_for,
)
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import CheckpointConfig, InvalidArgumentError, TorchTrainer, WorkerDiedError

pytestmark = pytest.mark.usefixtures("no_worker_left")

FOUR = Job(ranks=4)
STATEFUL = Job(ranks=4, operator="stateful", optimizer="momentum")


def carried(trainer) -> list[tuple[int, ...]]:
    """Ranks by process."""
    return [process.ranks for process in trainer.status().processes]


def assert_spread(trainer, processes: int) -> None:
    """So many processes carry all ranks, as evenly as possible."""
    ranks = carried(trainer)
    assert len(ranks) == processes
    assert sorted(rank for some in ranks for rank in some) == [0, 1, 2, 3]
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("job", [FOUR, STATEFUL], ids=["adam", "stateful, momentum"])
def test_four_ranks_on_any_number_of_processes(job) -> None:
    with job.trainer() as trainer:
        found = []
        for processes in (4, 3, 2, 1, 4):
            trainer.resize(processes)
            assert_spread(trainer, processes)
            found.append(one_epoch(trainer))
            assert_spread(trainer, processes)
        assert_as_undisturbed(found, job)
        assert trainer.status().failures == ()


class Resizing:
    """Changes the number of processes while the ranks train: when one number is reached, to the next one on the list.

    Attributes:
        changes: those that were asked for and seen done within one call.
    """

    def __init__(self, *wanted: int) -> None:
        self.left = list(wanted)
        self.asked: int | None = None
        self.batch = 0
        self.changes: list[int] = []

    def on_step(self, event) -> None:
        if self.asked is not None and len(carried(self.trainer)) == self.asked:
            if event.batch > self.batch:
                self.changes.append(self.asked)
            self.asked = None
        if self.asked is None and self.left:
            self.asked, self.batch = self.left.pop(0), event.batch
            self.trainer.resize(self.asked)

    @property
    def done(self) -> bool:
        return self.asked is None and not self.left


STRETCH = 200
"""Steps of a call, many passes over the data."""
MOST_STRETCHES = 50


def stretches_of(trainer, number: int, done=lambda: False) -> list[tuple[object, str]]:
    """Trains in calls of many steps, so many of them or until it is done; what each returned, and the state after it."""
    found = []
    while len(found) < number and not done():
        found.append((trainer.train(num_steps=STRETCH), digest(trainer.state_dict())))
    return found


@pytest.mark.parametrize(
    "job",
    [FOUR, pytest.param(replace(STATEFUL, loader_workers=1), marks=pytest.mark.soak)],
    ids=["adam", "stateful, loader workers"],
)
def test_the_number_of_processes_changes_in_the_middle_of_a_call(job) -> None:
    resizing = Resizing(3, 2, 1, 4)
    with job.trainer(callbacks=[resizing]) as trainer:
        resizing.trainer = trainer
        found = stretches_of(trainer, MOST_STRETCHES, lambda: resizing.done)
        assert resizing.done
        assert resizing.changes
        assert_spread(trainer, 4)
        assert trainer.status().failures == ()
    with job.trainer() as trainer:
        assert stretches_of(trainer, len(found)) == found


@pytest.mark.parametrize("job", [FOUR, STATEFUL], ids=["adam", "stateful, momentum"])
def test_one_process_for_debuggers_gives_the_bits_of_four(job) -> None:
    with job.trainer(use_local=True) as trainer:
        assert_as_undisturbed(epochs_of(trainer, 3), job)


@pytest.mark.parametrize("local", [False, True], ids=["workers", "this process"])
def test_every_process_computes_with_as_many_threads_as_it_is_given(local) -> None:
    threads = torch.get_num_threads()
    with Job().trainer(use_local=local, num_cpus_per_worker=threads + 1) as trainer:
        trainer.train()
        assert trainer.apply_all_workers(torch.get_num_threads) == [threads + 1] * 2
        assert torch.get_num_threads() == threads, "the user's own process keeps its number"


def two_more_threads(operator):
    torch.set_num_threads(torch.get_num_threads() + 2)


@pytest.mark.parametrize("local", [False, True], ids=["workers", "this process"])
def test_a_number_of_threads_that_user_code_sets_stays(local) -> None:
    threads = torch.get_num_threads()
    with Job().trainer(use_local=local, num_cpus_per_worker=1) as trainer:
        trainer.apply_all_operators(two_more_threads)
        trainer.train()
        assert trainer.apply_all_workers(torch.get_num_threads) == [3] * 2
        assert torch.get_num_threads() == threads


class BrokenAt33(TensorDataset):
    """One sample, which is rank 1's, cannot be read."""

    def __init__(self, error):
        super().__init__(torch.ones(64, 4), torch.ones(64, 1))
        self.error = error

    def __getitem__(self, index):
        if index == 33:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("processes", [2, 1])
@pytest.mark.parametrize(
    ("error", "told", "says"),
    [(ValueError("sample 33"), ValueError, "sample 33"), (SystemExit(3), WorkerDiedError, r"sys\.exit\(3\)")],
    ids=["exception", "exit"],
)
def test_an_error_is_told_as_that_of_its_rank_whoever_carries_it(processes, error, told, says) -> None:
    def data_creator(config):
        return DataLoader(BrokenAt33(error), batch_size=8)

    with TorchTrainer(
        model_creator=lambda config: torch.nn.Linear(4, 1),
        data_creator=data_creator,
        optimizer_creator=lambda model, config: torch.optim.SGD(model.parameters(), lr=0.1),
        loss_creator=torch.nn.MSELoss,
        num_workers=2,
        use_gpu=False,
        run_dir=None,
    ) as trainer:
        trainer.resize(processes)
        with pytest.raises(told, match=says) as caught:
            trainer.train()
    text = str(caught.value if told is WorkerDiedError else caught.value.__cause__)
    assert ("raised on rank 1 (pid " if told is ValueError else "rank 1 (pid ") in text
    assert "rank 0 (pid" not in text


def raises(operator):
    raise ValueError("no")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_exception_in_a_function_for_all_operators_leaves_the_trainer_usable(processes) -> None:
    with FOUR.trainer() as trainer:
        trainer.resize(processes)
        found = [one_epoch(trainer)]
        with pytest.raises(ValueError, match="no"):
            trainer.apply_all_operators(raises)
        assert_as_undisturbed([*found, one_epoch(trainer)], FOUR)


@pytest.mark.parametrize(
    "options", [{}, {"ddp_args": {"broadcast_buffers": False}}], ids=["", "buffers of each rank's own"]
)
def test_a_state_is_loaded_into_all_ranks_of_a_process(options) -> None:
    job, found = replace(STATEFUL, ranks=2), []
    for processes in (1, 2):
        with job.trainer(**options) as trainer:
            trainer.resize(processes)
            trainer.train()
            early = trainer.state_dict()
            trainer.train()
            trainer.load_state_dict(early)
            assert digest(trainer.state_dict()) == digest(early)
            found.append([digest(early), *stretches_of(trainer, 2)])
    assert found[0] == found[1]


def test_processes_die_while_they_carry_several_ranks(tmp_path) -> None:
    strikes = (Strike(phase="forward", rank=0, at=9), Strike(phase="stepped", rank=2, at=9))
    with FOUR.trainer(Plan(directory=str(tmp_path), strikes=strikes)) as trainer:
        trainer.resize(2)
        found = epochs_of(trainer, 3)
        assert_as_undisturbed(found, FOUR)
        assert len(trainer.status().failures) == 1 + Plan(directory=str(tmp_path), strikes=strikes).fired(strikes[1])
        wait_for(lambda: len(carried(trainer)) == 2)


def test_a_checkpoint_of_two_processes_is_gone_on_with_by_four(tmp_path) -> None:
    options = {"run_dir": tmp_path / "run", "checkpoint": CheckpointConfig(every_steps=1)}
    with pytest.raises(RuntimeError, match="interrupted by intent"), FOUR.trainer(**options) as trainer:
        trainer.resize(2)
        trainer.train()
        trainer.validate()
        trainer.state_dict()
        raise RuntimeError("interrupted by intent")
    with FOUR.trainer(resume=True, **options) as trainer:
        found = epochs_of(trainer, 3)
        assert_spread(trainer, 4)
        assert_as_undisturbed(found, FOUR)


def test_a_number_of_processes_that_cannot_be_is_refused() -> None:
    with FOUR.trainer() as trainer:
        for processes in (0, 5, -1):
            with pytest.raises(InvalidArgumentError, match=rf"carried by 1 to 4 processes, got {processes}$"):
                trainer.resize(processes)
        assert_as_undisturbed([one_epoch(trainer)], FOUR)


def test_fewer_processes_than_min_workers_are_refused() -> None:
    with Job(ranks=3).trainer(min_workers=2) as trainer, pytest.raises(InvalidArgumentError, match="min_workers=2"):
        trainer.resize(1)


def test_more_min_workers_than_ranks_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="min_workers"):
        Job().trainer(min_workers=3)


@pytest.mark.parametrize("hook", ["train_batch", "train_epoch"])
def test_an_operator_that_makes_the_update_itself_says_why_it_cannot_share_a_process(hook) -> None:
    with Job(operator=f"own {hook.removeprefix('train_')}").trainer() as trainer:
        with pytest.raises(InvalidArgumentError, match=rf"has its own {hook}"):
            trainer.resize(1)
        trainer.resize(2)
        trainer.train()
