"""Measures or traces one call on one process. Everything here runs in the training thread."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from torchtrainer.observe.bottleneck import RankTimes, TrainingFacts
from torchtrainer.train.components import internals
from torchtrainer.train.loop import StepIterator
from torchtrainer.train.rank_context import trainable_of
from torchtrainer.train.step import GradientClock
from torchtrainer.worker.tracing import StepTrace

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

TRAINING_HOOKS = ("train_epoch", "train_batch")


class PassObserver:
    """Watches one call of ``train`` or ``validate``.

    Args:
        operator: of this process.
        clocked: gradients are exchanged inside backward, where only the end of the gradients tells what the exchange takes.
        profile: measure the parts of a step.
        trace_dir: where a trace of the steps goes; None: nothing is traced.
        num_steps: of the call, if that is known.
    """

    def __init__(
        self, operator: TrainingOperator, clocked: bool, profile: bool, trace_dir: str | None, num_steps: int | None
    ) -> None:
        self._operator = operator
        self._profile = profile
        self._clocked = clocked
        self._trace = StepTrace(operator, trace_dir, num_steps or 0) if trace_dir is not None else None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measures, or traces, as long as the block runs."""
        timers, inside = self._operator.timers, internals(self._operator)
        if self._profile:
            timers.reset()
            timers.enable()
            inside.gradient_clock = GradientClock(trainable_of(self._operator)()) if self._clocked else None
        try:
            if self._trace is None:
                yield
            else:
                with self._trace.recording():
                    yield
        finally:
            timers.disable()
            if inside.gradient_clock is not None:
                inside.gradient_clock.remove()
                inside.gradient_clock = None

    def counting(self, count_step: Callable[[], None]) -> Callable[[], None]:
        """What counts a step, so that a trace sees it too."""
        return count_step if self._trace is None else self._trace.counting(count_step)

    def result(self, steps: StepIterator) -> dict[str, Any] | None:
        """What the rank in use says of the call under ``profile``, as JSON data; None if nobody has asked.

        Args:
            steps: of the call, which is over.
        """
        if self._trace is not None:
            return {"trace": self._trace.path, "error": self._trace.error}
        if not self._profile:
            return None
        found: dict[str, Any] = self._operator.timers.stats()
        seconds = self._operator.timers.total("train_epoch")
        if seconds is not None:
            found["times"] = asdict(_times(self._operator, steps.steps_here, seconds))
            found["facts"] = asdict(_facts(self._operator))
            found["samples"] = steps.samples_here
        return found


def _times(operator: TrainingOperator, steps: int, seconds: float) -> RankTimes:
    """The average step of the rank in use.

    Args:
        operator: of this process.
        steps: that were measured.
        seconds: that they took.
    """
    share = 1 / steps if steps else 0.0
    phases = operator.timers.phases()
    other = max(0.0, seconds - sum(phases.values()))
    return RankTimes(
        rank=internals(operator).context.collective.rank,
        pid=os.getpid(),
        host=socket.gethostname(),
        device=str(operator.device),
        steps=steps,
        wall_s=seconds * share,
        other_s=other * share,
        **{f"{phase}_s": spent * share for phase, spent in phases.items()},
    )


def _facts(operator: TrainingOperator) -> TrainingFacts:
    from torchtrainer.operator import TrainingOperator as Base

    inside, kind = internals(operator), type(operator)
    settings, dealt = inside.context.settings, inside.loaders.get("train")
    loader = dealt._loader if dealt is not None else None
    parameters = trainable_of(operator)()
    return TrainingFacts(
        loader=type(loader).__name__ if loader is not None else "",
        num_workers=loader.num_workers if isinstance(loader, DataLoader) else None,
        pinned=isinstance(loader, DataLoader) and loader.pin_memory,
        gradient_bytes=sum(one.numel() * one.element_size() for one in parameters),
        precision=settings.precision,
        compiled=settings.compile is not False,
        fused=settings.fused is True,
        accumulate=settings.accumulate,
        comm_hook=settings.comm_hook,
        through_memory=internals(operator).context.in_memory,
        own_hooks=tuple(name for name in TRAINING_HOOKS if getattr(kind, name) is not getattr(Base, name)),
    )
