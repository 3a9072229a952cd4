"""Reading a checkpoint: all of it has the digests that were taken when it was written, or it is not used."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torchtrainer.checkpoint.durable import digest_file
from torchtrainer.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES, Identity, Manifest
from torchtrainer.errors import CheckpointDamagedError, CheckpointError
from torchtrainer.process.own_files import open_to_read

_GONE_OR_BAD: Final = frozenset(
    {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO, errno.ENODATA}
)
"""Errors that mean that a checkpoint is damaged; other errors of the system say nothing about the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that verified.

    Attributes:
        path: its directory.
        manifest: what it consists of.
    """

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.identity.step

    @property
    def generation(self) -> int:
        """Of the run that wrote it."""
        return self.manifest.identity.generation

    @property
    def meta(self) -> dict[str, Any]:
        """The writer's own JSON data."""
        return self.manifest.meta

    def file(self, name: str) -> Path:
        """One of its files.

        Raises:
            CheckpointError: it has no such file.
        """
        if name not in self.manifest.files:
            raise CheckpointError(f"checkpoint {self.path} has no file {name!r}; it has {sorted(self.manifest.files)}")
        return self.path / name


def verify(path: Path) -> Checkpoint:
    """Reads all of a checkpoint and compares it with its manifest. Changes nothing; for any process and thread.

    Args:
        path: its directory.

    Raises:
        CheckpointDamagedError: it is not what was written.
        CheckpointVersionError: it was written in a newer format.
        CheckpointError: the system could not read it, for a reason that says nothing about it.
    """
    try:
        manifest = _read_manifest(path)
        for name, expected in manifest.files.items():
            size_bytes = (path / name).lstat().st_size
            if size_bytes != expected.size_bytes:
                raise CheckpointDamagedError(f"{path / name} has {size_bytes} bytes instead of {expected.size_bytes}")
            if digest_file(path / name) != expected:
                raise CheckpointDamagedError(f"{path / name} is corrupt: its digest does not match")
    except OSError as error:
        if error.errno in _GONE_OR_BAD:
            raise CheckpointDamagedError(f"{path} cannot be read: {error}") from error
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}. Nothing was changed.") from error
    return Checkpoint(path=path, manifest=manifest)


def _read_manifest(path: Path) -> Manifest:
    with open_to_read(path / MANIFEST) as file:
        if os.fstat(file.fileno()).st_size > MAX_MANIFEST_BYTES:
            raise CheckpointDamagedError(f"{path / MANIFEST} is too long to be a manifest")
        manifest = Manifest.decode(file.read(), str(path / MANIFEST))
    if manifest.identity != Identity.parse(path.name):
        raise CheckpointDamagedError(f"{path / MANIFEST} belongs to {manifest.identity.name}")
    return manifest
