"""Launchers on several nodes, which are network namespaces here: torch's launcher and ours, and what each makes of the same events."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
from nodes import OBEY, Desk, Launcher, Node, Worker, nodes_and_desk, why_no_nodes

pytestmark = [
    pytest.mark.skipif(why_no_nodes() is not None, reason=str(why_no_nodes())),
    pytest.mark.slow,
]

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
OURS = (sys.executable, "-m", "torchtrainer", "run")
BOTH = pytest.mark.parametrize(
    "command", [pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.soak), pytest.param(OURS, id="torchtrainer")]
)
"""That torchrun does the same is looked at where there is time for it."""
RUN_ID = "nodes"
PORT = 29400
QUICK = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=4,join_timeout=60,read_timeout=30"
"""A rendezvous that waits no longer than a busy machine needs; the keys take whole seconds."""
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Works around torch 2.14: a launcher serves one store to the workers of all rounds. It does not tell a node that joins later where
that is, so that all wait for a key that nobody sets; and workers that come back find the addresses of the dead in it. Our
launcher needs no such setting."""


GLOO = """
import datetime
import torch
import torch.distributed as dist

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))

def reduce():
    one = torch.ones(1)
    dist.all_reduce(one)
    return int(one)

say(sum=reduce())
for line in desk.makefile():
    if line.startswith("reduce"):
        reduce()
    else:
        dist.destroy_process_group()
        obey(line)
sys.exit("the test has ended")
"""
"""A worker that says how many workers an all-reduce found, and does another one when told."""

TAKE_PORT = (
    """
listener = socket.create_server(("", int(sys.argv[1])))
say(listens=True)
"""
    + OBEY
)
"""A process that listens on a port and never answers: to a launcher, what listens there is no store."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes, the launcher under test, and the script that it starts."""

    nodes: list[Node]
    desk: Desk
    command: Sequence[str]
    script: str

    def launch(self, node: Node, *options: str) -> Launcher:
        return node.start([*self.command, *options, self.script, "an argument"], self.desk.environ)

    def elastic(self, node: Node, *options: str, nnodes: str = "1:3", conf: str = QUICK) -> Launcher:
        """Starts a launcher that meets the others at the first node's address."""
        endpoint = f"{self.nodes[0].address}:{PORT}"
        where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--local-addr", node.address)
        return self.launch(node, "--nnodes", nnodes, *where, "--rdzv-id", RUN_ID, "--rdzv-conf", conf, *options)


@pytest.fixture
def make_cluster(tmp_path) -> Iterator[Callable[..., Cluster]]:
    """Makes clusters; the previous one is gone before the next one is there."""
    with contextlib.ExitStack() as stack:

        def make(command: Sequence[str], count: int, *, own_store: bool = False, **script: str) -> Cluster:
            stack.close()
            directory = tmp_path / f"cluster-{len(list(tmp_path.iterdir()))}"
            directory.mkdir()
            nodes, desk = stack.enter_context(nodes_and_desk(directory, count))
            desk.environ.update(OWN_STORE if own_store else {})
            return Cluster(nodes=nodes, desk=desk, command=command, script=desk.script(directory, **script))

        yield make


def finish(launchers: Sequence[Launcher], workers: Sequence[Worker]) -> None:
    """Ends all workers well, and expects the same of their launchers."""
    for worker in workers:
        worker.tell("exit 0")
    for launcher in launchers:
        assert launcher.finish() == 0, launcher.text
        launcher.node.assert_empty()


def of_node(workers: Sequence[Worker], node: int) -> list[Worker]:
    """Workers of the node with a number; group ranks follow the addresses and start at 0."""
    return [worker for worker in workers if worker["GROUP_RANK"] == node - 1]


# --- the same ranks and the same environment -------------------------------------------------------------------------


def start_c10d_with_roles(cluster: Cluster) -> list[Launcher]:
    """Three nodes with 2, 1 and 2 workers, the last in a role of its own."""
    return [
        cluster.elastic(node, "--nproc-per-node", nproc, "--role", role, nnodes="3")
        for node, nproc, role in zip(cluster.nodes, "212", ("trainer", "trainer", "reader"), strict=True)
    ]


def start_static(cluster: Cluster) -> list[Launcher]:
    """Two nodes that know their ranks and where the first one is."""
    where = ("--master-addr", cluster.nodes[0].address, "--master-port", "29511", "--max-restarts", "2")
    first, second = cluster.nodes
    return [
        cluster.launch(first, "--nnodes=2", "--node_rank=0", "--nproc_per_node=1", *where),
        cluster.launch(second, "--nnodes=2", "--node_rank=1", "--nproc_per_node=2", *where),
    ]


def start_elastic_by_name(cluster: Cluster) -> list[Launcher]:
    """Up to three nodes, which have to find their own addresses; with the third, the waiting is over."""
    where = ("--rdzv-backend=c10d", f"--rdzv-endpoint={cluster.nodes[0].name}", f"--rdzv-id={RUN_ID}")
    return [cluster.launch(node, "--nnodes=1:3", *where) for node in cluster.nodes]


def comparable(worker: Worker, node: Node) -> dict[str, str]:
    """A worker's environment, without what is drawn by chance."""
    environ = {key: value.replace(str(node.directory.parent), "CLUSTER") for key, value in worker.environ.items()}
    environ = {
        key: re.sub(r"launcher-\w+|torchelastic_\w+|(?<=/)(none|nodes)_\w+", "*", v) for key, v in environ.items()
    }
    environ = {key: value for key, value in environ.items() if not key.startswith("TORCHTRAINER_")}  # ours to add
    environ["DESK"] = "*"
    if environ["TORCHELASTIC_USE_AGENT_STORE"] == "True" and environ["MASTER_PORT"] != "29511":
        environ["MASTER_PORT"] = "*"
    return environ


def observe(
    cluster: Cluster, start: Callable[[Cluster], list[Launcher]]
) -> dict[int, tuple[list[str], dict[str, str]]]:
    """Environments and arguments by rank; every worker reaches the store of the first one."""
    launchers = start(cluster)
    workers = cluster.desk.world(nodes=len(cluster.nodes), launchers=launchers)
    for worker in workers:
        address, port = worker.environ["MASTER_ADDR"], worker.environ["MASTER_PORT"]
        assert worker.ask(f"connect {address} {port}") == {"connected": True}
    finish(launchers, workers)
    return {
        worker["RANK"]: (worker.arguments, comparable(worker, cluster.nodes[worker["GROUP_RANK"]]))
        for worker in workers
    }


@pytest.mark.parametrize(
    ("start", "count", "roles"),
    [
        (start_c10d_with_roles, 3, [("0", "0"), ("0", "1"), ("1", "2"), ("2", "0"), ("2", "1")]),
        (start_static, 2, [("0", "0"), ("1", "1"), ("1", "2")]),
        pytest.param(start_elastic_by_name, 3, [("0", "0"), ("1", "1"), ("2", "2")], marks=pytest.mark.soak),
    ],
)
@pytest.mark.soak
def test_ranks_and_environments_are_those_of_torchrun(make_cluster, start, count, roles) -> None:
    expected = observe(make_cluster(TORCHRUN, count), start)
    assert [(e["GROUP_RANK"], e["ROLE_RANK"]) for _, e in expected.values()] == roles
    found = observe(make_cluster(OURS, count), start)
    assert [arguments for arguments, _ in found.values()] == [arguments for arguments, _ in expected.values()]
    ours, theirs = ({rank: environ for rank, (_, environ) in seen.items()} for seen in (found, expected))
    differences = [
        (rank, key, environ.get(key), ours[rank].get(key))
        for rank, environ in theirs.items()
        for key in sorted(environ.keys() | ours[rank].keys())
        if environ.get(key) != ours[rank].get(key)
    ]
    assert not differences, differences


# --- nodes and workers that come and go ------------------------------------------------------------------------------


@BOTH
def test_others_go_on_without_a_killed_node(make_cluster, command) -> None:
    cluster = make_cluster(command, 3, rest=GLOO, own_store=command is TORCHRUN)
    launchers = [cluster.elastic(node, "--max-restarts", "1") for node in cluster.nodes]
    workers = cluster.desk.world(nodes=3, launchers=launchers)
    assert [worker.next() for worker in workers] == [{"sum": 3}] * 3
    *others, killed = launchers
    killed.process.kill()
    if command is TORCHRUN:  # whose workers do not mind
        os.kill(workers[2].pid, signal.SIGKILL)
    killed.node.assert_empty()
    for worker in workers[:2]:
        worker.tell("reduce")
    again = cluster.desk.world(nodes=2, launchers=others)
    assert [worker.next() for worker in again] == [{"sum": 2}] * 2
    finish(others, again)


@pytest.mark.soak
@BOTH
def test_a_node_that_joins_makes_the_world_bigger_and_costs_no_restart(make_cluster, command) -> None:
    cluster = make_cluster(command, 2, own_store=command is TORCHRUN)
    first = cluster.elastic(cluster.nodes[0], "--max-restarts", "0")
    (alone,) = cluster.desk.world(nodes=1, launchers=[first])
    second = cluster.elastic(cluster.nodes[1], "--max-restarts", "0")
    assert alone.next() == {"signal": signal.SIGTERM}
    workers = cluster.desk.world(nodes=2, launchers=[first, second])
    assert [worker["TORCHELASTIC_RESTART_COUNT"] for worker in workers] == [0, 0]
    finish([first, second], workers)


@BOTH
def test_a_killed_worker_restarts_the_workers_of_all_nodes(make_cluster, command) -> None:
    cluster = make_cluster(command, 2)
    launchers = [cluster.elastic(node, "--max-restarts", "1", nnodes="2") for node in cluster.nodes]
    workers = cluster.desk.world(nodes=2, launchers=launchers)
    workers[1].tell("kill")
    assert workers[0].next() == {"signal": signal.SIGTERM}
    again = cluster.desk.world(nodes=2, launchers=launchers)
    assert [worker["RANK"] for worker in again] == [0, 1]
    # Only the node whose worker failed calls what follows attempt 1.
    assert [worker["TORCHELASTIC_RESTART_COUNT"] for worker in again] == [0, 1]
    finish(launchers, again)


@BOTH
@pytest.mark.soak
def test_a_node_that_is_told_to_stop_leaves_and_the_others_go_on(make_cluster, command) -> None:
    cluster = make_cluster(command, 2)
    stays, leaves = launchers = [cluster.elastic(node, "--max-restarts", "1", nnodes="1:2") for node in cluster.nodes]
    workers = cluster.desk.world(nodes=2, launchers=launchers)
    leaves.process.terminate()
    assert of_node(workers, 2)[0].next() == {"signal": signal.SIGTERM}
    assert leaves.finish() == 1, leaves.text
    leaves.node.assert_empty()
    workers[0].tell("exit 3")  # as it would when its peer is gone
    again = cluster.desk.world(nodes=1, launchers=[stays])
    assert [worker["TORCHELASTIC_RESTART_COUNT"] for worker in again] == [1]
    finish([stays], again)


# --- what cannot work, and who says why ------------------------------------------------------------------------------


def assert_one_clear_line(launcher: Launcher, *words: str) -> None:
    """The launcher failed, and the last line says what was wrong: no traceback, nothing left running."""
    assert launcher.finish() == 1, launcher.text
    text = launcher.text
    last = text.strip().splitlines()[-1]
    assert "Traceback" not in text, text
    for word in words:
        assert re.search(word, last), f"{word!r} is not in the last line:\n{text}"
    launcher.node.assert_empty()


C10D = ("--rdzv-backend=c10d", "--rdzv-conf=is_host=1,read_timeout=3,join_timeout=3")
STATIC = ("--rdzv-backend=static", "--rdzv-conf=timeout=3")


@pytest.mark.parametrize("backend", [C10D, STATIC], ids=["c10d", "static"])
def test_an_endpoint_without_address_is_named(make_cluster, backend) -> None:
    cluster = make_cluster(OURS, 1)
    endpoint = f"--rdzv-endpoint=no-such-node:{PORT}"
    launcher = cluster.launch(cluster.nodes[0], "--nnodes=2", *backend, endpoint)
    assert_one_clear_line(launcher, "no-such-node")


@pytest.mark.parametrize("backend", [C10D, STATIC], ids=["c10d", "static"])
def test_a_port_in_use_is_named(make_cluster, backend) -> None:
    cluster = make_cluster(OURS, 2, rest=TAKE_PORT)
    node = cluster.nodes[0]
    taking = node.start([sys.executable, cluster.script, str(PORT)], cluster.desk.environ)
    taker = cluster.desk.next_worker([taking])
    assert taker.next() == {"listens": True}
    launcher = cluster.launch(node, "--nnodes=2", *backend, f"--rdzv-endpoint={node.address}:{PORT}")
    launcher.finish()
    taker.tell("exit 0")
    assert taking.finish() == 0
    assert_one_clear_line(launcher, str(PORT), "in use")


def test_a_rendezvous_that_times_out_says_who_came_and_how_many_were_wanted(make_cluster) -> None:
    cluster = make_cluster(OURS, 2)
    first, second = cluster.nodes
    stays = cluster.elastic(first, nnodes="3")
    stays.await_text("waiting for other machines: wanted 3, for up to 60 s (join_timeout of --rdzv-conf)")
    gives_up = cluster.elastic(second, nnodes="3", conf="join_timeout=4")
    assert_one_clear_line(gives_up, re.escape(first.address), re.escape(second.address), "wanted 3, 2 joined")
    assert_one_clear_line(stays, "is closed: another machine's launcher gave up", "--rdzv-id")


@pytest.mark.soak
def test_a_static_rendezvous_that_times_out_says_who_came_and_how_many_were_wanted(make_cluster) -> None:
    cluster = make_cluster(OURS, 1)
    endpoint = f"--rdzv-endpoint={cluster.nodes[0].address}:{PORT}"
    launcher = cluster.launch(cluster.nodes[0], "--nnodes=2", "--node-rank=0", *STATIC, endpoint)
    assert_one_clear_line(launcher, re.escape(cluster.nodes[0].address), "wanted 2", r"\b1\b.{0,20}joined")


def test_a_static_rendezvous_without_the_first_node_names_its_address(make_cluster) -> None:
    cluster = make_cluster(OURS, 2)
    endpoint = f"{cluster.nodes[0].address}:{PORT}"
    launcher = cluster.launch(cluster.nodes[1], "--nnodes=2", "--node-rank=1", *STATIC, f"--rdzv-endpoint={endpoint}")
    assert_one_clear_line(launcher, re.escape(endpoint))
