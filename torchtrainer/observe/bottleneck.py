"""What holds a training up, in one sentence, from how long each rank spends in the parts of a step.

In a step all ranks take the same time, since they wait for each other in the exchange of gradients. So the exchange of the
rank that waits least is the exchange itself. What others spend there beyond that, they wait for the ranks that come last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median_low

PHASES = ("data", "copy", "forward", "backward", "exchange", "optimizer", "snapshot", "other")
"""Parts of a step, which add up to the whole."""
AVOIDABLE = ("data", "copy", "exchange", "optimizer", "snapshot")
"""Those that can often be reduced without changing the model."""
WORTH_NAMING = 0.15
"""Share of the step at and above which something other than computing is called the bottleneck."""
OPTIMIZER_WORTH_NAMING = 0.3
"""The same for the optimizer, which is computing too."""
ON_TIME = 0.25
"""A process that waits less than this share of the longest wait is one of those that come late."""
SLOWEST_EXCHANGE_BYTES_PER_S = 20e6
"""An exchange of gradients slower than this, over any network, means that ranks wait for each other in turn."""
EXCHANGE_LATENCY_S = 0.005
"""Time that an exchange may take however small it is."""
MOST_TIMES = 100.0
"""Largest ratio of times that is shown as a ratio; beyond it, both times are shown."""


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Where the steps of a rank went, on average, in seconds per step. Ranks that share a process have those of the process.

    Attributes:
        rank: it is.
        pid: of its process.
        host: name of its machine.
        device: it trains on.
        steps: that were measured.
        wall_s: the whole step.
        data_s: waiting for the loader's next batch.
        copy_s: copying it to the device.
        forward_s: forward pass and loss.
        backward_s: backward pass, without the exchange in it.
        exchange_s: exchanging gradients, and waiting for ranks that have not computed theirs yet.
        optimizer_s: the optimizer's step, and clipping.
        snapshot_s: what checkpoints cost the thread that trains.
        other_s: the rest.
    """

    rank: int
    pid: int
    host: str
    device: str
    steps: int
    wall_s: float
    data_s: float
    copy_s: float
    forward_s: float
    backward_s: float
    exchange_s: float
    optimizer_s: float
    snapshot_s: float
    other_s: float

    def of(self, phase: str) -> float:
        """Seconds per step in one of `PHASES`."""
        return float(getattr(self, f"{phase}_s"))

    @property
    def work_s(self) -> float:
        """Everything but the exchange, in which a rank waits for others."""
        return self.wall_s - self.exchange_s


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What advice depends on.

    Attributes:
        loader: name of the class of the training loader; empty: there is none.
        num_workers: of a torch ``DataLoader``; None: it is something else.
        pinned: the loader's ``pin_memory``.
        gradient_bytes: size of one rank's gradients.
        precision, compiled, fused, accumulate, comm_hook: options of the trainer.
        through_memory: gradients go through shared memory, where making them smaller only costs.
        own_hooks: names of the operator's own training hooks.
    """

    loader: str = "DataLoader"
    num_workers: int | None = 0
    pinned: bool = False
    gradient_bytes: int = 0
    precision: str = "fp32"
    compiled: bool = False
    fused: bool = False
    accumulate: int = 1
    comm_hook: str | None = None
    through_memory: bool = False
    own_hooks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Process:
    times: RankTimes
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{_ranks(self.ranks)} (pid {self.times.pid}, host {self.times.host})"


@dataclass(frozen=True, kw_only=True)
class _Lateness:
    """Some processes that the others wait for.

    Attributes:
        latest: the process that waits least.
        more: how many others come about as late.
        waiting: processes that wait for them.
        share: of the step that they wait, on average.
        phase: in which the latest one loses most against them.
    """

    latest: _Process
    more: int
    waiting: tuple[_Process, ...]
    share: float
    phase: str


def bottleneck(ranks: Sequence[RankTimes], facts: TrainingFacts) -> str:
    """Says what to look at first.

    Args:
        ranks: of every rank, in rank order.
        facts: of the training.

    Returns:
        A sentence without a full stop. Its percentage is of the step of those ranks that spend, or wait, that time.
    """
    processes = _processes(ranks)
    if not processes:
        return "no step was taken"
    late = _lateness(processes)
    share = _common_shares(processes)
    worst = max(AVOIDABLE, key=lambda phase: share[phase])
    if late is not None and late.share >= max(WORTH_NAMING, share[worst]):
        return _about_late(late, facts)
    if share[worst] >= (OPTIMIZER_WORTH_NAMING if worst == "optimizer" else WORTH_NAMING):
        exchange_s = min(one.times.exchange_s for one in processes)
        return _about_part(worst, _percent(share[worst]), exchange_s, facts)
    computing = share["forward"] + share["backward"]
    if share["other"] >= max(WORTH_NAMING, computing):
        return _about_other(_percent(share["other"]), facts)
    return _about_computing(_percent(computing), facts)


def slowest(ranks: Sequence[RankTimes]) -> RankTimes:
    """The rank that has the most to do before it comes to the exchange."""
    return max(ranks, key=lambda one: one.work_s)


def _processes(ranks: Sequence[RankTimes]) -> list[_Process]:
    """Ranks by the processes that carry them; those without a step are left out."""
    grouped: dict[tuple[str, int], list[RankTimes]] = {}
    for one in ranks:
        if one.steps and one.wall_s > 0:
            grouped.setdefault((one.host, one.pid), []).append(one)
    return [_Process(times=members[0], ranks=tuple(m.rank for m in members)) for members in grouped.values()]


def _common_shares(processes: Sequence[_Process]) -> dict[str, float]:
    """Share of the step that processes in the middle spend in each phase; in the exchange, that of the one that waits least."""
    shares = {phase: [one.times.of(phase) / one.times.wall_s for one in processes] for phase in PHASES}
    return {phase: (min if phase == "exchange" else median_low)(found) for phase, found in shares.items()}


def _lateness(processes: Sequence[_Process]) -> _Lateness | None:
    """Those who come late, if others wait for them, and are not fewer than they."""
    least_s = min(one.times.exchange_s for one in processes)
    waits_s = [one.times.exchange_s - least_s for one in processes]
    late = [one for one, wait_s in zip(processes, waits_s, strict=True) if wait_s <= ON_TIME * max(waits_s)]
    waiting = [one for one in processes if one not in late]
    if not waiting or len(late) > len(waiting):
        return None
    latest = min(late, key=lambda one: one.times.exchange_s)
    phases = [phase for phase in PHASES if phase != "exchange"]
    return _Lateness(
        latest=latest,
        more=len(late) - 1,
        waiting=tuple(waiting),
        share=fmean((one.times.exchange_s - least_s) / one.times.wall_s for one in waiting),
        phase=max(phases, key=lambda phase: latest.times.of(phase) - _median_s(waiting, phase)),
    )


def _median_s(processes: Sequence[_Process], phase: str) -> float:
    return median_low([one.times.of(phase) for one in processes])


# Sentences


def _about_late(late: _Lateness, facts: TrainingFacts) -> str:
    who = f"{_ranks(late.waiting[0].ranks)} waits" if _single(late.waiting) else "the other ranks wait"
    more = f" and {late.more} more process{'' if late.more == 1 else 'es'}" if late.more else ""
    begin = f"{who} {_percent(late.share)} of the step for {late.latest}{more}"
    if len(late.latest.ranks) > max(len(one.ranks) for one in late.waiting):
        return f"{begin}: it carries {len(late.latest.ranks)} ranks, more than others do; a replacement or resize() ends that"
    if late.phase == "data":
        own, others = late.latest.times.data_s, _median_s(late.waiting, "data")
        return f"{begin}, which waits {_time(own)} for its data, the others {_time(others)}: {_data_advice(facts)}"
    part = _PARTS[late.phase]
    if late.phase == "other" and facts.own_hooks:
        part = f"its own {' and '.join(facts.own_hooks)} {'takes' if len(facts.own_hooks) == 1 else 'take'}"
    return f"{begin}: {part} {_compared(late)}"


_PARTS: Mapping[str, str] = {
    "copy": "its copies to the device take",
    "forward": "its forward takes",
    "backward": "its backward takes",
    "optimizer": "its optimizer takes",
    "snapshot": "its part in checkpoints takes",
    "other": "what it does between the measured parts takes",
}


def _compared(late: _Lateness) -> str:
    own_s, others_s = late.latest.times.of(late.phase), _median_s(late.waiting, late.phase)
    if own_s < MOST_TIMES * others_s:
        return f"{own_s / others_s:.1f} x the median of the others"
    return f"{_time(own_s)}, that of the others {_time(others_s)}"


def _about_part(phase: str, percent: str, exchange_s: float, facts: TrainingFacts) -> str:
    if phase == "data":
        return f"{percent} of the step is waiting for data: {_data_advice(facts)}"
    if phase == "exchange":
        return _about_exchange(percent, exchange_s, facts)
    if phase == "optimizer":
        advice = ["larger batches"] if facts.fused else ["fused=True", "larger batches"]
        return f"{percent} of the step is the optimizer: {_any_of(advice)} would reduce it"
    if phase == "snapshot":
        return f"{percent} of the step is copying state for checkpoints: save less often, by CheckpointConfig"
    advice_on_copy = "smaller types reduce it" if facts.pinned else "pin_memory=True in the loader makes it faster"
    return f"{percent} of the step is copying batches to the device: {advice_on_copy}"


def _data_advice(facts: TrainingFacts) -> str:
    if facts.num_workers is not None:
        return f"raise the loader's num_workers, now {facts.num_workers}"
    return f"the loader is a {facts.loader}, which has to have its batches ready sooner"


def _about_exchange(percent: str, exchange_s: float, facts: TrainingFacts) -> str:
    size = _size(facts.gradient_bytes)
    if exchange_s > EXCHANGE_LATENCY_S and facts.gradient_bytes < SLOWEST_EXCHANGE_BYTES_PER_S * exchange_s:
        return (
            f"{percent} of the step is spent exchanging only {size} of gradients: the ranks wait for each other in "
            "turn, because of batches of unequal length or other work on their cores"
        )
    advice = [f"accumulate={2 * facts.accumulate}", "larger batches"]
    if facts.comm_hook is None and not facts.through_memory:
        advice.append('comm_hook="bf16"')
    return f"{percent} of the step is the exchange of {size} of gradients: {_any_of(advice)} would reduce it"


def _about_other(percent: str, facts: TrainingFacts) -> str:
    if facts.own_hooks:
        return (
            f"{percent} of the step is in parts of the operator's own {' and '.join(facts.own_hooks)} that are not measured: "
            'with self.timers.record("fwd"), "grad" and "apply" around them they are'
        )
    return f"{percent} of the step is the loop around a model that takes little time itself: larger batches reduce it"


def _about_computing(percent: str, facts: TrainingFacts) -> str:
    advice = ['precision="bf16"'] if facts.precision == "fp32" else []
    if not facts.compiled:
        advice.append("compile=True")
    more = f"; {_any_of(advice)} may make it faster" if advice else ""
    return f"{percent} of the step is computing, which is what the hardware is for{more}"


def _single(processes: Sequence[_Process]) -> bool:
    return len(processes) == 1 and len(processes[0].ranks) == 1


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(str(rank) for rank in ranks[:-1])} and {ranks[-1]}"


def _any_of(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.3g} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.3g} kB"
