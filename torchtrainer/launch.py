"""``python -m torchtrainer.launch``: a drop-in for ``python -m torch.distributed.launch``.

Without ``--use-env`` each worker gets ``--local-rank=<n>`` before the script's own arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchtrainer.launcher.options import Form, parse_unchecked
from torchtrainer.launcher.program import main as program_main
from torchtrainer.launcher.program import run_here


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line; None: that of this process. `launch` checks the values.

    Raises:
        SystemExit: with status 2 for unknown options and missing arguments.
    """
    return parse_unchecked(sys.argv[1:] if args is None else args, Form.LAUNCH)


def launch(args: argparse.Namespace) -> None:
    """Launches on this machine: see `torchtrainer.run.run`."""
    run_here(args)


def main(args: Sequence[str] | None = None) -> None:
    """Parses and launches: see `torchtrainer.run.main`."""
    launch(parse_args(args))


if __name__ == "__main__":
    sys.exit(program_main(sys.argv[1:], Form.LAUNCH))
