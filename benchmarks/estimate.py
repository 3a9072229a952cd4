"""A paper estimate for very many GPUs, from what the driver was measured to cost per rank. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DAY_S = 86400.0
YEAR_H = 8766.0


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the estimate takes for granted.

    Attributes:
        ranks: one per GPU.
        per_machine: GPUs of one machine, which fail together.
        mtbf_years: mean time between two failures of one GPU or its share of the machine. Meta's Llama 3 report counts 419
            unexpected interruptions in 54 days on 16,384 GPUs, which is this.
        heartbeat_s: between two heartbeats of a rank.
        replace_s: until all processes are started again, one of them on another machine, and have read the state.
        checkpoint_every_s: between two checkpoints; half of it is computed again after a failure.
        stall_share: of the time that training stands still for checkpoints.
    """

    ranks: int = 10_000
    per_machine: int = 8
    mtbf_years: float = 5.8
    heartbeat_s: float = 1.0
    replace_s: float = 60.0
    checkpoint_every_s: float = 300.0
    stall_share: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What follows.

    Attributes:
        heartbeats_per_s: that come to the driver.
        driver_share: of one core that they take.
        start_s, failure_s: driver time to start all ranks, and for one failure.
        failures_per_day: of any rank.
        lost_share: of the day that is lost to failures: all ranks start again, and repeat what came after the checkpoint.
        checkpoint_share: of the day that is lost to checkpoints.
    """

    heartbeats_per_s: float
    driver_share: float
    start_s: float
    failure_s: float
    failures_per_day: float
    lost_share: float
    checkpoint_share: float


def estimated(cost: Mapping[str, float], given: Assumptions) -> Estimate:
    """Scales what was measured linearly to more ranks.

    Args:
        cost: of one number of ranks, the fields of `control_plane.Cost`.
        given: the assumptions.
    """
    factor = given.ranks / cost["ranks"]
    failures_per_day = given.ranks * 24 / (given.mtbf_years * YEAR_H)
    failure_s = cost["failure_s"] * factor
    return Estimate(
        heartbeats_per_s=given.ranks / given.heartbeat_s,
        driver_share=cost["beat_s"] * factor / given.heartbeat_s,
        start_s=cost["start_s"] * factor,
        failure_s=failure_s,
        failures_per_day=failures_per_day,
        lost_share=failures_per_day * (failure_s + given.replace_s + given.checkpoint_every_s / 2) / DAY_S,
        checkpoint_share=given.stall_share,
    )


def paragraph(cost: Mapping[str, float], given: Assumptions) -> str:
    """The estimate as Markdown, with its arithmetic."""
    found, ranks = estimated(cost, given), given.ranks
    beat_us = cost["beat_s"] / cost["ranks"] * 1e6
    start_us, failure_us = (cost[name] / cost["ranks"] * 1e6 for name in ("start_s", "failure_s"))
    verdict = "one core is enough" if found.driver_share < 1 else "one core is not enough"
    return f"""Nobody has run this on {ranks:,} GPUs. What follows is arithmetic on the costs per rank that were measured with {cost["ranks"]:,}
synthetic ranks, taken as linear; the plot shows how far they are. It says what the control plane would cost. Collectives between machines
are NCCL's, and not in it.

Assumptions: one rank per GPU, {given.per_machine} GPUs per machine; each GPU with its share of the machine fails once in {given.mtbf_years:g} years, independently of
the others (Meta's Llama 3 report counts 419 unexpected interruptions in 54 days on 16,384 GPUs, which is that); a heartbeat per rank every {given.heartbeat_s:g} s, all to one driver; there is no recovery in place over several machines, so that
after a failure all ranks start again, which takes {given.replace_s:g} s, and repeat half of what is between two checkpoints, {given.checkpoint_every_s:g} s; checkpoints may stall training for {given.stall_share:.0%} of the time, which is the limit that the automatic
interval keeps to.

| what | arithmetic | comes to |
| --- | --- | --- |
| heartbeats at the driver | {ranks:,} / {given.heartbeat_s:g} s | {found.heartbeats_per_s:,.0f} per second |
| driver time for them | {found.heartbeats_per_s:,.0f}/s x {beat_us:.0f} µs | {found.driver_share:.0%} of a core: {verdict} |
| start of all ranks, driver's part | {ranks:,} x {start_us:.0f} µs | {found.start_s:.1f} s |
| failures | {ranks:,} x 24 h / ({given.mtbf_years:g} x {YEAR_H:,.0f} h) | {found.failures_per_day:.1f} per day |
| one failure, driver's part | {ranks:,} x {failure_us:.0f} µs | {found.failure_s:.1f} s |
| time lost to failures | {found.failures_per_day:.1f} x ({found.failure_s:.1f} s + {given.replace_s:g} s + {given.checkpoint_every_s:g} s / 2) / 86,400 s | {found.lost_share:.2%} |
| time lost to checkpoints | the limit of the automatic interval | {found.checkpoint_share:.0%} |

A heartbeat every 10 s instead, or one message per machine instead of {given.per_machine}, divides the first two lines by as much. A death is noticed by the
kernel and reported at once, whatever the heartbeats do; they serve to find hangs, for which 10 s are early enough.
"""
