"""Directories in the making: named after the process that makes them, so that only those of dead processes are removed."""

from __future__ import annotations

import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from torchtrainer.process.guard import ENDED_STATES, is_alive, read_stat

_NAME = re.compile(
    r"\.tmp-g(?P<generation>\d+)-(?P<boot>[0-9a-f]*)-(?P<pid>\d+)-(?P<started>\d*)-[0-9a-f]+-(?P<host>.+)", re.ASCII
)

_STARTED = 19
"""Index of a process's start time in the result of `read_stat`."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One life of one process.

    Attributes:
        host: name of its machine.
        boot: which start of that machine; empty where the system does not say.
        pid: its number.
        started: when it started, in ticks since the boot, because numbers are used again; empty where not known.
    """

    host: str
    boot: str
    pid: int
    started: str

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        return cls(host=_host(), boot=_boot(), pid=pid, started=_started(pid) or "")

    def may_live(self) -> bool | None:
        """Whether the process can still be there; None: it is on another machine."""
        if self.host != _host():
            return None
        if self.boot != _boot():
            return False
        started = _started(self.pid)
        return started is not None and started == self.started


def new_directory(root: Path, generation: int) -> Path:
    """Makes an empty directory of this process, mode 0700.

    Raises:
        OSError: it cannot be made.
    """
    owner = Owner.here()
    name = f".tmp-g{generation}-{owner.boot}-{owner.pid}-{owner.started}-{secrets.token_hex(8)}-{owner.host}"
    path = root / name
    path.mkdir(mode=0o700)
    return path


def is_stale(name: str, generation: int) -> bool:
    """Whether a directory in the making can never become a checkpoint.

    Args:
        name: of the directory.
        generation: that owns the store now. Whether a process on another machine lives is not known here, but one of an
            older generation is refused when it wants to publish.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    owner = Owner(host=match["host"], boot=match["boot"], pid=int(match["pid"]), started=match["started"])
    lives = owner.may_live()
    return int(match["generation"]) < generation if lives is None else not lives


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())[:64] or "_"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started; empty if the system does not say, None if there is no such process."""
    if not Path("/proc/self/stat").exists():
        return "" if is_alive(pid) else None
    stat = read_stat(pid)
    return None if stat is None or stat[0] in ENDED_STATES else stat[_STARTED]
