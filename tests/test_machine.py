"""The driver's decisions, without a process, a socket or a second of waiting."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

import pytest

from torchtrainer.config import Timeouts
from torchtrainer.control.messages import (
    Beat,
    Boundary,
    Call,
    CheckpointEnded,
    DumpStacks,
    EndWorker,
    EngineFailed,
    Failure,
    GroupGone,
    KillGroup,
    PrepareStop,
    Reply,
    SignalWorkers,
    Stacks,
    StopAt,
    WorkerExited,
    WorkerReady,
    WorkerStarted,
)
from torchtrainer.control.wire import Message
from torchtrainer.driver.causes import EngineLost, StartTimedOut, UserCodeFailed, WorkerDied, WorkerHung
from torchtrainer.driver.machine import handle
from torchtrainer.driver.policies import MIN_SAVE_EVERY_S
from torchtrainer.driver.states import (
    TO_THE_END,
    Action,
    Calling,
    CallRequested,
    Closed,
    EndRequested,
    Event,
    HostLost,
    Idle,
    Killing,
    Machine,
    Raised,
    Returned,
    SaveRequested,
    Send,
    StopRequested,
    Tick,
)
from torchtrainer.worker.link import StopGate

LIMITS = Timeouts()
HANG_S = 10.0


class Drive:
    """A machine with its virtual clock, and all that it asked for."""

    def __init__(self, world_size: int = 2, save_every_s: float | Literal["auto"] | None = None) -> None:
        self.now = 1000.0
        self.machine = Machine.start(
            group="g",
            world_size=world_size,
            timeouts=LIMITS,
            hang_timeout_s=HANG_S,
            now=self.now,
            save_every_s=save_every_s,
        )

    def on(self, event: Event, after_s: float = 0.0) -> list[Action]:
        self.now += after_s
        self.machine, actions = handle(self.machine, event, self.now)
        return list(actions)

    @property
    def ranks(self) -> range:
        return range(self.machine.world_size)

    def build(self) -> Drive:
        for rank in self.ranks:
            self.on(WorkerStarted(group="g", rank=rank, pid=100 + rank))
        for rank in self.ranks:
            self.on(ready(rank))
        assert isinstance(self.machine.state, Idle)
        return self

    def calling(self, method: str = "train") -> Drive:
        self.on(CallRequested(method=method, blob=b""))
        assert isinstance(self.machine.state, Calling)
        return self


def ready(rank: int) -> WorkerReady:
    return WorkerReady(group="g", rank=rank, device="cpu", facts={"rank": rank}, modules=[])


def reply(rank: int, call: int = 1) -> Reply:
    return Reply(group="g", rank=rank, call=call, form="json", step=3, epoch=1, blob=b"1")


def failure(rank: int, call: int = 1, kind: str = "error", text: str = "no") -> Failure:
    return Failure(
        group="g", rank=rank, call=call, kind=kind, type_name="E", text=text, traceback="", phase="data", step=3
    )


def exited(rank: int, code: int = -9) -> WorkerExited:
    return WorkerExited(group="g", rank=rank, pid=100 + rank, exit_code=code)


def beat(rank: int, age_s: float = 0.0, call: int = 1, **at: int) -> Beat:
    position = {"epoch": 1, "step": 5, "batch": 5, **at}
    return Beat(
        group="g",
        rank=rank,
        call=call,
        phase="data",
        phase_age_s=age_s,
        batches=None,
        samples=0,
        loss=None,
        rss_bytes=1,
        cpu_s=1.0,
        **position,
    )


def messages(actions: list[Action]) -> list[type[Message]]:
    return [type(action.message) for action in actions if isinstance(action, Send)]


def test_a_group_is_ready_when_every_rank_is() -> None:
    drive = Drive(3)
    for rank in (2, 0):
        assert drive.on(ready(rank)) == []
    assert drive.on(ready(1)) == [Returned(call=0, replies=())]
    assert drive.machine.facts == {"rank": 0}


def test_a_call_returns_replies_in_rank_order() -> None:
    drive = Drive(3).build()
    assert drive.on(CallRequested(method="train", blob=b"x")) == [
        Send(message=Call(group="g", call=1, method="train", blob=b"x"))
    ]
    drive.on(reply(2))
    drive.on(reply(0))
    (returned,) = drive.on(reply(1))
    assert isinstance(returned, Returned)
    assert [r.rank for r in returned.replies] == [0, 1, 2]
    assert isinstance(drive.machine.state, Idle)


def test_replies_to_an_earlier_call_are_nobodys() -> None:
    drive = Drive().build().calling()
    assert drive.on(reply(0, call=0)) == []
    assert drive.machine.state == Calling(method="train")


def test_equal_errors_of_all_ranks_are_gathered_before_the_group_is_stopped() -> None:
    drive = Drive().build().calling()
    assert drive.on(failure(1)) == []
    assert messages(drive.on(failure(0))) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and not raised.usable
    assert isinstance(raised.cause, UserCodeFailed)
    assert [f.rank for f in raised.cause.failures] == [1, 0]


def test_an_error_on_one_rank_waits_for_the_others_no_longer_than_allowed() -> None:
    drive = Drive().build().calling()
    drive.on(failure(1))
    assert drive.on(Tick(), after_s=LIMITS.error_gather_s / 2) == []
    assert messages(drive.on(Tick(), after_s=LIMITS.error_gather_s)) == [KillGroup]


def test_the_error_is_reported_only_when_nothing_is_left_running() -> None:
    drive = Drive().build().calling()
    drive.on(failure(1))
    actions = drive.on(Tick(), after_s=LIMITS.error_gather_s)
    assert not any(isinstance(action, Raised) for action in actions)
    assert drive.on(exited(0)) == []
    assert isinstance(drive.on(GroupGone(group="g"))[0], Raised)


@pytest.mark.parametrize("method", ["apply_worker", "validate"])
def test_what_raises_on_all_ranks_and_trains_nothing_leaves_the_group_usable(method) -> None:
    drive = Drive().build().calling(method)
    drive.on(failure(0))
    (raised,) = drive.on(failure(1))
    assert isinstance(raised, Raised) and raised.usable
    assert isinstance(drive.machine.state, Idle)


def test_a_function_that_raises_while_a_rank_waits_for_it_ends_the_group() -> None:
    drive = Drive().build().calling("apply_worker")
    drive.on(failure(0))
    assert messages(drive.on(Tick(), after_s=LIMITS.error_gather_s)) == [KillGroup]


def test_the_peers_errors_do_not_hide_a_death() -> None:
    drive = Drive(3).build().calling()
    drive.on(failure(0, text="Connection closed by peer"))
    drive.on(exited(1, code=-11))
    drive.on(failure(2, text="Connection closed by peer"))
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, WorkerDied)
    assert (raised.cause.rank, raised.cause.exit_code) == (1, -11)


def test_sys_exit_is_told_apart_from_a_death() -> None:
    drive = Drive().build().calling()
    drive.on(failure(0, text="Connection closed by peer"))
    drive.on(replace(failure(1, kind="exit"), exit_code=3))
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, WorkerDied)
    assert raised.cause.failure is not None and raised.cause.exit_code == 3


def test_a_death_between_calls_is_reported() -> None:
    drive = Drive().build()
    assert messages(drive.on(exited(1))) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, WorkerDied)


def test_ranks_stop_at_the_highest_boundary_in_progress() -> None:
    drive = Drive(3).build().calling()
    assert messages(drive.on(StopRequested(signum=2))) == [PrepareStop]
    assert drive.on(StopRequested(signum=2)) == [], "asked once is enough"
    drive.on(Boundary(group="g", rank=0, call=1, round=1, boundary=7))
    drive.on(Boundary(group="g", rank=2, call=1, round=1, boundary=8))
    assert drive.on(Boundary(group="g", rank=1, call=1, round=1, boundary=7)) == [
        Send(message=StopAt(group="g", call=1, round=1, boundary=8, stop=True, save=False))
    ]


def test_ranks_go_on_to_the_end_if_one_is_already_there() -> None:
    drive = Drive().build().calling()
    drive.on(StopRequested(signum=2))
    drive.on(Boundary(group="g", rank=0, call=1, round=1, boundary=7))
    assert drive.on(reply(1)) == [
        Send(message=StopAt(group="g", call=1, round=1, boundary=TO_THE_END, stop=True, save=False))
    ]
    assert isinstance(drive.on(reply(0))[0], Returned)


def boundaries(drive: Drive, *reached: int, round_: int = 1) -> list[Action]:
    """Every rank says where it holds; what follows from the last one."""
    actions: list[Action] = []
    for rank, boundary in enumerate(reached):
        actions = drive.on(Boundary(group="g", rank=rank, call=1, round=round_, boundary=boundary))
    return actions


def order(boundary: int, *, round_: int = 1, stop: bool = False, save: bool = False) -> Send:
    return Send(message=StopAt(group="g", call=1, round=round_, boundary=boundary, stop=stop, save=save))


def test_the_state_is_saved_every_so_often_where_all_ranks_come_by() -> None:
    drive = Drive(2, save_every_s=10.0).build().calling()
    assert drive.on(Tick(), after_s=5.0) == []
    assert messages(drive.on(Tick(), after_s=6.0)) == [PrepareStop]
    assert drive.on(Tick(), after_s=20.0) == [], "the ranks are being asked already"
    assert boundaries(drive, 7, 8) == [order(8, save=True)]
    assert messages(drive.on(Tick(), after_s=11.0)) == [PrepareStop]
    assert boundaries(drive, 30, 30, round_=2) == [order(30, round_=2, save=True)]


def test_the_state_is_not_saved_between_calls_or_in_calls_without_steps() -> None:
    drive = Drive(2, save_every_s=10.0).build()
    assert drive.on(Tick(), after_s=11.0) == []
    drive.calling("apply_worker")
    assert drive.on(Tick(), after_s=11.0) == []


def test_a_stop_that_comes_while_a_save_is_agreed_on_is_agreed_on_with_it() -> None:
    drive = Drive().build().calling()
    assert messages(drive.on(SaveRequested())) == [PrepareStop]
    assert drive.on(StopRequested(signum=None, save=True)) == []
    assert boundaries(drive, 3, 3) == [order(3, stop=True, save=True)]


def test_a_stop_after_a_save_was_decided_is_another_round() -> None:
    drive = Drive().build().calling()
    drive.on(SaveRequested())
    assert boundaries(drive, 3, 3) == [order(3, save=True)]
    assert messages(drive.on(StopRequested(signum=None))) == [PrepareStop]
    assert boundaries(drive, 4, 4) == [], "answers to the first round"
    assert boundaries(drive, 4, 5, round_=2) == [order(5, round_=2, stop=True)]


def test_a_notice_does_not_disturb_a_call_without_steps() -> None:
    drive = Drive().build().calling("apply_worker")
    assert drive.on(StopRequested(signum=None, save=True)) == []


def test_the_interval_follows_from_what_a_checkpoint_costs() -> None:
    drive = Drive(save_every_s="auto").build().calling()
    drive.on(CheckpointEnded(group="g", number=1, step=1, stall_s=0.5, seconds=1.0))
    assert drive.machine.save_every_s == 50.0, "half a second is a hundredth of that"
    drive.on(CheckpointEnded(group="g", number=2, step=2, stall_s=0.001, seconds=60.0))
    assert drive.machine.save_every_s == 120.0, "writing takes half of that"
    drive.on(CheckpointEnded(group="g", number=3, step=3, stall_s=0.001, seconds=0.1))
    assert drive.machine.save_every_s == MIN_SAVE_EVERY_S


def test_a_gate_does_what_was_decided_at_the_boundary_and_once() -> None:
    gate = StopGate(hold_s=1.0)
    said: list[tuple[int, int, int]] = []
    gate.announce = lambda *told: said.append(told)
    gate.begin(1)
    assert not gate.stop_requested(0)
    gate.prepare(1, 1)
    gate.decide(StopAt(group="g", call=1, round=1, boundary=2, stop=False, save=True))
    done = [(gate.stop_requested(boundary), gate.save_wanted) for boundary in (1, 2, 3)]
    assert done == [(False, False), (False, True), (False, False)]
    gate.prepare(1, 2)
    gate.decide(StopAt(group="g", call=1, round=2, boundary=5, stop=True, save=True))
    assert [gate.stop_requested(boundary) for boundary in (4, 5)] == [False, True]
    assert said == [(1, 1, 1), (1, 2, 4)]


def test_a_gate_keeps_what_was_decided_when_it_is_asked_again_before_it_is_there() -> None:
    gate = StopGate(hold_s=1.0)
    gate.announce = lambda *_: None
    gate.begin(1)
    gate.prepare(1, 1)
    gate.decide(StopAt(group="g", call=1, round=1, boundary=3, stop=False, save=True))
    gate.stop_requested(1)
    gate.prepare(1, 2)
    gate.decide(StopAt(group="g", call=1, round=2, boundary=4, stop=True, save=False))
    seen = [(gate.stop_requested(boundary), gate.save_wanted) for boundary in (2, 3, 4)]
    assert seen == [(False, False), (False, True), (True, False)]


def test_a_gate_that_is_not_answered_says_what_it_waited_for() -> None:
    gate = StopGate(hold_s=0.01)
    gate.announce = lambda *_: None
    gate.begin(1)
    gate.prepare(1, 1)
    with pytest.raises(TimeoutError, match="hold_s"):
        gate.stop_requested(0)


def test_a_call_without_steps_is_interrupted_by_a_signal() -> None:
    drive = Drive().build().calling("apply_worker")
    assert drive.on(StopRequested(signum=2)) == [Send(message=SignalWorkers(group="g", signum=2))]


def test_the_rank_that_is_furthest_behind_is_the_one_that_hangs() -> None:
    drive = Drive(3).build().calling()
    drive.on(beat(0, age_s=0.0, step=6))
    drive.on(beat(1, age_s=0.0, step=5))
    drive.on(beat(2, age_s=0.0, step=6))
    assert drive.on(Tick(), after_s=HANG_S / 2) == []
    assert messages(drive.on(Tick(), after_s=HANG_S)) == [DumpStacks]
    assert drive.on(Stacks(group="g", rank=0, text="not me")) == []
    assert messages(drive.on(Stacks(group="g", rank=1, text="def f"))) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, WorkerHung)
    assert (raised.cause.rank, raised.cause.stacks) == (1, "def f")


def test_a_rank_that_beats_and_moves_never_hangs() -> None:
    drive = Drive().build().calling()
    for _ in range(100):
        for rank in drive.ranks:
            drive.on(beat(rank))
        assert drive.on(Tick(), after_s=HANG_S / 2) == []


def test_a_silent_rank_hangs_whatever_it_said_last() -> None:
    drive = Drive().build().calling()
    for rank in drive.ranks:
        drive.on(beat(rank))
    for _ in range(30):
        drive.on(beat(0))
        actions = drive.on(Tick(), after_s=1.0)
        if actions:
            break
    assert messages(actions) == [DumpStacks]
    assert drive.machine.state.cause.rank == 1  # type: ignore[union-attr]


def test_what_a_rank_said_before_the_call_says_nothing_about_it() -> None:
    drive = Drive().build()
    drive.now += 10 * HANG_S
    drive.calling()
    drive.on(beat(0, age_s=10 * HANG_S, call=0))
    assert drive.on(Tick()) == []


def test_a_users_function_may_take_as_long_as_it_likes() -> None:
    drive = Drive().build().calling("apply_worker")
    drive.on(beat(0))
    assert drive.on(Tick(), after_s=100 * HANG_S) == []


@pytest.mark.parametrize(("started", "setting"), [(False, "engine_start_s"), (True, "worker_connect_s")])
def test_workers_that_do_not_come_have_a_deadline_with_a_name(started: bool, setting: str) -> None:
    drive = Drive()
    if started:
        for rank in drive.ranks:
            drive.on(WorkerStarted(group="g", rank=rank, pid=100 + rank))
    limit_s = getattr(LIMITS, setting)
    assert drive.on(Tick(), after_s=limit_s - 1) == []
    assert messages(drive.on(Tick(), after_s=2)) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and raised.cause == StartTimedOut(ranks=(0, 1), setting=setting, limit_s=limit_s)


def test_a_group_ends_by_itself_or_is_killed_in_time() -> None:
    drive = Drive().build()
    assert messages(drive.on(EndRequested())) == [EndWorker]
    assert drive.on(exited(0, code=0)) == []
    assert drive.on(Tick(), after_s=LIMITS.shutdown_s / 2) == []
    assert messages(drive.on(Tick(), after_s=LIMITS.shutdown_s)) == [KillGroup]
    drive.on(GroupGone(group="g"))
    assert drive.machine.state == Closed()


def test_ending_a_group_at_work_does_not_wait_for_it() -> None:
    assert messages(Drive().build().calling().on(EndRequested())) == [KillGroup]


@pytest.mark.parametrize("event", [HostLost(text="gone"), EngineFailed(text="gone")])
def test_losing_the_host_is_an_error_at_once(event: Event) -> None:
    drive = Drive().build().calling()
    assert drive.on(event) == [Raised(cause=EngineLost(text="gone"), usable=False)]
    assert isinstance(drive.machine.state, Closed)


def test_losing_the_host_while_a_group_is_killed_keeps_the_first_error() -> None:
    drive = Drive().build().calling()
    drive.on(failure(0))
    drive.on(failure(1))
    assert isinstance(drive.machine.state, Killing)
    (raised,) = drive.on(HostLost(text="gone"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, UserCodeFailed)


@pytest.mark.parametrize("seed", range(300))
def test_whatever_happens_in_whatever_order_every_call_gets_one_outcome_and_every_group_ends(seed: int) -> None:
    random_ = random.Random(seed)
    drive = Drive(random_.randint(1, 4), random_.choice([None, 2.0, "auto"]))
    asked = outcomes = 0

    def events() -> list[Event]:
        rank, call = random_.randrange(drive.machine.world_size), drive.machine.call
        return [
            Tick(),
            WorkerStarted(group="g", rank=rank, pid=100 + rank),
            ready(rank),
            beat(rank, age_s=random_.choice([0.0, 0.0, 2 * HANG_S]), call=call),
            reply(rank, call=call),
            failure(rank, call=call, kind=random_.choice(["error", "exit"])),
            exited(rank, code=random_.choice([0, -9, -11])),
            Boundary(group="g", rank=rank, call=call, round=random_.randint(1, 3), boundary=random_.randint(0, 9)),
            StopRequested(signum=random_.choice([2, None]), save=random_.random() < 0.5),
            SaveRequested(),
            CheckpointEnded(group="g", number=call, step=1),
            Stacks(group="g", rank=rank, text=""),
        ]

    for _ in range(random_.randint(1, 120)):
        if isinstance(drive.machine.state, Idle) and random_.random() < 0.7:
            asked += 1
            actions = drive.on(CallRequested(method=random_.choice(["train", "apply_worker"]), blob=b""))
        else:
            actions = drive.on(random_.choice(events()), after_s=random_.choice([0.0, 0.1, 1.0]))
        outcomes += sum(isinstance(action, Returned | Raised) for action in actions)
    busy = isinstance(drive.machine.state, Calling)
    drive.on(EndRequested(force=random_.random() < 0.5))
    for _ in range(20):
        drive.on(Tick(), after_s=1.0)
    assert isinstance(drive.machine.state, Closed), f"seed {seed}: {drive.machine.state}"
    # Every call has one outcome, the start has one more, and a group that is lost while idle tells it once.
    assert outcomes <= asked + 2, f"seed {seed}"
    assert busy or outcomes >= asked, f"seed {seed}: {asked} calls, {outcomes} outcomes"
