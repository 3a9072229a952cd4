"""The ``torchtrainer`` command.

It answers ``--help`` and ``--version`` without importing torch. The subcommands are part of the interface and are named
in the help; calling one that this version does not have prints one line and ends with status 2, as wrong usage does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torchtrainer.version import __version__

EXIT_USAGE = 2


@dataclass(frozen=True, kw_only=True)
class PlannedCommand:
    """A subcommand that has its name and place, but is not in this version.

    Attributes:
        name: as it is typed.
        summary: what it is for; one line of the help.
        instead: what does the job in this version; completes "until then, ...".
    """

    name: str
    summary: str
    instead: str


PLANNED_COMMANDS = (
    PlannedCommand(
        name="run",
        summary="start a script in several processes, with torchrun's options",
        instead="start the script with python, or with torchrun --nproc-per-node N",
    ),
    PlannedCommand(
        name="status",
        summary="show the state of a run",
        instead="call status() on the TorchTrainer",
    ),
    PlannedCommand(
        name="verify-resume",
        summary="run a script with and without interruptions and compare the bits",
        instead="there is nothing to verify: this version does not resume runs",
    ),
    PlannedCommand(
        name="doctor",
        summary="check versions, devices, fork safety, shared memory and time-outs",
        instead="python -m torch.utils.collect_env shows versions and devices",
    ),
)


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the whole command line."""
    width = max(len(command.name) for command in PLANNED_COMMANDS)
    planned = "\n".join(f"  {command.name:<{width}}  {command.summary}" for command in PLANNED_COMMANDS)
    parser = argparse.ArgumentParser(
        prog="torchtrainer",
        usage="torchtrainer [--help] [--version] COMMAND ...",
        description="Data-parallel PyTorch training on several workers.",
        epilog=f"commands (not in version {__version__} yet):\n{planned}\n\n"
        "Training itself needs no command: a script that makes a TorchTrainer is started with python.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"torchtrainer {__version__}")
    parser.add_argument(
        "command",
        metavar="COMMAND",
        choices=[command.name for command in PLANNED_COMMANDS],
        help="one of the commands below",
    )
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ``torchtrainer`` command.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        The exit status.

    Raises:
        SystemExit: after ``--help`` and ``--version``, with status 0, and for arguments that are not understood, with
            status 2.
    """
    chosen = make_parser().parse_args(argv).command
    command = next(command for command in PLANNED_COMMANDS if command.name == chosen)
    print(
        f"torchtrainer {command.name} is not in version {__version__} yet; until then, {command.instead}.",
        file=sys.stderr,
    )
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
