"""For scripts with a training loop of their own: who am I, under any launcher and inside a trainer's workers.

Importing this module and asking for rank and world size do not import torch.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from torchtrainer import topology
from torchtrainer.errors import NotAvailableError


def rank() -> int:
    """This process's rank, from 0; 0 if there is only one.

    In this order: the rank in the default process group, the launcher's variables (torchrun, srun, mpirun), 0.

    Raises:
        InvalidArgumentError: a launcher's variables are incomplete; the message names the missing one.
    """
    return _place()[0]


def world_size() -> int:
    """The number of ranks of the run; 1 if there is only this process.

    Raises:
        InvalidArgumentError: a launcher's variables are incomplete; the message names the missing one.
    """
    return _place()[1]


def should_stop() -> bool:
    """Whether this run was asked to stop, for instance because the machine will be taken away.

    Raises:
        NotAvailableError: always, in this version.
    """
    _not_yet("should_stop")


def save_checkpoint(state: Any, step: int) -> None:  # noqa: ARG001  # the interface comes before the feature
    """Save the state of the loop after ``step`` optimizer steps.

    Raises:
        NotAvailableError: always, in this version.
    """
    _not_yet("save_checkpoint")


def latest_checkpoint() -> Any:
    """The state that was saved last and verifies; None if there is none.

    Raises:
        NotAvailableError: always, in this version.
    """
    _not_yet("latest_checkpoint")


def loader(loader: Any) -> Any:  # noqa: ARG001  # the interface comes before the feature
    """A loader that gives each sample exactly once over all ranks, and goes on where a resumed run stopped.

    Raises:
        NotAvailableError: always, in this version.
    """
    _not_yet("loader")


def _place() -> tuple[int, int]:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    launched = topology.current()
    return (0, 1) if launched is None else (launched.rank, launched.world_size)


def _not_yet(name: str) -> NoReturn:
    raise NotAvailableError(
        f"session.{name} is not in this version yet, as are checkpoints and resuming: save state with torch.save, and "
        "use session.rank() and session.world_size(), which work"
    )
