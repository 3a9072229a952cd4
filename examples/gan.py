"""Two models, two optimizers and a training step of its own: a GAN that learns to draw handwritten digits.

    python examples/gan.py --epochs 30

Prints both losses, and how sharp the drawings are: the mean distance of a drawing to the nearest real digit.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import BATCH_SIZE, TorchTrainer, TrainingOperator

PIXELS = 8 * 8


def real_digits():
    """The 1,797 digits that come with scikit-learn; shape (1797, 64), values from -1 to 1."""
    return torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1


class GAN(TrainingOperator):
    def setup(self, config):
        latent, width = config["latent_size"], config["width"]
        generator = nn.Sequential(
            nn.Linear(latent, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, PIXELS), nn.Tanh(),
        )  # fmt: skip
        discriminator = nn.Sequential(
            nn.Linear(PIXELS, width), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(width, width), nn.LeakyReLU(0.2),
            nn.Dropout(0.3), nn.Linear(width, 1),
        )  # fmt: skip
        models = generator, discriminator
        optimizers = [
            torch.optim.Adam(model.parameters(), lr=lr, betas=(0.5, 0.999))
            for model, lr in zip(models, (config["lr_g"], config["lr_d"]), strict=True)
        ]
        (self.generator, self.discriminator), (self.optimizer_g, self.optimizer_d), self.criterion = self.register(
            models=models, optimizers=optimizers, criterion=nn.BCEWithLogitsLoss()
        )
        dataset = TensorDataset(real_digits())
        self.register_data(
            train_loader=DataLoader(dataset, batch_size=config[BATCH_SIZE], shuffle=True, drop_last=True)
        )

    def train_batch(self, batch, batch_info):
        (real,) = batch
        real = real.to(self.device)
        ones, zeros = torch.ones(len(real), 1, device=self.device), torch.zeros(len(real), 1, device=self.device)
        fake = self.generator(torch.randn(len(real), self.config["latent_size"], device=self.device))

        # Tell real digits from drawings: one forward pass over both, so that gradients are exchanged once.
        verdict = self.discriminator(torch.cat([real, fake.detach()]))
        loss_d = self.criterion(verdict, torch.cat([0.9 * ones, zeros]))
        self.optimizer_d.zero_grad()
        loss_d.backward()
        self.optimizer_d.step()

        # Draw what passes for real. The judge only passes gradients on, it does not learn from this.
        self.discriminator.requires_grad_(requires_grad=False)
        loss_g = self.criterion(self.discriminator(fake), ones)
        self.optimizer_g.zero_grad()
        loss_g.backward()
        self.optimizer_g.step()
        self.discriminator.requires_grad_(requires_grad=True)
        return {"loss_d": loss_d.item(), "loss_g": loss_g.item(), "num_samples": len(real)}


def draw(generator, latent_size, count=200):
    """Drawings of shape (count, 64)."""
    generator.eval()
    with torch.no_grad():
        return generator(torch.randn(count, latent_size))


def as_text(image):
    """One drawing, 8 lines of 8 characters."""
    levels = ((image + 1) / 2 * 4).round().int().reshape(8, 8).tolist()
    return "\n".join("".join(" .+*#"[level] * 2 for level in row) for row in levels)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--no-tqdm", action="store_true")
    args = parser.parse_args()
    config = {"latent_size": 32, "width": 256, "lr_g": 2e-3, "lr_d": 5e-4, BATCH_SIZE: 64}

    trainer = TorchTrainer(
        training_operator_cls=GAN, config=config, num_workers=args.num_workers, use_tqdm=not args.no_tqdm
    )
    with trainer:
        for epoch in range(1, args.epochs + 1):
            stats = trainer.train()
            print(f"epoch {epoch:3d}/{args.epochs}  loss_d {stats['loss_d']:.3f}  loss_g {stats['loss_g']:.3f}")
        generator, _ = trainer.get_model()

    drawings = draw(generator, config["latent_size"])
    distance = torch.cdist(drawings, real_digits()).min(dim=1).values.mean()
    noise = torch.cdist(torch.rand_like(drawings) * 2 - 1, real_digits()).min(dim=1).values.mean()
    print(as_text(drawings[0]))
    print(f"mean distance to the nearest real digit: {distance:.2f} (random pixels: {noise:.2f})")


main()
