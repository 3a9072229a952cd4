"""The ``torchtrainer`` command: finds the subcommand and hands on the rest. ``--help`` and ``--version`` need no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchtrainer.launcher import program
from torchtrainer.launcher.options import Form
from torchtrainer.version import __version__

EXIT_USAGE = 2
COMMANDS = {
    "run": "start a script in several processes, with torchrun's options",
    "status": "show the state of a run",
    "doctor": "check versions, devices, fork safety, shared memory and time-outs",
    "verify-resume": "run a script with and without interruptions and compare the bits",
    "replay-driver": "replay the journal of a run's driver and compare the orders",
}
"""What each subcommand is for; one line of the help."""


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the whole command line; the subcommands have their own."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="torchtrainer",
        usage="torchtrainer [--help] [--version] COMMAND ...",
        description="Data-parallel PyTorch training on several workers.",
        epilog=f"commands:\n{commands}\n\n`torchtrainer COMMAND --help` shows the options of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"torchtrainer {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
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
    argv = sys.argv[1:] if argv is None else list(argv)
    # Split off by hand: argparse would take a "--" away that belongs to the script.
    at = next((at for at, argument in enumerate(argv) if argument in COMMANDS), None)
    if at is None or at > 0:
        make_parser().parse_args(argv)
        return EXIT_USAGE
    command, rest = argv[0], argv[1:]
    if command == "run":
        return program.main(rest, Form.RUN)
    if command == "verify-resume":
        from torchtrainer.launcher import verify_resume

        return verify_resume.main(rest)
    parser = argparse.ArgumentParser(prog=f"torchtrainer {command}", description=COMMANDS[command])
    if command == "status":
        from torchtrainer.launcher import status

        status.add_arguments(parser)
        return status.main(parser.parse_args(rest))
    if command == "replay-driver":
        from torchtrainer.launcher import replay_driver

        replay_driver.add_arguments(parser)
        return replay_driver.main(parser.parse_args(rest))
    from torchtrainer.launcher import doctor

    doctor.add_arguments(parser)
    return doctor.main(parser.parse_args(rest))


if __name__ == "__main__":
    sys.exit(main())
