"""Compiles models with ``torch.compile``: the rest runs as it is, and results do not depend on the past."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from torchtrainer.errors import InvalidArgumentError

_FAILED = "WON'T CONVERT"
_LOGGER = "torch._dynamo.convert_frame"
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Unsupported|Failed)\b.*")
"""The line of a traceback that names an exception."""
_EXPLAINS = "Explanation:"


def compile_model(model: nn.Module, options: Mapping[str, Any], *, say: Callable[[str], None] | None) -> None:
    """Has a model be compiled when it is called first.

    Each size of a batch is compiled by itself unless ``options`` has another ``dynamic``: code for changing sizes replaces that
    for the first size once another one was seen, so that the last bits would depend on what a process has seen.

    Args:
        model: the user's.
        options: of ``torch.compile``.
        say: tells the user that a part runs uncompiled; None: somebody else does.

    Raises:
        InvalidArgumentError: ``torch.compile`` does not take the options.
    """
    import torch._dynamo

    torch._dynamo.config.suppress_errors = (
        True  # what fails to compile runs as it was written: the same numbers, more slowly
    )
    logger = logging.getLogger(_LOGGER)
    if not any(isinstance(one, _FailureNotices) for one in logger.filters):
        logger.addFilter(_FailureNotices(say))
    try:
        model.compile(**{"dynamic": False, **options})
    except Exception as error:
        raise InvalidArgumentError(
            f"torch.compile does not take compile={dict(options)!r}: {error}. Pass compile=True, or a dict of its arguments"
        ) from error


class _FailureNotices(logging.Filter):
    """Turns the compiler's report of a failure, many lines on every rank, into one line on one."""

    def __init__(self, say: Callable[[str], None] | None) -> None:
        super().__init__()
        self._say = say

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith(_FAILED):
            return True
        if self._say is not None:
            say, self._say = self._say, None
            say(f"compile: a part of the model cannot be compiled and runs as it is: {_reason(text)}")
        return False


def _reason(text: str) -> str:
    """The exception in a report, and what the compiler adds to explain it."""
    lines = [one.strip() for one in text.splitlines()]
    found = [one for one in lines if one.startswith(_EXPLAINS)][:1]
    at = next((at for at, one in enumerate(lines) if _EXCEPTION.match(one)), None)
    if at is not None:
        goes_on = lines[at].endswith(":")  # torch before 2.7 breaks the line before the message
        found = [*lines[at : at + 1 + goes_on], *found]
    return " ".join(found) if found else lines[0]
