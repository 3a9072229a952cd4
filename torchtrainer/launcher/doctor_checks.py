"""What ``torchtrainer doctor`` looks at without torch: the machine, its limits, its names, the environment, the time-outs.

Every check is a function without arguments that returns its findings; it may take long, hang or crash, since the command
runs it in a process of its own. What a check reads below ``/proc`` and ``/sys`` it takes from a root that tests can give.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchtrainer.config import FailureConfig, Timeouts, TrainSettings
from torchtrainer.observe.devices import GIB, MIB, format_bytes
from torchtrainer.process.cgroups import (
    cgroup_limit,
    cgroup_memory_left,
    cgroup_values,
    cores_by_affinity,
    cpu_quota,
    usable_cores,
)
from torchtrainer.process.paths import SOCKET_PATH_LIMIT, EnginePaths
from torchtrainer.topology import LOOPBACK
from torchtrainer.version import __version__

Level = Literal["ok", "warn", "fail"]

OLDEST_PYTHON = (3, 10)
PACKAGES: Mapping[str, tuple[int, ...] | None] = {
    "torch": (2, 6),
    "cloudpickle": (3, 0),
    "pyzmq": (26, 0),
    "tqdm": (4, 66),
    "nvidia-ml-py": (12, 535),
    "torchvision": None,
    "numpy": None,
}
"""Packages and the oldest version that works; None: optional, only reported."""

MIN_MEMORY_BYTES = GIB
"""Less free memory than this does not hold torch in two processes and a model."""
MIN_SHARED_BYTES = GIB
"""Less shared memory than this (containers get 64 MiB) is soon too little for loaders with workers and for gradients."""
MIN_TEMPORARY_BYTES = 256 * MIB
"""Less room than this for temporary files stops torch's compiler cache and larger specs."""
MIN_OPEN_FILES = 1024
MIN_FREE_PROCESSES = 512
"""Threads count as processes: a worker of a large machine has a hundred."""
SLOW_LOOKUP_S = 1.0
"""A look-up of the host name that takes longer is felt at every start."""
LOOPBACK_S = 5.0
"""Longest wait for a connection of this process with itself."""
SHOWN_CHARACTERS = 120
"""Values of variables are cut after this many."""

LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
OTHER_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TMPDIR")
OTHER_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "TORCHELASTIC_", "CUDA_")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact about the machine.

    Attributes:
        name: what was looked at.
        level: ``ok``, ``warn`` (it works, but not as well as it could) or ``fail`` (training will not work).
        value: what was found.
        advice: what to do about it; empty if nothing.
    """

    name: str
    level: Level
    value: str
    advice: str = ""

    def __post_init__(self) -> None:
        if (self.level == "ok") != (not self.advice):
            raise ValueError(f"a finding has advice exactly if it is not ok, got {self}")


def judged(name: str, value: str, *, problem: str = "", level: Level = "warn") -> Finding:
    """A finding that is ok if there is no ``problem``, and else has it as its advice."""
    return Finding(name=name, level=level if problem else "ok", value=value, advice=problem)


def check_versions() -> list[Finding]:
    """Versions of Python, of this package, and of the packages that it needs or uses."""
    wanted = ".".join(map(str, OLDEST_PYTHON))
    old = f"install Python {wanted} or newer" if sys.version_info < OLDEST_PYTHON else ""
    described = f"{platform.python_version()}, {sys.executable}"
    found = [judged("python", described, problem=old, level="fail"), judged("torchtrainer", __version__)]
    return found + [package_finding(name, oldest) for name, oldest in PACKAGES.items()]


def package_finding(name: str, oldest: tuple[int, ...] | None) -> Finding:
    """Whether a package is there and new enough."""
    import importlib.metadata  # takes a while: the command's help does without it

    wanted = "" if oldest is None else f'pip install "{name}>={".".join(map(str, oldest))}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return judged(name, "not installed" + ("" if oldest else ", and not needed"), problem=wanted, level="fail")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".") if part.isdecimal())
    return judged(name, version, problem=wanted if oldest and numbers < oldest else "", level="fail")


def check_processors() -> list[Finding]:
    """Cores that this process may use: by affinity, and by the quota of its control groups."""
    cores, usable, quota = cores_by_affinity(), usable_cores(), cpu_quota()
    value = f"{cores} of {os.cpu_count()} by affinity, " + ("no quota" if quota is None else f"quota {quota:g}")
    few = (
        f"the control group gives less time than there are cores: use at most {usable} rank{'s' if usable > 1 else ''}"
    )
    advice = few if quota is not None and quota < cores else ""
    return [judged("processors", value, problem=advice)]


def check_memory() -> list[Finding]:
    """Memory of the machine, and the limit of the control groups."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return [judged("memory", "not told by this system")]
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    limit, left = cgroup_limit("memory.max", "memory/memory.limit_in_bytes"), cgroup_memory_left()
    free = sizes.get("MemAvailable", sizes["MemFree"])
    free = free if left is None else min(free, left)
    value = f"{format_bytes(free)} free of {format_bytes(sizes['MemTotal'])}, "
    value += "no limit of a control group" if limit is None else f"limit {format_bytes(limit)}"
    low = f"less than {format_bytes(MIN_MEMORY_BYTES)}: end other programs, raise the limit, or use fewer ranks"
    return [judged("memory", value, problem=low if free < MIN_MEMORY_BYTES else "")]


def check_shared_memory(directory: Path = Path("/dev/shm")) -> list[Finding]:  # noqa: S108  # looked at; the file made there is private
    """Shared memory, which loaders with workers and the exchange of gradients on one machine need."""
    name = f"shared memory {directory}"
    advice = (
        "give the container more: docker run --shm-size=8g, or in Kubernetes an emptyDir with medium Memory on /dev/shm"
    )
    if sys.platform != "linux" and not directory.exists():
        return [judged("shared memory", "not a directory on this system")]
    try:
        usage = shutil.disk_usage(directory)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0" * MIB)
            file.flush()
    except OSError as error:
        return [judged(name, f"not usable: {error}", problem=advice, level="fail")]
    value = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}, writable"
    return [judged(name, value, problem=advice if usage.free < MIN_SHARED_BYTES else "")]


def check_limits() -> list[Finding]:
    """Limits of this process and of its control group: open files, processes, locked memory."""
    if sys.platform == "win32":
        return []
    import resource

    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few_files = f"ulimit -n {min(4096, hard) if hard > 0 else 4096}, before the command; loaders with workers need many"
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limited = locked != resource.RLIM_INFINITY and Path("/dev/infiniband").exists()
    pids = cgroup_limit("pids.max", "pids/pids.max")
    used = next(cgroup_values("pids.current", "pids/pids.current"), "0")
    left = None if pids is None else pids - int(used)
    few = "threads count as processes: raise it (ulimit -u, docker run --pids-limit, podPidsLimit of the kubelet)"
    return [
        judged("open files", _limit(files), problem=few_files if 0 <= files < MIN_OPEN_FILES else ""),
        judged("processes", _limit(processes), problem=few if 0 <= processes < MIN_FREE_PROCESSES else ""),
        judged(
            "processes of the control group",
            "no limit" if pids is None else f"{left} left of {pids}",
            problem=few if left is not None and left < MIN_FREE_PROCESSES else "",
        ),
        judged(
            "locked memory",
            _limit(locked, size=True),
            problem="InfiniBand needs it without limit: ulimit -l unlimited" if limited else "",
        ),
    ]


def _limit(value: int, *, size: bool = False) -> str:
    if value < 0:
        return "no limit"
    return format_bytes(value) if size else str(value)


def check_loopback() -> list[Finding]:
    """Whether processes of this machine can reach each other over loopback."""
    advice = f"bring the loopback interface up (ip link set lo up), and let firewall rules pass {LOOPBACK}"
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            server.settimeout(LOOPBACK_S)
            with socket.create_connection(server.getsockname(), timeout=LOOPBACK_S) as near:
                far, _ = server.accept()
                near.sendall(b"x")
                far.settimeout(LOOPBACK_S)
                far.recv(1)
                far.close()
    except OSError as error:
        return [judged("loopback", f"{LOOPBACK} cannot be connected to: {error}", problem=advice, level="fail")]
    return [judged("loopback", f"{LOOPBACK} works")]


LOOKUP_ADVICE = (
    "a launcher looks its host name up: pass --local-addr 127.0.0.1 on one machine, --local-addr <its address> on several, "
    "or put the name into /etc/hosts"
)


def check_host_name(name: str | None = None) -> list[Finding]:
    """Whether the host name leads to this machine, and how long that takes to find out.

    Args:
        name: a host name; None: this machine's.
    """
    host = socket.gethostname() if name is None else name
    started = time.monotonic()
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
        foreign = [address for address in addresses if not is_local(address)]
        full = host if foreign else socket.getfqdn(host)
    except (OSError, UnicodeError) as error:
        took_s = time.monotonic() - started
        return [judged("host name", f"{host} does not resolve ({error}; {took_s:.1f} s)", problem=LOOKUP_ADVICE)]
    took_s = time.monotonic() - started
    local_only = all(address.startswith("127.") or address == "::1" for address in addresses)
    kind = "loopback: known to this machine alone" if local_only else "routable"
    value = f"{host} ({full}) is {', '.join(addresses)} ({kind}), {took_s:.2f} s"
    if foreign:
        advice = f"{', '.join(foreign)} is not an address of this machine: {LOOKUP_ADVICE}"
    else:
        advice = LOOKUP_ADVICE if took_s > SLOW_LOOKUP_S else ""
    return [judged("host name", value, problem=advice)]


def is_local(address: str) -> bool:
    """Whether a socket of this machine can have the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def check_temporary_directory() -> list[Finding]:
    """Whether temporary files can be written, and sockets' paths are short enough there."""
    advice = "set TMPDIR to a directory that you can write to, with a short path and room"
    try:
        directory = tempfile.gettempdir()
        paths = EnginePaths.create()
    except OSError as error:
        return [judged("temporary directory", str(error), problem=advice, level="fail")]
    length = len(os.fsencode(paths.socket))
    free = shutil.disk_usage(directory).free
    sockets_in = str(paths.root.parent)
    asked = os.environ.get("TMPDIR") or directory
    elsewhere = not (Path(asked).exists() and Path(asked).samefile(directory)) or sockets_in not in (
        directory,
        os.environ.get("XDG_RUNTIME_DIR"),
    )
    paths.remove()
    value = f"{directory}, {format_bytes(free)} free; sockets in {sockets_in}, {length} of {SOCKET_PATH_LIMIT} bytes"
    return [judged("temporary directory", value, problem=advice if elsewhere or free < MIN_TEMPORARY_BYTES else "")]


def check_environment(environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Variables that change what training does.

    Args:
        environ: the variables; None: those of this process.
    """
    variables = os.environ if environ is None else environ
    findings = []
    for name in sorted(variables):
        if name in LAUNCHER_VARIABLES:
            advice = (
                f"left over from a launcher? A TorchTrainer that finds it joins that launcher's processes: unset {name}"
            )
        elif name.startswith("PET_"):
            advice = f"it changes a default of torchtrainer run: unset {name} if that is not meant"
        elif name == "CUDA_VISIBLE_DEVICES" and variables[name].strip() in ("", "-1"):
            advice = f"it hides every GPU: unset {name} to train on them"
        elif name in OTHER_VARIABLES or name.startswith(OTHER_PREFIXES):
            advice = ""
        else:
            continue
        value = variables[name]
        findings.append(judged(f"variable {name}", repr(value[:SHOWN_CHARACTERS]), problem=advice))
    if "OMP_NUM_THREADS" not in variables:
        findings.append(judged("variable OMP_NUM_THREADS", "not set: the cores are divided among the ranks"))
    return findings


def check_timeouts() -> list[Finding]:
    """The named time-outs, their values, and where each is changed."""
    hang = FailureConfig().hang_timeout_s
    findings = [
        judged("time-out timeout_s", f"{TrainSettings().timeout_s:g} s; TorchTrainer(timeout_s=...)"),
        judged(
            "time-out hang_timeout_s",
            f"{'timeout_s' if hang == 'auto' else hang}; TorchTrainer(failure=FailureConfig(hang_timeout_s=...))",
        ),
    ]
    values = dataclasses.asdict(Timeouts())
    return findings + [
        judged(f"time-out Timeouts.{name}", f"{value:g} s; fixed in this version") for name, value in values.items()
    ]
