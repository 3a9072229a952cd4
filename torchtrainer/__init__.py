"""Data-parallel PyTorch training from a script, a notebook or any launcher.

Importing this package imports no torch and starts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchtrainer import session
from torchtrainer.config import BATCH_SIZE, CheckpointConfig, FailureConfig
from torchtrainer.engines.local import LocalEngine, prestart
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
from torchtrainer.observe.history import History
from torchtrainer.trainer import TorchTrainer
from torchtrainer.version import __version__

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

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


def __getattr__(name: str) -> Any:
    if name == "TrainingOperator":  # needs torch, which this package must not import by itself
        from torchtrainer.operator import TrainingOperator

        return TrainingOperator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
