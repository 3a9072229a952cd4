"""A trace of a few steps of one process, for Chrome and Perfetto, by ``torch.profiler``. In the thread that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile, record_function

from torchtrainer.train.components import internals
from torchtrainer.train.timers import PHASES

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


class StepTrace:
    """Records one call, with a span for each step and phase, and writes it down when the call is over.

    Args:
        operator: of this process.
        directory: of the trace; made if it is not there.
        num_steps: that will be taken.

    Attributes:
        path: of the file: ``step_<steps before>_rank_<lowest rank of the process>.json``.
        error: why there is none; empty: there is one.
    """

    def __init__(self, operator: TrainingOperator, directory: str, num_steps: int) -> None:
        rank = internals(operator).context.collective.rank
        self.path = str(Path(directory) / f"step_{operator.global_step}_rank_{rank}.json")
        self.error = ""
        self._operator = operator
        self._left = num_steps
        self._step: record_function | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records as long as the block runs. What it raises leaves no file; that the file cannot be written raises nothing."""
        activities = [ProfilerActivity.CPU]
        if self._operator.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        recorder = profile(activities=activities)
        recorder.start()
        self._operator.timers.enable(_span)
        self._begin_step()
        try:
            yield
        finally:
            self._end_step()
            self._operator.timers.disable()
            recorder.stop()
        self._write(recorder)

    def counting(self, count_step: Callable[[], None]) -> Callable[[], None]:
        """A function that counts a step as the given one does, and begins the span of the next."""

        def count() -> None:
            count_step()
            self._end_step()
            self._begin_step()

        return count

    def _begin_step(self) -> None:
        if self._left > 0:
            self._left -= 1
            self._step = record_function(f"step {self._operator.global_step + 1}")
            self._step.__enter__()  # type: ignore[no-untyped-call]  # torch has no types here

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _write(self, recorder: profile) -> None:
        """A whole file or none: the steps were taken, whether or not there is room to tell of them."""
        path = Path(self.path)
        part = path.with_name(f".{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)  # a crash left it, or it is a link of somebody else's
            recorder.export_chrome_trace(str(part))
            part.replace(path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            self.error = str(error) or type(error).__name__


def _span(key: str) -> record_function:
    return record_function(PHASES.get(key, key))
