"""Who does the same work, and with which command."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compare import PROGRAMS, TORCHRUN

PLAIN = "plain DDP under torchrun"
OURS = "torchtrainer"
OURS_BF16 = 'torchtrainer, precision="bf16"'
OURS_FORMAT = 'torchtrainer, memory_format="auto"'
PACKAGES = ("torchtrainer", "torch", "torchvision", "accelerate", "lightning", "ray", "pyzmq", "scikit-learn")
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One row of the tables.

    Attributes:
        name: of the row.
        package: that has to be there.
        program: below ``programs``.
        starter: what starts it.
        options: for the program.
    """

    name: str
    package: str
    program: str
    starter: Sequence[str] = (sys.executable,)
    options: Sequence[str] = ()

    @property
    def installed(self) -> bool:
        """Whether it can be run here."""
        return find_spec(self.package) is not None

    def command(self, work: str, *options: str) -> list[str]:
        """The command that does a work."""
        return [*self.starter, str(PROGRAMS / self.program), "--work", work, *self.options, *options]


PEERS = (
    Peer(name=PLAIN, package="torch", program="peer_by_hand.py", starter=TORCHRUN),
    Peer(name="Accelerate", package="accelerate", program="peer_accelerate.py", starter=TORCHRUN),
    Peer(name="Lightning Fabric", package="lightning", program="peer_fabric.py"),
    Peer(name="Lightning Trainer", package="lightning", program="peer_lightning.py"),
    Peer(name="Ray Train", package="ray", program="peer_ray.py"),
    Peer(name=OURS, package="torchtrainer", program="peer_torchtrainer.py"),
)
VARIANTS = (
    Peer(name=OURS_BF16, package="torchtrainer", program="peer_torchtrainer.py", options=("--precision", "bf16")),
    Peer(name=OURS_FORMAT, package="torchtrainer", program="peer_torchtrainer.py", options=("--memory-format", "auto")),
)


def versions() -> dict[str, str]:
    """Of everything that is compared; ``not installed`` where it is not."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on, and nothing that names the machine."""
    facts: dict[str, Any] = {"system": platform.system(), "architecture": platform.machine()}
    facts["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1)
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        facts["processor"] = names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        facts["processor"] = platform.processor() or "not known"
    if hasattr(os, "getloadavg"):
        facts["load_before"] = round(os.getloadavg()[0], 2)
    return facts
