"""Buffers that grow, or change type, or come and go while a model trains: they are carried on, whoever carries the ranks."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import CheckpointConfig, TorchTrainer, TrainingOperator
from torchtrainer.train.records import RecordFile

X = torch.randn(48, 3, generator=torch.Generator().manual_seed(1))
Y = X.sum(1, keepdim=True)


class Bank(nn.Module):
    """Keeps what it has seen, counts it in a type that changes, and has a mean once there is one."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 1), nn.BatchNorm1d(3)
        self.register_buffer("bank", torch.zeros(0, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int32))
        self.register_buffer("mean", None)

    def forward(self, x):
        if self.training:
            self.bank = torch.cat([self.bank, x.detach()])
            self.count = (self.count + len(x)).to(torch.float64)
            self.mean = self.bank.mean(dim=0)
        return self.layer(self.norm(x)) + (0 if self.mean is None else self.mean.sum() * 0.01)


class OwnStep(TrainingOperator):
    def train_batch(self, batch, batch_info):
        return super().train_batch(batch, batch_info)


class KillOnce:
    """Kills the process of a rank when the training has come to a step."""

    def __init__(self, rank):
        self.rank, self.trainer, self.killed = rank, None, 0

    def on_step(self, event):
        if self.rank is not None and not self.killed and event.step >= 2:
            at = next(one for one in self.trainer.status().processes if self.rank in one.ranks)
            self.killed = at.pid
            os.kill(at.pid, signal.SIGKILL)


def trained(run_dir, *, killed=None, **more):
    striking = KillOnce(killed)
    with TorchTrainer(
        model_creator=lambda config: Bank(),
        optimizer_creator=lambda model, config: torch.optim.SGD(model.parameters(), lr=0.01),
        data_creator=lambda config: [DataLoader(TensorDataset(X, Y), batch_size=4)] * 2,
        loss_creator=nn.MSELoss,
        num_workers=2,
        use_gpu=False,
        run_dir=run_dir,
        checkpoint=CheckpointConfig(every_steps=2),
        callbacks=[striking],
        **more,
    ) as trainer:
        striking.trainer = trainer
        trainer.train()
        trainer.train()
        found = trainer.validate()["val_loss"]
        state = trainer.state_dict()["models"][0]
    assert bool(striking.killed) == (killed is not None)
    return state, found


@pytest.mark.parametrize(
    ("killed", "more"),
    [
        (1, {}),
        (0, {}),
        (0, {"ddp_args": {"broadcast_buffers": False}}),
        (1, {"training_operator_cls": OwnStep}),
    ],
)
def test_a_training_goes_on_with_buffers_that_grew(tmp_path, killed, more) -> None:
    state, loss = trained(tmp_path / "whole", **more)
    assert state["bank"].shape == (48, 3)
    assert (state["count"].item(), state["count"].dtype) == (48.0, torch.float64)
    torch.testing.assert_close(state["mean"], state["bank"].mean(dim=0))
    again, same = trained(tmp_path / "killed", killed=killed, **more)
    for name, value in state.items():
        assert torch.equal(again[name], value), name
    assert same == loss


def test_a_card_holds_tensors_of_other_shapes_than_at_first() -> None:
    first = [torch.zeros(2), None, torch.zeros((), dtype=torch.int64)]
    cards = RecordFile(None, rank=0, tensors=first)
    shapes = [
        first,
        [torch.ones(5, 3), torch.tensor(True), torch.tensor(1.5, dtype=torch.bfloat16)],
        [torch.rand(4000, 3).t(), None, torch.zeros(0, 7)],
        [torch.ones(2), None, torch.tensor(3)],
        [torch.ones(1), torch.ones(1), torch.ones(1), torch.ones(1)],
    ]
    for number, tensors in enumerate(shapes, start=1):
        cards.write(number, tensors, {"number": number})
        found, plain = cards.read(number)
        assert plain == {"number": number}
        assert len(found) == len(tensors)
        for one, other in zip(found, cards.tensors(number), strict=True):
            assert one is other is None or torch.equal(one, other)
        for one, value in zip(found, tensors, strict=True):
            assert (one is None) == (value is None)
            assert value is None or (one.dtype == value.dtype and torch.equal(one, value))
        if number > 1:
            assert cards.read(number - 1)[1] == {"number": number - 1}, "the card before stays"
