"""The works that all peers do: the same model, data, batches and number of steps, whoever drives the loop.

A program takes ``--work NAME`` and the sizes, and prints ``LABEL number`` lines; which of two processes prints is its own business.
"""

import argparse
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

WORKERS = 2
SEED = 0
CONTEXT = 64
WIDTH = 128
CHANNEL_MEANS, CHANNEL_STDS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done.

    Attributes:
        name: ``mlp``, ``resnet``, ``transformer``, or ``digits``, which is trained until it knows something.
        batch_size: per worker.
        learning_rate: of SGD with momentum.
        samples: of the training set; the rest of digits is for validation.
        warm_up, epochs: passes that are not timed, and that are.
        data: image folder for ``resnet``; None: random images.
    """

    name: str
    batch_size: int
    learning_rate: float
    samples: int
    warm_up: int
    epochs: int
    data: str | None = None

    @property
    def validates(self) -> bool:
        return self.name == "digits"

    def train_set(self) -> Dataset:
        return {"mlp": vectors, "resnet": images, "transformer": sequences, "digits": digits}[self.name](self)

    def validation_set(self) -> Dataset:
        return digits(self, validation=True)

    def model(self) -> nn.Module:
        """The model, with the same weights in every process."""
        torch.manual_seed(SEED)
        return {"mlp": mlp, "resnet": resnet, "transformer": Transformer, "digits": cnn}[self.name]()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=0.9)


WORKS = {
    "mlp": Work(name="mlp", batch_size=32, learning_rate=0.01, samples=32000, warm_up=1, epochs=2),
    "resnet": Work(name="resnet", batch_size=32, learning_rate=0.01, samples=256, warm_up=1, epochs=2),
    "transformer": Work(name="transformer", batch_size=8, learning_rate=0.05, samples=1024, warm_up=1, epochs=2),
    "digits": Work(name="digits", batch_size=8, learning_rate=0.00002, samples=1424, warm_up=0, epochs=40),
}


def asked() -> Work:
    """The work that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", choices=WORKS, required=True)
    parser.add_argument("--data")
    for name in ("samples", "warm-up", "epochs"):
        parser.add_argument(f"--{name}", type=int)
    given = {name: value for name, value in vars(parser.parse_known_args()[0]).items() if value is not None}
    return Work(**{**vars(WORKS[given.pop("work")]), **given})


# Data


def vectors(work: Work) -> Dataset:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(work.samples, 64, generator=generator)
    return TensorDataset(x, torch.randint(0, 10, (work.samples,), generator=generator))


def images(work: Work) -> Dataset:
    """Images of 32x32: of every class as many from the folder, or random ones."""
    generator = torch.Generator().manual_seed(SEED)
    if work.data is None:
        x = torch.randn(work.samples, 3, 32, 32, generator=generator)
        return TensorDataset(x, torch.randint(0, 10, (work.samples,), generator=generator))
    from torchvision import datasets, transforms

    as_tensor = [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize(CHANNEL_MEANS, CHANNEL_STDS)]
    folder = datasets.ImageFolder(Path(work.data) / "train", transforms.Compose(as_tensor))
    chosen = torch.randperm(len(folder), generator=generator)[: work.samples].tolist()
    x, y = zip(*(folder[index] for index in chosen), strict=True)
    return TensorDataset(torch.stack(x), torch.tensor(y))


def text() -> str:
    """Python's own help texts: they are on every machine, and differ between its versions only."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def sequences(work: Work) -> Dataset:
    """Pieces of the text, and what follows each of their characters."""
    wanted = work.samples * CONTEXT + 1
    whole = text()
    codes = torch.tensor([min(ord(character), 127) for character in (whole * (wanted // len(whole) + 1))[:wanted]])
    return TensorDataset(codes[:-1].view(-1, CONTEXT), codes[1:].view(-1, CONTEXT))


def digits(work: Work, validation: bool = False) -> Dataset:
    """The handwritten digits that come with scikit-learn, 8x8."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(SEED))
    chosen = order[WORKS["digits"].samples :] if validation else order[: work.samples]
    x = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(x[chosen], torch.tensor(found.target)[chosen])


# Models


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def resnet() -> nn.Module:
    """ResNet-18 with the stem for small images."""
    import torchvision

    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def cnn() -> nn.Module:
    def block(channels_in: int, channels_out: int) -> nn.Module:
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))

    return nn.Sequential(
        block(1, 32),
        block(32, 64),
        nn.MaxPool2d(2),
        block(64, 128),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 128, 10),
    )


class Transformer(nn.Module):
    """Says for each character of a piece of text which one follows; scores are (pieces, characters, positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, WIDTH)
        self.positions = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.scores = nn.Linear(WIDTH, 128)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        inside = self.layers(self.characters(codes) + self.positions, mask=self.mask, is_causal=True)
        return self.scores(inside).transpose(1, 2)


# What the programs print


def run(work, *, train, validate, barrier, says: bool) -> None:
    """Trains and reports.

    ``train(epoch)`` returns its number of steps, ``validate()`` the accuracy on the whole validation set.
    """
    for epoch in range(work.warm_up):
        train(epoch)
    barrier()
    began, steps = time.perf_counter(), 0
    for epoch in range(work.warm_up, work.warm_up + work.epochs):
        steps += train(epoch)
        if work.validates:
            accuracy = validate()
            if says:
                tell_accuracy(accuracy)
    barrier()
    if says:
        tell_pace(work, steps, time.perf_counter() - began)


def tell_pace(work: Work, steps: int, seconds: float) -> None:
    print("MS_PER_STEP", seconds / steps * 1e3, flush=True)
    print("SAMPLES_PER_S", work.samples * work.epochs / seconds, flush=True)


def tell_accuracy(accuracy: float) -> None:
    """Prints the accuracy, with the seconds since the command began."""
    print("ACCURACY", time.time() - float(os.environ["T0"]), accuracy, flush=True)


def tell_weights(model: nn.Module) -> None:
    """Prints a digest of all weights, which equal trainings share."""
    sha = hashlib.sha256()
    for tensor in model.state_dict().values():
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    print("WEIGHTS", sha.hexdigest(), flush=True)
