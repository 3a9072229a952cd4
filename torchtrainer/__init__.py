"""Data-parallel PyTorch training from a script, a notebook or any launcher.

Importing this package imports no torch and starts nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchtrainer.config import BATCH_SIZE, CheckpointConfig, FailureConfig, PreemptionConfig, Timeouts
from torchtrainer.errors import (
    CallMismatchError,
    CheckpointDamagedError,
    CheckpointError,
    CheckpointFencedError,
    CheckpointVersionError,
    CheckpointWriteError,
    EngineError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    NotAvailableError,
    NotSerializableError,
    OperatorUseError,
    Preempted,
    RemoteTraceback,
    ResumeError,
    RunDirectoryError,
    SnapshotError,
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
    from torchtrainer.observe.events import Callback
    from torchtrainer.observe.history import History
    from torchtrainer.operator import TrainingOperator
    from torchtrainer.preempt.notice import Notice
    from torchtrainer.trainer import TorchTrainer

__all__ = [
    "BATCH_SIZE",
    "CallMismatchError",
    "Callback",
    "CheckpointConfig",
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointFencedError",
    "CheckpointVersionError",
    "CheckpointWriteError",
    "EngineError",
    "FailureConfig",
    "History",
    "InvalidArgumentError",
    "InvalidArgumentTypeError",
    "LocalEngine",
    "NotAvailableError",
    "NotSerializableError",
    "Notice",
    "OperatorUseError",
    "Preempted",
    "PreemptionConfig",
    "RemoteTraceback",
    "ResumeError",
    "RunDirectoryError",
    "SnapshotError",
    "Timeouts",
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
    "Callback": "torchtrainer.observe.events",
    "History": "torchtrainer.observe.history",
    "LocalEngine": "torchtrainer.engines.local",
    "Notice": "torchtrainer.preempt.notice",
    "TorchTrainer": "torchtrainer.trainer",
    "TrainingOperator": "torchtrainer.operator",
    "prestart": "torchtrainer.engines.local",
}
"""Module of each name that is imported on first use: the operator needs torch, and a launcher none of the rest."""


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
