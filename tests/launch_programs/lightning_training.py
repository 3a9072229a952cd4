"""Trains, validates and tests Lightning's own demo model with Lightning's own demo data.

The package ships these, but no program; these are the lines that its documentation puts around them.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel


class LoggedModel(BoringModel):
    """The demo model, whose losses are logged over all ranks."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().validation_step(batch, batch_idx)["x"], sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", super().test_step(batch, batch_idx)["y"], sync_dist=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    seed_everything(7, workers=True)
    trainer = Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy=args.strategy,
        max_epochs=2,
        logger=False,
        callbacks=[ModelCheckpoint(args.output, filename="{epoch}", monitor="val_loss", save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model, data = LoggedModel(), BoringDataModule()
    trainer.fit(model, data)
    print(
        f"environment {type(trainer.strategy.cluster_environment).__name__}, {trainer.global_rank} of {trainer.world_size}"
    )
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"fit {name} {value.item()!r}")
    print(f"test {trainer.test(model, data, verbose=False)!r}")
    print(f"weights {[p.double().sum().item() for p in model.parameters()]!r} {torch.initial_seed()}")


if __name__ == "__main__":
    main()
