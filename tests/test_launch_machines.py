"""Faults of a training run on several machines: it goes on with the same bits, or its launch ends with one clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from machines import FAULTS, Machines, last_word, machines, texts
from nodes import Node, why_no_nodes

pytestmark = [
    pytest.mark.skipif(why_no_nodes() is not None, reason=str(why_no_nodes())),
    pytest.mark.slow,
]
SOAK = pytest.mark.soak


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> set[str]:
    """The digest of a run to which nothing happens."""
    with machines(tmp_path_factory.mktemp("undisturbed")) as cluster:
        launchers = cluster.launch_all()
        digests = cluster.finish(launchers, cluster.held(launchers))
    assert len(digests) == 1
    return digests


def checkpoints(cluster: Machines) -> set[int]:
    """The steps of the checkpoints that are there."""
    found = Path(cluster.desk.environ["RUN"], "checkpoints").glob("step-*")
    return {int(path.name.split("-")[1]) for path in found}


# A machine's own counts


@pytest.mark.parametrize(
    ("rank", "static"),
    [
        pytest.param(0, False, marks=SOAK),
        pytest.param(1, False, marks=SOAK),
        pytest.param(0, True, marks=SOAK),
        pytest.param(1, True, marks=SOAK),
    ],
)
def test_training_goes_on_after_workers_of_one_machine_and_then_the_other_were_killed(
    tmp_path, undisturbed, rank, static
) -> None:
    with machines(tmp_path) as cluster:
        launchers = cluster.launch_all(static=static)
        for first in (rank, 1 - rank):
            workers = cluster.held(launchers)
            workers[first].tell("kill")
            workers[1 - first].tell("go")
        assert cluster.finish(launchers, cluster.held(launchers)) == undisturbed
        for launcher in launchers:
            assert FAULTS["killed"].says in launcher.text, texts(launchers)
            assert FAULTS["killed"].others in launcher.text, texts(launchers)


@SOAK
@pytest.mark.parametrize("static", [False, True])
def test_a_machine_whose_launcher_was_killed_comes_back(tmp_path, undisturbed, static) -> None:
    """The new launcher has started nothing before, the other one has; three faults in a row."""
    with machines(tmp_path) as cluster:
        launchers = cluster.launch_all(static=static)
        for _ in range(2):
            workers = cluster.held(launchers)
            launchers[1].process.kill()
            launchers[1].node.assert_empty()
            workers[0].tell("go")
            launchers[1] = cluster.launch(cluster.nodes[1], static=static)
        assert FAULTS["launcher"].others in launchers[0].text, texts(launchers)
        workers = cluster.held(launchers)
        workers[0].tell("kill")
        workers[1].tell("go")
        assert cluster.finish(launchers, cluster.held(launchers)) == undisturbed


# The network


@SOAK
def test_a_link_that_is_cut_for_less_than_the_time_out_costs_no_restart(tmp_path, undisturbed) -> None:
    with machines(tmp_path) as cluster:
        launchers = cluster.launch_all()
        workers = cluster.held(launchers)
        cluster.nodes[1].cut()
        for worker in workers:
            worker.tell("go")
        cluster.nodes[1].heal()
        assert {last_word(worker)["digest"] for worker in workers} == undisturbed
        assert [launcher.finish() for launcher in launchers] == [0, 0], texts(launchers)
        assert "restarting all workers" not in texts(launchers)


BREAKS: dict[str, Callable[[Node, Node], None]] = {
    "cut": lambda node, other: node.cut(),
    "cut one way": lambda node, other: node.cut_towards(other),
    "cut the other way": lambda node, other: other.cut_towards(node),
}
MENDS: dict[str, Callable[[Node, Node], None]] = {
    "cut": lambda node, other: node.heal(),
    "cut one way": lambda node, other: node.heal_towards(other),
    "cut the other way": lambda node, other: other.heal_towards(node),
}


@pytest.mark.parametrize(
    ("how", "host"),
    [
        ("cut", 1),
        pytest.param("cut", 0, marks=SOAK),
        pytest.param("cut one way", 0, marks=SOAK),
        pytest.param("cut the other way", 1, marks=SOAK),
    ],
)
def test_a_machine_that_is_cut_off_says_so_writes_nothing_and_can_come_back(tmp_path, undisturbed, how, host) -> None:
    with machines(tmp_path) as cluster:
        launchers = cluster.launch_all(host=host)
        workers = cluster.held(launchers)
        away, stays = 1 - host, host
        BREAKS[how](cluster.nodes[away], cluster.nodes[stays])
        for worker in workers:
            worker.tell("go")
        assert not any("digest" in last_word(worker) for worker in workers)
        assert launchers[away].finish() == 1
        assert FAULTS[how].says in launchers[away].text.strip().splitlines()[-1], texts(launchers)
        cluster.nodes[away].assert_empty()
        assert checkpoints(cluster) <= {3, 6}, "each is of all ranks, and begun before the cut"
        launchers[stays].await_text(FAULTS[how].others)
        MENDS[how](cluster.nodes[away], cluster.nodes[stays])
        launchers[away] = cluster.launch(cluster.nodes[away], host=host)
        assert cluster.finish(launchers, cluster.held(launchers)) == undisturbed


@SOAK
@pytest.mark.parametrize("nnodes", ["2", "1:2"])
def test_training_goes_on_when_a_machine_that_lost_its_power_is_back(tmp_path, undisturbed, nnodes) -> None:
    with machines(tmp_path) as cluster:
        launchers = cluster.launch_all(nnodes=nnodes)
        workers = cluster.held(launchers)
        cluster.nodes[1].lose_power()
        workers[0].tell("go")
        fault = FAULTS["power" if nnodes == "2" else "power, elastic"]
        launchers[0].await_text(fault.others)
        if nnodes == "1:2":  # the other one does not wait
            (alone,) = cluster.held(launchers[:1], nodes=1)
            assert alone["WORLD_SIZE"] == 1
        cluster.nodes[1].heal()
        launchers[1] = cluster.launch(cluster.nodes[1], nnodes=nnodes)
        digests = cluster.finish(launchers, cluster.held(launchers))
        assert nnodes == "1:2" or digests == undisturbed, "alone, the steps are others"


@SOAK
def test_delay_and_loss_change_nothing(tmp_path, undisturbed) -> None:
    with machines(tmp_path) as cluster:
        cluster.lan.disturb(delay_s=0.2, loss=0.05)
        launchers = cluster.launch_all()
        assert cluster.finish(launchers, cluster.held(launchers)) == undisturbed


@SOAK
def test_ranks_that_do_not_share_the_run_directory_are_told(tmp_path) -> None:
    """Rank 0 reads and writes it; after a restart, every rank has to read the checkpoint."""
    with machines(tmp_path, shared=False) as cluster:
        launchers = cluster.launch_all()
        workers = cluster.held(launchers)
        workers[1].tell("kill")
        workers[0].tell("go")
        assert [launcher.finish() for launcher in launchers] == [1, 1], texts(launchers)
        for launcher in launchers:
            assert FAULTS["not shared"].says in launcher.text, texts(launchers)
