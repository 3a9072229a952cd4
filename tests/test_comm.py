"""Process groups between real processes: run as a script, this file is a parent that forks the ranks of one case.

The parent imports torch once and runs no thread, so that a group of ranks costs a fork and not an import each.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from forked import ForkedProcess
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch's stubs leave them out
from torch.nn.parallel import DistributedDataParallel

from torchtrainer.comm.group import SingleCollective, close_group, join_group, open_group
from torchtrainer.comm.rendezvous import LOOK_S, private_store
from torchtrainer.comm.wrapping import unwrap, wrap
from torchtrainer.errors import EngineError, InvalidArgumentError
from torchtrainer.topology import Topology, detect, to_environ

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
RANK_DEADLINE_S = 60.0
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------- run in the ranks


class Buffers(nn.Module):
    """Buffers of many dtypes and shapes, filled by rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.norm.get_buffer("running_mean").fill_(rank + 0.5)
        self.norm.get_buffer("num_batches_tracked").fill_(rank + 7)
        self.register_buffer("mask", torch.tensor([[rank == 0, rank == 1]]))
        self.register_buffer("brain", torch.full((2, 1, 2), rank + 1.0, dtype=torch.bfloat16))
        self.register_buffer("phase", torch.tensor(1j * rank))
        self.register_buffer("transposed", torch.arange(6.0).reshape(2, 3).t() * (rank + 1))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("shared", self.get_buffer("brain"))


def _open(rank: int, world_size: int, place: Path, *, generation: int = 0, timeout_s: float = 30.0) -> Any:
    return open_group(
        backend="gloo",
        rank=rank,
        world_size=world_size,
        timeout_s=timeout_s,
        store_path=str(place / f"store{generation}"),
        device=CPU,
    )


def _listening() -> set[str]:
    """Addresses on which this process has a listening TCP socket, as the kernel prints them."""
    mine = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            mine.add(str(entry.readlink()))
        except FileNotFoundError:  # the listing's own descriptor is gone by now
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.add(fields[1].split(":")[0])
    return found


def _groups() -> list[str]:
    return ["default"] if dist.is_initialized() else []


def case_exchange(rank: int, world_size: int, place: Path) -> Any:
    hook = sys.excepthook
    collective = _open(rank, world_size, place)
    gathered = collective.all_gather(
        {"rank": rank, "text": "ä" * rank * 300, "values": [math.nan, -math.inf, 0.1, None]}
    )
    raw = collective.gather_tensors(bytes(range(rank)))
    nothing = collective.gather_tensors(b"")
    try:
        collective.all_gather(object())
        refused = False
    except TypeError:
        refused = True
    sums = collective.sum([0.1, float(rank), 1e16 if rank == 0 else 1.0])
    nothing_summed = collective.sum([])
    collective.barrier()
    listening = _listening()
    collective.close()
    collective.close()
    return {
        "place": [collective.rank, collective.world_size],
        "gathered": gathered,
        "raw": [list(part) for part in raw],
        "nothing": [list(part) for part in nothing],
        "refused": refused,
        "sums": [*sums, *nothing_summed],
        "listening": sorted(listening),
        "excepthook_kept": sys.excepthook is hook,
        "left": _groups(),
    }


def case_buffers(rank: int, world_size: int, place: Path) -> Any:
    collective = _open(rank, world_size, place)
    modules = [Buffers(rank), wrap(nn.BatchNorm1d(2), device=CPU, ddp_args={}), nn.Linear(1, 1)]
    collective.broadcast_buffers(modules, src=1)
    expected = Buffers(1)
    equal = {name: bool(torch.equal(value, modules[0].get_buffer(name))) for name, value in expected.named_buffers()}
    collective.broadcast_buffers([])
    collective.broadcast_buffers([nn.Linear(1, 1)])
    collective.close()
    return equal


def case_generations(rank: int, world_size: int, place: Path) -> Any:
    totals, threads, descriptors = [], [], []
    for generation in range(6):
        collective = _open(rank, world_size, place, generation=generation)
        totals.append(collective.sum([1.0])[0])
        close_group()
        close_group()
        threads.append(len(list(Path("/proc/self/task").iterdir())))
        descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
    return {"totals": totals, "threads": threads, "descriptors": descriptors}


def case_wrap(rank: int, world_size: int, place: Path) -> Any:
    collective = _open(rank, world_size, place)
    torch.manual_seed(rank)
    model = nn.Linear(2, 1, bias=False)
    wrapped = wrap(model, device=CPU, ddp_args={"gradient_as_bucket_view": True, "broadcast_buffers": False})
    assert isinstance(wrapped, DistributedDataParallel)
    wrapped(torch.full((1, 2), float(rank))).sum().backward()
    assert model.weight.grad is not None
    frozen = nn.Linear(1, 1).requires_grad_(False)
    outcome = {
        "weights": collective.all_gather(model.weight.tolist()),
        "gradient": model.weight.grad.tolist(),
        "ddp_args": [wrapped.gradient_as_bucket_view, wrapped.broadcast_buffers],
        "unwrapped": unwrap(wrapped) is model and unwrap(model) is model,
        "frozen_as_it_is": wrap(frozen, device=CPU, ddp_args={}) is frozen,
    }
    collective.close()
    return outcome


def case_absent(rank: int, world_size: int, place: Path) -> Any:
    if rank == world_size - 1:
        return None
    try:
        _open(rank, world_size, place, timeout_s=1.0)
    except EngineError as error:
        return {"message": str(error), "left": _groups()}
    return None


def case_lost(rank: int, world_size: int, place: Path) -> Any:
    """The last rank ends without a word after the group is formed; a collective of the others fails."""
    collective = _open(rank, world_size, place, timeout_s=10.0)
    collective.barrier()
    if rank == world_size - 1:
        os._exit(0)
    try:
        collective.all_gather(rank)
    except RuntimeError:
        collective.close()
        return {"failed": True, "left": _groups()}
    return {"failed": False}


def _launched(rank: int, world_size: int, port: int) -> Topology:
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        node_rank=0,
        nodes=1,
        master_addr="host.that.does.not.exist.invalid",
        master_port=port,
        launcher="srun",
    )


def case_join(rank: int, world_size: int, place: Path) -> Any:
    """All ranks are on this machine: whatever MASTER_ADDR says, they meet on loopback."""
    topology = _launched(rank, world_size, int((place / "port").read_text()))
    os.environ.update(to_environ(topology))
    collective = join_group(topology, backend="gloo", timeout_s=30.0, device=CPU)
    outcome = {"ranks": collective.all_gather(rank), "listening": sorted(_listening())}
    collective.barrier()
    collective.close()
    return {**outcome, "left": _groups()}


def case_attach(rank: int, world_size: int, place: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{place}/own", rank=rank, world_size=world_size)
    collective = join_group(_launched(rank, world_size, 1), backend="gloo", timeout_s=30.0, device=CPU)
    ranks = collective.all_gather(rank)
    collective.close()
    left = _groups()
    try:
        join_group(_launched(rank, world_size + 1, 1), backend="gloo", timeout_s=30.0)
        message = ""
    except InvalidArgumentError as error:
        message = str(error)
    dist.destroy_process_group()
    return {"ranks": ranks, "left": left, "message": message}


def case_agent_store(rank: int, world_size: int, place: Path) -> Any:
    """torchrun's agent hosts the store, and the ranks connect to it."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=(place / "port").read_text(),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT=str(rank),  # each machine counts for itself
    )
    topology = detect(os.environ)
    assert topology is not None
    if rank == 0 and (place / "late").exists():  # the others take what was left behind for an offer of this one
        store = TCPStore("127.0.0.1", topology.master_port, is_master=False, timeout=timedelta(seconds=30))
        store.wait([f"torchtrainer/meeting/left/{other}" for other in range(1, world_size)])
    collective = join_group(topology, backend="gloo", timeout_s=30.0, device=CPU)
    outcome = {"ranks": collective.all_gather(rank), "listening": sorted(_listening())}
    collective.barrier()
    collective.close()
    return outcome


def _run_rank(case: Callable[[int, int, Path], Any], rank: int, world_size: int, place: Path) -> None:
    outcome = case(rank, world_size, place)
    (place / f"{rank}.json").write_text(json.dumps(outcome))


def _fork_ranks(name: str, world_size: int, place: Path) -> None:
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_run_rank, args=(globals()[name], rank, world_size, place)) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(RANK_DEADLINE_S)
        if process.exitcode is None:
            process.kill()
            process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


# ---------------------------------------------------------------------------------------------- the tests


def run_ranks(case: Callable[[int, int, Path], Any], world_size: int, place: Path) -> list[Any]:
    """Run one case on that many real ranks and return what each came to; fails if a process is left behind."""
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if sys.platform == "linux":
        environ["GLOO_SOCKET_IFNAME"] = "lo"
    words = [__file__, case.__name__, str(world_size), str(place)]
    parent = ForkedProcess(words, place, environ, session=True)
    try:
        output = "".join(parent.communicate(timeout=RANK_DEADLINE_S * world_size))
    except subprocess.TimeoutExpired:
        os.killpg(parent.pid, 9)
        raise
    assert parent.returncode == 0, output
    with pytest.raises(ProcessLookupError):
        os.killpg(parent.pid, 0)
    files = [place / f"{rank}.json" for rank in range(world_size)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@contextmanager
def held_port() -> Iterator[int]:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_learns_the_same_in_rank_order(world_size: int, place: Path) -> None:
    outcomes = run_ranks(case_exchange, world_size, place)
    for rank, outcome in enumerate(outcomes):
        assert outcome["place"] == [rank, world_size]
        assert [value["rank"] for value in outcome["gathered"]] == list(range(world_size))
        assert [value["text"] for value in outcome["gathered"]] == ["ä" * n * 300 for n in range(world_size)]
        for value in outcome["gathered"]:
            assert math.isnan(value["values"][0])
            assert value["values"][1:] == [-math.inf, 0.1, None]
        assert outcome["raw"] == [list(range(n)) for n in range(world_size)]
        assert outcome["nothing"] == [[]] * world_size
        assert outcome["refused"]
        assert outcome["sums"] == outcomes[0]["sums"]
        assert outcome["excepthook_kept"]
        assert outcome["left"] == []
    total = 0.0
    for _ in range(world_size):
        total += 0.1
    assert outcomes[0]["sums"] == [total, float(sum(range(world_size))), 1e16]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's table of sockets")
def test_nothing_listens_outside_loopback(place: Path) -> None:
    for outcome in run_ranks(case_exchange, 2, place):
        assert outcome["listening"] == ["0100007F"]  # 127.0.0.1, and there is a listener, so that this says something


@pytest.mark.soak
def test_buffers_of_every_dtype_follow_one_rank(place: Path) -> None:
    for equal in run_ranks(case_buffers, 3, place):
        assert len(equal) >= 8
        assert all(equal.values()), equal


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads and descriptors in /proc")
def test_a_group_can_be_formed_again_and_leaves_nothing(place: Path) -> None:
    for outcome in run_ranks(case_generations, 2, place):
        assert outcome["totals"] == [2.0] * 6
        assert len(set(outcome["threads"][1:])) == 1, outcome
        assert len(set(outcome["descriptors"][1:])) == 1, outcome


def test_a_wrapped_model_averages_gradients_and_unwraps(place: Path) -> None:
    for outcome in run_ranks(case_wrap, 3, place):
        assert outcome["weights"][0] == outcome["weights"][1] == outcome["weights"][2]
        assert outcome["gradient"] == [[1.0, 1.0]]
        assert outcome["ddp_args"] == [True, False]
        assert outcome["unwrapped"]
        assert outcome["frozen_as_it_is"]


def test_a_rank_that_does_not_come_is_an_error_with_the_time_out(place: Path) -> None:
    outcomes = run_ranks(case_absent, 3, place)
    for rank, outcome in enumerate(outcomes[:2]):
        assert f"rank {rank} of 3 could not form the process group" in outcome["message"]
        assert "timeout_s=1 s" in outcome["message"]
        assert outcome["left"] == []


def test_a_lost_rank_fails_the_collective_and_the_group_can_be_closed(place: Path) -> None:
    assert run_ranks(case_lost, 2, place) == [{"failed": True, "left": []}, None]


def test_ranks_of_a_launcher_on_one_machine_meet_on_loopback(place: Path) -> None:
    with held_port() as port:
        (place / "port").write_text(str(port))
    for outcome in run_ranks(case_join, 3, place):
        assert outcome["ranks"] == [0, 1, 2]
        assert outcome["left"] == []
        if sys.platform == "linux":
            assert outcome["listening"] == ["0100007F"]


def test_a_port_in_use_is_named_with_the_variable_to_change() -> None:
    with held_port() as port, pytest.raises(EngineError, match=f"port {port} .*MASTER_PORT"):
        join_group(_launched(0, 2, port), backend="gloo", timeout_s=5.0)
    assert not dist.is_initialized()


def test_a_port_in_use_is_named_when_ranks_are_on_several_machines() -> None:
    with closing(socket.create_server(("0.0.0.0", 0))) as listener:
        port = listener.getsockname()[1]
        topology = Topology(
            rank=0,
            world_size=2,
            local_rank=0,
            local_world_size=1,
            node_rank=0,
            nodes=2,
            master_addr="127.0.0.1",
            master_port=port,
            launcher="torchrun",
        )
        with pytest.raises(EngineError, match=f"port {port} .*MASTER_PORT"):
            join_group(topology, backend="gloo", timeout_s=5.0)


def test_a_group_of_the_script_is_used_and_kept(place: Path) -> None:
    for outcome in run_ranks(case_attach, 2, place):
        assert outcome["ranks"] == [0, 1]
        assert outcome["left"] == ["default"]
        assert "of 2" in outcome["message"]
        assert "of 3" in outcome["message"]


def test_ranks_connect_to_the_store_of_the_launcher(place: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (place / "port").write_text(str(store.port))
    for outcome in run_ranks(case_agent_store, 2, place):
        assert outcome["ranks"] == [0, 1]
    assert store.num_keys() > 1


@pytest.mark.parametrize("left", ["an offer", "signatures", "a meeting", "a larger meeting"])
def test_ranks_meet_in_a_store_that_holds_what_earlier_ones_left(place: Path, left: str) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = PrefixStore("torchtrainer/meeting", store)
    meeting.set("offer", "left")
    if left == "an offer":
        (place / "late").touch()
    else:
        for rank in (1, 2):
            meeting.set(f"left/{rank}", "theirs")
    if "meeting" in left:
        meeting.set("left/signed", json.dumps(["theirs"] * (5 if left == "a larger meeting" else 2)))
    (place / "port").write_text(str(store.port))
    for _ in range(2):  # the second time, what the first ranks left is there too
        for outcome in run_ranks(case_agent_store, 3, place):
            assert outcome["ranks"] == [0, 1, 2]


def pump(source: socket.socket, sink: socket.socket, delay_s: float) -> None:
    """Hands on what comes, later: the way between two machines."""
    with suppress(OSError):  # one of them has closed its end
        while data := source.recv(65536):
            time.sleep(delay_s)
            sink.sendall(data)


def test_ranks_meet_over_a_slow_network() -> None:
    """An answer takes longer than a rank waits for one before it looks again."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    enough = timedelta(seconds=30)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        opening = pool.submit(
            TCPStore, "127.0.0.1", listener.getsockname()[1], is_master=False, wait_for_workers=False, timeout=enough
        )
        near, _ = listener.accept()
        with near, socket.create_connection(("127.0.0.1", store.port)) as far:
            for source, sink in ((near, far), (far, near)):
                pool.submit(pump, source, sink, 2 * LOOK_S)
            other = pool.submit(private_store, opening.result(), rank=1, world_size=2, timeout=enough)
            mine = private_store(store, rank=0, world_size=2, timeout=enough)
            mine.set("key", "value")
            assert other.result().get("key") == b"value"
            near.shutdown(socket.SHUT_RDWR)
            far.shutdown(socket.SHUT_RDWR)


def test_ranks_that_do_not_come_to_the_meeting_are_named() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    soon = timedelta(seconds=0.2)
    with pytest.raises(EngineError, match=r"rank 2 waited for rank 0 .* 0\.2 s.*timeout_s"):
        private_store(store, rank=2, world_size=4, timeout=soon)
    PrefixStore("torchtrainer/meeting", store).set("offer", "left")
    with pytest.raises(EngineError, match="rank 1 waited for rank 0"):
        private_store(store, rank=1, world_size=4, timeout=soon)
    with pytest.raises(EngineError, match="rank 0 waited for ranks 1, 2, 3 "):
        private_store(store, rank=0, world_size=4, timeout=soon)


def test_a_single_rank_needs_no_group() -> None:
    collective = SingleCollective()
    assert (collective.rank, collective.world_size) == (0, 1)
    assert collective.all_gather((1, 2)) == [[1, 2]]
    assert collective.gather_tensors(b"ab") == [b"ab"]
    assert collective.sum([1, 2.5]) == [1.0, 2.5]
    module = nn.BatchNorm1d(1)
    collective.broadcast_buffers([module])
    collective.barrier()
    collective.close()
    assert not dist.is_initialized()


def test_unwrap_takes_off_the_compiled_shell() -> None:
    class Compiled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

    model = nn.Linear(1, 1)
    assert unwrap(Compiled(model)) is model
    assert unwrap(model) is model


if __name__ == "__main__":
    _fork_ranks(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
