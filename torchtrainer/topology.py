"""Ranks, processes and machines as one value, read from and written to the environments of launchers.

`detect` is pure: it looks at a mapping, never at the process. It knows torchrun and everything that speaks its
variables, steps of Slurm's srun, Open MPI, and MPICH or Intel MPI. A rank that is missing is an error, never 0: a
launch whose ranks all believe to be rank 0 trains N models and says nothing.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchtrainer.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

DERIVED_PORTS = range(20000, 30000)
"""Ports where a Slurm or MPI job meets if MASTER_PORT is not set: TCP ports below those that systems hand out."""

LOOPBACK = "127.0.0.1"
WORKER_MARK = "TORCHTRAINER_WORKER"
"""Set in the environment of our own worker processes, so that a trainer that is made inside one by mistake says so."""
_LOOPBACK_NAMES = frozenset({LOOPBACK, "localhost", "::1"})
_LOOPBACK_INTERFACES = {"linux": "lo", "darwin": "lo0"}
_NOT_SRUN_STEPS = frozenset({"batch", "extern", "interactive", "4294967290", "4294967291", "4294967292"})


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The place of this process among those that a launcher started.

    Attributes:
        rank: this process, 0 to ``world_size - 1``.
        world_size: processes of the launch.
        local_rank: this process among those of its machine, from 0.
        local_world_size: processes on this machine.
        node_rank: this machine, from 0.
        nodes: machines of the launch.
        master_addr: host of rank 0, where the ranks meet.
        master_port: TCP port there.
        launcher: who started the processes, for messages: ``torchrun``, ``srun``, ``Open MPI``, ``MPI``.
        agent_store: the launcher itself hosts the store at ``master_addr:master_port``; the ranks only connect.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    nodes: int
    master_addr: str
    master_port: int
    launcher: str
    agent_store: bool = False

    def __post_init__(self) -> None:
        _check_place("rank", self.rank, self.world_size, self.launcher)
        _check_place("local rank", self.local_rank, self.local_world_size, self.launcher)
        _check_place("machine", self.node_rank, self.nodes, self.launcher)
        if self.local_world_size > self.world_size:
            raise InvalidArgumentError(
                f"{self.launcher} says that {self.local_world_size} processes are on this machine, of "
                f"{self.world_size} in all: check the local and the world size in its environment variables"
            )
        if not 0 < self.master_port < 65536:
            raise InvalidArgumentError(f"MASTER_PORT must be 1 to 65535, got {self.master_port}: set it for all ranks")

    @property
    def one_machine(self) -> bool:
        """Whether all processes of the launch are on this machine."""
        return self.local_world_size == self.world_size


def current() -> Topology | None:
    """The place of this process, from its environment variables; None if no launcher started it.

    Raises:
        InvalidArgumentError: a launcher did, but a variable is missing or wrong.
    """
    return detect(os.environ)


def detect(environ: Mapping[str, str]) -> Topology | None:
    """Read a launcher's variables; None if there is no launch.

    torchrun's variables win over all others, which may belong to whatever started torchrun. Then come those of MPI:
    where mpirun works through srun, Slurm's variables describe mpirun's daemons. A batch script and a Slurm step of one
    task (a shell) are no launch: a script there may start workers of its own.

    Args:
        environ: the variables, as in ``os.environ``.

    Raises:
        InvalidArgumentError: a variable is missing or has a value that cannot be; the message names it.
    """
    if "RANK" in environ:
        return _from_torchrun(environ)
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _from_open_mpi(environ)
    slurm = _in_srun_step(environ)
    if "PMI_RANK" in environ and ("MPI_LOCALRANKID" in environ or not slurm):
        return _from_pmi(environ)
    if slurm:
        return _from_slurm(environ)
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        if name in environ:
            _required(environ, "RANK", f"{name} is set")
    return None


def to_environ(topology: Topology) -> dict[str, str]:
    """The variables of torchrun for this process, for code that reads them, whichever launcher started it.

    On one machine they keep Gloo's sockets on the loopback interface. Set only those that are not set: the user's win.
    """
    variables = {
        "RANK": str(topology.rank),
        "WORLD_SIZE": str(topology.world_size),
        "LOCAL_RANK": str(topology.local_rank),
        "LOCAL_WORLD_SIZE": str(topology.local_world_size),
        "GROUP_RANK": str(topology.node_rank),
        "GROUP_WORLD_SIZE": str(topology.nodes),
        "MASTER_ADDR": topology.master_addr,
        "MASTER_PORT": str(topology.master_port),
    }
    return {**variables, **gloo_interface(one_machine=topology.one_machine)}


def gloo_interface(*, one_machine: bool) -> dict[str, str]:
    """The variable that has Gloo's own sockets listen on loopback only, where all ranks are on one machine."""
    if not one_machine or sys.platform not in _LOOPBACK_INTERFACES:
        return {}
    return {"GLOO_SOCKET_IFNAME": _LOOPBACK_INTERFACES[sys.platform]}


def share_of(total: int, rank: int, world_size: int) -> int:
    """This rank's part of an even split of ``total``: parts differ by at most one, the larger ones come first."""
    return total // world_size + (rank < total % world_size)


def visible_gpus(environ: Mapping[str, str], count: int) -> list[str]:
    """The GPUs that this process may use, as names for the CUDA_VISIBLE_DEVICES of its workers.

    Args:
        environ: the variables of this process; its CUDA_VISIBLE_DEVICES is read as CUDA reads it: nothing
            counts from the first entry on that names no GPU, such as -1.
        count: GPUs of the machine.
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(index) for index in range(count)]

    def usable(name: str) -> bool:
        return (name.isdigit() and int(name) < count) or name.startswith(("GPU-", "MIG-"))

    return list(itertools.takewhile(usable, (name.strip() for name in listed.split(","))))


def expand_hostlist(text: str) -> list[str]:
    """Names of the hosts in Slurm's short form: ``a[1-3,07],b`` is a1, a2, a3, a07, b.

    Raises:
        InvalidArgumentError: the brackets do not match or hold something else than numbers.
    """
    hosts: list[str] = []
    for item in re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", text):
        pieces = re.split(r"\[([^\]]*)\]", item)
        choices = [[piece] if at % 2 == 0 else _expand_numbers(piece, text) for at, piece in enumerate(pieces)]
        hosts.extend("".join(parts) for parts in itertools.product(*choices))
    if not hosts or text.count("[") != text.count("]"):
        raise _bad_hostlist(text)
    return hosts


def _expand_numbers(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise _bad_hostlist(text)
        first, last = match[1], match[2] or match[1]
        numbers.extend(str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return numbers


def _bad_hostlist(text: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the host list {text!r} is not in Slurm's form, such as node[1-3,7]: set MASTER_ADDR to the host of rank 0"
    )


def _from_torchrun(environ: Mapping[str, str]) -> Topology:
    why = "RANK is set"
    rank = _number(environ, "RANK", why)
    world_size = _number(environ, "WORLD_SIZE", why)
    master_addr = _required(environ, "MASTER_ADDR", why)
    alone = world_size == 1 or _one_process_per_pod(environ)
    local_rank = 0 if alone and "LOCAL_RANK" not in environ else _number(environ, "LOCAL_RANK", why)
    if "LOCAL_WORLD_SIZE" not in environ and alone:
        local_world_size = 1
    elif "LOCAL_WORLD_SIZE" not in environ and master_addr in _LOOPBACK_NAMES:
        local_world_size = world_size
    else:
        local_world_size = _number(
            environ, "LOCAL_WORLD_SIZE", f"{why} and MASTER_ADDR={master_addr} is not a loopback address"
        )
    node_rank, nodes = _blocks(rank, world_size, local_world_size)
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=_number(environ, "GROUP_RANK", why) if "GROUP_RANK" in environ else node_rank,
        nodes=_number(environ, "GROUP_WORLD_SIZE", why) if "GROUP_WORLD_SIZE" in environ else nodes,
        master_addr=master_addr,
        master_port=_number(environ, "MASTER_PORT", why),
        launcher="torchrun",
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _one_process_per_pod(environ: Mapping[str, str]) -> bool:
    """Kubernetes training operators set RANK and WORLD_SIZE per pod and no LOCAL_RANK."""
    return "KUBERNETES_SERVICE_HOST" in environ and environ.get("PET_NPROC_PER_NODE", "1") in ("1", "auto")


def _from_open_mpi(environ: Mapping[str, str]) -> Topology:
    why = "OMPI_COMM_WORLD_RANK is set"
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid", "")
    return _from_mpi(
        environ,
        rank=_number(environ, "OMPI_COMM_WORLD_RANK", why),
        world_size=_number(environ, "OMPI_COMM_WORLD_SIZE", why),
        local_rank=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK", why),
        local_world_size=_number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", why),
        launcher="Open MPI",
        job=job,
    )


def _from_pmi(environ: Mapping[str, str]) -> Topology:
    why = "PMI_RANK is set"
    return _from_mpi(
        environ,
        rank=_number(environ, "PMI_RANK", why),
        world_size=_number(environ, "PMI_SIZE", why),
        local_rank=_number(environ, "MPI_LOCALRANKID", why),
        local_world_size=_number(environ, "MPI_LOCALNRANKS", why),
        launcher="MPI",
        job=environ.get("PMI_JOBID", ""),
    )


def _from_mpi(
    environ: Mapping[str, str],
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    launcher: str,
    job: str,
) -> Topology:
    node_rank, nodes = _blocks(rank, world_size, local_world_size)
    master_addr = environ.get("MASTER_ADDR") or (LOOPBACK if local_world_size == world_size else None)
    if master_addr is None:
        raise InvalidArgumentError(
            f"{launcher} started {world_size} ranks, {local_world_size} of them on this machine, and MASTER_ADDR "
            "is not set: set it to the host of rank 0, for all ranks (mpirun -x MASTER_ADDR=HOST, or "
            "-genv MASTER_ADDR HOST)"
        )
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=node_rank,
        nodes=nodes,
        master_addr=master_addr,
        master_port=_port(environ, f"{launcher} {job}"),
        launcher=launcher,
    )


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process with others. SLURM_NTASKS and SLURM_PROCID are set in batch scripts as well."""
    step = environ.get("SLURM_STEP_ID")
    if step is None or step in _NOT_SRUN_STEPS:
        return False
    return _slurm_tasks(environ) > 1


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    # Of the step first: SLURM_NTASKS is the whole job's where a shell or a smaller step runs inside it.
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return _number(environ, name, "SLURM_STEP_ID is set")


def _from_slurm(environ: Mapping[str, str]) -> Topology:
    why = "SLURM_STEP_ID is set"
    world_size = _slurm_tasks(environ)
    node_rank = _number(environ, "SLURM_NODEID", why)
    hosts = expand_hostlist(_required(environ, "SLURM_STEP_NODELIST", why))
    master_addr = environ.get("MASTER_ADDR") or (LOOPBACK if len(hosts) == 1 else hosts[0])
    return Topology(
        rank=_number(environ, "SLURM_PROCID", why),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID", why),
        local_world_size=world_size if len(hosts) == 1 else _slurm_tasks_here(environ, node_rank),
        node_rank=node_rank,
        nodes=len(hosts),
        master_addr=master_addr,
        master_port=_port(environ, f"{environ.get('SLURM_JOB_ID', '')}.{environ['SLURM_STEP_ID']}"),
        launcher="srun",
    )


def _slurm_tasks_here(environ: Mapping[str, str], node_rank: int) -> int:
    text = _required(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_ID is set")  # such as 4(x2),3
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise InvalidArgumentError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not in Slurm's form, such as 4(x2),3")
        counts.extend([int(match[1])] * int(match[2] or 1))
    if node_rank >= len(counts):
        raise InvalidArgumentError(
            f"SLURM_STEP_TASKS_PER_NODE={text!r} says nothing about machine SLURM_NODEID={node_rank}"
        )
    return counts[node_rank]


def _blocks(rank: int, world_size: int, local_world_size: int) -> tuple[int, int]:
    """Machine and number of machines, if each carries as many ranks as this one and they are dealt out in blocks."""
    per_node = max(local_world_size, 1)
    return rank // per_node, -(-world_size // per_node)


def _port(environ: Mapping[str, str], job: str) -> int:
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT", "a launcher started this process")
    return DERIVED_PORTS[zlib.crc32(job.encode()) % len(DERIVED_PORTS)]


def _required(environ: Mapping[str, str], name: str, why: str) -> str:
    value = environ.get(name)
    if not value:
        raise InvalidArgumentError(
            f"the environment variable {name} is missing, although {why}: a launcher sets both. Set {name} as well, "
            "or, if this is no distributed launch, unset the other"
        )
    return value


def _number(environ: Mapping[str, str], name: str, why: str) -> int:
    value = _required(environ, name, why)
    try:
        return int(value)
    except ValueError:
        raise InvalidArgumentError(f"the environment variable {name} must be an integer, got {value!r}") from None


def _check_place(what: str, place: int, size: int, launcher: str) -> None:
    if not 0 <= place < size:
        raise InvalidArgumentError(
            f"{launcher} says that this process is {what} {place} of {size}: it must be 0 to {size - 1}. Check the "
            "launcher's environment variables, and that none was left over from another launch"
        )
