"""The error file of a rank, in the form that torch's launchers write and read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from torchtrainer.process.own_files import open_own

NS_PER_S = 1_000_000_000


def write_error_file(
    path: str | Path, *, type_name: str, text: str, traceback: str, when_ns: int | None = None
) -> None:
    """Writes why a rank failed; an earlier file stays, as the first error is the root cause.

    Args:
        path: where.
        type_name, text: of the exception.
        traceback: formatted.
        when_ns: wall clock, in nanoseconds since 1970; None: now. torch's format has whole seconds; the rest stands beside.
    """
    when_ns = time.time_ns() if when_ns is None else when_ns
    extra = {"py_callstack": traceback, "timestamp": str(when_ns // NS_PER_S), "timestamp_ns": when_ns}
    record = {"message": {"message": f"{type_name}: {text}", "extraInfo": extra}}
    try:
        fd = open_own(Path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return
    with os.fdopen(fd, "w") as file:
        json.dump(record, file)
