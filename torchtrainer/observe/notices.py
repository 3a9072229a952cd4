"""How the package tells its user something noteworthy that is not an error."""

from __future__ import annotations

import sys
from typing import Protocol


class TextSink(Protocol):
    """Where a line of text goes: a stream such as ``sys.stderr``, or a progress bar that must not be torn."""

    def write(self, text: str, /) -> object:
        """Takes the text, which ends with a newline."""


def notice(text: str, *, stream: TextSink | None = None) -> None:
    """Tells the user something in one line that starts with ``torchtrainer:``.

    Args:
        text: what to say; line breaks become blanks, so that it stays one line.
        stream: where it goes; None: ``sys.stderr`` as it is now (a notebook replaces it).
    """
    sink = sys.stderr if stream is None else stream
    sink.write(f"torchtrainer: {' '.join(text.split())}\n")
