"""Lightning modules in worker processes: over a loss of one of them, saved and loaded, and in the script's own process."""

from __future__ import annotations

import os
import random
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():  # Lightning's own imports warn of one another's versions
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: pip install 'lightning>=2.5'")
    import torchmetrics

from torchtrainer import CheckpointConfig, TorchTrainer, TrainingOperator
from torchtrainer.errors import InvalidArgumentError

SAMPLES, BATCH = 26, 4


class Pair(lightning.LightningModule):
    """Two parts with an optimizer each; everything that a checkpoint has to bring back is in its results."""

    def __init__(self, lr=0.02, kill_at=None, marker=None):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.parts = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
        self.seen = torchmetrics.SumMetric()
        self.passes, self.number = 0, random.randrange(10**6)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if (
            self.global_rank == 1
            and self.hparams.kill_at == self.global_step
            and not Path(self.hparams.marker).exists()
        ):
            Path(self.hparams.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        for part, optimizer, schedule in zip(self.parts, self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(part(x), y)
            self.manual_backward(loss)
            optimizer.step()
            schedule.step()
        self.seen(len(x))
        self.log("seen", self.seen)
        self.log("loss", loss)
        self.log("largest", loss, reduce_fx="max")

    def on_train_epoch_end(self):
        self.passes += 1

    def validation_step(self, batch, batch_idx):
        x, y = batch
        error = self.parts[1](x) - y
        return {"val_loss": error.square().mean().item(), "val_acc": (error.abs() < 0.5).float().mean().item()}

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(part.parameters(), lr=self.hparams.lr, momentum=0.9) for part in self.parts]
        return optimizers, [torch.optim.lr_scheduler.StepLR(one, 3, 0.9) for one in optimizers]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = [self.passes, self.number]

    def on_load_checkpoint(self, checkpoint):
        self.passes, self.number = checkpoint["mine"]


class Numbers(lightning.LightningDataModule):
    def setup(self, stage):
        x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(3))
        self.rows = TensorDataset(x, x.sum(1, keepdim=True) + 0.1)

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=BATCH, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=BATCH)


def trainer(**arguments):
    operator = TrainingOperator.from_ptl(Pair, datamodule=Numbers)
    return TorchTrainer(
        **{"training_operator_cls": operator, "num_workers": 2, "use_gpu": False, "run_dir": None, **arguments}
    )


def weights(one):
    return torch.cat([value.flatten() for value in one.get_model().state_dict().values()])


def facts(operator):
    model = operator.get_model()
    return [
        model.passes,
        model.global_step,
        [group["lr"] for each in operator.optimizers for group in each.param_groups],
    ]


def test_a_lost_worker_changes_nothing(tmp_path):
    kill_at = 8  # updates: after a pass of four steps, whose end comes after its last checkpoint
    found = []
    for name, kill in (("undisturbed", None), ("lost", kill_at)):
        config = {"lr": 0.05, "kill_at": kill, "marker": str(tmp_path / "marker")}
        keeping = {"run_dir": str(tmp_path / name), "checkpoint": CheckpointConfig(every_steps=1, asynchronous=False)}
        with trainer(config=config, **keeping) as one:
            metrics = one.train(num_steps=7)
            found.append([metrics, one.validate(), weights(one).tolist(), one.apply_all_operators(facts)])
    assert (tmp_path / "marker").exists()
    assert found[0] == found[1]
    assert found[0][0]["seen"] == 3 * 2 * BATCH  # of the three steps of the second pass
    assert {"val_loss", "val_acc"} <= set(found[0][1])
    assert [one[:2] for one in found[0][3]] == [[1, 14]] * 2


def test_saved_and_loaded_with_the_modules_own_values(tmp_path):
    with trainer() as one:
        losses = [one.train()["loss"] for _ in range(4)]
        path, kept = one.save(str(tmp_path / "state")), weights(one)
        numbers = one.apply_all_operators(lambda operator: operator.get_model().number)
    assert losses[-1] < losses[0]
    with trainer() as other:
        other.load(path)
        assert torch.equal(weights(other), kept)
        assert other.apply_all_operators(lambda operator: operator.get_model().number) == [numbers[0]] * 2
        other.train()


def test_in_the_scripts_own_process():
    with trainer(num_workers=1, use_local=True) as one:
        assert one.train(num_steps=1)["batch_count"] == one.validate(num_steps=1)["batch_count"] == 1
    with pytest.raises(
        InvalidArgumentError, match=r"use_local=True cannot carry 2 ranks of Pair in one process.*num_workers=1"
    ):
        trainer(use_local=True)
