"""Ctrl-C at safe points only: an exception between receiving a message and acting on it would lose the message."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from types import FrameType, TracebackType


class DeferredInterrupts:
    """Holds Ctrl-C back inside ``with``: what SIGINT does in this process happens when the block is left.

    Only where SIGINT runs Python code, in the main thread; elsewhere nothing can come in between. Does not nest.
    """

    def __init__(self) -> None:
        self._came: tuple[int, FrameType | None] | None = None
        self._usual: signal._HANDLER = None
        self._holds = False

    def __enter__(self) -> None:
        self._came = None
        if threading.current_thread() is not threading.main_thread():
            return
        self._usual = signal.getsignal(signal.SIGINT)
        if callable(self._usual):
            signal.signal(signal.SIGINT, self._hold)
            self._holds = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._holds:
            return
        self._holds = False
        signal.signal(signal.SIGINT, self._usual)
        came, self._came = self._came, None
        if came is not None and callable(self._usual):
            self._usual(*came)

    def _hold(self, signum: int, frame: FrameType | None) -> None:
        self._came = (signum, frame)


def forget_interrupted_calls() -> None:
    """Drops the variables of calls that Ctrl-C ended, which a notebook or an interactive interpreter keeps for debuggers.

    Among them is the trainer: it would live on, with its workers, after its name was given to a new one.
    """
    error = getattr(sys, "last_value", None)
    while isinstance(error, KeyboardInterrupt):
        traceback.clear_frames(error.__traceback__)
        for frame, _line in traceback.walk_tb(error.__traceback__):
            _ = frame.f_locals  # a copy that was made for display is brought up to date
        error = error.__context__
