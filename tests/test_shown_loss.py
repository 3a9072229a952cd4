"""The loss that the progress bar and ``on_step`` show is the mean over all ranks, whoever carries them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import TorchTrainer, TrainingOperator

BATCHES, BATCH = 4, 2


class Own(TrainingOperator):
    """Makes the update itself; its losses are tensors."""

    def train_batch(self, batch, batch_info):
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(batch[0]), batch[1])
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach(), "num_samples": len(batch[0])}


def data_creator(config):
    """Each sample's loss is another, so that ranks differ."""
    y = torch.arange(config["ranks"] * BATCHES * BATCH, dtype=torch.float32).reshape(-1, 1)
    data = TensorDataset(torch.zeros_like(y), y)
    return DataLoader(data, batch_size=BATCH), DataLoader(data, batch_size=BATCH)


class Steps:
    def __init__(self):
        self.events = []

    def on_step(self, event):
        self.events.append(event)


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        (2, {}),
        (3, {}),
        (3, {"processes": 2}),
        (2, {"use_local": True}),
        (2, {"training_operator_cls": Own}),
        (1, {"training_operator_cls": Own}),
    ],
    ids=["two", "three", "three in two", "in this process", "own step", "one"],
)
def test_the_shown_loss_is_the_mean_over_the_ranks(tmp_path, capfd, ranks, arguments) -> None:
    steps, processes = Steps(), arguments.pop("processes", None)
    with TorchTrainer(
        model_creator=lambda config: nn.Linear(1, 1),
        data_creator=data_creator,
        optimizer_creator=lambda model, config: torch.optim.SGD(model.parameters(), lr=1e-3),
        loss_creator=nn.MSELoss,
        num_workers=ranks,
        config={"ranks": ranks},
        callbacks=[steps],
        use_tqdm=True,
        use_gpu=False,
        run_dir=tmp_path,
        **arguments,
    ) as trainer:
        if processes is not None:
            trainer.resize(processes)
        for method, name in (("train", "last_train_loss"), ("train", "last_train_loss"), ("validate", "last_val_loss")):
            result = getattr(trainer, method)()
            expected = result.get(name, result.get("last_loss"))
            assert (steps.events[-1].batch, steps.events[-1].batches) == (BATCHES, BATCHES)
            assert steps.events[-1].loss == pytest.approx(expected, rel=1e-5)
            assert f"loss {steps.events[-1].loss:.4g}" in capfd.readouterr().err
    batches = [event.batch for event in steps.events]
    assert batches.count(BATCHES) == 3, "no step is shown twice"
