"""Ends a process with a certain exit code, even if a launcher or torch's own shutdown interferes."""

from __future__ import annotations

import atexit
import signal
import sys
import threading

from torchtrainer.process.child import leave


def keep_exit_code(code: int) -> None:
    """Has this process end with a code, unless an unhandled exception ends it; from the main thread.

    A launcher sends SIGTERM to the ranks that are left when one has ended, and those may be about to end by themselves. And
    torch now and then aborts a process while the interpreter is dismantled, which here is therefore left whole.

    Args:
        code: of the end.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    atexit.unregister(_end_now)
    atexit.register(_end_now, code)


def _end_now(code: int) -> None:
    """Runs everything else that was to be done at the end, then ends."""
    atexit.unregister(_end_now)
    if getattr(sys, "last_value", None) is not None:  # the interpreter ends with the code of the exception
        return
    leave(code)
