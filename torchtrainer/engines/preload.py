"""What a spawner imports before it forks workers, and what it may import after seeing a worker do so."""

from __future__ import annotations

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.algorithms",
    "torch.nn.parallel",
    "torch.optim",
    "torch.utils.data",
    "torch._dynamo",
    "torchtrainer.worker.main",
)
"""What every worker would import otherwise, lazily included: the first optimizer and DDP import ``torch._dynamo``."""
PRELOADABLE = ("torch", "torchvision", "numpy", "PIL")
"""Packages whose modules a spawner may import after seeing a worker do so: known to start no thread when imported."""
