"""Runs a script as ``--run-path`` asks for: by `runpy`, with its errors recorded. An exec'd worker runs this file."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record


def run_recorded(path: str, arguments: Sequence[str]) -> None:
    """Runs a script as ``__main__``; leaving it with exit code 0 is success.

    Args:
        path: of the script.
        arguments: its ``sys.argv[1:]``.
    """
    sys.argv[:] = [path, *arguments]
    try:
        record(runpy.run_path)(path, run_name="__main__")
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            raise


if __name__ == "__main__":
    del sys.path[0]  # this file's own directory
    run_recorded(sys.argv[1], sys.argv[2:])
