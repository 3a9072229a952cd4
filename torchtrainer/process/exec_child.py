"""Entry of a worker that is exec'd instead of forked: reads its `ChildSpec` from standard input."""

from __future__ import annotations

import json
import sys

from torchtrainer.process.child import run_child


def main(arguments: list[str]) -> int:
    """Runs the worker described on standard input.

    Args:
        arguments: pid of the process that started this one.
    """
    return run_child(json.load(sys.stdin), parent=int(arguments[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
