"""Tells a process that another one is gone, and ends its own children with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torchtrainer.process.signals import STOP_SIGNALS

ENDED_STATES = ("Z", "X")
"""States in ``/proc`` of a process that has ended: not reaped yet, and being reaped."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_F_SETSIG = 10
"""Of ``fcntl``, which does not name it in every version of Python."""


class _Tie:
    """What this process's life is tied to.

    Attributes:
        broken: whether that is gone; for systems that do not end this process themselves.
    """

    def __init__(self) -> None:
        self.broken: Callable[[], bool] = bool


_tie = _Tie()


def tie_broken() -> bool:
    """Whether the process to whose life this one's is tied is gone; always False if it is tied to none."""
    return _tie.broken()


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent ends (Linux; elsewhere pipes and polling do).

    Call it from the main thread of a process whose parent forked it from a thread that lives as long as the parent: the
    signal is tied to that thread.

    Args:
        parent: pid that the parent had when this process was asked for; if it is gone already, so is this process.
    """
    be_killed_with_parent()
    _tie.broken = lambda: os.getppid() != parent
    if tie_broken():
        os._exit(1)


def die_with_holder(pipe: int) -> None:
    """Has the kernel kill this process when nobody holds the writing end of a pipe any more (Linux).

    Unlike `die_with_parent`, it does not matter which process started this one, and whether that still lives.

    Args:
        pipe: descriptor of the reading end, which is closed.
    """
    import fcntl  # there is none on Windows, where nobody calls this

    # The owner and the flags belong to what was opened: every process opens it for itself.
    mine = os.open(f"/proc/self/fd/{pipe}", os.O_RDONLY | os.O_NONBLOCK)
    os.close(pipe)
    fcntl.fcntl(mine, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(mine, _F_SETSIG, int(signal.SIGKILL))
    fcntl.fcntl(mine, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    watch = select.poll()
    watch.register(mine, 0)
    _tie.broken = lambda: bool(watch.poll(0))
    if tie_broken():  # before the kernel was asked
        os._exit(1)


def adopt_orphans() -> bool:
    """Makes what descendants of this process leave behind its own children; returns whether the system can (Linux)."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def be_killed_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies; does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def settle_signals() -> dict[int, Any]:
    """For processes that only serve others: what they inherited is taken back, and signals to stop are left to the others.

    Schedulers send those to every process of a job, and who serves must not go before those who save.

    Returns:
        What those signals did before, for a process that is forked from this one: `restore_signals`.
    """
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in _stop_signals()}
    unblock_signals()
    return before


def restore_signals(before: Mapping[int, Any]) -> None:
    """Undoes `settle_signals`, except for the mask."""
    for signum, handler in before.items():
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """A process that is started inside begins with these signals blocked: none ends it before `settle_signals`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop_signals() -> list[int]:
    return [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]


def unblock_signals() -> None:
    """Takes back a signal mask that this process inherited: one that blocks SIGCHLD would hide every death from it.

    What came while it was blocked is then delivered, and does what the process has meanwhile said that it does.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, [])


def open_pidfd(pid: int) -> int | None:
    """Opens a descriptor that becomes readable when the process ends; None where the system has no such thing."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def kill_process_group(leader: int) -> None:
    """Kills what is left of the process group of a process that has ended."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody left
        return


def kill_session(pid: int) -> None:
    """Kills a process that leads a session, and everything in its process group."""
    kill_process_group(pid)
    signal_process(pid, signal.SIGKILL)  # it may not lead a group yet


def signal_process(pid: int, signum: int) -> None:
    """Sends a signal to one process; one that is gone needs none."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return


def thread_count() -> int:
    """Threads of this process, native ones included; 1 where the system does not say."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def is_alive(pid: int) -> bool:
    """Whether a process with this id can still do something, whoever's it is; always True where asking would end it (Windows).

    One that has ended and was not reaped by its parent still has its id, and does nothing any more.
    """
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except OSError:
        return False
    stat = read_stat(pid)
    return stat is None or stat[0] not in ENDED_STATES


def read_stat(pid: int) -> list[str] | None:
    """What ``/proc`` says of a process, from its state on; None: it says nothing."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            text = file.read()
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the name before it may hold blanks and parentheses
