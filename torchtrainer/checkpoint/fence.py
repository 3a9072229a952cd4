"""Who may write: the run of the highest generation that claimed the directory, and nobody who started before it.

A claim is an empty file ``generation-0002``. Its name is all that counts, so it cannot be torn, and two claims at once cannot
undo each other: the highest one stays.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from torchtrainer.checkpoint.durable import FILE_MODE, sync_directory
from torchtrainer.checkpoint.failpoints import failpoint
from torchtrainer.checkpoint.manifest import Identity
from torchtrainer.errors import CheckpointFencedError
from torchtrainer.process.own_files import open_own
from torchtrainer.process.paths import private_directory

CORRUPT: Final = ".corrupt"
"""Suffix of a checkpoint that was set aside."""

_CLAIM = re.compile(r"generation-(\d{4,})", re.ASCII)


def next_generation(root: Path) -> int:
    """The generation of a run that resumes from these checkpoints: one more than any before; 1 if there is none.

    Args:
        root: of the store; it need not exist.

    Raises:
        OSError: the directory cannot be read.
    """
    try:
        return 1 + _last_generation(root)
    except FileNotFoundError:
        return 1


def claim(root: Path, generation: int) -> Path:
    """Makes a directory this generation's; earlier ones are refused from then on.

    Args:
        root: made if it is not there.
        generation: of this run.

    Returns:
        The directory as an absolute path.

    Raises:
        CheckpointFencedError: a later generation was here before.
        OSError: the directory cannot be made, is a link, belongs to somebody else, or others may write to it.
    """
    root = private_directory(root.absolute())
    check_fence(root, generation)
    path = root / f"generation-{generation:04d}"
    if not path.exists():
        failpoint("checkpoint.claim")
        os.close(open_own(path, os.O_WRONLY | os.O_CREAT, FILE_MODE))
        failpoint("checkpoint.claim.fsync")
        sync_directory(root)
        sync_directory(root.parent)
        check_fence(root, generation)  # of two that come at once, the later generation stays
    for name in _names(root):
        match = _CLAIM.fullmatch(name)
        if match is not None and int(match[1]) < generation:
            with contextlib.suppress(
                IsADirectoryError, PermissionError
            ):  # something else with such a name is nobody's claim
                (root / name).unlink(missing_ok=True)
    return root


def check_fence(root: Path, generation: int) -> None:
    """Does nothing as long as this generation is the last one.

    Raises:
        CheckpointFencedError: it is not.
        OSError: the directory cannot be read.
    """
    last = _last_generation(root)
    if last > generation:
        raise CheckpointFencedError(
            f"generation {generation} of this run was superseded: generation {last} owns the checkpoints in {root}. Nothing "
            "was written; stop this process; the newer one continues."
        )


def next_serial(root: Path) -> int:
    """The serial number of the next checkpoint of a store.

    Raises:
        OSError: the directory cannot be read.
    """
    return 1 + max((identity.serial for identity in _identities(_names(root))), default=0)


def _last_generation(root: Path) -> int:
    names = _names(root)
    claimed = [int(match[1]) for match in map(_CLAIM.fullmatch, names) if match is not None]
    return max([0, *claimed, *(identity.generation for identity in _identities(names))])


def _names(root: Path) -> list[str]:
    return [path.name for path in root.iterdir()]


def _identities(names: Iterable[str]) -> Iterator[Identity]:
    """The identities of all checkpoints, including those set aside."""
    for name in names:
        identity = Identity.parse(name.removesuffix(CORRUPT))
        if identity is not None:
            yield identity
