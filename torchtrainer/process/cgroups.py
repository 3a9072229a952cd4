"""Limits of this process's control groups, of both versions, and the cores that they leave. Linux; elsewhere no limit.

What is read below ``/proc`` and ``/sys`` is taken from a root that tests can give.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NO_LIMIT = 1 << 60
"""Version 1 of control groups shows a number of this size where there is no limit."""


@dataclass(frozen=True)
class Mounts:
    """Where the proc and cgroup file systems are mounted."""

    proc: Path = Path("/proc")
    root: Path = Path("/sys/fs/cgroup")


HERE = Mounts()


def cgroup_values(name: str, v1: str = "", *, at: Mounts = HERE) -> Iterator[str]:
    """Values of one file in this process's control groups, from its own group up to the top.

    Args:
        name: of the file in the unified hierarchy, such as ``memory.max``; empty for none.
        v1: controller and file in the older hierarchies, such as ``memory/memory.limit_in_bytes``.
        at: where to look.
    """
    controller, _, v1_name = v1.partition("/")
    try:
        lines = (at.proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "" and name:
            top, file = at.root, name
        elif controller and controller in controllers.split(","):
            top, file = at.root / controller, v1_name
        else:
            continue
        own = top / group.lstrip("/")
        # In a container the group may be named as the host sees it, and not be there: its top is then ours.
        for directory in (own, *(parent for parent in own.parents if parent.is_relative_to(top))):
            try:
                yield (directory / file).read_text().strip()
            except OSError:
                continue


def cgroup_limit(name: str, v1: str = "", *, at: Mounts = HERE) -> int | None:
    """The smallest of the limits in a control group's file, None for no limit; arguments as for `cgroup_values`."""
    limits = [int(value) for value in cgroup_values(name, v1, at=at) if value.isdecimal()]
    lowest = min(limits, default=NO_LIMIT)
    return None if lowest >= NO_LIMIT else lowest


def cgroup_memory_left(*, at: Mounts = HERE) -> int | None:
    """Bytes until this process's control groups are full, None for no limit. Pages of files that can be let go do not count."""
    groups = zip(
        cgroup_values("memory.max", "memory/memory.limit_in_bytes", at=at),
        cgroup_values("memory.current", "memory/memory.usage_in_bytes", at=at),
        cgroup_values("memory.stat", "memory/memory.stat", at=at),
        strict=False,
    )
    left = [
        int(limit) - int(used) + _unused_file_pages(stat)
        for limit, used, stat in groups
        if limit.isdecimal() and int(limit) < NO_LIMIT
    ]
    return None if not left else max(0, min(left))


def _unused_file_pages(stat: str) -> int:
    counts = dict(line.split(maxsplit=1) for line in stat.splitlines())
    return int(counts.get("total_inactive_file", counts.get("inactive_file", "0")))


def cpu_quota(*, at: Mounts = HERE) -> float | None:
    """Cores' worth of time that the control groups allow; None: no limit."""
    pairs = [tuple(value.split()) for value in cgroup_values("cpu.max", at=at)]
    quotas = cgroup_values("", "cpu/cpu.cfs_quota_us", at=at)
    pairs += zip(quotas, cgroup_values("", "cpu/cpu.cfs_period_us", at=at), strict=False)
    allowed = [int(quota) / int(period) for quota, period in pairs if quota.isdecimal() and int(period) > 0]
    return min(allowed, default=None)


def cores_by_affinity() -> int:
    """Cores that the system may run this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores(*, at: Mounts = HERE) -> int:
    """How many cores this process and its children can keep busy: by affinity, and by the quota of its control groups.

    Of a quota, whole cores count, at least one: a thread more than that is stopped in every period of the scheduler, and whoever
    exchanges with it waits.
    """
    quota = cpu_quota(at=at)
    cores = cores_by_affinity()
    return cores if quota is None else max(1, min(cores, int(quota)))
