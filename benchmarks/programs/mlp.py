"""The small model on which the cost of everything but arithmetic shows."""

import torch
from torch.utils.data import TensorDataset

SAMPLES, WARM_UP, EPOCHS = 32000, 1, 2


def samples() -> TensorDataset:
    """32,000 rows of 64 numbers in 10 classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 64, generator=generator)
    return TensorDataset(x, torch.randint(0, 10, (SAMPLES,), generator=generator))


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.nn.Module]:
    """Model, optimizer and loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), torch.nn.CrossEntropyLoss()
