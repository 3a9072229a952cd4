"""The manifest of a checkpoint: what makes a directory of files a checkpoint, and the names of checkpoints.

``manifest.json`` is written last. It is JSON whose last line but one is the digest of all bytes before it, so that no bit of
the file can change unseen::

    {
     "format": 1,
     "step": 1200, "generation": 2, "serial": 17,
     "torchtrainer": "0.1.0", "created": 1790000000.0,
     "meta": {...},
     "files": {"state.pt": {"size_bytes": 4711, "sha256": "..."}},
     "sha256": "..."
    }

``format`` and the place of the digest stay the same in every version, so that a newer checkpoint is told from a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from torchtrainer.checkpoint.durable import FileDigest
from torchtrainer.errors import (
    CheckpointDamagedError,
    CheckpointVersionError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
)
from torchtrainer.version import __version__

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
MAX_MANIFEST_BYTES: Final = 64 * 1024**2
"""Longest manifest that is read."""

_NAME = re.compile(r"step-(?P<step>\d{12})-g(?P<generation>\d{4,})-n(?P<serial>\d{6,})", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


@dataclass(frozen=True, kw_only=True, order=True)
class Identity:
    """Which checkpoint it is; the greater one is the newer one.

    A later generation always knows better than an earlier one; within a generation the last one written counts, also after
    the steps were set back.

    Attributes:
        generation: of the store, when it was written; one more for each run that went on.
        serial: one more for each checkpoint of the store.
        step: optimizer steps done.
    """

    generation: int
    serial: int
    step: int

    @property
    def name(self) -> str:
        """Name of its directory."""
        return f"step-{self.step:012d}-g{self.generation:04d}-n{self.serial:06d}"

    @classmethod
    def parse(cls, name: str) -> Identity | None:
        """The checkpoint that a directory's name stands for, or None."""
        match = _NAME.fullmatch(name)
        return match and cls(**{key: int(value) for key, value in match.groupdict().items()})


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
        identity: which checkpoint it is.
        meta: the writer's own JSON data.
        files: by name.
        torchtrainer: version that wrote it.
        created_s: wall clock, seconds since 1970.
    """

    identity: Identity
    meta: dict[str, Any]
    files: dict[str, FileDigest]
    torchtrainer: str = __version__
    created_s: float = field(default_factory=time.time)

    def encode(self) -> bytes:
        """The content of ``manifest.json``.

        Raises:
            InvalidArgumentTypeError: ``meta`` is not JSON data.
            InvalidArgumentError: ``meta`` is too large.
        """
        fields = {
            "format": FORMAT,
            **asdict(self.identity),
            "torchtrainer": self.torchtrainer,
            "created": self.created_s,
            "meta": self.meta,
            "files": {name: asdict(digest) for name, digest in self.files.items()},
        }
        try:
            text = json.dumps(fields, indent=1)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentTypeError(f"meta of a checkpoint must be JSON data: {error}") from error
        head = text.removesuffix("\n}").encode() + b",\n "
        if len(head) + len(_tail(head)) > MAX_MANIFEST_BYTES:
            raise InvalidArgumentError(
                f"meta of a checkpoint makes a manifest of {len(head)} bytes; at most {MAX_MANIFEST_BYTES} are read back: "
                "put large data into files"
            )
        return head + _tail(head)

    @classmethod
    def decode(cls, raw: bytes, where: str) -> Manifest:
        """Reads the content of a ``manifest.json``.

        Args:
            raw: all of it.
            where: what errors call it.

        Raises:
            CheckpointDamagedError: it is not what was written.
            CheckpointVersionError: it was written by a newer version.
        """
        head = raw[: -len(_tail(b""))]
        if raw != head + _tail(head):
            raise CheckpointDamagedError(f"{where} is corrupt: its digest does not match")
        try:
            fields = json.loads(raw)
            version, writer = fields["format"], str(fields.get("torchtrainer"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointDamagedError(f"{where} is not a manifest: {error!r}") from error
        if isinstance(version, int) and version > FORMAT:
            raise CheckpointVersionError(
                f"{where} has format {version}, written by torchtrainer {writer}; torchtrainer {__version__} reads formats "
                f"up to {FORMAT}. Install a newer torchtrainer to resume from it, or start fresh in another directory. "
                "Nothing was changed."
            )
        try:
            return cls._from(fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointDamagedError(f"{where} is not a manifest of format {FORMAT}: {error!r}") from error

    @classmethod
    def _from(cls, fields: Mapping[str, Any]) -> Manifest:
        identity = Identity(**{key: fields[key] for key in ("generation", "serial", "step")})
        if fields["format"] != FORMAT or Identity.parse(identity.name) != identity:
            raise ValueError(f"format {fields['format']!r}, {identity}")
        files = {check_file_name(name): FileDigest(**entry) for name, entry in fields["files"].items()}
        for name, digest in files.items():
            if not (isinstance(digest.size_bytes, int) and digest.size_bytes >= 0 and _SHA256.fullmatch(digest.sha256)):
                raise ValueError(f"file {name!r} has {digest}")
        return cls(
            identity=identity,
            meta=dict(fields["meta"]),
            files=files,
            torchtrainer=str(fields["torchtrainer"]),
            created_s=float(fields["created"]),
        )


def check_file_name(name: str) -> str:
    """Returns a name that stays inside of its directory on every system.

    Raises:
        InvalidArgumentError: it may not.
    """
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        raise InvalidArgumentError(
            f"a file of a checkpoint cannot be called {name!r}: letters, digits, '_', '-' and '.' (not first) are allowed, "
            f"and {MANIFEST!r} is taken"
        )
    return name


def _tail(head: bytes) -> bytes:
    """The end of a manifest that starts with these bytes; always of the same length."""
    return f'"sha256": "{hashlib.sha256(head).hexdigest()}"\n}}\n'.encode()
