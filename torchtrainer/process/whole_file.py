"""Small files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Puts a file, for its owner only, in the place of the one that is there, once its content is on the disk.

    Raises:
        OSError: it could not be written; the old one is as it was.
    """
    unready = path.with_name(f".{path.name}.unready")
    with open(os.open(unready, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unready, path)
