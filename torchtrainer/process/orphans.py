"""Children that a process inherits when their parent ends, and has to wait for."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable

from torchtrainer.process.guard import kill_process_group, open_pidfd
from torchtrainer.process.starters import RSS_UNIT_BYTES, ChildExited

EXIT_UNKNOWN = 255
"""Stands for an exit code that only a process knew that is gone."""


class Orphans:
    """Children of this process that another one had started. Used by one thread."""

    def __init__(self) -> None:
        self._pidfds: dict[int, int | None] = {}

    def fds(self) -> list[int]:
        """Descriptors that become readable when one of those that were adopted ends."""
        return [fd for fd in self._pidfds.values() if fd is not None]

    def adopt(self, pids: Iterable[int]) -> list[ChildExited]:
        """Tells from now on when these end; returns those whose end nobody can tell any more.

        Args:
            pids: of processes whose parent is gone.
        """
        gone = []
        for pid in pids:
            if pid in self._pidfds:
                continue
            try:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # its parent had seen its end, and not told it
                gone.append(ChildExited(pid=pid, exit_code=EXIT_UNKNOWN, max_rss_bytes=0))
                continue
            self._pidfds[pid] = open_pidfd(pid)
        return gone

    def reap(self, waited_for: Collection[int]) -> list[ChildExited]:
        """Which of those that were adopted have ended. Whatever else was left to this process and has ended is reaped.

        Args:
            waited_for: children for whose end somebody else waits.
        """
        ended = []
        while (found := _ended_child()) is not None and found not in waited_for:
            if found in self._pidfds:
                kill_process_group(found)  # before it is reaped: its id cannot be anybody else's yet
            pid, status, usage = os.wait4(found, 0)
            if pid in self._pidfds:
                pidfd = self._pidfds.pop(pid)
                if pidfd is not None:
                    os.close(pidfd)
                code = os.waitstatus_to_exitcode(status)
                ended.append(ChildExited(pid=pid, exit_code=code, max_rss_bytes=usage.ru_maxrss * RSS_UNIT_BYTES))
        return ended


def _ended_child() -> int | None:
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if found is None else found.si_pid
