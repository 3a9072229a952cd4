"""A Lightning module whose ranks part: apart from the tests, since every worker imports what its operator's module imports."""

from __future__ import annotations

import warnings

import torch
from test_parting_ranks import BATCH, BREAKS_AT, X
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch import LightningModule


class Lit(LightningModule):
    def __init__(self, how: str | None = None):
        super().__init__()
        self.layer, self.how = nn.Linear(6, 1), how
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = mse_loss(self.layer(batch[0]), batch[1])
        breaks = self.global_rank == 1 and batch_idx == BREAKS_AT
        if breaks and self.how == "leaves out":
            return
        self.manual_backward(loss)
        if not (breaks and self.how == "does not update"):
            optimizer.step()
        if breaks and self.how == "flips a bit":
            self.layer.weight.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return DataLoader(TensorDataset(X, X[:, :1].clone()), batch_size=BATCH)
