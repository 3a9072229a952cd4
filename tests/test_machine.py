"""The driver's decisions, without a process, a socket or a second of waiting."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Literal

import pytest

from torchtrainer.config import FailureConfig, Timeouts
from torchtrainer.control.messages import (
    AdoptRanks,
    Boundary,
    Call,
    CheckpointEnded,
    DumpStacks,
    EndWorker,
    EngineFailed,
    Failure,
    GroupGone,
    Heartbeat,
    Join,
    KillGroup,
    KillWorker,
    Paused,
    PrepareStop,
    RanksAdopted,
    Reply,
    SendState,
    SetRanks,
    SignalWorkers,
    Stacks,
    StartWorker,
    StateSent,
    StopAt,
    WorkerExited,
    WorkerReady,
    WorkerStarted,
)
from torchtrainer.control.wire import Message
from torchtrainer.driver.causes import CrashLoop, EngineLost, StartTimedOut, UserCodeFailed, WorkerDied, WorkerHung
from torchtrainer.driver.events import (
    Action,
    CallRequested,
    EndRequested,
    Event,
    HostLost,
    Joined,
    Raised,
    Recovered,
    ReplacingStopped,
    Resized,
    ResizeRequested,
    Returned,
    SaveRequested,
    Send,
    StopRequested,
    Tick,
)
from torchtrainer.driver.hangs import HANG_FLOOR_S, HANG_STEPS, MUTE_FLOOR_S, limit_s
from torchtrainer.driver.machine import handle
from torchtrainer.driver.policies import (
    MIN_SAVE_EVERY_S,
    RecoveryAction,
    Situation,
    decide_recovery,
    why_not_resize,
)
from torchtrainer.driver.recovery import BURST_S
from torchtrainer.driver.states import TO_THE_END, Calling, Closed, Idle, Killing, Machine
from torchtrainer.driver.stragglers import STRAGGLER_STEPS, Straggler
from torchtrainer.driver.views import WorkerView
from torchtrainer.worker.link import StepBarrier

pytestmark = pytest.mark.pure

LIMITS = Timeouts()
HANG_S = 10.0


class Drive:
    """A machine with its virtual clock, and all that it asked for."""

    def __init__(
        self,
        world_size: int = 2,
        save_every_s: float | Literal["auto"] | None = None,
        facts: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.now = 1000.0
        self.facts = facts or {"rank": 0}
        self.machine = Machine.start(
            group="g",
            world_size=world_size,
            timeouts=LIMITS,
            hang_timeout_s=HANG_S,
            now=self.now,
            save_every_s=save_every_s,
            **options,
        )

    def on(self, event: Event, after_s: float = 0.0) -> list[Action]:
        self.now += after_s
        self.machine, actions = handle(self.machine, event, self.now)
        return list(actions)

    def wait(self, seconds: float) -> list[Action]:
        """Time goes by while the driver looks once a second; returns what that led to first."""
        until = self.now + seconds
        while self.now < until:
            actions = self.on(Tick(), after_s=min(1.0, until - self.now))
            if actions:
                return actions
        return []

    @property
    def ranks(self) -> range:
        return range(self.machine.world_size)

    def build(self) -> Drive:
        for rank in self.ranks:
            self.on(WorkerStarted(group="g", worker=rank, pid=100 + rank))
        for rank in self.ranks:
            self.on(replace(ready(rank), facts=self.facts))
        assert isinstance(self.machine.state, Idle)
        return self

    def calling(self, method: str = "train") -> Drive:
        self.on(CallRequested(method=method, blob=b""))
        assert isinstance(self.machine.state, Calling)
        return self


def ready(rank: int) -> WorkerReady:
    return WorkerReady(group="g", worker=rank, device="cpu", facts={"rank": rank}, modules=[])


def reply(rank: int, call: int = 1) -> Reply:
    return Reply(group="g", worker=rank, rank=rank, call=call, form="json", step=3, epoch=1, blob=b"1")


def failure(rank: int, call: int = 1, kind: str = "error", text: str = "no") -> Failure:
    return Failure(
        group="g",
        worker=rank,
        rank=rank,
        call=call,
        kind=kind,
        type_name="E",
        text=text,
        traceback="",
        phase="data",
        step=3,
    )


def exited(rank: int, code: int = -9) -> WorkerExited:
    return WorkerExited(group="g", worker=rank, pid=100 + rank, exit_code=code)


def heartbeat(rank: int, age_s: float = 0.0, call: int = 1, **at: int) -> Heartbeat:
    position = {"epoch": 1, "step": 5, "batch": 5, **at}
    return Heartbeat(
        group="g",
        worker=rank,
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
        Send(message=Call(group="g", worker=worker, call=1, method="train", blob=b"x")) for worker in range(3)
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
    drive.on(Boundary(group="g", worker=0, call=1, round=1, boundary=7))
    drive.on(Boundary(group="g", worker=2, call=1, round=1, boundary=8))
    assert drive.on(Boundary(group="g", worker=1, call=1, round=1, boundary=7)) == [
        Send(message=StopAt(group="g", call=1, round=1, boundary=8, stop=True, save=False))
    ]


def test_ranks_go_on_to_the_end_if_one_is_already_there() -> None:
    drive = Drive().build().calling()
    drive.on(StopRequested(signum=2))
    drive.on(Boundary(group="g", worker=0, call=1, round=1, boundary=7))
    assert drive.on(reply(1)) == [
        Send(message=StopAt(group="g", call=1, round=1, boundary=TO_THE_END, stop=True, save=False))
    ]
    assert isinstance(drive.on(reply(0))[0], Returned)


def boundaries(drive: Drive, *reached: int, round_: int = 1) -> list[Action]:
    """Every rank says where it holds; what follows from the last one."""
    actions: list[Action] = []
    for rank, boundary in enumerate(reached):
        actions = drive.on(Boundary(group="g", worker=rank, call=1, round=round_, boundary=boundary))
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
    gate = StepBarrier(pause_s=1.0)
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
    gate = StepBarrier(pause_s=1.0)
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
    gate = StepBarrier(pause_s=0.01)
    gate.announce = lambda *_: None
    gate.begin(1)
    gate.prepare(1, 1)
    with pytest.raises(TimeoutError, match="pause_s"):
        gate.stop_requested(0)


def test_a_call_without_steps_is_interrupted_by_a_signal() -> None:
    drive = Drive().build().calling("apply_worker")
    assert drive.on(StopRequested(signum=2)) == [Send(message=SignalWorkers(group="g", signum=2))]


def test_the_rank_that_is_furthest_behind_is_the_one_that_hangs() -> None:
    drive = Drive(3).build().calling()
    drive.on(heartbeat(0, age_s=0.0, step=6))
    drive.on(heartbeat(1, age_s=0.0, step=5))
    drive.on(heartbeat(2, age_s=0.0, step=6))
    assert drive.wait(HANG_S / 2) == []
    assert messages(drive.wait(HANG_S)) == [DumpStacks]
    assert drive.on(Stacks(group="g", worker=0, text="not me")) == []
    assert messages(drive.on(Stacks(group="g", worker=1, text="def f"))) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, WorkerHung)
    assert (raised.cause.rank, raised.cause.stacks) == (1, "def f")


def test_a_rank_that_beats_and_moves_never_hangs() -> None:
    drive = Drive().build().calling()
    for _ in range(100):
        for rank in drive.ranks:
            drive.on(heartbeat(rank))
        assert drive.on(Tick(), after_s=HANG_S / 2) == []


def test_a_silent_rank_hangs_whatever_it_said_last() -> None:
    drive = Drive().build().calling()
    for rank in drive.ranks:
        drive.on(heartbeat(rank))
    for _ in range(30):
        drive.on(heartbeat(0))
        actions = drive.on(Tick(), after_s=1.0)
        if actions:
            break
    assert messages(actions) == [DumpStacks]
    assert drive.machine.diagnosis is not None
    assert drive.machine.diagnosis.cause.ranks == (1,)


def test_what_a_rank_said_before_the_call_says_nothing_about_it() -> None:
    drive = Drive().build()
    drive.now += 10 * HANG_S
    drive.calling()
    drive.on(heartbeat(0, age_s=10 * HANG_S, call=0))
    assert drive.on(Tick()) == []


def test_a_users_function_may_take_as_long_as_it_likes() -> None:
    drive = Drive().build().calling("apply_worker")
    drive.on(heartbeat(0))
    assert drive.wait(10 * HANG_S) == []


@pytest.mark.parametrize(("started", "setting"), [(False, "engine_start_s"), (True, "worker_connect_s")])
def test_workers_that_do_not_come_have_a_deadline_with_a_name(started: bool, setting: str) -> None:
    drive = Drive()
    if started:
        for rank in drive.ranks:
            drive.on(WorkerStarted(group="g", worker=rank, pid=100 + rank))
    limit_s = getattr(LIMITS, setting)
    assert drive.wait(limit_s - 1) == []
    assert messages(drive.wait(2)) == [KillGroup]
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


# Workers that are lost


def fleet(world_size: int = 3, *, bound: str = "", recovers: bool = True, **options: Any) -> Drive:
    """A group that is built, whose workers can be replaced."""
    options = {"failure": FailureConfig(replace=False, hang_timeout_s=HANG_S), **options}
    return Drive(world_size, facts={"bound": bound, "recovers": recovers}, **options).build()


REPLACING = FailureConfig(hang_timeout_s=HANG_S)
BOUND = "it makes its own update"


def sent(actions: list[Action]) -> list[Message]:
    return [action.message for action in actions if isinstance(action, Send)]


def carried(worker: int, *ranks: int, step: int = 6, redone: int = 1) -> RanksAdopted:
    return RanksAdopted(group="g", worker=worker, ranks=list(ranks), call=1, step=step, redone=redone)


def shared(drive: Drive, worker: int, call: int = 0, error: str = "") -> StateSent:
    return StateSent(group="g", worker=worker, number=drive.machine.shares, call=call, at={"exchange": 5}, error=error)


RECOVERIES = [
    ({}, RecoveryAction.ADOPT, "any worker can carry any rank"),
    ({"failures": 4}, RecoveryAction.FAIL, "FailureConfig(max_failures=3) allows 3 failures"),
    ({"failures": 1, "max_failures": 0}, RecoveryAction.FAIL, "FailureConfig(max_failures=0) allows no failure"),
    ({"failures": 2, "max_failures": 1}, RecoveryAction.FAIL, "FailureConfig(max_failures=1) allows 1 failure"),
    ({"lost_for_good": "it streams"}, RecoveryAction.RESTART, "it streams"),
    ({"carriers": 0}, RecoveryAction.RESTART, "no worker was left that has the state"),
    ({"carriers": 0, "replacement_comes": True}, RecoveryAction.RESTART, "no worker was left that has the state"),
    ({"bound": BOUND, "replacement_comes": True}, RecoveryAction.WAIT, BOUND),
    ({"bound": BOUND}, RecoveryAction.RESTART, "a replacement is needed, and none could be built"),
    ({"min_workers": 3, "replacement_comes": True}, RecoveryAction.WAIT, "2 workers are left, and min_workers=3"),
    ({"min_workers": 3}, RecoveryAction.RESTART, "a replacement is needed, and none could be built"),
    ({"failures": 4, "lost_for_good": "it streams", "carriers": 0}, RecoveryAction.FAIL, "allows 3 failures"),
]


@pytest.mark.parametrize(("changes", "action", "reason"), RECOVERIES)
def test_what_follows_a_loss_is_decided_from_values(changes, action, reason) -> None:
    usual = Situation(
        failures=1, max_failures=3, lost_for_good="", bound="", carriers=2, min_workers=1, replacement_comes=False
    )
    decision = decide_recovery(replace(usual, **changes))
    assert decision.action is action
    assert reason in decision.reason


def test_survivors_with_the_fewest_ranks_carry_those_of_a_lost_worker_at_once() -> None:
    drive = fleet().calling()
    assert sent(drive.on(exited(1))) == [AdoptRanks(group="g", worker=0, call=1, ranks=[1])]
    assert sent(drive.on(exited(0), after_s=1.0)) == [AdoptRanks(group="g", worker=2, call=1, ranks=[0, 1])]
    assert drive.on(reply(2)) == []
    drive.on(replace(reply(2), rank=0))
    actions = drive.on(replace(reply(2), rank=1))
    (returned,) = [action for action in actions if isinstance(action, Returned)]
    assert [one.rank for one in returned.replies] == [0, 1, 2]


def test_a_loss_is_recovered_when_its_work_is_done() -> None:
    drive = fleet().calling()
    drive.on(heartbeat(1))
    drive.on(exited(1))
    drive.now += 0.25
    (recovered,) = drive.on(carried(0, 1))
    assert isinstance(recovered, Recovered)
    assert (recovered.worker, recovered.ranks, recovered.step, recovered.redone) == (1, (1,), 5, 1)
    assert (recovered.seconds, recovered.how) == (0.25, "carried")
    assert isinstance(recovered.cause, WorkerDied) and recovered.cause.exit_code == -9


def test_a_worker_that_is_lost_between_calls_is_made_up_for() -> None:
    drive = fleet()
    assert sent(drive.on(exited(2))) == [AdoptRanks(group="g", worker=0, call=0, ranks=[2])]
    assert sent(drive.on(CallRequested(method="train", blob=b""))) == [
        Call(group="g", worker=worker, call=1, method="train") for worker in (0, 1)
    ]


def test_a_bound_worker_is_replaced_while_the_others_wait() -> None:
    drive = fleet(bound=BOUND)
    drive.on(CallRequested(method="train", blob=b"x"))
    assert sent(drive.on(exited(1))) == [StartWorker(group="g", worker=3, rank=1, record=[])]
    drive.on(WorkerStarted(group="g", worker=3, pid=103))
    assert sent(drive.on(ready(3))) == [SendState(group="g", worker=0, number=1, ranks=[1])]
    assert sent(drive.on(shared(drive, 0, call=1))) == [
        Join(group="g", worker=3, number=1, ranks=[1], at={"exchange": 5}, call=1, method="train", blob=b"x")
    ]
    joined, recovered = drive.on(carried(3, 1))
    assert joined == Joined(worker=3, ranks=(1,))
    assert isinstance(recovered, Recovered) and recovered.how == "replaced"


def test_another_survivor_is_asked_when_the_one_that_was_asked_is_lost() -> None:
    drive = fleet(4, bound=BOUND).calling()
    drive.on(exited(1))
    drive.on(ready(4))
    drive.on(exited(0), after_s=1.0)
    drive.on(ready(5))
    assert drive.machine.move is not None and drive.machine.move.sharer == 2
    joins = sent(drive.on(shared(drive, 2, call=1)))
    assert [(type(join), join.worker, join.ranks) for join in joins if isinstance(join, Join)] == [
        (Join, 4, [1]),
        (Join, 5, [0]),
    ]


def test_state_that_is_still_read_is_not_written_over() -> None:
    drive = fleet(3, bound=BOUND).calling()
    drive.on(exited(1))
    drive.on(ready(3))
    drive.on(shared(drive, 0, call=1))
    drive.on(exited(2), after_s=1.0)
    assert drive.on(ready(4)) == [], "worker 3 may still be reading"
    assert messages(drive.on(heartbeat(3))) == [SendState]


def test_fewer_workers_than_allowed_wait_for_a_replacement() -> None:
    drive = fleet(3, min_workers=3).calling()
    assert messages(drive.on(exited(1))) == [StartWorker]
    assert messages(drive.on(ready(3))) == [SendState]
    assert messages(drive.on(shared(drive, 0, call=1))) == [Join]


def test_a_replacement_takes_its_rank_back_at_a_boundary_at_which_all_hold() -> None:
    drive = fleet(3, failure=REPLACING).calling()
    assert messages(drive.on(exited(1))) == [AdoptRanks, StartWorker]
    assert drive.on(ready(3)) == [], "the loss comes first"
    assert messages(drive.on(carried(0, 1))) == [PrepareStop]
    drive.on(Boundary(group="g", worker=0, call=1, round=1, boundary=7))
    (order,) = sent(drive.on(Boundary(group="g", worker=2, call=1, round=1, boundary=8)))
    assert order == StopAt(group="g", call=1, round=1, boundary=8, stop=False, save=False, pause=True)
    assert drive.on(Paused(group="g", worker=2, call=1, boundary=8)) == []
    assert messages(drive.on(Paused(group="g", worker=0, call=1, boundary=8))) == [SendState]
    join, *assigned = sent(drive.on(shared(drive, 0, call=1)))
    assert isinstance(join, Join) and (join.worker, join.ranks, join.call) == (3, [1], 1)
    assert assigned == [SetRanks(group="g", worker=0, ranks=[0]), SetRanks(group="g", worker=2, ranks=[2])]


def hold_for_a_replacement(drive: Drive) -> None:
    drive.on(exited(1))
    drive.on(ready(3))
    drive.on(carried(0, 1))
    for worker in (0, 2):
        drive.on(Boundary(group="g", worker=worker, call=1, round=1, boundary=8))


def test_those_that_hold_are_let_go_when_the_newcomer_is_lost() -> None:
    drive = fleet(3, failure=REPLACING).calling()
    hold_for_a_replacement(drive)
    drive.on(Paused(group="g", worker=2, call=1, boundary=8))
    assert sent(drive.on(exited(3)))[0] == SetRanks(group="g", worker=2, ranks=[2])
    assert sent(drive.on(Paused(group="g", worker=0, call=1, boundary=8))) == [
        SetRanks(group="g", worker=0, ranks=[0, 1])
    ], "one that comes to pause later finds nothing to wait for"


def test_ranks_of_a_holder_that_is_lost_are_carried_and_the_change_goes_on() -> None:
    drive = fleet(3, failure=REPLACING).calling()
    hold_for_a_replacement(drive)
    drive.on(Paused(group="g", worker=2, call=1, boundary=8))
    actions = sent(drive.on(exited(0)))
    assert actions[:2] == [
        AdoptRanks(group="g", worker=2, call=1, ranks=[0, 1]),
        SendState(group="g", worker=2, number=1, ranks=[1]),
    ]
    joined, assigned = sent(drive.on(shared(drive, 2, call=1)))
    assert isinstance(joined, Join) and joined.ranks == [1]
    assert assigned == SetRanks(group="g", worker=2, ranks=[0, 2])


def test_a_stop_that_is_wanted_while_workers_hold_is_asked_for_when_they_go_on() -> None:
    drive = fleet(3, failure=REPLACING).calling()
    hold_for_a_replacement(drive)
    assert drive.on(StopRequested(signum=None, save=True)) == []
    for worker in (0, 2):
        drive.on(Paused(group="g", worker=worker, call=1, boundary=8))
    assert messages(drive.on(shared(drive, 0, call=1))) == [Join, SetRanks, SetRanks, PrepareStop]


def test_workers_do_not_hold_for_longer_than_they_may() -> None:
    drive = fleet(3, failure=REPLACING).calling("train")
    hold_for_a_replacement(drive)
    drive.on(Paused(group="g", worker=0, call=1, boundary=8))
    for worker in (0, 2):
        drive.on(heartbeat(worker))
    drive.machine = replace(drive.machine, hang_timeout_s=1000.0)
    assert messages(drive.wait(LIMITS.pause_s)) == [SetRanks, EndWorker, StartWorker]


def test_a_call_waits_for_a_worker_that_joins() -> None:
    drive = fleet(3, failure=REPLACING)
    assert messages(drive.on(exited(1))) == [AdoptRanks, StartWorker]
    assert messages(drive.on(ready(3))) == [SendState]
    assert drive.on(CallRequested(method="train", blob=b"")) == []
    assert messages(drive.on(shared(drive, 0))) == [Join, SetRanks, Call, Call, Call]


def test_a_call_that_is_interrupted_before_it_begins_never_does() -> None:
    drive = fleet(3, failure=REPLACING)
    drive.on(exited(1))
    drive.on(ready(3))
    drive.on(CallRequested(method="train", blob=b""))
    drive.on(StopRequested(signum=2))
    assert messages(drive.on(shared(drive, 0))) == [Join, SetRanks]


def test_a_newcomer_learns_with_its_order_to_join_what_the_others_were_told() -> None:
    drive = fleet(2, bound=BOUND).calling()
    drive.on(StopRequested(signum=None, save=True))
    (stop,) = sent(boundaries(drive, 3, 3))
    drive.on(exited(1))
    drive.on(ready(2))
    (join,) = sent(drive.on(shared(drive, 0, call=1)))
    assert isinstance(join, Join) and [StopAt(**order) for order in join.orders] == [stop]


def test_a_lost_worker_may_have_been_a_step_ahead_of_those_that_say_where_they_are() -> None:
    drive = fleet().calling()
    drive.on(StopRequested(signum=None))
    drive.on(exited(1))
    drive.on(Boundary(group="g", worker=0, call=1, round=1, boundary=7))
    (stop,) = sent(drive.on(Boundary(group="g", worker=2, call=1, round=1, boundary=7)))
    assert isinstance(stop, StopAt) and stop.boundary == 8


def test_failures_without_progress_between_them_end_in_a_crash_loop() -> None:
    drive = fleet(5, failure=FailureConfig(max_failures=2, replace=False)).calling()
    for worker in (4, 3):
        assert messages(drive.on(exited(worker), after_s=1.0)) == [AdoptRanks]
    assert messages(drive.on(exited(2), after_s=1.0)) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, CrashLoop) and not raised.retry
    assert raised.cause.failures == 3
    assert isinstance(raised.cause.last, WorkerDied) and raised.cause.last.ranks == (2,)


def test_a_step_of_progress_refills_the_budget() -> None:
    drive = fleet(5, failure=FailureConfig(max_failures=1, replace=False)).calling()
    for step, worker in enumerate((4, 3, 2, 1)):
        assert messages(drive.on(exited(worker), after_s=1.0)) == [AdoptRanks]
        drive.on(carried(0, worker, step=step + 1))


def test_workers_that_are_lost_together_are_one_failure() -> None:
    drive = fleet(5, failure=FailureConfig(max_failures=1, replace=False)).calling()
    for worker in (4, 3, 2, 1):
        assert messages(drive.on(exited(worker), after_s=BURST_S / 8)) == [AdoptRanks]


def test_no_failure_is_made_up_for_where_none_is_allowed() -> None:
    drive = fleet(failure=FailureConfig(max_failures=0)).calling()
    assert messages(drive.on(exited(1))) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, WorkerDied) and not raised.retry


@pytest.mark.parametrize("recovers", [True, False])
def test_a_group_that_is_lost_may_be_started_again_from_a_saved_state(recovers: bool) -> None:
    drive = fleet(2, recovers=recovers).calling()
    drive.on(exited(0))
    assert messages(drive.on(exited(1))) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and raised.retry and raised.why
    assert isinstance(raised.cause, WorkerDied) and raised.cause.ranks == (0,)


def test_state_that_cannot_be_shared_ends_a_group_that_needs_a_replacement() -> None:
    drive = fleet(2, bound=BOUND).calling()
    drive.on(exited(1))
    drive.on(ready(2))
    assert messages(drive.on(shared(drive, 0, call=1, error="no room"))) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and raised.retry and "no room" in raised.why


def test_errors_of_bound_ranks_after_a_death_are_its_consequence() -> None:
    drive = fleet(bound=BOUND).calling()
    drive.on(exited(1))
    assert messages(drive.on(failure(0, text="Connection closed by peer"))) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, WorkerDied) and raised.retry


def test_a_users_error_is_not_recovered_from_whoever_else_is_lost() -> None:
    drive = fleet().calling()
    drive.on(exited(2))
    drive.on(failure(0, text="mine"))
    assert drive.on(exited(1)) == []
    actions = drive.on(Tick(), after_s=LIMITS.error_gather_s)
    assert messages(actions) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, UserCodeFailed) and not raised.retry


def test_nobody_joins_a_call_in_which_user_code_has_raised() -> None:
    drive = fleet(4, min_workers=4).calling()
    drive.on(exited(1))
    drive.on(ready(4))
    drive.on(failure(0, text="mine"))
    assert drive.on(shared(drive, 0, call=1)) == []
    assert messages(drive.on(Tick(), after_s=LIMITS.error_gather_s)) == [KillGroup]


def test_a_rank_that_leaves_by_sys_exit_is_not_replaced() -> None:
    drive = fleet().calling()
    drive.on(replace(failure(1, kind="exit"), exit_code=3))
    assert drive.on(exited(1, code=3)) == []
    assert messages(drive.on(Tick(), after_s=LIMITS.error_gather_s)) == [KillGroup]


def test_a_group_goes_on_without_replacements_that_cannot_be_built() -> None:
    drive = fleet(3, failure=REPLACING).calling()
    drive.on(exited(1))
    assert messages(drive.on(exited(3))) == [StartWorker]
    assert messages(drive.on(exited(4))) == [StartWorker]
    (stopped,) = drive.on(exited(5, code=1))
    assert isinstance(stopped, ReplacingStopped) and stopped.tries == 3
    assert isinstance(stopped.cause, WorkerDied) and stopped.cause.exit_code == 1


def test_a_bound_group_ends_when_its_replacement_cannot_be_built() -> None:
    drive = fleet(2, bound=BOUND).calling()
    drive.on(exited(1))
    drive.on(exited(2))
    drive.on(exited(3))
    assert messages(drive.on(exited(4, code=7))) == [KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, CrashLoop) and raised.cause.building


def test_what_user_code_raises_while_a_replacement_is_built_is_not_tried_again() -> None:
    drive = fleet(2, bound=BOUND).calling()
    drive.on(exited(1))
    assert messages(drive.on(replace(failure(2, call=0), rank=1))) == [KillWorker, KillGroup]
    (raised,) = drive.on(GroupGone(group="g"))
    assert isinstance(raised, Raised) and isinstance(raised.cause, UserCodeFailed) and not raised.retry


def test_a_replacement_that_does_not_come_is_given_up() -> None:
    drive = fleet(3, failure=REPLACING)
    drive.on(exited(1))
    assert messages(drive.wait(LIMITS.engine_start_s + 2)) == [KillWorker, StartWorker]
    assert messages(drive.on(WorkerStarted(group="g", worker=3, pid=103))) == [KillWorker], "it comes after all"


# More and fewer processes


def test_ranks_are_dealt_to_fewer_processes_between_two_calls() -> None:
    drive = fleet(4)
    *told, resized = drive.on(ResizeRequested(processes=2))
    assert sent(told) == [
        SetRanks(group="g", worker=0, ranks=[0, 1]),
        SetRanks(group="g", worker=1, ranks=[2, 3]),
        SetRanks(group="g", worker=2, ranks=[]),
        SetRanks(group="g", worker=3, ranks=[]),
        EndWorker(group="g", worker=2),
        EndWorker(group="g", worker=3),
    ]
    assert resized == Resized(processes=2)
    assert drive.on(exited(2, code=0)) == [], "that is no failure"


def test_ranks_are_dealt_to_fewer_processes_at_a_boundary_of_a_running_call() -> None:
    drive = fleet(2).calling()
    assert messages(drive.on(ResizeRequested(processes=1))) == [PrepareStop]
    boundaries(drive, 3, 3)
    drive.on(Paused(group="g", worker=0, call=1, boundary=3))
    *told, resized = drive.on(Paused(group="g", worker=1, call=1, boundary=3))
    assert [type(message) for message in sent(told)] == [SetRanks, SetRanks, EndWorker]
    assert resized == Resized(processes=1)


def test_a_group_grows_back() -> None:
    drive = fleet(2)
    drive.on(ResizeRequested(processes=1))
    assert sent(drive.on(ResizeRequested(processes=2))) == [StartWorker(group="g", worker=2, rank=1, record=[])]
    assert messages(drive.on(ready(2))) == [SendState]
    joined = drive.on(shared(drive, 0))
    assert sent(joined) == [
        Join(group="g", worker=2, number=1, ranks=[1], at={"exchange": 5}),
        SetRanks(group="g", worker=0, ranks=[0]),
    ]
    assert joined[-1] == Resized(processes=2)


@pytest.mark.parametrize(
    ("processes", "bound", "says"),
    [
        (0, "", "1 to 4"),
        (5, "", "1 to 4"),
        (1, "", "min_workers=2"),
        (3, BOUND, BOUND),
        (4, BOUND, None),
        (2, "", None),
    ],
)
def test_why_a_group_is_not_resized(processes: int, bound: str, says: str | None) -> None:
    why = why_not_resize(processes, world_size=4, min_workers=2, bound=bound)
    assert why is None if says is None else says in (why or "")


# Hangs and stragglers


def test_only_the_worker_that_hangs_is_killed_and_its_ranks_are_carried() -> None:
    drive = fleet().calling()
    actions: list[Action] = []
    for age_s in range(2 * int(HANG_S)):
        for worker in drive.ranks:
            drive.on(replace(heartbeat(worker, age_s=age_s), phase="data" if worker == 1 else "exchange"))
        actions += drive.on(Tick(), after_s=1.0)
    assert messages(actions)[0] == DumpStacks
    assert drive.machine.pending_kills[0].worker == 1, "its stacks did not come in time"


def test_the_stacks_of_a_worker_that_hung_are_part_of_the_record() -> None:
    drive = fleet().calling()
    for worker in drive.ranks:
        drive.on(heartbeat(worker, step=4 if worker == 1 else 5))
    drive.wait(2 * HANG_S)
    assert sent(drive.on(Stacks(group="g", worker=1, text="def f"))) == [KillWorker(group="g", worker=1)]
    assert sent(drive.on(exited(1))) == [AdoptRanks(group="g", worker=0, call=1, ranks=[1])]
    (recovered,) = drive.on(carried(0, 1))
    assert isinstance(recovered, Recovered) and isinstance(recovered.cause, WorkerHung)
    assert recovered.cause.stacks == "def f"


def test_a_worker_that_goes_on_while_its_stacks_are_taken_is_spared() -> None:
    drive = fleet().calling()
    for worker in drive.ranks:
        drive.on(heartbeat(worker))
    drive.wait(2 * HANG_S)
    drive.on(heartbeat(0, step=6))
    assert drive.on(Stacks(group="g", worker=0, text="")) == []


def test_a_worker_that_cannot_be_killed_takes_the_group_with_it() -> None:
    drive = fleet().calling()
    for worker in drive.ranks:
        drive.on(heartbeat(worker))
    drive.wait(2 * HANG_S)
    drive.on(Stacks(group="g", worker=0, text=""))
    assert messages(drive.wait(LIMITS.cleanup_s + 1)) == [KillGroup]


def test_nobody_is_blamed_for_the_time_in_which_the_driver_was_stopped() -> None:
    drive = fleet().calling()
    for worker in drive.ranks:
        drive.on(heartbeat(worker))
    assert drive.on(Tick(), after_s=100 * HANG_S) == []
    assert drive.wait(HANG_S - 1) == []
    assert messages(drive.wait(2)) == [DumpStacks]


@pytest.mark.parametrize("calling", [False, True])
def test_a_worker_that_may_have_gone_on_since_its_last_heartbeat_is_not_blamed(calling: bool) -> None:
    drive = fleet().calling() if calling else Drive()
    for rank in () if calling else drive.ranks:
        drive.on(WorkerStarted(group="g", worker=rank, pid=100 + rank))
    for worker in drive.ranks:
        drive.on(replace(heartbeat(worker, age_s=HANG_S - 0.1), phase="data"))
    assert drive.on(Tick(), after_s=0.2) == [], "nobody has said that it was in this phase for so long"
    drive.on(replace(heartbeat(0), phase="exchange"))
    drive.on(replace(heartbeat(1, age_s=HANG_S + 0.1), phase="data"))
    assert messages(drive.on(Tick())) == [DumpStacks]
    assert drive.machine.diagnosis is not None and drive.machine.diagnosis.worker == 1


@pytest.mark.parametrize(
    ("phase", "batch", "longest_s", "given_s", "limit"),
    [
        ("data", 5, 0.01, 1800.0, HANG_FLOOR_S),
        ("data", 5, 5.0, 1800.0, HANG_STEPS * 5.0),
        ("data", 5, 100.0, 1800.0, 1800.0),
        ("data", 0, 0.01, 1800.0, 1800.0),
        ("train", 5, 0.01, 1800.0, 1800.0),
        ("data", 5, 0.0, 1800.0, 1800.0),
    ],
)
def test_the_time_that_a_step_may_take_is_learnt(phase, batch, longest_s, given_s, limit) -> None:
    view = WorkerView(worker=0, phase=phase, batch=batch, longest_s=longest_s)
    assert limit_s(view, longest_s, given_s, learnt=True) == limit
    assert limit_s(view, longest_s, given_s, learnt=False) == given_s


def test_a_worker_that_is_not_heard_of_may_take_less_time() -> None:
    view = WorkerView(worker=0, phase="data", batch=5, longest_s=0.01)
    assert limit_s(view, 0.01, 1800.0, learnt=True, mute=True) == MUTE_FLOOR_S < HANG_FLOOR_S


def test_a_worker_that_is_much_slower_than_the_others_is_told_once_a_call() -> None:
    drive = fleet().calling()
    told: list[Action] = []
    for step in (0, STRAGGLER_STEPS // 2, STRAGGLER_STEPS, 2 * STRAGGLER_STEPS):
        for worker in drive.ranks:
            each_s = 0.3 if worker == 1 else 0.1
            spent_s = {"data": each_s * step, "forward": 0.1 * step, "exchange": 9.0 * step}
            drive.on(replace(heartbeat(worker, step=step), spent_s=spent_s))
        told += drive.on(Tick())
    assert told == []
    for worker in drive.ranks:
        spent_s = {"data": (30.0 if worker == 1 else 6.0), "forward": 6.0, "exchange": 540.0}
        drive.on(replace(heartbeat(worker, step=3 * STRAGGLER_STEPS), spent_s=spent_s))
    (straggler,) = drive.on(Tick())
    assert isinstance(straggler, Straggler)
    assert (straggler.worker, straggler.ranks, straggler.phase) == (1, (1,), "data")
    assert straggler.factor > 2
    assert drive.on(Tick()) == []


@pytest.mark.parametrize("seed", range(300))
def test_whatever_happens_in_whatever_order_every_call_gets_one_outcome_and_every_group_ends(seed: int) -> None:
    random_ = random.Random(seed)
    drive = Drive(random_.randint(1, 4), random_.choice([None, 2.0, "auto"]))
    asked = outcomes = 0

    def events() -> list[Event]:
        rank, call = random_.randrange(drive.machine.world_size), drive.machine.call
        return [
            Tick(),
            WorkerStarted(group="g", worker=rank, pid=100 + rank),
            ready(rank),
            heartbeat(rank, age_s=random_.choice([0.0, 0.0, 2 * HANG_S]), call=call),
            reply(rank, call=call),
            failure(rank, call=call, kind=random_.choice(["error", "exit"])),
            exited(rank, code=random_.choice([0, -9, -11])),
            Boundary(group="g", worker=rank, call=call, round=random_.randint(1, 3), boundary=random_.randint(0, 9)),
            StopRequested(signum=random_.choice([2, None]), save=random_.random() < 0.5),
            SaveRequested(),
            CheckpointEnded(group="g", number=call, step=1),
            Stacks(group="g", worker=rank, text=""),
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
