"""What programs for Ray 0.8, with creators and rank 0 in the driver, find here."""

from __future__ import annotations

import itertools
import os
import signal
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchtrainer import TrainingOperator

SAMPLES = 12
LOCAL = {"num_workers": 1, "use_local": True}


def numbers():
    """Sample i is i."""
    return torch.arange(SAMPLES, dtype=torch.float32).reshape(-1, 1)


class Stream(IterableDataset):
    """The same without a length."""

    def __iter__(self):
        return iter(zip(numbers(), numbers(), strict=True))


def data_creator(config):
    data = Stream() if config.get("stream") else TensorDataset(numbers(), numbers())
    return DataLoader(data, batch_size=1), DataLoader(data, batch_size=1)


CREATORS = {
    "model_creator": lambda config: nn.Linear(1, 1),
    "optimizer_creator": lambda model, config: torch.optim.SGD(model.parameters(), lr=1e-4),
    "data_creator": data_creator,
    "loss_creator": nn.MSELoss,
}


@pytest.fixture
def make(trainers):
    """Makes trainers that are shut down at the end of the test."""
    return partial(trainers, **{**CREATORS, "use_gpu": False})


# Info


class Told(TrainingOperator):
    """Keeps what its hooks are told."""

    def train_epoch(self, iterator, info):
        self.epoch_info = dict(info)
        return super().train_epoch(iterator, info)

    def train_batch(self, batch, batch_info):
        self.batch_info = dict(batch_info)
        return super().train_batch(batch, batch_info)

    def validate(self, val_iterator, info):
        self.validation_info = dict(info)
        return super().validate(val_iterator, info)


@pytest.mark.parametrize(
    ("arguments", "scheduler_step"),
    [
        ({**LOCAL}, None),
        ({"num_workers": 2, "scheduler_step_freq": "epoch"}, "epoch"),
        ({"num_workers": 2, "scheduler_step_freq": "batch", "use_fp16": True}, "batch"),
        ({**LOCAL, "scheduler_step_freq": "manual"}, "manual"),
    ],
    ids=["none", "epoch", "batch", "manual"],
)
def test_hooks_are_told_how_they_are_called(make, arguments, scheduler_step) -> None:
    creators = {"scheduler_creator": lambda optimizer, config: StepLR(optimizer, 1)} if scheduler_step else {}
    trainer = make(training_operator_cls=Told, **creators, **arguments)
    trainer.train(num_steps=2, info={"mine": 5, "scheduler_step": "theirs"})
    trainer.validate(info={"mine": 6})
    told = {
        "mine": 5,
        "epoch_idx": 0,
        "scheduler_step": scheduler_step,
        "__num_steps__": 2,
        "__use_fp16__": arguments.get("use_fp16", False),
    }
    found = trainer.apply_all_operators(lambda op: (op.epoch_info, op.batch_info, op.validation_info))
    expected = (told, {**told, "batch_idx": 1, "global_step": 1}, {"mine": 6, "epoch_idx": 0})
    assert found == [expected] * arguments["num_workers"]


# Steps that end with the pass


class Seen(TrainingOperator):
    """Makes the update itself, and notes the samples; ends its process once where it is told to."""

    def setup(self, config):
        self.samples = []

    def train_batch(self, batch, batch_info):
        self.note(batch)
        marker = self.config.get("ends")
        if marker and self.world_rank == 1 and len(self.samples) == 3 and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_batch(batch, batch_info)

    def validate_batch(self, batch, batch_info):
        self.note(batch)
        return super().validate_batch(batch, batch_info)

    def note(self, batch):
        self.samples.append(int(batch[0]))

    def state_dict(self):
        return {"samples": self.samples}

    def load_state_dict(self, state_dict):
        self.samples = list(state_dict["samples"])


def passes(trainer, method, calls):
    """The samples of all ranks in each call, and what the calls return of the passes."""
    seen, counts = [], []
    for arguments in calls:
        result = getattr(trainer, method)(**arguments)
        counts.append((result["batch_count"], result.get("epoch")))
        seen.append(sorted(itertools.chain.from_iterable(trainer.apply_all_operators(taken))))
    return seen, counts


def taken(operator):
    """Hands over what the operator has noted since."""
    found, operator.samples = operator.samples, []
    return found


@pytest.mark.parametrize("stream", [False, True], ids=["dealt", "stream"])
@pytest.mark.parametrize("method", ["train", "validate"])
@pytest.mark.parametrize("arguments", [{**LOCAL}, {"num_workers": 2}], ids=["one rank", "two ranks"])
def test_a_new_pass_begins_at_the_beginning_and_ends_at_the_end(make, arguments, method, stream) -> None:
    trainer = make(training_operator_cls=Seen, config={"stream": stream}, **arguments)
    whole = SAMPLES // arguments["num_workers"]
    some = {"num_steps": 3, "new_pass": True}
    calls = [some, some, {"num_steps": whole + 1, "new_pass": True}, {"num_steps": 2}, {}]
    seen, counts = passes(trainer, method, calls)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3 * arguments["num_workers"]
    assert seen[2] == list(range(SAMPLES)), "it ends with the pass"
    assert sorted(seen[3] + seen[4]) == list(range(SAMPLES)), "without it a pass continues"
    epochs = [1, 2, 3, 4, 4] if method == "train" else [None] * 5
    assert counts == list(zip([3, 3, whole, 2, whole - 2], epochs, strict=True))


def test_the_built_in_step_begins_new_passes_on_all_ranks_of_a_process(make) -> None:
    trainer = make(num_workers=3, num_cpus_per_worker=1)
    trainer.train(num_steps=3)
    trainer.resize(2)
    results = [trainer.train(num_steps=steps, new_pass=True) for steps in (1, 9)]
    assert [(one["batch_count"], one["num_samples"], one["epoch"]) for one in results] == [(1, 3, 2), (4, 12, 3)]
    assert trainer.train(new_pass=True)["num_samples"] == SAMPLES
    assert trainer.validate(num_steps=9, new_pass=True)["num_samples"] == SAMPLES


def test_a_new_pass_goes_on_where_a_lost_rank_was(make, tmp_path) -> None:
    marker = tmp_path / "ended"
    trainer = make(training_operator_cls=Seen, config={"ends": str(marker)}, num_workers=2)
    calls = [{"num_steps": 2}, {"num_steps": 9, "new_pass": True}]
    seen, counts = passes(trainer, "train", calls)
    assert marker.exists()
    assert len(seen[0]) == 4
    assert seen[1] == list(range(SAMPLES))
    assert counts == [(2, 1), (6, 2)]


# Names


def test_the_local_worker_is_there_where_the_driver_is_a_rank(make) -> None:
    local = make(training_operator_cls=Seen, **LOCAL)
    assert local.local_worker.training_operator is local.get_local_operator()
    assert local.local_worker.training_operator.device_ids is None
    with pytest.raises(NotImplementedError, match="use_local=True"):
        _ = make(num_workers=1).local_worker
    local.shutdown()
    with pytest.raises(RuntimeError, match="not active"):
        _ = local.local_worker


class OwnNames(TrainingOperator):
    def setup(self, config):
        self._models = "mine"


def test_registered_components_have_their_private_names_too(make) -> None:
    def names(op) -> Any:
        same = op._models == op.models, op._optimizers == op.optimizers, op._schedulers == op.schedulers
        return same, op._schedulers[0].last_epoch

    scheduler = {"scheduler_creator": lambda optimizer, config: StepLR(optimizer, 1), "scheduler_step_freq": "epoch"}
    for arguments in ({**LOCAL}, {"num_workers": 2}):
        trainer = make(training_operator_cls=Seen, **scheduler, **arguments)
        assert trainer.apply_all_operators(names) == [((True, True, True), 0)] * arguments["num_workers"]
    assert make(training_operator_cls=OwnNames, **LOCAL).get_local_operator()._models == "mine"


def test_retired_arguments_that_ask_for_nothing_are_left_alone(make) -> None:
    trainer = make(serialize_data_creation=False, apex_args=None, batch_size=None, **LOCAL)
    assert trainer.train(dataset=None)["num_samples"] == SAMPLES
    with pytest.raises(TypeError, match="file lock"):
        make(serialize_data_creation=True, **LOCAL)
    with pytest.raises(TypeError, match="data_creator"):
        trainer.train(dataset=[1])
