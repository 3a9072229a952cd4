"""Launchers' environments as tables, and the session functions that read them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from torchtrainer.errors import InvalidArgumentError
from torchtrainer.topology import (
    DERIVED_PORTS,
    Topology,
    detect,
    expand_hostlist,
    share_of,
    to_environ,
    visible_gpus,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parent.parent

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM_BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}
SLURM_STEP = SLURM_BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
SLURM_ONE_NODE = SLURM_STEP | {
    "SLURM_STEP_NODELIST": "gpu07",
    "SLURM_STEP_TASKS_PER_NODE": "6",
    "SLURM_LOCALID": "5",
    "SLURM_NODEID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_NODE_RANK": "3",
    "PMIX_NAMESPACE": "prterun-host-4711@1",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def without(environ: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param(
            TORCHRUN,
            {"rank": 5, "world_size": 8, "local_rank": 1, "local_world_size": 4, "node_rank": 1, "nodes": 2,
             "master_addr": "host0", "master_port": 29500, "launcher": "torchrun", "agent_store": True},
            id="torchrun",
        ),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"},
            {"rank": 1, "world_size": 3, "local_world_size": 3, "node_rank": 0, "nodes": 1, "agent_store": False},
            id="by-hand-on-loopback",
        ),
        pytest.param(
            without(TORCHRUN, "GROUP_RANK", "GROUP_WORLD_SIZE"), {"node_rank": 1, "nodes": 2}, id="machines-in-blocks"
        ),
        pytest.param(
            {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456",
             "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            {"rank": 2, "world_size": 3, "local_rank": 0, "local_world_size": 1, "node_rank": 2, "nodes": 3},
            id="kubernetes-one-process-per-pod",
        ),
        pytest.param(SLURM_STEP | TORCHRUN, {"rank": 5, "launcher": "torchrun"}, id="torchrun-under-srun"),
        pytest.param(
            SLURM_STEP,
            {"rank": 5, "world_size": 6, "local_rank": 1, "local_world_size": 2, "node_rank": 1, "nodes": 2,
             "master_addr": "gpu07", "launcher": "srun", "agent_store": False},
            id="srun-two-machines",
        ),
        pytest.param(
            SLURM_ONE_NODE,
            {"rank": 5, "world_size": 6, "local_world_size": 6, "nodes": 1, "master_addr": "127.0.0.1"},
            id="srun-one-machine",
        ),
        pytest.param(
            SLURM_STEP | {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "4000", "WORLD_SIZE": "6"},
            {"master_addr": "10.1.2.3", "master_port": 4000, "launcher": "srun"},
            id="srun-with-the-user's-address",
        ),
        pytest.param(
            without(SLURM_ONE_NODE, "SLURM_STEP_NUM_TASKS"), {"world_size": 6, "launcher": "srun"}, id="srun-old"
        ),
        pytest.param(
            SLURM_ONE_NODE | {"PMI_RANK": "5", "PMI_SIZE": "6"}, {"rank": 5, "launcher": "srun"}, id="srun-with-pmi2"
        ),
        pytest.param(
            SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI,
            {"rank": 3, "world_size": 4, "launcher": "Open MPI"},
            id="mpirun-whose-daemons-came-through-srun",
        ),
        pytest.param(
            OPEN_MPI,
            {"rank": 3, "world_size": 4, "local_rank": 3, "local_world_size": 4, "node_rank": 0, "nodes": 1,
             "master_addr": "127.0.0.1", "launcher": "Open MPI"},
            id="open-mpi",
        ),
        pytest.param(
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "MASTER_ADDR": "a"},
            {"local_rank": 1, "local_world_size": 2, "node_rank": 1, "nodes": 2, "master_addr": "a"},
            id="open-mpi-two-machines",
        ),
        pytest.param(
            PMI, {"rank": 1, "world_size": 2, "local_rank": 1, "launcher": "MPI"}, id="mpich"
        ),
        pytest.param(SLURM_STEP | PMI, {"rank": 1, "world_size": 2, "launcher": "MPI"}, id="mpich-inside-slurm"),
    ],
)  # fmt: skip
def test_a_launch_is_read_from_its_variables(environ: dict[str, str], expected: dict[str, Any]) -> None:
    topology = detect(environ)
    assert topology is not None
    assert {name: getattr(topology, name) for name in expected} == expected
    if "MASTER_PORT" not in environ:
        assert topology.master_port in DERIVED_PORTS


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, id="only-an-address"),
        pytest.param(SLURM_BATCH, id="batch-script"),
        pytest.param(SLURM_BATCH | {"SLURM_STEP_ID": "4294967291"}, id="batch-step"),
        pytest.param(SLURM_BATCH | {"SLURM_STEP_ID": "4294967290"}, id="interactive-step"),
        pytest.param(SLURM_BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, id="shell-in-a-larger-job"),
    ],
)
def test_what_is_no_launch(environ: dict[str, str]) -> None:
    assert detect(environ) is None


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        (without(TORCHRUN, "RANK"), "RANK"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"LOCAL_RANK": "0"}, "RANK"),
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK"),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT"),
        (without(TORCHRUN, "RANK") | {"RANK": ""}, "RANK"),
        (without(SLURM_STEP, "SLURM_PROCID"), "SLURM_PROCID"),
        (without(SLURM_STEP, "SLURM_LOCALID"), "SLURM_LOCALID"),
        (without(SLURM_STEP, "SLURM_NODEID"), "SLURM_NODEID"),
        (without(SLURM_STEP, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST"),
        (without(SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE"), "SLURM_STEP_TASKS_PER_NODE"),
        (without(SLURM_STEP, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_NTASKS"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK"), "OMPI_COMM_WORLD_LOCAL_RANK"),
        (without(PMI, "PMI_SIZE"), "PMI_SIZE"),
        (without(PMI, "MPI_LOCALRANKID"), "MPI_LOCALRANKID"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "MASTER_ADDR"),
    ],
)
def test_a_missing_variable_is_named(environ: dict[str, str], name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"\b{name}\b"):
        detect(environ)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"RANK": "two"}, "RANK must be an integer, got 'two'"),
        ({"RANK": "8"}, "rank 8 of 8: it must be 0 to 7"),
        ({"RANK": "-1"}, "rank -1 of 8"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "9 processes are on this machine, of 8"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be 1 to 65535, got 70000"),
    ],
)
def test_a_wrong_value_is_shown(change: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        detect(TORCHRUN | change)


def test_all_ranks_of_a_job_derive_one_port_and_another_step_gets_another() -> None:
    def port(**change: str) -> int:
        topology = detect(SLURM_STEP | change)
        assert topology is not None
        return topology.master_port

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert port() != port(SLURM_STEP_ID="1")
    assert port() != port(SLURM_JOB_ID="78")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[1-3,7]", ["node1", "node2", "node3", "node7"]),
        ("node[08-11]", ["node08", "node09", "node10", "node11"]),
        ("a,b[2,4]-ib,c", ["a", "b2-ib", "b4-ib", "c"]),
        ("r[1-2]n[0-1]", ["r1n0", "r1n1", "r2n0", "r2n1"]),
    ],
)
def test_host_lists_expand(text: str, hosts: list[str]) -> None:
    assert expand_hostlist(text) == hosts


@pytest.mark.parametrize("text", ["", "node[1-", "node[a-b]", "node[]", "node[1,]"])
def test_a_host_list_that_is_none_is_shown(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="MASTER_ADDR"):
        expand_hostlist(text)


@pytest.mark.parametrize("environ", [TORCHRUN, SLURM_STEP, SLURM_ONE_NODE, OPEN_MPI, PMI])
def test_the_variables_that_we_set_read_back_as_the_same_place(environ: dict[str, str]) -> None:
    topology = detect(environ)
    assert topology is not None
    again = detect(to_environ(topology))
    assert isinstance(again, Topology)
    for name in (
        "rank",
        "world_size",
        "local_rank",
        "local_world_size",
        "node_rank",
        "nodes",
        "master_addr",
        "master_port",
    ):
        assert getattr(again, name) == getattr(topology, name), name


def test_gloo_stays_on_loopback_only_where_all_ranks_are_on_one_machine() -> None:
    several, one = detect(SLURM_STEP), detect(SLURM_ONE_NODE)
    assert several is not None
    assert one is not None
    assert "GLOO_SOCKET_IFNAME" not in to_environ(several)
    if sys.platform == "linux":
        assert to_environ(one)["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize(("total", "world_size"), [(7, 3), (3, 3), (2, 3), (0, 2), (64, 1), (1000, 7)])
def test_shares_add_up_and_differ_by_one_at_most(total: int, world_size: int) -> None:
    shares = [share_of(total, rank, world_size) for rank in range(world_size)]
    assert sum(shares) == total
    assert shares == sorted(shares, reverse=True)
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("2,0", ["2", "0"]),
        (" 1 , 3 ", ["1", "3"]),
        ("0,-1,2", ["0"]),
        ("1,9,2", ["1"]),
        ("GPU-abc,MIG-def", ["GPU-abc", "MIG-def"]),
        ("NoDevFiles", []),
    ],
)
def test_gpus_are_listed_as_cuda_lists_them(listed: str | None, expected: list[str]) -> None:
    environ = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert visible_gpus(environ, 4) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, "0 1"), (TORCHRUN, "5 8"), (SLURM_STEP, "5 6"), (OPEN_MPI, "3 4"), (SLURM_BATCH, "0 1")],
)
def test_session_knows_its_place_without_torch(environ: dict[str, str], expected: str) -> None:
    program = (
        "import sys; from torchtrainer import session; print(session.rank(), session.world_size()); "
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.split() == expected.split(), result.stderr


def test_session_reads_the_process_group_first(tmp_path: Path) -> None:
    program = (
        "import sys, torch.distributed as dist; from torchtrainer import session\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=0, world_size=1)\n"
        "print(session.rank(), session.world_size())\n"
        "dist.destroy_process_group()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"} | TORCHRUN,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.split() == ["0", "1"], result.stderr
