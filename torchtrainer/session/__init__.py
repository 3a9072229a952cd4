"""For scripts with their own training loop, under any launcher: which rank this is, when to stop, and where to resume.

Importing this module and calling `rank` and `world_size` does not import torch. The other functions do, and with
several ranks they need the process group that the script has formed. See the page on scripts with their own training
loop.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torchtrainer import topology
from torchtrainer.arguments import check_may_change, check_resume
from torchtrainer.config import PreemptionConfig
from torchtrainer.errors import EngineError, InvalidArgumentError, InvalidArgumentTypeError

if TYPE_CHECKING:
    from torchtrainer.session.loaders import SessionLoader
    from torchtrainer.session.loop import SessionLoop

EXIT_PREEMPTED = 75
"""Exit code of a script that was stopped and has saved its state: start the same command again."""
KEEP = 3
"""Number of checkpoints that stay."""

_settings: dict[str, Any] = {
    "run_dir": None,
    "keep": KEEP,
    "preemption": PreemptionConfig(),
    "resume": "auto",
    "may_change": (),
}
_loops: list[SessionLoop] = []
"""The loop of this process, made on first use."""


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


def configure(
    *,
    run_dir: str | os.PathLike[str] | None = None,
    keep: int = KEEP,
    preemption: PreemptionConfig | None = None,
    resume: bool | str = "auto",
    may_change: Iterable[str] = (),
) -> None:
    """Sets where checkpoints go and what counts as a warning. Call it first, with the same arguments on all ranks.

    Args:
        run_dir: directory of the run; None: ``TORCHTRAINER_RUN_DIR`` of the environment, else ``./runs/<script>``. With
            ranks on several machines, it must be on a file system that they share.
        keep: how many checkpoints stay.
        preemption: sources of warnings that the machine or the job will be taken away.
        resume: "auto": resume an interrupted session if the script's arguments and settings are unchanged; True: also a
            finished one, and raise if there is none that fits; False: start anew. A new session gets a directory beside
            the old one.
        may_change: names of arguments and settings that may differ: ``epochs`` stands for ``--epochs`` and
            ``args.epochs``.

    Raises:
        InvalidArgumentError: ``keep`` is below 1, ``resume`` is invalid, or the session is already in use.
    """
    if _loops:
        raise InvalidArgumentError("call session.configure first: the session of this script is already in use")
    if type(keep) is not int or keep < 1:
        raise InvalidArgumentError(f"keep must be a whole number of at least 1, got {keep!r}")
    if run_dir is not None and not isinstance(run_dir, str | os.PathLike):
        raise InvalidArgumentTypeError(f"run_dir must be a path or None, got {run_dir!r}")
    if preemption is not None and not isinstance(preemption, PreemptionConfig):
        raise InvalidArgumentTypeError(f"preemption must be a PreemptionConfig or None, got {preemption!r}")
    check_resume(resume)
    _settings.update(
        run_dir=run_dir,
        keep=keep,
        preemption=preemption or PreemptionConfig(),
        resume=resume,
        may_change=check_may_change(may_change),
    )


def should_stop() -> bool:
    """Whether to save and exit now, because the machine or the job will be taken away. Call it once per step.

    All ranks get True at the same step, whichever of them got the warning, so every rank must call it the same number
    of times. It costs next to nothing until there is a warning: the ranks exchange nothing. Once True, it stays True.

    Raises:
        EngineError: the ranks have formed no process group yet, or this is a worker of a trainer.
        RunDirectoryError: the run directory cannot be used.
        TimeoutError: the other ranks did not call it.
    """
    return _loop().should_stop()


def save_checkpoint(state: Any, step: int) -> str:
    """Saves the state of the loop after ``step`` optimizer steps, and returns when it is on disk and verified.

    A collective call. It also saves the positions of the loaders of `loader` and the random streams of this process.
    Rank 0 writes; what is equal on all ranks is written once.

    Args:
        state: of this rank: tensors, numbers, text, and lists and dicts of them.
        step: optimizer steps done.

    Returns:
        Directory of the checkpoint.

    Raises:
        InvalidArgumentTypeError: the state holds something else; on all ranks.
        CheckpointWriteError: it is not on disk; older checkpoints are intact. On all ranks.
        EngineError, RunDirectoryError: as for `should_stop`.
    """
    return _loop().save(state, step)


def latest_checkpoint() -> Any:
    """The newest state of this rank whose checkpoint verifies; None if there is none. A collective call.

    Restores the positions of the loaders of `loader`, including those made later, and the random streams of this
    process: call it after building the model, right before the loop.

    Raises:
        ResumeError: it was saved by another number of ranks with states that differ, or by a trainer.
        CheckpointError: a rank cannot read it.
        EngineError, RunDirectoryError: as for `should_stop`.
    """
    return _loop().latest()


def loader(
    loader: Any,
    *,
    seed: int = 0,
    training: bool = True,
    even_batches: bool | str = False,
    min_batch_size: int = 1,
) -> SessionLoader:
    """A loader that gives each sample once per pass over all ranks, and continues where a resumed run stopped.

    A collective call; the order in which a script makes its loaders identifies them.

    Args:
        loader: a ``DataLoader`` as for one rank; its ``batch_size`` is that of each rank.
        seed: of the order, unless the loader has one of its own (``generator``, ``DistributedSampler``).
        training: the ranks step together, so that each has the same number of batches; False: for an evaluation.
        even_batches: as for `torchtrainer.TorchTrainer`.
        min_batch_size: fewest samples of a rank in a short last step: 2 for models with batch-norm layers.

    Raises:
        InvalidArgumentError: ``even_batches`` or ``min_batch_size`` is invalid.
        UnshardableLoaderError: it cannot be dealt out; the message says why.
        EngineError, RunDirectoryError: as for `should_stop`.
    """
    return _loop().loader(
        loader, seed=seed, training=training, even_batches=even_batches, min_batch_size=min_batch_size
    )


def finish() -> None:
    """Marks the work of this script as done: when it is started again, it begins a new session.

    A script that ends without an exception need not call it; one that does other things afterwards should. Every rank
    calls it. After a stop it changes nothing: the session will be resumed.
    """
    if _loops:
        _loops[0].finish()


def _loop() -> SessionLoop:
    if not _loops:
        from torchtrainer.session.loop import SessionLoop

        _loops.append(SessionLoop(**_settings))
    if _loops[0].finished:
        raise EngineError("the session of this script has ended: session.finish() comes after everything else")
    return _loops[0]


def _place() -> tuple[int, int]:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    launched = topology.current()
    return (0, 1) if launched is None else (launched.rank, launched.world_size)
