"""Gradients through shared memory: the sum in rank order, on any number of processes, whoever dies in between."""

from __future__ import annotations

import importlib
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchtrainer.checkpoint import memory
from torchtrainer.comm.backward import BackwardEnd, take_over
from torchtrainer.comm.board import LOOK_PARTS, Board, exchange_tag
from torchtrainer.comm.group import open_group
from torchtrainer.comm.shared_memory import (
    SHARES_FROM_BYTES,
    ExchangeUnavailableError,
    SharedMemoryExchange,
    UnequalExchangeError,
    why_not_shared,
)
from torchtrainer.comm.wrapping import Replica
from torchtrainer.errors import EngineError

pytestmark = pytest.mark.skipif(why_not_shared() is not None, reason=str(why_not_shared()))

TIMEOUT_S = 30.0
KILL_EXCHANGES = 200
AFTER_THE_KILL = 25
SOAK_SEEDS = 200
DEFAULT_SEEDS = 20


# ------------------------------------------------------------------------------------------------------ processes


@contextmanager
def memory_file() -> Iterator[str]:
    """A new file in memory that belongs to this process, by a path that other processes can open."""
    file = os.memfd_create("exchange")
    try:
        yield f"/proc/{os.getpid()}/fd/{file}"
    finally:
        os.close(file)


def fork(body: Callable[[], None]) -> int:
    """Runs the body in a new process, which ends with 0 if it returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        body()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ends_well(pids: list[int]) -> bool:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * len(pids)


def make(path: str | None, parameters: list[torch.Tensor], *, world_size: int, processes: int = 1, **changes):
    arguments = {"world_size": world_size, "parameters": parameters, "timeout_s": TIMEOUT_S, "processes": processes}
    return SharedMemoryExchange(path, **{**arguments, **changes})


def nothing() -> None:
    pass


def give(exchange: SharedMemoryExchange, rank: int, gradients: list[torch.Tensor | None]) -> None:
    exchange.put(rank, exchange.number + 1, gradients)
    exchange.publish(rank, exchange.number + 1)


# ------------------------------------------------------------------------------------------------------ gradients


def of_bytes(size_bytes: int) -> list[torch.Tensor]:
    return [torch.zeros(size_bytes // 4)]


def mixed() -> list[torch.Tensor]:
    """All types, sizes from none to some, in no order."""
    types = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    shapes = ((), (3,), (0, 4), (17, 5), (1,), (129,))
    found = [torch.zeros(shape, dtype=dtype) for shape in shapes for dtype in types]
    return [*found, torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last), torch.zeros(6, 7).t()]


def hundreds() -> list[torch.Tensor]:
    return [torch.zeros(1 + place % 37, 1 + place % 5) for place in range(400)]


MODELS = {
    "mixed": mixed,
    "hundreds": hundreds,
    "none": list,
    "just below shares": lambda: of_bytes(SHARES_FROM_BYTES - 64),
    "just at shares": lambda: of_bytes(SHARES_FROM_BYTES),
    "odd shares": lambda: [torch.zeros(131, 1013), torch.zeros(5), torch.zeros(100_003, dtype=torch.bfloat16)],
}


def gradients_of(
    rank: int, number: int, parameters: list[torch.Tensor], *, all_there: bool = True
) -> list[torch.Tensor | None]:
    """What a rank gives in an exchange, laid out as its parameters are; some are missing on some ranks, one on all."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    found = [
        torch.empty_like(one).copy_(torch.randn(one.shape, generator=generator, dtype=torch.float64))
        for one in parameters
    ]
    if all_there:
        return [*found]
    return [None if place == 1 or (place + rank + number) % 3 == 0 else one for place, one in enumerate(found)]


def averaged(given: list[list[torch.Tensor | None]]) -> list[torch.Tensor | None]:
    """By torch's plain operations, in rank order; a missing gradient counts as zeros beside others."""
    found: list[torch.Tensor | None] = []
    for ranks in zip(*given, strict=True):
        there = [one for one in ranks if one is not None]
        if not there:
            found.append(None)
            continue
        whole = [torch.zeros_like(there[0]) if one is None else one for one in ranks]
        total = whole[0].clone()
        for one in whole[1:]:
            total = total + one
        found.append(total / len(ranks))
    return found


def same_bits(found: list[torch.Tensor | None], wanted: list[torch.Tensor | None]) -> bool:
    def bits(one: torch.Tensor | None) -> bytes | None:
        return None if one is None else one.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return len(found) == len(wanted) and all(bits(one) == bits(other) for one, other in zip(found, wanted, strict=True))


# ------------------------------------------------------------------------------------------------------ sums


@pytest.mark.parametrize("name", ["mixed", "just at shares"])
def test_a_sample_may_weigh_more_on_one_rank_than_on_another(name) -> None:
    parameters = MODELS[name]()
    gradients = [gradients_of(rank, 1, parameters) for rank in range(3)]
    stands = [(1.0, 2.0), (0.5, 4.0), (9.0, 0.0)]
    with memory_file() as path:
        exchange = make(path, parameters, world_size=3)
        for rank, (weight, samples) in enumerate(stands):
            exchange.put(rank, 1, gradients[rank], weight=weight, samples=samples)
            exchange.publish(rank, 1)
        found = exchange.finish(carried=lambda: [0, 1, 2], on_wait=nothing)
        mean = (2 * 1.0 + 4 * 0.5) / 6
        for place, one in enumerate(found):
            expected = (gradients[0][place] * (1.0 / mean) + gradients[1][place] * (0.5 / mean)) / 3
            torch.testing.assert_close(one, expected)
        for rank in range(3):
            exchange.put(rank, 2, gradients[rank], weight=0.5, samples=rank)
            exchange.publish(rank, 2)
        plain = exchange.finish(carried=lambda: [0, 1, 2], on_wait=nothing)
        for one, expected in zip(plain, averaged(gradients), strict=True):
            assert torch.equal(one, expected), "weights that are alike change no bit"
        exchange.close()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("world_size", "processes"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 3), (5, 1)])
def test_every_process_gets_the_average_in_rank_order(model, world_size, processes) -> None:
    parameters = MODELS[model]()

    def body(process: int, path: str) -> None:
        ranks = [rank for rank in range(world_size) if rank * processes // world_size == process]
        exchange = make(path, parameters, world_size=world_size, processes=processes)
        for number in range(1, 6):
            given = [gradients_of(rank, number, parameters, all_there=number % 2 == 1) for rank in range(world_size)]
            for rank in ranks:
                give(exchange, rank, given[rank])
            found = exchange.finish(carried=lambda: ranks, on_wait=nothing)
            assert same_bits(found, averaged(given)), number
            for one in found:
                if one is not None:
                    one.fill_(float("nan"))  # as the caller may, without harm to others
        assert exchange.number == 5
        assert [exchange.given(rank) for rank in range(world_size)] == [5] * world_size

    with memory_file() as path:
        assert ends_well([fork(lambda process=process: body(process, path)) for process in range(processes)])


@pytest.mark.parametrize("model", MODELS)
def test_one_process_alone_needs_no_file(model) -> None:
    parameters = MODELS[model]()
    exchange = make(None, parameters, world_size=3)
    for number in (1, 2, 3):
        given = [gradients_of(rank, number, parameters, all_there=number != 2) for rank in range(3)]
        for rank in (2, 0, 1):
            give(exchange, rank, given[rank])
        assert same_bits(exchange.finish(carried=lambda: range(3), on_wait=nothing), averaged(given))
    exchange.close()


@pytest.mark.parametrize("size_bytes", [64, SHARES_FROM_BYTES])
def test_sixty_four_ranks_on_two_processes(size_bytes) -> None:
    parameters = of_bytes(size_bytes)
    given = [gradients_of(rank, 1, parameters) for rank in range(64)]

    def body(process: int, path: str) -> None:
        ranks = range(process, 64, 2)
        exchange = make(path, parameters, world_size=64, processes=2)
        for rank in ranks:
            give(exchange, rank, given[rank])
        assert same_bits(exchange.finish(carried=lambda: ranks, on_wait=nothing), averaged(given))

    with memory_file() as path:
        assert ends_well([fork(lambda process=process: body(process, path)) for process in range(2)])


def test_more_processes_than_cores_take_turns() -> None:
    processes = 4 * len(os.sched_getaffinity(0))
    parameters = of_bytes(1024)

    def body(rank: int, path: str) -> None:
        exchange = make(path, parameters, world_size=processes, processes=processes)
        for number in range(1, 101):
            give(exchange, rank, [torch.full_like(parameters[0], rank * number)])
            (found,) = exchange.finish(carried=lambda: [rank], on_wait=nothing)
            assert found is not None and found[0].item() == number * (processes - 1) / 2

    with memory_file() as path:
        assert ends_well([fork(lambda rank=rank: body(rank, path)) for rank in range(processes)])


# ------------------------------------------------------------------------------------------------------ ranks that change hands


SIZES = pytest.mark.parametrize("size_bytes", [4096, SHARES_FROM_BYTES])


@contextmanager
def two_carriers(
    size_bytes: int,
) -> Iterator[tuple[SharedMemoryExchange, SharedMemoryExchange, list[list[torch.Tensor | None]]]]:
    """The exchanges of two processes, both in this one, and the gradients of two ranks."""
    parameters = of_bytes(size_bytes)
    with memory_file() as path:
        pair = [make(path, parameters, world_size=2, timeout_s=0.05) for _ in range(2)]
        yield pair[0], pair[1], [gradients_of(rank, 1, parameters) for rank in range(2)]


@SIZES
def test_what_a_rank_has_given_stays(size_bytes) -> None:
    with two_carriers(size_bytes) as (one, other, given):
        give(other, 1, given[1])
        give(one, 0, given[0])
        give(one, 1, [torch.zeros_like(given[1][0])])
        assert same_bits(one.finish(carried=lambda: [0, 1], on_wait=nothing), averaged(given))


@SIZES
def test_a_half_written_slot_is_written_again(size_bytes) -> None:
    with two_carriers(size_bytes) as (one, other, given):
        other.put(1, 1, [torch.full_like(given[1][0], float("nan"))])
        assert other.given(1) == 0
        give(one, 0, given[0])
        assert same_bits(one.finish(carried=lambda: [0, 1], on_wait=lambda: give(one, 1, given[1])), averaged(given))


@SIZES
def test_a_rank_taken_over_while_others_are_waited_for_is_finished(size_bytes) -> None:
    with two_carriers(size_bytes) as (one, other, given):
        give(other, 1, given[1])  # and is lost before its share of the sum is made
        give(one, 0, given[0])
        carried = [0]
        waits = iter(range(100))

        def take_over() -> None:
            if next(waits) == 2:
                carried.append(1)

        assert same_bits(one.finish(carried=lambda: carried, on_wait=take_over), averaged(given))


@SIZES
def test_a_process_that_joins_goes_on_where_the_others_are(size_bytes) -> None:
    with two_carriers(size_bytes) as (one, other, given):
        for _ in range(3):
            give(one, 0, given[0])
            give(one, 1, given[1])
            one.finish(carried=lambda: [0, 1], on_wait=nothing)
        other.number = one.number
        give(other, 1, given[1])
        give(one, 0, given[0])
        found = other.finish(carried=lambda: [0, 1], on_wait=nothing)
        assert same_bits(found, averaged(given))
        assert same_bits(one.finish(carried=lambda: [0, 1], on_wait=nothing), found)


def test_only_the_running_exchange_takes_gradients() -> None:
    with two_carriers(64) as (one, _, given), pytest.raises(ValueError, match="number is 2"):
        one.put(0, 2, given[0])


@SIZES
def test_a_rank_that_does_not_come_is_named(size_bytes) -> None:
    with two_carriers(size_bytes) as (one, _, given):
        give(one, 0, given[0])
        with pytest.raises(EngineError, match=r"ranks \[1\] .* exchange 1 .* timeout_s=0\.05 s"):
            one.finish(carried=lambda: [0], on_wait=nothing)


@SIZES
def test_what_on_wait_raises_leaves_the_exchange_which_can_be_finished_later(size_bytes) -> None:
    with two_carriers(size_bytes) as (one, other, given):
        calls: list[int] = []

        def leave() -> None:
            calls.append(1)
            if len(calls) == 3:  # the first comes before the first sleep, the others while nobody wakes this thread
                raise KeyError("orders")

        give(one, 0, given[0])
        with pytest.raises(KeyError, match="orders"):
            one.finish(carried=lambda: [0], on_wait=leave)
        assert one.number == 0
        give(other, 1, given[1])
        assert same_bits(one.finish(carried=lambda: [0, 1], on_wait=nothing), averaged(given))


# ------------------------------------------------------------------------------------------------------ deaths


class Carriers:
    """Which process carries which rank, in memory that all share; the parent changes it when a process is gone."""

    def __init__(self, carriers: list[int]) -> None:
        self._ranks = len(carriers)
        self._bytes = mmap.mmap(-1, self._ranks + 1)
        self._bytes[: self._ranks] = bytes(carriers)

    def of(self, process: int) -> list[int]:
        return [rank for rank, carrier in enumerate(self._bytes[: self._ranks]) if carrier == process]

    def killed(self) -> None:
        self._bytes[self._ranks] = 1

    def await_kill(self) -> None:
        """Without it, a parent that had no core for a while would come too late to kill anybody."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self._bytes[self._ranks]:
            assert time.monotonic() < deadline, "nobody was killed"
            os.sched_yield()

    def hand_over(self, gone: int, rng: random.Random, left: list[int]) -> None:
        for rank in self.of(gone):
            self._bytes[rank] = rng.choice(left)


def by_formula(rank: int, number: int, base: torch.Tensor) -> torch.Tensor:
    return base * (1.0 + 0.37 * rank + 0.011 * number)


def train_on(path: str, process: int, carriers: Carriers, *, size_bytes: int, world_size: int) -> None:
    """Two hundred exchanges; every total is compared."""
    base = torch.arange(1.0, size_bytes // 4 + 1)
    exchange = make(path, [base], world_size=world_size, processes=3)

    def give_all() -> None:
        for rank in carriers.of(process):
            if exchange.given(rank) <= exchange.number:
                give(exchange, rank, [by_formula(rank, exchange.number + 1, base)])

    for number in range(1, KILL_EXCHANGES + 1):
        if number == KILL_EXCHANGES - AFTER_THE_KILL:
            carriers.await_kill()
        give_all()
        found = exchange.finish(carried=lambda: carriers.of(process), on_wait=give_all)
        wanted = averaged([[by_formula(rank, number, base)] for rank in range(world_size)])
        assert same_bits(found, wanted), f"process {process}, exchange {number}"


def kill_within(watched: SharedMemoryExchange, rank: int, pid: int, rng: random.Random) -> None:
    """At a drawn instant of a drawn exchange."""
    number = rng.randrange(2, KILL_EXCHANGES - 2 * AFTER_THE_KILL)
    deadline = time.monotonic() + TIMEOUT_S
    while watched.given(rank) < number:
        assert time.monotonic() < deadline, f"rank {rank} did not come to exchange {number}"
    instant = time.perf_counter() + rng.uniform(0, 1e-3)
    while time.perf_counter() < instant:
        pass
    os.kill(pid, signal.SIGKILL)


SEEDS = [
    *range(DEFAULT_SEEDS),
    *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(DEFAULT_SEEDS, DEFAULT_SEEDS + SOAK_SEEDS)),
]


@pytest.mark.parametrize("seed", SEEDS)
def test_survivors_finish_every_exchange_of_a_process_killed_at_any_instant(seed) -> None:
    rng = random.Random(seed)
    world_size, processes = 4, 3
    size_bytes = (4096, SHARES_FROM_BYTES)[seed % 2]
    carriers = Carriers([rank % processes for rank in range(world_size)])
    with memory_file() as path:
        pids = [
            fork(
                lambda process=process: train_on(path, process, carriers, size_bytes=size_bytes, world_size=world_size)
            )
            for process in range(processes)
        ]
        watched = make(path, of_bytes(size_bytes), world_size=world_size)
        victim = rng.randrange(processes)
        kill_within(watched, carriers.of(victim)[0], pids[victim], rng)
        carriers.killed()
        status = os.waitstatus_to_exitcode(os.waitpid(pids[victim], 0)[1])
        left = [process for process in range(processes) if process != victim]
        carriers.hand_over(victim, rng, left)
        assert ends_well([pids[process] for process in left])
        assert status == -signal.SIGKILL
        assert [watched.given(rank) for rank in range(world_size)] == [KILL_EXCHANGES] * world_size


# ------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("alone", [True, False])
def test_too_little_memory_is_said_with_how_much_is_needed(monkeypatch, alone) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000_000)
    monkeypatch.setattr("torchtrainer.comm.shared_memory.available_bytes", lambda: 10_000_000)
    with (
        memory_file() as path,
        pytest.raises(ExchangeUnavailableError, match=r"need 42 MB .* 10 MB are free\. .*limit"),
    ):
        make(None if alone else path, of_bytes(42_000_000 // (3 if not alone else 2)), world_size=2)


def test_a_closed_exchange_lets_go_of_the_memory() -> None:
    with memory_file() as path:
        exchange = make(path, of_bytes(4096), world_size=2)
        assert "memfd:exchange" in Path("/proc/self/maps").read_text()
        exchange.close()
        assert "memfd:exchange" not in Path("/proc/self/maps").read_text()


# ------------------------------------------------------------------------------------------------------ inside DDP


@pytest.fixture(scope="module")
def _ddp_imported() -> None:
    """DDP imports this when it is first used: here once, not in every process that is forked."""
    importlib.import_module("torch._dynamo")


class Branches(nn.Module):
    """Two layers, of which a rank may use only the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.spare = (nn.Linear(40, 40) for _ in range(3))

    def forward(self, rows: torch.Tensor, *, both: bool) -> torch.Tensor:
        out = self.first(rows)
        return self.second(out) if both else out


def one_step(model: DistributedDataParallel, rank: int, step: int, *, unused: bool) -> None:
    """Two backward passes, after one that is not exchanged; the branches differ between ranks where that is allowed."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    rows = torch.randn(3, 4, 40, generator=generator)
    both = not unused or (rank + step) % 2 == 0
    model.zero_grad(set_to_none=step % 2 == 0)
    with model.no_sync():
        model(rows[0], both=both).sum().backward()
    model(rows[1], both=both).sum().backward()
    model(rows[2], both=not unused or step == 1).square().sum().backward()


def compare_with_plain(rank: int, path: str, place: Path, **options: bool) -> None:
    group = open_group(backend="gloo", rank=rank, world_size=2, timeout_s=TIMEOUT_S, store_path=str(place / "store"))
    unused = options.get("find_unused_parameters", False)
    models = []
    for wrapped in (DistributedDataParallel, Replica):
        torch.manual_seed(0)
        model = Branches()
        model.spare.requires_grad_(unused)  # used by nobody
        if not unused:
            del model.spare
        models.append(wrapped(model, bucket_cap_mb=0.005, **options))
    plain, ours = models
    parameters = [nn.Parameter(torch.zeros(2)), *ours.parameters()]  # the first is another model's
    exchange = make(path, parameters, world_size=2, processes=2)

    def exchanged(touched: Mapping[int, int]) -> None:
        assert set(touched) == {0}
        if ours.require_backward_grad_sync:
            give(exchange, rank, [one.grad for one in parameters])
            take_over(parameters, exchange.finish(carried=lambda: [rank], on_wait=nothing))

    BackwardEnd(exchanged).watch(ours.parameters(), 0)
    for step in range(4):
        for model in models:
            one_step(model, rank, step, unused=unused)
        found, wanted = ([one.grad for one in model.parameters()] for model in (ours, plain))
        assert same_bits(found, wanted), (rank, step, found, wanted)
    assert exchange.number == 8
    group.close()


@pytest.mark.usefixtures("_ddp_imported")
@pytest.mark.parametrize("gradient_as_bucket_view", [True, False])
@pytest.mark.parametrize("find_unused_parameters", [True, False])
def test_gradients_are_those_of_plain_ddp(tmp_path, gradient_as_bucket_view, find_unused_parameters) -> None:
    options = {
        "gradient_as_bucket_view": gradient_as_bucket_view,
        "find_unused_parameters": find_unused_parameters,
    }
    with memory_file() as path:
        assert ends_well(
            [fork(lambda rank=rank: compare_with_plain(rank, path, tmp_path, **options)) for rank in range(2)]
        )


def test_what_the_exchange_raises_comes_out_of_backward() -> None:
    def refuse(touched: Mapping[int, int]) -> None:
        raise KeyError("orders")

    model = nn.Linear(2, 2)
    BackwardEnd(refuse).watch(model.parameters(), 0)
    with pytest.raises(KeyError, match="orders"):
        model(torch.ones(1, 2)).sum().backward()


def test_the_end_of_backward_is_noticed_once_whatever_was_differentiated() -> None:
    """Also after a pass that an error broke off; ``torch.autograd.grad`` adds to no gradient and is not noticed."""
    model, other, loose = nn.Linear(2, 2), nn.Linear(2, 1), nn.Parameter(torch.ones(2))
    ended: list[Mapping[int, int]] = []
    ends = BackwardEnd(ended.append)
    for unit, parameters in enumerate((model.parameters(), other.parameters(), [loose])):
        ends.watch(parameters, unit)
    other(model(torch.ones(1, 2)) * loose).sum().backward()
    torch.autograd.grad(model(torch.ones(1, 2)).sum(), [*model.parameters()])
    loose.sum().backward()
    breaks = model(torch.ones(1, 2))
    breaks.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (breaks.sum() + other(torch.ones(1, 2)).sum()).backward()
    model.bias.sum().backward()
    assert ended[:2] == [{0: 2, 1: 2, 2: 1}, {2: 1}]
    assert 0 in ended[2]
    assert len(ended) == 3


# ---------------------------------------------------------------------------------------------- other parameters


def by_rows(rows: list[int], values: list[list[float]], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), torch.tensor(values), shape, check_invariants=False)


@pytest.mark.parametrize("size_bytes", [64, 2 * SHARES_FROM_BYTES])
def test_sparse_gradients_stay_sparse_and_are_added_up_in_rank_order(size_bytes) -> None:
    """Rows twice, rows of one rank only, a rank without any, and one whose gradient is dense."""
    table, dense = torch.zeros(5, 2), torch.zeros(size_bytes // 4)
    mine = [
        by_rows([1, 1, 3], [[1.0, 2.0], [10.0, 20.0], [4.0, 4.0]], (5, 2)),
        by_rows([3], [[2.0, 2.0]], (5, 2)),
        None,
    ]
    wanted = torch.zeros(5, 2)
    wanted[1], wanted[3] = torch.tensor([11.0, 22.0]), torch.tensor([6.0, 6.0])

    def body(rank: int, path: str) -> None:
        exchange = make(path, [table, dense], world_size=3, processes=3, by_rows={0})
        full = torch.full((size_bytes // 4,), float(rank))
        for dense_table in (False, False, True):
            table_gradient = mine[rank].to_dense() if dense_table and mine[rank] is not None else mine[rank]
            give(exchange, rank, [table_gradient, full])
            found = exchange.finish(carried=lambda: [rank], on_wait=nothing)
            assert found[0].is_sparse is not dense_table
            assert same_bits([found[0].to_dense() if found[0].is_sparse else found[0]], [wanted / 3])
            assert same_bits([found[1]], [torch.full_like(full, 1.0)])
        give(exchange, rank, [None, full])
        assert exchange.finish(carried=lambda: [rank], on_wait=nothing)[0] is None

    with memory_file() as path:
        assert ends_well([fork(lambda rank=rank: body(rank, path)) for rank in range(3)])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_gradients_keep_both_parts(dtype) -> None:
    exchange = make(None, [torch.zeros(3, dtype=dtype)], world_size=2)
    for rank, value in enumerate((1 + 2j, 3 - 6j)):
        give(exchange, rank, [torch.full((3,), value, dtype=dtype)])
    (found,) = exchange.finish(carried=lambda: [0, 1], on_wait=nothing)
    assert same_bits([torch.view_as_real(found)], [torch.view_as_real(torch.full((3,), 2 - 2j, dtype=dtype))])


@pytest.mark.parametrize("size_bytes", [64, 2 * SHARES_FROM_BYTES])
def test_other_parameters_are_exchanged_from_one_exchange_on(size_bytes) -> None:
    """The memory of what was exchanged before goes back, and a process that comes later finds the place."""
    first, second = torch.zeros(size_bytes // 4), torch.zeros(7, 3)

    def body(rank: int, path: str) -> None:
        exchange = make(path, [first], world_size=2, processes=2)
        for round_ in range(8):
            grown = round_ % 2 == 1
            if round_:
                exchange.lay_out([first, second] if grown else [second])
            if round_ == 5 and rank:  # this process is replaced by one that was built with what there was at first
                number, region = exchange.number, exchange.region
                exchange = make(path, [first], world_size=2, processes=2)
                exchange.number = number
                exchange.lay_out([first, second], region=region)
            for _ in range(3):
                whole = torch.full_like(first, float(rank + round_))
                rows = torch.full_like(second, float(2 * rank))
                mine = [whole] if not round_ else [whole, rows] if grown else [rows]
                give(exchange, rank, mine)
                found = exchange.finish(carried=lambda: [rank], on_wait=nothing)
                wanted = [torch.full_like(first, round_ + 0.5), torch.full_like(second, 1.0)]
                assert same_bits(found, wanted[:1] if not round_ else wanted if grown else wanted[1:])

    with memory_file() as path:
        assert ends_well([fork(lambda rank=rank: body(rank, path)) for rank in range(2)])
        taken = os.stat(path).st_blocks * 512
        assert taken < 12 * size_bytes + (1 << 20), "the slots of earlier layouts are still there"


@pytest.mark.parametrize(
    ("differs", "other"), [("step", 6), ("updates", 6), ("layout", 6), ("sums", (0,) * (LOOK_PARTS - 1) + (-1,))]
)
def test_ranks_that_do_not_exchange_alike_are_told_before_anything_is_averaged(differs, other) -> None:
    tags = [exchange_tag(**{"step": 5, "updates": 5, "layout": 9, **change}) for change in ({}, {differs: other})]
    exchange = make(None, [torch.zeros(3)], world_size=2)
    for rank, tag in enumerate(tags):
        exchange.put(rank, 1, [torch.ones(3)])
        exchange.publish(rank, 1, tag)
    with pytest.raises(UnequalExchangeError) as caught:
        exchange.finish(carried=lambda: [0, 1], on_wait=nothing, tag=tags[0])
    assert (caught.value.rank, caught.value.tag) == (1, tags[1])
    assert exchange.number == 0


def test_nobody_waits_for_a_rank_that_went_on_without_the_exchange() -> None:
    def body(path: str) -> None:
        exchange = make(path, [torch.zeros(3)], world_size=2, processes=2)
        give(exchange, 0, [torch.ones(3)])
        exchange.be_at(1, 8)  # another process writes this; here it is there from the beginning
        with pytest.raises(UnequalExchangeError) as caught:
            exchange.finish(carried=lambda: [0], on_wait=nothing, place=7)
        assert (caught.value.rank, caught.value.tag) == (1, None)

    with memory_file() as path:
        assert ends_well([fork(lambda: body(path))])


class GoesOnWhenLookedAt:
    """What the ranks have given, where rank 1 gives, finishes the exchange and goes on right after somebody has looked."""

    def __init__(self, board: Board) -> None:
        self._given, self._board = board.given, board

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)

    def __getitem__(self, rank: int) -> int:
        return self._then_go_on(self._given[rank])

    def missing(self, number: int) -> list[int]:
        return self._then_go_on(self._given.missing(number))

    def _then_go_on(self, seen: Any) -> Any:
        self._given.publish(1, 1)
        self._board.places[1] = 8
        return seen


def test_a_rank_that_gives_and_goes_on_while_it_is_looked_at_has_not_parted() -> None:
    board = Board(mmap.mmap(-1, Board.size_bytes(2)), world_size=2, shared=False)
    board.given.publish(0, 1)
    board.given = GoesOnWhenLookedAt(board)  # type: ignore[assignment]
    board.check_places(1, 7)
    board.check_places(1, 7)
