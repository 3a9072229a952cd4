"""``python -m torchtrainer.run``: a drop-in for ``python -m torch.distributed.run``, which is torchrun.

From Python, `main` and `run` take what torch's take and raise what they raise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchtrainer.launcher.options import Form, make_parser, parse_unchecked
from torchtrainer.launcher.program import main as program_main
from torchtrainer.launcher.program import run_here


def get_args_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    return make_parser(Form.MODULE_RUN)


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line; None: that of this process. `run` checks the values.

    Raises:
        SystemExit: with status 2 for unknown options and missing arguments.
    """
    return parse_unchecked(sys.argv[1:] if args is None else args, Form.MODULE_RUN)


def run(args: argparse.Namespace) -> None:
    """Launches on this machine, within the calling process and from its main thread.

    Args:
        args: as `parse_args` returns them, or ``torch.distributed.run.parse_args``. They stay as they are.

    Raises:
        ValueError: a value is wrong, or options exclude each other.
        ChildFailedError: workers failed: torch's class, with torch's fields.
        SignalException: a signal ended it.
        SystemExit: with 75, if workers stopped for a preemption with their state saved.
    """
    run_here(args)


def main(args: Sequence[str] | None = None) -> None:
    """Parses and launches.

    Args:
        args: command line; None: that of this process.

    Raises:
        as `run` and `parse_args`.
    """
    run(parse_args(args))


if __name__ == "__main__":
    sys.exit(program_main(sys.argv[1:], Form.MODULE_RUN))
