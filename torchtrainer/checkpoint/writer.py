"""The writer: a separate process that turns one snapshot into one checkpoint while training continues.

Forked from the spawner, so that it starts in milliseconds, and gone when the checkpoint is on disk and verified. It reads the
regions that the host holds, and outlives the ranks and the driver.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from torchtrainer.checkpoint.journal import call_files
from torchtrainer.checkpoint.remote import RemoteStore
from torchtrainer.checkpoint.snapshot import assemble
from torchtrainer.checkpoint.store import Checkpoint, CheckpointStore
from torchtrainer.errors import CheckpointError, TorchTrainerError
from torchtrainer.process.whole_file import replace_file

STATE = "state.pt"
"""The file of a checkpoint that holds the whole state, in the form of ``torch.save``."""
EXIT_WRITE_FAILED = 1


@dataclass(frozen=True, kw_only=True)
class WriterArguments:
    """A writer's arguments, from the host.

    Attributes:
        regions: of the ranks' shares, by rank.
        number: of the snapshot.
        root: directory of the checkpoints.
        keep: how many verified ones stay.
        generation: of the run.
        meta: kept in the manifest: position and what else is known without opening the state.
        result_path: where the outcome goes, as JSON.
        remote: URL to which the checkpoint is copied, with the record of the calls; None: nowhere.
        run_dir: of the run.
    """

    regions: list[str]
    number: int
    root: str
    keep: int
    generation: int
    meta: dict[str, Any]
    result_path: str
    remote: str | None
    run_dir: str


@dataclass(frozen=True, kw_only=True)
class Written:
    """The outcome of writing a snapshot.

    Attributes:
        path: of the checkpoint; empty if there is none.
        seconds: that it took.
        size_bytes: of the state.
        error: why there is no checkpoint; empty if there is one.
        problems: what else the user should know, such as a damaged checkpoint that was set aside.
    """

    path: str = ""
    seconds: float = 0.0
    size_bytes: int = 0
    error: str = ""
    problems: tuple[str, ...] = ()


def main(arguments: dict[str, Any]) -> int:
    """Writes one checkpoint; entry of the writer process. Returns its exit code."""
    order = WriterArguments(**arguments)
    problems: list[str] = []
    started = time.monotonic()
    try:
        state = assemble(order.regions, order.number)
        checkpoint = write_state(_store(order, problems), state, order.meta, with_calls=_calls_of(order))
        if order.remote is not None:
            copy_to(order.remote, checkpoint, keep=order.keep, on_problem=problems.append)
        outcome = Written(
            path=str(checkpoint.path),
            seconds=time.monotonic() - started,
            size_bytes=checkpoint.file(STATE).stat().st_size,
            problems=tuple(problems),
        )
    except (TorchTrainerError, OSError) as error:
        outcome = Written(error=str(error), problems=tuple(problems))
    except Exception:
        outcome = Written(error=traceback.format_exc(), problems=tuple(problems))
    replace_file(Path(order.result_path), json.dumps(asdict(outcome)).encode())
    return EXIT_WRITE_FAILED if outcome.error else 0


def write_state(
    store: CheckpointStore, state: Mapping[str, Any], meta: Mapping[str, Any], *, with_calls: Path | None = None
) -> Checkpoint:
    """Writes a whole state as a checkpoint.

    Args:
        store: where to.
        state: ``shared`` and ``ranks``.
        meta: for the manifest; its ``step`` names the checkpoint.
        with_calls: directory of a run whose recorded calls go with the state, to where the directory is not.

    Raises:
        CheckpointWriteError: the disk did not take it.
    """

    def save(file: BinaryIO) -> None:
        torch.save(dict(state), file)

    files = {STATE: save, **(call_files(with_calls) if with_calls is not None else {})}
    return store.write(int(meta["step"]), meta, files, reserve_bytes=_size_bytes(state))


def copy_to(url: str, checkpoint: Checkpoint, *, keep: int, on_problem: Callable[[str], None]) -> None:
    """Copies a checkpoint to a URL; a failure is reported, and the local checkpoint counts."""
    try:
        RemoteStore(url, keep=keep, on_problem=on_problem).upload(checkpoint)
    except (CheckpointError, ImportError) as error:
        on_problem(str(error))


def read_state(path: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote. Nothing in it is run.

    Args:
        path: of the state's file, in a checkpoint that verified.

    Raises:
        CheckpointError: it is not what was written.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is not what torchtrainer writes ({str(error).splitlines()[0]}). Nothing in it was run. Remove {path.parent}, "
            "or pass resume=False to start anew"
        ) from error
    return state


def _calls_of(order: WriterArguments) -> Path | None:
    return Path(order.run_dir) if order.remote is not None else None


def _store(order: WriterArguments, problems: list[str]) -> CheckpointStore:
    return CheckpointStore(Path(order.root), keep=order.keep, generation=order.generation, on_problem=problems.append)


def _size_bytes(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, Mapping):
        return sum(_size_bytes(one) for one in tree.values())
    if isinstance(tree, list | tuple):
        return sum(_size_bytes(one) for one in tree)
    return 0
