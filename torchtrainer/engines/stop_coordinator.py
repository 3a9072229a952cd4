"""Rank 0's part in agreeing where ranks that a launcher started stop or save. Pure: messages in, orders out.

    wish ──> ask: are all in this call? ──> prepare: all pause at their next boundary and say which ──> stop_at the highest

There is no driver here that waits for a call and knows that it has begun on every rank. So rank 0 asks first: a rank that paused
for others that are still between two calls could pause for as long as the user's script takes there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchtrainer.driver.states import TO_THE_END

StopOrders = list[dict[str, Any]]


@dataclass
class _Round:
    """One agreement: whether to stop or only to save, in which call, and which ranks have answered."""

    number: int
    call: int
    stop: bool
    prepared: bool = False
    answers: dict[int, int] = field(default_factory=dict)

    def order(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"kind": kind, "call": self.call, "round": self.number, **more}


class StopCoordinator:
    """Decides one round after the other.

    Args:
        world_size: ranks.

    Attributes:
        open: a round is being decided.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._round: _Round | None = None
        self._rounds = 0
        self._ended_call = 0
        self._stopped_call = 0
        self._later: list[dict[str, Any]] = []

    @property
    def open(self) -> bool:
        """Whether a round is being decided."""
        return self._round is not None

    def hear(self, told: dict[str, Any]) -> StopOrders:
        """Takes what a rank told; returns what all ranks are to be told.

        Args:
            told: ``wish`` (call, stop), or an answer to the present round: ``in``, ``at`` (boundary), ``ended``.
        """
        if told["kind"] == "wish":
            return self._wish(told)
        if self._round is None or told["round"] != self._round.number:
            return []
        if told["kind"] == "ended":
            self._ended_call = max(self._ended_call, self._round.call)
            if not self._round.prepared:  # nobody holds
                return self._close([])
        self._round.answers[told["rank"]] = TO_THE_END if told["kind"] == "ended" else told.get("boundary", 0)
        return self._go_on(self._round) if len(self._round.answers) == self._world_size else []

    def _wish(self, told: dict[str, Any]) -> StopOrders:
        call, at = told["call"], self._round
        if call <= self._ended_call or call <= self._stopped_call:
            return []
        if at is not None and at.call == call:
            at.stop = at.stop or told["stop"]
            return []
        if at is not None:
            self._later.append(told)
            return []
        self._rounds += 1
        self._round = _Round(number=self._rounds, call=call, stop=told["stop"])
        return [self._round.order("ask")]

    def _go_on(self, at: _Round) -> StopOrders:
        if not at.prepared:
            at.prepared, at.answers = True, {}
            return [at.order("prepare")]
        if at.stop:
            self._stopped_call = at.call
        return self._close([at.order("stop_at", boundary=max(at.answers.values()), stop=at.stop)])

    def _close(self, orders: StopOrders) -> StopOrders:
        self._round = None
        later, self._later = self._later, []
        return orders + [order for told in later for order in self._wish(told)]
