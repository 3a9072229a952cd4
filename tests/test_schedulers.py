"""With ``scheduler_step_freq="batch"`` a scheduler follows its optimizer, whoever makes the update and however often."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import TorchTrainer, TrainingOperator

BATCHES = 7
"""Of each rank in a pass."""


def halving(optimizer):
    """So that a rate tells how often it was stepped."""
    return StepLR(optimizer, step_size=1, gamma=0.5)


class Rates(TrainingOperator):
    """Notes the rate with which each batch was trained; subclasses say when they update."""

    def setup(self, config):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=1.0)
        self.model, self.optimizer, self.criterion, self.scheduler = self.register(
            models=model, optimizers=optimizer, criterion=nn.MSELoss(), schedulers=halving(optimizer)
        )
        x = torch.zeros(config["samples"], 1)
        self.register_data(train_loader=DataLoader(TensorDataset(x, x), batch_size=1))

    @property
    def rate(self):
        return self.optimizer.param_groups[0]["lr"]

    def backward(self, batch):
        self.criterion(self.model(batch[0]), batch[1]).backward()


class AddsUp(Rates):
    """Two batches for each update."""

    def train_batch(self, batch, batch_info):
        self.end_once(batch_info)
        rate = self.rate
        self.backward(batch)
        if batch_info["batch_idx"] % 2:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"rate": rate, f"rate_{batch_info['batch_idx']}": rate}

    def end_once(self, batch_info):
        marker = self.config.get("ends")
        if marker and self.world_rank == 1 and batch_info["batch_idx"] == 4 and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)


class OwnEpoch(AddsUp):
    """The same in a loop around the built-in one."""

    def train_epoch(self, iterator, info):
        return super().train_epoch(iter(list(iterator)), info)


class SeveralTimes(Rates):
    """Several updates in one batch are one batch."""

    def train_batch(self, batch, batch_info):
        rate = self.rate
        for _ in range(3):
            self.backward(batch)
            self.optimizer.step()
        return {f"rate_{batch_info['batch_idx']}": rate}


class Wrapped(AddsUp):
    """The registered optimizer only hands on to the one that the scheduler knows."""

    class Outer:
        def __init__(self, inner):
            self.inner, self.param_groups = inner, inner.param_groups
            self.step, self.zero_grad = inner.step, inner.zero_grad
            self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

    def register(self, *, optimizers, **parts):
        return super().register(optimizers=self.Outer(optimizers), **parts)


class Pair(Rates):
    """Two models; the second is updated in every third batch, and its scheduler follows that."""

    def setup(self, config):
        super().setup(config)
        models = [nn.Linear(1, 1) for _ in range(2)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in models]
        self.models, self.optimizers, self.schedulers = self.register(
            models=models, optimizers=optimizers, schedulers=[halving(one) for one in optimizers]
        )
        self.model, self.optimizer, self.scheduler = self.models[0], self.optimizers[1], None

    def train_batch(self, batch, batch_info):
        first, second = (one.param_groups[0]["lr"] for one in self.optimizers)
        for number, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            optimizer.zero_grad()
            model(batch[0]).sum().backward()
            if number == 0 or batch_info["batch_idx"] % 3 == 2:
                optimizer.step()
        return {f"rate_{batch_info['batch_idx']}": second, f"first_{batch_info['batch_idx']}": first}


def rates(directory: Path, operator: type[TrainingOperator], ranks: int = 1, name: str = "rate", **arguments: Any):
    """The rate of each batch of a pass, the mean over the ranks, and after it."""
    config = {"samples": BATCHES * ranks, **arguments.pop("config", {})}
    with TorchTrainer(
        training_operator_cls=operator,
        scheduler_step_freq="batch",
        num_workers=ranks,
        config=config,
        run_dir=directory,
        use_gpu=False,
        **arguments,
    ) as trainer:
        found = trainer.train()
        after = trainer.apply_all_operators(lambda op: op.rate)
    assert len(set(after)) == 1
    return [found.get(f"{name}_{batch}") for batch in range(BATCHES)], after[0]


EVERY_SECOND = ([1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125], 0.125)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (AddsUp, {"use_local": True}),
        (AddsUp, {"ranks": 2}),
        (AddsUp, {"ranks": 3}),
        (AddsUp, {"ranks": 2, "strategy": "zero1"}),
        (OwnEpoch, {"ranks": 2}),
        (Wrapped, {"ranks": 2}),
    ],
    ids=["one rank", "two ranks", "three ranks", "zero1", "own epoch", "wrapped"],
)
def test_a_scheduler_waits_while_a_hook_adds_up_gradients(tmp_path, operator, arguments) -> None:
    assert rates(tmp_path, operator, **arguments) == EVERY_SECOND


def test_a_scheduler_waits_also_in_a_rank_that_was_lost_in_between(tmp_path) -> None:
    marker = tmp_path / "ended"
    assert rates(tmp_path / "run", AddsUp, ranks=2, config={"ends": str(marker)}) == EVERY_SECOND
    assert marker.exists()


def test_several_updates_in_a_batch_are_one_step_of_the_scheduler(tmp_path) -> None:
    assert rates(tmp_path, SeveralTimes, ranks=2) == ([0.5**batch for batch in range(BATCHES)], 0.5**BATCHES)


def test_each_of_several_schedulers_follows_its_own_optimizer(tmp_path) -> None:
    assert rates(tmp_path / "second", Pair, ranks=2) == ([1.0] * 3 + [0.5] * 3 + [0.25], 0.25)
    assert rates(tmp_path / "first", Pair, use_local=True, name="first")[0] == [0.5**batch for batch in range(BATCHES)]


@pytest.mark.parametrize("arguments", [{"ranks": 2}, {"use_local": True}], ids=["two ranks", "in this process"])
def test_the_built_in_step_counts_updates_not_batches(tmp_path, arguments) -> None:
    assert rates(tmp_path, Rates, accumulate=2, **arguments)[1] == 0.5**4  # the last of them from one batch


class Overflowing(Rates):
    """In half precision with a loss scale that is too large at first: those updates are left out."""

    def setup(self, config):
        super().setup(config)
        self.updates = 0
        self.optimizer.register_step_post_hook(self.count)
        self._amp_scaler._init_scale = 2.0**18

    def count(self, *_):
        self.updates += 1


def test_an_update_that_the_loss_scaler_leaves_out_is_no_step(tmp_path) -> None:
    with TorchTrainer(
        training_operator_cls=Overflowing,
        scheduler_step_freq="batch",
        precision="fp16",
        config={"samples": 2 * BATCHES},
        num_workers=2,
        run_dir=tmp_path,
        use_gpu=False,
    ) as trainer:
        trainer.train()
        found = trainer.apply_all_operators(lambda op: (op.updates, op.rate))
    assert found[0] == found[1]
    updates, rate = found[0]
    assert 0 < updates < BATCHES
    assert rate == 0.5**updates
