"""Creators, setup and the hook at the start: what they raise, return, or never return."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch
from failing import CREATORS, HANG_S, MyError, data_creator, failure_of, samples, story, workers
from torch.utils.data import DataLoader, Dataset

from torchtrainer import (
    BATCH_SIZE,
    FailureConfig,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    RemoteTraceback,
    TorchTrainer,
    TrainingOperator,
    UnshardableLoaderError,
    WorkerDiedError,
    WorkerHungError,
)

NAMES = ("model_creator", "data_creator", "optimizer_creator", "loss_creator")


def raises(*arguments):
    raise MyError("zażółć 漢字")


def returns_none(*arguments):
    return None


def returns_text(*arguments):
    return "text"


@pytest.mark.parametrize("name", NAMES)
def test_a_creator_that_raises(name) -> None:
    error = failure_of(MyError, **{name: raises})
    assert error.args == ("zażółć 漢字",)
    assert isinstance(error.__cause__, RemoteTraceback)
    text = str(error.__cause__)
    assert "raised on ranks 0, 1 (equal errors; pids " in text
    assert "during the start of the workers, phase setup:" in text
    assert 'test_bad_creators.py", line ' in text
    assert ', in raises\n    raise MyError("zażółć 漢字")' in text
    assert text.count("Traceback") == 1


def test_an_initialization_hook_that_raises(tmp_path) -> None:
    error = failure_of(MyError, initialization_hook=raises, run_dir=tmp_path / "run")
    assert "phase initialization_hook" in story(error)
    log = story(error).rpartition("Log: ")[2].split(" (")[0]
    assert os.path.exists(log)
    assert "MyError" in (tmp_path / "run" / "logs" / "rank_0" / "error.json").read_text()


WRONG = [
    ("model_creator", returns_none, InvalidArgumentTypeError, "(returns_none) returns must be an nn.Module"),
    ("model_creator", returns_text, InvalidArgumentTypeError, "got 'text' of type str"),
    ("model_creator", lambda config: [], InvalidArgumentTypeError, "got an empty list"),
    ("model_creator", lambda config: torch.nn.Linear, InvalidArgumentTypeError, "must be an nn.Module"),
    ("optimizer_creator", returns_none, InvalidArgumentTypeError, "(returns_none) returns must be a torch optimizer"),
    ("optimizer_creator", returns_text, InvalidArgumentTypeError, "got 'text' of type str"),
    ("loss_creator", returns_none, InvalidArgumentTypeError, "a loss that can be called with (output, target)"),
    ("loss_creator", returns_text, InvalidArgumentTypeError, "got 'text'"),
    ("scheduler_creator", returns_none, InvalidArgumentTypeError, "returns must be a learning rate scheduler"),
    ("data_creator", returns_none, InvalidArgumentTypeError, "a loader or (train loader, validation loader); got None"),
    (
        "data_creator",
        lambda config: 3,
        InvalidArgumentTypeError,
        "something to iterate over, a DataLoader for instance",
    ),
    ("data_creator", lambda config: [], InvalidArgumentError, "must hold a train loader; got []"),
    (
        "data_creator",
        lambda config: (data_creator(config)[0],) * 3,
        InvalidArgumentError,
        "Number of loaders must be <= 2",
    ),
    ("data_creator", lambda config: DataLoader([]), InvalidArgumentError, "has no batches; its data set is empty"),
    (
        "data_creator",
        lambda config: DataLoader(samples(3), batch_size=4, drop_last=True),
        InvalidArgumentError,
        "smaller than one batch with drop_last=True",
    ),
    (
        "data_creator",
        lambda config: DataLoader(samples(1), batch_size=4),
        InvalidArgumentError,
        "the train loader has 1 samples for num_workers=2 ranks",
    ),
    ("data_creator", returns_text, UnshardableLoaderError, "it is a str, whose batches only it can divide"),
    (
        "data_creator",
        lambda config: samples(64),
        UnshardableLoaderError,
        "it is a TensorDataset, whose batches only it",
    ),
    (
        "data_creator",
        lambda config: iter([1]),
        UnshardableLoaderError,
        "return a torch DataLoader or a list of batches",
    ),
]


@pytest.mark.parametrize(("name", "creator", "kind", "text"), WRONG)
def test_a_creator_that_returns_the_wrong_thing(name, creator, kind, text) -> None:
    error = failure_of(kind, **{name: creator, "scheduler_step_freq": "epoch"})
    assert text in str(error)
    assert "\n" not in str(error)
    if "returns must" in text:
        assert f"what {name} (" in str(error)


class OwnIteration(DataLoader):
    def __iter__(self):
        return super().__iter__()


def test_loaders_that_cannot_be_dealt_out_say_what_to_return() -> None:
    error = failure_of(UnshardableLoaderError, data_creator=lambda config: OwnIteration(samples(64)))
    assert "the train loader of rank 0 cannot be dealt out to 2 ranks" in str(error)
    assert "OwnIteration, which overrides DataLoader.__iter__" in str(error)
    assert "add_dist_sampler=False" in str(error)


class DifferentSizes(TrainingOperator):
    """Gives each rank a loader over a dataset of its own length."""

    def setup(self, config):
        model = torch.nn.Linear(20, 5)
        self.register(models=model, optimizers=torch.optim.SGD(model.parameters(), lr=0.1))
        self.register_data(train_loader=DataLoader(samples(64 + self.world_rank)))


def test_loaders_that_differ_between_ranks() -> None:
    arguments = dict.fromkeys(NAMES) | {"training_operator_cls": DifferentSizes}
    error = failure_of(UnshardableLoaderError, **arguments)
    assert "they have different dataset lengths by rank: [64, 65]" in str(error)


def test_a_batch_that_has_fewer_samples_than_ranks() -> None:
    error = failure_of(InvalidArgumentError, config={BATCH_SIZE: 2}, num_workers=3)
    assert "must be a whole number of at least num_workers=3, got 2" in str(error)


class WithoutLength(Dataset):
    def __getitem__(self, index):
        return torch.randn(20), torch.tensor(1)


def test_a_dataset_without_length() -> None:
    error = failure_of(TypeError, data_creator=lambda config: DataLoader(WithoutLength(), batch_size=4))
    assert "object of type 'WithoutLength' has no len()" in str(error)


class SetupOnRank1(TrainingOperator):
    """Does ``config["do"]()`` in setup, on rank 1 only."""

    def setup(self, config):
        if self.world_rank == 1:
            config["do"]()


def sleeps_in_setup():
    threading.Event().wait()


def test_a_setup_that_hangs() -> None:
    error = failure_of(
        WorkerHungError,
        training_operator_cls=SetupOnRank1,
        config={"do": sleeps_in_setup},
        failure=FailureConfig(hang_timeout_s=HANG_S),
    )
    text = str(error)
    assert text.startswith("rank 1 (pid ")
    assert f"made no progress for {HANG_S}." in text
    assert "during the start of the workers, phase setup" in text
    assert f"The limit was {HANG_S} s: pass failure=FailureConfig(hang_timeout_s=...)" in text
    assert "in sleeps_in_setup" in text
    assert (error.rank, error.exit_code) == (1, None)


def test_a_creator_that_hangs() -> None:
    error = failure_of(
        WorkerHungError, model_creator=lambda config: sleeps_in_setup(), failure=FailureConfig(hang_timeout_s=HANG_S)
    )
    assert "in sleeps_in_setup" in str(error)


def leaves():
    sys.exit(4)


def goes():
    os._exit(5)


@pytest.mark.parametrize(("do", "code", "text"), [(leaves, 4, "called sys.exit(4)"), (goes, 5, "exited with code 5")])
def test_a_setup_that_ends_its_process(do, code, text) -> None:
    error = failure_of(WorkerDiedError, training_operator_cls=SetupOnRank1, config={"do": do})
    assert f"{text} during the start of the workers, phase setup" in str(error)
    assert (error.rank, error.exit_code) == (1, code)


def test_a_trainer_can_be_made_after_one_that_failed() -> None:
    before = workers()
    with pytest.raises(MyError):
        TorchTrainer(**{**CREATORS, "model_creator": raises})
    with TorchTrainer(**CREATORS) as trainer:
        assert trainer.train(num_steps=1)["batch_count"] == 1
    assert workers() == before
