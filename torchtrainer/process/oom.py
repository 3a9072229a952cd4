"""Whether the system has killed processes for memory."""

from __future__ import annotations

from pathlib import Path


def oom_kills() -> int:
    """How many processes of this control group were killed for memory so far; 0 where the system does not say."""
    total = 0
    for path in _memory_event_files():
        try:
            text = path.read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))
    return total


def _memory_event_files() -> list[Path]:
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files.append(Path(f"/sys/fs/cgroup{path}/memory.events"))
        elif "memory" in controllers.split(","):
            files.append(Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control"))
    return files


class OomWatch:
    """Notices that a process of this control group was killed for memory since it was asked last."""

    def __init__(self) -> None:
        self._kills = oom_kills()

    def killed(self) -> bool:
        """Whether there was such a kill."""
        before, self._kills = self._kills, oom_kills()
        return self._kills > before
