"""Tells whether the system killed processes for memory, and says which ones it should kill first."""

from __future__ import annotations

import contextlib
from pathlib import Path

from torchtrainer.process.cgroups import cgroup_values
from torchtrainer.process.signals import MAY_BE_OUT_OF_MEMORY

SPAWNER_MORE, WORKER_MORE = 150, 300
"""How much likelier than others they are to be killed for memory, in thousandths of the machine's memory."""
_MOST = 1000


def oom_kills() -> int:
    """How many processes of this control group were killed for memory so far; 0 where the system does not say."""
    own = next(cgroup_values("memory.events", "memory/memory.oom_control"), "")
    return sum(int(line.split()[1]) for line in own.splitlines() if line.startswith("oom_kill "))


class OomWatch:
    """Notices that a process of this control group was killed for memory since it was asked last."""

    def __init__(self) -> None:
        self._kills = oom_kills()

    def killed(self) -> bool:
        """Whether there was such a kill."""
        before, self._kills = self._kills, oom_kills()
        return self._kills > before

    def explain(self, exit_code: int | None) -> str:
        """What an error adds about the end of a process of ours: that it was killed for memory, or may have been; or nothing."""
        if exit_code != MAY_BE_OUT_OF_MEMORY:
            return ""
        if self.killed():
            return (
                ": the system was out of memory and killed it. Use a smaller batch or fewer workers, or give the machine or "
                "container more memory"
            )
        return ": if nobody killed it by hand, it was likely out of memory. Try a smaller batch or fewer workers"


def be_killed_first(more: int, *, own: Path = Path("/proc/self/oom_score_adj")) -> None:
    """Has the system, where it needs memory, kill this process before those that others cannot do without.

    A worker or a spawner that is lost is replaced; with the host or the driver the run would end. What this process starts
    later is killed as early. Does nothing where the system has no such number.
    """
    with contextlib.suppress(OSError, ValueError):
        own.write_text(str(min(_MOST, int(own.read_text()) + more)))
