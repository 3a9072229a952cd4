"""Trains the demo model of Lightning in a loop of one's own with Lightning Fabric, as its documentation shows."""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset


def main():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    fabric.seed_everything(11)
    model = BoringModel().layer
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.05))
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(RandomDataset(32, 40), batch_size=4, shuffle=True))
    for epoch in range(2):
        for batch in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(batch), torch.ones(len(batch), 2))
            fabric.backward(loss)
            optimizer.step()
        mean = fabric.all_reduce(loss.detach(), reduce_op="mean")
        print(
            f"rank {fabric.global_rank} of {fabric.world_size}: epoch {epoch} loss {loss.item()!r} mean {mean.item()!r}"
        )
    gathered = fabric.all_gather(torch.tensor(fabric.global_rank))
    fabric.print(f"ranks {gathered.tolist()}")


if __name__ == "__main__":
    main()
