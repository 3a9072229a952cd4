"""The places of a run: its directory, its checkpoints on this machine, and their copies elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from torchtrainer.config import VERIFY_RUNS, CheckpointConfig


def kept_below(path: Path) -> Path:
    """A path of the user's; while ``torchtrainer verify-resume`` tries a script out, one in a directory of its own."""
    path = path.expanduser()
    root = os.environ.get(VERIFY_RUNS)
    return path if root is None else Path(root, *path.absolute().parts[1:])


def beside(path: Path) -> Path:
    """A path like this one at which nothing is."""
    number = 2
    while os.path.lexists(candidate := path.with_name(f"{path.name}-{number}")):
        number += 1
    return candidate


def checkpoints_of(config: CheckpointConfig, root: Path) -> Path:
    """Where the checkpoints of a run are on this machine; in a directory of the user's, each run has its own."""
    if config.path is None or _is_url(config.path):
        return root / "checkpoints"
    return kept_below(Path(config.path)).absolute() / _name_of(root)


def remote_url(config: CheckpointConfig, root: Path) -> str | None:
    """Where copies of the checkpoints of a run are; None: nowhere."""
    if config.path is None or not _is_url(config.path) or VERIFY_RUNS in os.environ:
        return None
    return f"{config.path.rstrip('/')}/{_name_of(root)}"


def _is_url(path: str) -> bool:
    return "://" in path


def _name_of(root: Path) -> str:
    """A run's name where others' runs may be: that of its directory and of the one above."""
    return f"{root.absolute().parent.name}/{root.name}"
