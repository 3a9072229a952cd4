"""The checkpoints of a run on disk: written so that each is there whole or not at all, and verified before it is used.

::

    root/                                     0700, files 0600
      generation-0002                         the run that may write; empty, its name is what counts
      step-000000001200-g0002-n000017/        a checkpoint, if manifest.json verifies
        manifest.json
        state.pt
      step-000000000900-g0001-n000016.corrupt a damaged one, set aside for a person to look at
      .tmp-...                                in the making
      .trash-step-...                         being deleted

Files and their directory are on the disk before the directory gets its name, and its name is before anything older goes: at
whatever instant the process or the machine stops, the last checkpoint that was reported is found again. A directory is used
only if every byte of it has the digest that was taken when it was written. Nothing is unpickled here.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from torchtrainer.checkpoint.durable import FileDigest, sync_directory, write_file
from torchtrainer.checkpoint.failpoints import failpoint
from torchtrainer.checkpoint.fence import CORRUPT, check_fence, claim, next_generation, next_serial
from torchtrainer.checkpoint.manifest import MANIFEST, Identity, Manifest, check_file_name
from torchtrainer.checkpoint.temporary import is_stale, new_directory
from torchtrainer.checkpoint.verified import Checkpoint, verify
from torchtrainer.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointWriteError,
    InvalidArgumentError,
)

__all__ = ["Checkpoint", "CheckpointStore", "newest_in", "next_generation"]

MIN_VERIFIED: Final = 2
"""Number of verified checkpoints that stay, whatever ``keep`` is, in case the disk damages the newest one."""
MAX_STEP: Final = 10**12 - 1
TRASH: Final = ".trash-"

_NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})

Write = Callable[[BinaryIO], object]
"""Fills an open file; the file can write, but not seek."""


class CheckpointStore:
    """The checkpoints below one directory. For one thread of one process; others may read at the same time.

    Opening it claims the directory for ``generation``: stores of earlier generations, wherever they are open, are refused from
    then on.

    Args:
        root: the directory; made if it is not there.
        keep: how many checkpoints stay, at least 2.
        generation: of this run: `next_generation` for one that continues; the same for all processes of the run.
        on_problem: told in a sentence or two what went wrong without stopping anything.

    Raises:
        InvalidArgumentError: ``keep`` or ``generation`` is below 1.
        CheckpointFencedError: a later generation owns the directory.
        CheckpointWriteError: the directory cannot be used: not writable, a link, or open to other users.
    """

    def __init__(self, root: Path, *, keep: int, generation: int, on_problem: Callable[[str], None]) -> None:
        if keep < 1 or generation < 1:
            raise InvalidArgumentError(f"keep and generation must be at least 1, got {keep} and {generation}")
        self.generation = generation
        self._keep = max(keep, MIN_VERIFIED)
        self._on_problem = on_problem
        self._verified: set[str] = set()
        try:
            self.root = claim(root, generation)
        except OSError as error:
            raise CheckpointWriteError(
                f"checkpoints cannot be kept in {root}: {error}. Pass CheckpointConfig(path=<a directory of your own that "
                "you can write to>)."
            ) from error
        self._sweep()

    def all(self) -> list[Path]:
        """Directories that look like checkpoints, newest first; nothing is verified.

        Raises:
            CheckpointError: the directory cannot be read.
        """
        try:
            with os.scandir(self.root) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            raise CheckpointError(f"checkpoints in {self.root} cannot be listed: {error}") from error
        found = [identity for identity in map(Identity.parse, names) if identity is not None]
        return [self.root / identity.name for identity in sorted(found, reverse=True)]

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; damaged ones are set aside and told of. None: there is none.

        Raises:
            CheckpointVersionError: the newest was written in a newer format.
            CheckpointError: the system could not read one, for a reason that says nothing about it.
        """
        sound = (self._verify_or_set_aside(path) for path in self.all())
        return next((checkpoint for checkpoint in sound if checkpoint is not None), None)

    def write(
        self, step: int, meta: Mapping[str, Any], files: Mapping[str, Write], *, reserve_bytes: int = 0
    ) -> Checkpoint:
        """Makes a checkpoint, verifies it, then lets go of the oldest.

        Args:
            step: optimizer steps done.
            meta: JSON data.
            files: what fills each file, by name. An exception from there comes back as it is, unless the system refused the
                bytes; nothing is left of the checkpoint then.
            reserve_bytes: known size; if there is less space than that, nothing is written at all.

        Returns:
            The checkpoint, on the disk and read back.

        Raises:
            InvalidArgumentError: ``step`` or the name of a file is not possible.
            CheckpointWriteError: it could not be written; older ones are intact.
            CheckpointFencedError: a later generation owns the directory.
        """
        if not 0 <= step <= MAX_STEP:
            raise InvalidArgumentError(f"step of a checkpoint must be between 0 and {MAX_STEP}, got {step}")

        with self._telling_what_failed(step, reserve_bytes):
            identity = Identity(generation=self.generation, serial=next_serial(self.root), step=step)

            def manifest_of(digests: dict[str, FileDigest]) -> Manifest:
                return Manifest(identity=identity, meta=dict(meta), files=digests)

            checkpoint = self._put(identity, manifest_of, files, reserve_bytes)
        self._retire()
        return checkpoint

    def adopt(self, manifest: Manifest, files: Mapping[str, Write]) -> Checkpoint:
        """Makes a copy of a checkpoint that is kept elsewhere, under the same name; one that is here already stays.

        Args:
            manifest: of the other one.
            files: what fills each of its files.

        Raises:
            InvalidArgumentError: the other one is of a later generation than this store.
            CheckpointDamagedError: what came is not what the manifest says; nothing of it is kept.
            CheckpointWriteError: it could not be written.
            CheckpointFencedError: a later generation owns the directory.
        """
        identity = manifest.identity
        if identity.generation > self.generation:
            raise InvalidArgumentError(
                f"{identity.name} is of a later generation than this store: open it with generation={identity.generation + 1}"
            )
        if self.root / identity.name in self.all():
            here = self._verify_or_set_aside(self.root / identity.name)
            if here is not None:
                return here

        def manifest_of(digests: dict[str, FileDigest]) -> Manifest:
            if digests != manifest.files:
                wrong = sorted(name for name in manifest.files if digests.get(name) != manifest.files[name])
                raise CheckpointDamagedError(f"{identity.name} was not written correctly: {wrong}")
            return manifest

        size_bytes = sum(digest.size_bytes for digest in manifest.files.values())
        with self._telling_what_failed(identity.step, size_bytes):
            return self._put(identity, manifest_of, files, size_bytes)

    def _put(
        self,
        identity: Identity,
        manifest_of: Callable[[dict[str, FileDigest]], Manifest],
        files: Mapping[str, Write],
        reserve_bytes: int,
    ) -> Checkpoint:
        """Brings a checkpoint to the disk, gives it its name, and reads it back."""
        for name in files:
            check_file_name(name)
        check_fence(self.root, self.generation)
        self._sweep()
        self._require_space(reserve_bytes)
        final = self.root / identity.name
        with self._temporary() as directory:
            digests = {
                name: write_file(directory / name, write, failpoints="checkpoint.payload")
                for name, write in files.items()
            }
            encoded = manifest_of(digests).encode()
            write_file(directory / MANIFEST, lambda file: file.write(encoded), failpoints="checkpoint.manifest")
            failpoint("checkpoint.directory.fsync")
            sync_directory(directory)
            check_fence(self.root, self.generation)
            failpoint("checkpoint.publish")
            directory.rename(final)
        failpoint("checkpoint.publish.fsync")
        sync_directory(self.root)
        failpoint("checkpoint.verify")
        checkpoint = self._verify_or_set_aside(final)
        if checkpoint is None:
            raise OSError(errno.EIO, "the bytes read back differ from those written")
        return checkpoint

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A directory in the making; if it did not get its final name, it is removed."""
        failpoint("checkpoint.directory")
        directory = new_directory(self.root, self.generation)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @contextmanager
    def _telling_what_failed(self, step: int, size_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointWriteError(self._what_failed(step, size_bytes, error)) from error

    def _what_failed(self, step: int, size_bytes: int, error: OSError) -> str:
        try:
            free = f"{_mib(shutil.disk_usage(self.root).free)} are free there"
        except OSError as unknown:
            free = f"the free space there is unknown ({unknown})"
        size = f"It needs {_mib(size_bytes)}, {free}" if size_bytes else f"Its size is not known, {free}"
        if error.errno in _FULL:
            advice = (
                "Free some space, lower CheckpointConfig(keep=...), or pass CheckpointConfig(path=...) on another disk."
            )
        elif error.errno in _NOT_WRITABLE:
            advice = "Make the directory writable, or pass CheckpointConfig(path=...) for another one."
        else:
            advice = "Check the disk (dmesg), or pass CheckpointConfig(path=...) on another one."
        return (
            f"the checkpoint of step {step} could not be written to {self.root}: {error}. {size}. "
            f"No older checkpoint was touched. {advice}"
        )

    def _require_space(self, reserve_bytes: int) -> None:
        # Asked, not reserved: posix_fallocate writes every block where the file system has no such call.
        if shutil.disk_usage(self.root).free < reserve_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _verify_or_set_aside(self, path: Path) -> Checkpoint | None:
        try:
            checkpoint = verify(path)
        except CheckpointDamagedError as error:
            self._verified.discard(path.name)
            if os.path.lexists(path):  # else another process let go of it meanwhile
                self._set_aside(path, error)
            return None
        self._verified.add(path.name)
        return checkpoint

    def _set_aside(self, path: Path, damage: CheckpointDamagedError) -> None:
        aside = path.with_name(path.name + CORRUPT)
        try:
            failpoint("checkpoint.set_aside")
            path.rename(aside)
            sync_directory(self.root)
        except OSError as error:
            self._on_problem(f"checkpoint {path.name} is damaged and is not used: {damage}. It stays in place: {error}")
        else:
            self._on_problem(f"checkpoint {path.name} is damaged and is not used: {damage}. It was renamed to {aside}")

    def _retire(self) -> None:
        """Deletes the oldest, while enough stay that are known to be good."""
        kept = verified = 0
        try:
            check_fence(self.root, self.generation)
            for path in self.all():
                if kept >= self._keep and verified >= MIN_VERIFIED:
                    self._delete(path)
                    continue
                if verified < MIN_VERIFIED:
                    if path.name not in self._verified and self._verify_or_set_aside(path) is None:
                        continue
                    verified += 1
                kept += 1
        except (OSError, CheckpointError) as error:
            self._on_problem(f"old checkpoints in {self.root} were not removed: {error}")

    def _delete(self, path: Path) -> None:
        trash = path.with_name(TRASH + path.name)
        failpoint("checkpoint.retire")
        path.rename(trash)
        self._verified.discard(path.name)
        failpoint("checkpoint.delete")
        shutil.rmtree(trash)

    def _sweep(self) -> None:
        """Removes what processes that died left unfinished."""
        try:
            with os.scandir(self.root) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            for name in names:
                thrown_away = name.startswith(TRASH) and Identity.parse(name.removeprefix(TRASH)) is not None
                if thrown_away or is_stale(name, self.generation):
                    failpoint("checkpoint.sweep")
                    shutil.rmtree(self.root / name)
        except OSError as error:
            self._on_problem(f"unfinished checkpoints in {self.root} were not removed: {error}")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**2:.1f} MiB"


def newest_in(root: Path, generation: int, on_problem: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint in a directory that verifies; None: there is none. Arguments as for `CheckpointStore`."""
    if not root.is_dir():
        return None
    return CheckpointStore(root, keep=MIN_VERIFIED, generation=generation, on_problem=on_problem).newest()
