"""Copies of checkpoints in an object store or on another file system, by fsspec.

::

    url/
      step-000000001200-g0002-n000017-<token>/     one attempt to copy a checkpoint
        state.pt ...                               its files
        manifest.json                              put last: without it nothing else is looked at

Object stores cannot rename, but one object appears whole or not at all: that object is the manifest, byte for byte the one on
the local disk. What was copied is read back before it is put.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Final

from torchtrainer.checkpoint.durable import FileDigest
from torchtrainer.checkpoint.failpoints import failpoint
from torchtrainer.checkpoint.manifest import MANIFEST, Identity, Manifest
from torchtrainer.checkpoint.store import MIN_VERIFIED, CheckpointStore
from torchtrainer.checkpoint.verified import Checkpoint
from torchtrainer.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointFencedError,
    CheckpointWriteError,
    InvalidArgumentError,
    TorchTrainerError,
)

READ_BYTES: Final = 4 * 1024**2
"""Bytes requested at a time."""

_ATTEMPT = re.compile(r"(?P<name>step-.+)-[0-9a-f]{16}", re.ASCII)
_CREDENTIALS = re.compile(r"//[^/@]*@")


@dataclass(frozen=True, kw_only=True)
class RemoteCheckpoint:
    """A copy whose manifest is sound; its files are verified when they are downloaded.

    Attributes:
        prefix: where its objects are, as the file system calls it.
        manifest: what it consists of.
    """

    prefix: str
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.identity.step

    @property
    def generation(self) -> int:
        """Of the run that wrote it."""
        return self.manifest.identity.generation


class RemoteStore:
    """The copies below one URL. For one thread of the process that made it: what is below fsspec does not survive a fork.

    A run has one process that uploads, one checkpoint at a time.

    Args:
        url: as fsspec takes it, such as ``s3://bucket/runs/a``; credentials come from where its package looks for them.
        keep: how many copies stay, at least 2.
        on_problem: told in a sentence or two what went wrong without stopping anything.

    Raises:
        ImportError: fsspec, or its package for this kind of URL, is not installed.
        InvalidArgumentError: there is no such kind of URL, or ``keep`` is below 1.
    """

    def __init__(self, url: str, *, keep: int, on_problem: Callable[[str], None]) -> None:
        if keep < 1:
            raise InvalidArgumentError(f"keep must be at least 1, got {keep}")
        self.url = _CREDENTIALS.sub("//", url)
        self._keep = max(keep, MIN_VERIFIED)
        self._on_problem = on_problem
        self._files, base = _file_system(url, self.url)
        self._base = base.rstrip("/")

    def upload(self, checkpoint: Checkpoint) -> RemoteCheckpoint:
        """Copies a checkpoint, reads the copy back, publishes it, then lets go of the oldest.

        Raises:
            CheckpointWriteError: it could not be copied; nothing of it will be found.
            CheckpointFencedError: a later generation has written here.
        """
        identity = checkpoint.manifest.identity
        prefix = f"{self._base}/{identity.name}-{secrets.token_hex(8)}"
        try:
            self._check_fence(identity)
            self._put(checkpoint, prefix)
        except BaseException as error:
            with suppress(Exception):  # what is left is removed with the next upload that succeeds
                self._remove(prefix)
            if not isinstance(error, Exception) or isinstance(error, CheckpointFencedError):
                raise
            raise CheckpointWriteError(
                f"the checkpoint of step {identity.step} could not be copied to {self.url}: {_said(error)}. It is on this "
                f"machine, in {checkpoint.path}, and older copies are intact. Look at the credentials and the space of the "
                "store, and at the network."
            ) from error
        self._retire(identity, prefix)
        return RemoteCheckpoint(prefix=prefix, manifest=checkpoint.manifest)

    def newest(self) -> RemoteCheckpoint | None:
        """The newest copy whose manifest is sound; None: there is none.

        Raises:
            CheckpointVersionError: the newest was written in a newer format.
            CheckpointError: the store cannot be read.
        """
        return next(self._published(), None)

    def all(self) -> list[RemoteCheckpoint]:
        """Every copy whose manifest is sound, newest first; for when the newest does not arrive undamaged.

        Raises:
            CheckpointVersionError: one was written in a newer format.
            CheckpointError: the store cannot be read.
        """
        return list(self._published())

    def next_generation(self) -> int:
        """The generation of a run that resumes from these copies; 1 if there is none.

        Raises:
            CheckpointError: the store cannot be read.
        """
        return 1 + max((identity.generation for identity, _ in self._attempts()), default=0)

    def download(self, remote: RemoteCheckpoint, into: CheckpointStore) -> Checkpoint:
        """Brings a copy to the local disk, where it is a checkpoint like one that was written there.

        Args:
            remote: the copy.
            into: open for a generation not below the copy's.

        Raises:
            InvalidArgumentError: the copy is of a later generation than ``into``.
            CheckpointDamagedError: what came is not what was written; nothing of it is kept.
            CheckpointWriteError: it could not be written to the local disk.
            CheckpointError: the store cannot be read.
        """
        fill = {name: partial(self._copy, f"{remote.prefix}/{name}") for name in remote.manifest.files}
        return into.adopt(remote.manifest, fill)

    def read_note(self, name: str) -> bytes | None:
        """A small object beside the copies; None: there is none.

        Raises:
            CheckpointError: the store cannot be read.
        """
        try:
            content: bytes = self._files.cat_file(f"{self._base}/{name}")
        except FileNotFoundError:
            return None
        except Exception as error:
            raise CheckpointError(f"{name} cannot be read from {self.url}: {_said(error)}") from error
        return content

    def put_note(self, name: str, content: bytes) -> None:
        """Puts a small object beside the copies, in the place of an older one.

        Raises:
            CheckpointWriteError: the store did not take it.
        """
        try:
            self._files.makedirs(self._base, exist_ok=True)
            self._files.pipe_file(f"{self._base}/{name}", content)
        except Exception as error:
            raise CheckpointWriteError(f"{name} could not be written to {self.url}: {_said(error)}") from error

    def children(self) -> list[str]:
        """Names of what is below the URL, sorted.

        Raises:
            CheckpointError: the store cannot be read.
        """
        try:
            self._files.invalidate_cache()
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in self._files.ls(self._base, detail=False))
        except FileNotFoundError:
            return []
        except Exception as error:
            raise CheckpointError(f"{self.url} cannot be listed: {_said(error)}") from error

    def _put(self, checkpoint: Checkpoint, prefix: str) -> None:
        files = checkpoint.manifest.files
        self._files.makedirs(prefix, exist_ok=True)
        for name in files:
            failpoint("remote.payload")
            self._files.put_file(str(checkpoint.file(name)), f"{prefix}/{name}")
        failpoint("remote.verify")
        for name, expected in files.items():
            found = self._digest(f"{prefix}/{name}")
            if found != expected:
                raise CheckpointDamagedError(f"{name} arrived as {found} instead of {expected}")
        encoded = checkpoint.manifest.encode()
        self._check_fence(checkpoint.manifest.identity)
        failpoint("remote.manifest")
        self._files.pipe_file(f"{prefix}/{MANIFEST}", encoded)
        if self._files.cat_file(f"{prefix}/{MANIFEST}") != encoded:
            raise CheckpointDamagedError(f"{MANIFEST} is not what was put")

    def _copy(self, path: str, file: BinaryIO) -> None:
        file.writelines(self._read(path))

    def _digest(self, path: str) -> FileDigest:
        sha256, size_bytes = hashlib.sha256(), 0
        for data in self._read(path):
            sha256.update(data)
            size_bytes += len(data)
        return FileDigest(size_bytes=size_bytes, sha256=sha256.hexdigest())

    def _read(self, path: str) -> Iterator[bytes]:
        try:
            with self._files.open(path, "rb") as file:
                while data := file.read(READ_BYTES):
                    yield data
        except FileNotFoundError as error:
            raise CheckpointDamagedError(f"{path} is missing in {self.url}") from error
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read from {self.url}: {_said(error)}") from error

    def _attempts(self) -> list[tuple[Identity, str]]:
        """The copies that were begun, newest first."""
        try:
            self._files.invalidate_cache()
            paths = [str(path).rstrip("/") for path in self._files.ls(self._base, detail=False)]
        except FileNotFoundError:
            return []
        except Exception as error:
            raise CheckpointError(f"{self.url} cannot be listed: {_said(error)}") from error
        found = []
        for path in paths:
            match = _ATTEMPT.fullmatch(path.rpartition("/")[2])
            identity = match and Identity.parse(match["name"])
            if identity is not None:
                found.append((identity, path))
        return sorted(found, reverse=True)

    def _published(self) -> Iterator[RemoteCheckpoint]:
        for identity, prefix in self._attempts():
            try:
                manifest = self._manifest(identity, prefix)
            except CheckpointDamagedError as error:
                self._on_problem(f"a copy in {self.url} is damaged and is not used: {error}")
                continue
            if manifest is not None:
                yield RemoteCheckpoint(prefix=prefix, manifest=manifest)

    def _manifest(self, identity: Identity, prefix: str) -> Manifest | None:
        """None: it was not put, or was removed."""
        path = f"{prefix}/{MANIFEST}"
        try:
            raw = self._files.cat_file(path)
        except FileNotFoundError:
            return None
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read from {self.url}: {_said(error)}") from error
        manifest = Manifest.decode(raw, path)
        if manifest.identity != identity:
            raise CheckpointDamagedError(f"{path} belongs to {manifest.identity.name}")
        return manifest

    def _check_fence(self, identity: Identity) -> None:
        last = max((attempt.generation for attempt, _ in self._attempts()), default=0)
        if last > identity.generation:
            raise CheckpointFencedError(
                f"generation {identity.generation} of this run was superseded: generation {last} owns the copies in "
                f"{self.url}. Nothing was published; stop this process; the newer one continues."
            )

    def _retire(self, mine: Identity, my_prefix: str) -> None:
        """Removes the oldest copies, and what attempts left that ended before they could publish."""
        kept: set[Identity] = set()
        try:
            for identity, prefix in self._attempts():
                with suppress(CheckpointDamagedError):  # left for a person to look at
                    if self._manifest(identity, prefix) is not None:
                        if identity not in kept and len(kept) < self._keep:
                            kept.add(identity)
                            continue
                        failpoint("remote.retire")
                    elif prefix == my_prefix or identity.generation > mine.generation:
                        continue
                    self._remove(prefix)
        except Exception as error:
            self._on_problem(f"old copies in {self.url} were not removed: {_said(error)}")

    def _remove(self, prefix: str) -> None:
        """Takes a copy out of sight, then removes it."""
        with suppress(FileNotFoundError):
            self._files.rm_file(f"{prefix}/{MANIFEST}")
        failpoint("remote.delete")
        with suppress(FileNotFoundError):
            self._files.rm(prefix, recursive=True)


def _file_system(url: str, shown: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(
            f'checkpoints in {shown} need fsspec ({error}); run: pip install "torchtrainer[remote]"'
        ) from error
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"checkpoints in {shown} need another package: {error}") from error
    except ValueError as error:
        raise InvalidArgumentError(f"checkpoints cannot be kept in {shown}: {error}") from error
    return files, str(path)


def _said(error: BaseException) -> str:
    """An error in a line; those of object stores often say nothing without their type."""
    return str(error) if isinstance(error, TorchTrainerError) else f"{type(error).__name__}: {error}"
