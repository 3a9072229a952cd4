"""Faults of a training run on several machines: it goes on with the same bits, or its launch ends with one clear error in time."""

from __future__ import annotations

import pytest
from machines import last_word, machines, texts
from nodes import why_no_nodes

pytestmark = [
    pytest.mark.skipif(why_no_nodes() is not None, reason=str(why_no_nodes())),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    """The digest of a run to which nothing happens."""
    with machines(tmp_path_factory.mktemp("undisturbed")) as cluster:
        launchers = cluster.launch_all()
        workers = cluster.held(launchers)
        for worker in workers:
            worker.tell("go")
        digests = {last_word(worker)["digest"] for worker in workers}
        assert [launcher.finish() for launcher in launchers] == [0, 0], texts(launchers)
    (digest,) = digests
    return digest


@pytest.mark.parametrize("rank", [0, 1])
def test_training_goes_on_after_a_worker_of_one_machine_was_killed(tmp_path, undisturbed, rank) -> None:
    with machines(tmp_path) as cluster:
        launchers = cluster.launch_all()
        workers = cluster.held(launchers)
        workers[rank].tell("kill")
        workers[1 - rank].tell("go")
        again = cluster.held(launchers)
        assert sorted(worker["TORCHELASTIC_RESTART_COUNT"] for worker in again) == [0, 1], "each counts its own"
        for worker in again:
            worker.tell("go")
        assert [last_word(worker)["digest"] for worker in again] == [undisturbed] * 2
        assert [launcher.finish() for launcher in launchers] == [0, 0], texts(launchers)
        for node in cluster.nodes:
            node.assert_empty()
