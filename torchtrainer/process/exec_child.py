"""Entry of a worker that is exec'd instead of forked: reads its `ChildSpec` from standard input."""

from __future__ import annotations

import json
import sys
from typing import NoReturn

from torchtrainer.process.child import leave, run_child


def main(arguments: list[str]) -> NoReturn:
    """Runs the worker described on standard input.

    Args:
        arguments: pid of the process that started this one.
    """
    leave(run_child(json.load(sys.stdin), parent=int(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
