"""``torchtrainer replay-driver``: runs the journal of a driver's decisions through its machine again and compares the orders."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from torchtrainer.driver.replay import Difference, UnreadableJournalError, replay
from torchtrainer.process.own_files import printable

EXIT_DIFFERENT = 1
EXIT_UNREADABLE = 2
MAX_SHOWN = 2000
"""Characters shown of an event and of what it led to."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``torchtrainer replay-driver``."""
    parser.add_argument("file", metavar="FILE", type=Path, help="a journal: logs/driver.jsonl of a run directory")


def main(args: argparse.Namespace) -> int:
    """Replays a journal.

    Args:
        args: as `add_arguments` describes them.

    Returns:
        The exit status: 0: the same orders come out; 1: others do; 2: the file cannot be replayed.
    """
    try:
        replayed = replay(args.file)
    except (OSError, UnreadableJournalError) as error:
        print(f"torchtrainer replay-driver: {printable(str(error))}", file=sys.stderr)
        return EXIT_UNREADABLE
    if replayed.difference is not None:
        print("\n".join(_told(replayed.difference)))
        return EXIT_DIFFERENT
    print(f"the same orders come out: {replayed.events} events of {replayed.groups} worker groups")
    return 0


def _told(found: Difference) -> list[str]:
    return [
        f"line {found.line}, at {found.at_s:.3f} s, is the first whose event leads to something else",
        f"  event:    {_shown(found.event)}",
        f"  recorded: {_shown(found.recorded)}",
        f"  replayed: {_shown(found.replayed)}",
    ]


def _shown(value: Any) -> str:
    return printable(json.dumps(value), MAX_SHOWN)
