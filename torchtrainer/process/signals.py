"""Signals and exit codes: their names for people, and the ones that this package uses."""

from __future__ import annotations

import signal

STACK_DUMP_SIGNAL: int | None = getattr(signal, "SIGRTMIN", getattr(signal, "SIGUSR2", 0) - 3) + 3 or None
"""Makes a worker write its stacks; a real-time signal where there are some, so that user code keeps SIGUSR1 and SIGUSR2."""

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
"""Signals with which people, terminals and schedulers end programs, some of them sent to every process."""

EXIT_PREEMPTED = 75
"""Exit code: stopped with the state saved; start the same command again."""
MAY_BE_OUT_OF_MEMORY = -int(getattr(signal, "SIGKILL", 9))


def describe_exit(exit_code: int | None) -> str:
    """Says in words how a process ended.

    Args:
        exit_code: as `subprocess.Popen.returncode` gives it; None: unknown.
    """
    if exit_code is None:
        return "ended in an unknown way"
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"was killed by {name}"
