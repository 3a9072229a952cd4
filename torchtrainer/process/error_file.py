"""The error file of a rank, in the form that torch's launchers write and read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


def write_error_file(path: Path, *, type_name: str, text: str, traceback: str) -> None:
    """Writes why a rank failed; an earlier file stays, as the first error is the root cause.

    Args:
        path: where.
        type_name, text: of the exception.
        traceback: formatted.
    """
    extra = {"py_callstack": traceback, "timestamp": str(int(time.time()))}
    record = {"message": {"message": f"{type_name}: {text}", "extraInfo": extra}}
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(fd, "w") as file:
        json.dump(record, file)
