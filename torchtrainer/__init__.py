"""Data-parallel PyTorch training from a script, a notebook or any launcher.

Importing this package imports no torch and starts nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchtrainer.config import BATCH_SIZE, CheckpointConfig, FailureConfig
from torchtrainer.errors import (
    EngineError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    NotAvailableError,
    NotSerializableError,
    OperatorUseError,
    RemoteTraceback,
    RunDirectoryError,
    TorchTrainerError,
    TrainerBusyError,
    TrainerClosedError,
    UnshardableLoaderError,
    WorkerDiedError,
    WorkerError,
    WorkerHungError,
    WorkerStartError,
)
from torchtrainer.version import __version__

if TYPE_CHECKING:
    from torchtrainer import session
    from torchtrainer.engines.local import LocalEngine, prestart
    from torchtrainer.observe.history import History
    from torchtrainer.operator import TrainingOperator
    from torchtrainer.trainer import TorchTrainer

__all__ = [
    "BATCH_SIZE",
    "CheckpointConfig",
    "EngineError",
    "FailureConfig",
    "History",
    "InvalidArgumentError",
    "InvalidArgumentTypeError",
    "LocalEngine",
    "NotAvailableError",
    "NotSerializableError",
    "OperatorUseError",
    "RemoteTraceback",
    "RunDirectoryError",
    "TorchTrainer",
    "TorchTrainerError",
    "TrainerBusyError",
    "TrainerClosedError",
    "TrainingOperator",
    "UnshardableLoaderError",
    "WorkerDiedError",
    "WorkerError",
    "WorkerHungError",
    "WorkerStartError",
    "__version__",
    "prestart",
    "session",
]

_HOMES = {
    "History": "torchtrainer.observe.history",
    "LocalEngine": "torchtrainer.engines.local",
    "TorchTrainer": "torchtrainer.trainer",
    "TrainingOperator": "torchtrainer.operator",
    "prestart": "torchtrainer.engines.local",
}
"""Where names live that are imported when they are first used: the operator needs torch, and a launcher none of the rest."""


def __getattr__(name: str) -> Any:
    if name == "session":
        return importlib.import_module("torchtrainer.session")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
