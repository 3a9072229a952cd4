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
"""Modules that every worker would import anyway, some lazily: the first optimizer and DDP import ``torch._dynamo``."""
_PRELOADABLE = ("torch", "torchtrainer", "torchvision", "numpy", "PIL", "pytest", "_pytest")
"""Packages whose modules a spawner may import after seeing a worker do so: known to start no thread when imported. Workers
import `torchtrainer` as drivers do, and pytest, with the module that an operator is defined in: half a second that each would take.
"""
_ONLY_IN_ORDER = "torch._inductor."
"""Modules that cannot be imported one by one: torch's compiler, which also starts processes."""


def preloadable(module: str) -> bool:
    """Whether a spawner may import a module."""
    return module.partition(".")[0] in _PRELOADABLE and not f"{module}.".startswith(_ONLY_IN_ORDER)
