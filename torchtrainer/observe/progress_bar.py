"""Progress bars in the driver: one for a pass over the data, one for a start that takes long.

Both draw through ``tqdm.auto``: a widget in notebooks, text elsewhere. Neither has a thread: they are drawn when the
driver, which waits for its workers anyway, tells them something.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TextIO

from torchtrainer.observe.devices import GIB, DeviceUse
from torchtrainer.observe.events import StepEvent
from torchtrainer.observe.notices import standard_stream

KNOWN_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
UNKNOWN_FORMAT = "{desc}: {n_fmt} batches [{elapsed}{postfix}]"
START_FORMAT = "{desc} [{elapsed}]"
FALLBACK_COLUMNS, FALLBACK_LINES = 80, 24
SPINNER = "|/-\\"


def _bar_class() -> Any:
    """The bar of ``tqdm.auto``, less its monitor thread and its lock between processes: we draw from one thread."""
    from tqdm.auto import tqdm

    bar_class: Any = type("Bar", (tqdm,), {"monitor_interval": 0})
    bar_class.set_lock(threading.RLock())
    return bar_class


def _shape(file: TextIO | None) -> dict[str, Any]:
    """How wide to draw: as the terminal is, also after it changes; some terminals say 0, where tqdm would draw nothing."""
    try:
        size = os.get_terminal_size((file or standard_stream("stderr")).fileno())
    except (OSError, ValueError, AttributeError):  # not a terminal, or not even a file
        return {"dynamic_ncols": True}
    if size.columns and size.lines:
        return {"dynamic_ncols": True}
    return {"ncols": size.columns or FALLBACK_COLUMNS, "nrows": FALLBACK_LINES}


class PassBar:
    """Shows how far a pass is: batches, time gone and left, samples per second, loss, device use.

    A context manager: however the pass ends, the bar stays where it stopped and the cursor is on a new line.

    Args:
        description: what is running, such as ``train epoch 3``.
        total: batches that the call will take; None: not known, or known from the first event on.
        file: where to draw text; None: ``sys.stderr``.
    """

    def __init__(self, description: str, *, total: int | None = None, file: TextIO | None = None) -> None:
        # The caller limits the rate, so every update is drawn: the last one above all.
        self._bar = _bar_class()(
            desc=description,
            total=total,
            file=file or standard_stream("stderr"),
            mininterval=0,
            miniters=1,
            **_shape(file),
            bar_format=UNKNOWN_FORMAT if total is None else KNOWN_FORMAT,
        )

    def update(self, event: StepEvent) -> None:
        """Draws the bar as the event says; an event for fewer batches than shown takes the bar back."""
        if event.batches is not None and event.batches != self._bar.total:
            self._bar.bar_format = KNOWN_FORMAT
            self._bar.reset(total=event.batches)
        self._bar.set_postfix_str(_figures(event), refresh=False)
        forward = event.batch - self._bar.n
        self._bar.update(forward)
        if forward <= 0:  # tqdm draws by itself only when the count grows
            self._bar.refresh()

    def write(self, text: str, file: TextIO | None = None) -> None:
        """Prints whole lines above the bar, on standard output or another stream; a missing newline at the end is added."""
        type(self._bar).write(text, file=file, end="" if text.endswith("\n") else "\n")

    def aside(self) -> AbstractContextManager[None]:
        """Takes the bar off the terminal while something else is written there."""
        aside: AbstractContextManager[None] = type(self._bar).external_write_mode(file=standard_stream("stderr"))
        return aside

    def close(self) -> None:
        """Draws the bar for the last time and ends its line. Closing twice does nothing."""
        self._bar.close()

    def __enter__(self) -> PassBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StartBar:
    """Shows that starting goes on, but only once it has taken so long that somebody may wonder.

    Args:
        description: what is starting.
        enabled: False: never shows anything (``use_tqdm`` is off).
        after_s: seconds before it shows up.
        file: where to draw text; None: ``sys.stderr``.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        description: str,
        *,
        enabled: bool = True,
        after_s: float = 2.0,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description = description
        self._enabled = enabled
        self._file = file
        self._clock = clock
        self._show_from = clock() + after_s
        self._bar: Any = None
        self._ticks = 0

    def tick(self, description: str | None = None) -> None:
        """Called now and then while waiting: shows the bar when it is time to, and turns the spinner.

        Args:
            description: what is being waited for now; None: as before.
        """
        self._description = description or self._description
        if not self._enabled or self._clock() < self._show_from:
            return
        text = f"{SPINNER[self._ticks % len(SPINNER)]} {self._description}"
        self._ticks += 1
        if self._bar is None:
            self._bar = _bar_class()(
                desc=text, file=self._file or standard_stream("stderr"), leave=False, bar_format=START_FORMAT
            )
        else:
            self._bar.set_description_str(text)

    def close(self) -> None:
        """Takes the bar off the screen. Closing twice does nothing."""
        bar, self._bar, self._enabled = self._bar, None, False
        if bar is not None:
            bar.close()

    def __enter__(self) -> StartBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _figures(event: StepEvent) -> str:
    parts = []
    if event.samples_per_s is not None:
        parts.append(
            f"{event.samples_per_s:,.0f} samples/s"
            if event.samples_per_s >= 10
            else f"{event.samples_per_s:.2g} samples/s"
        )
    if event.loss is not None:
        parts.append(f"loss {event.loss:.4g}")
    if event.devices:
        parts.append(summarize(event.devices))
    return ", ".join(parts)


def summarize(devices: tuple[DeviceUse, ...]) -> str:
    """Says in a few words how busy the devices are together, since a line has no room for eight of them.

    Returns:
        For one device, itself. For several: the range of their use (GPUs) or its sum (CPU), memory and power summed up.
    """
    if len(devices) == 1:
        return str(devices[0])
    kind = "gpu" if devices[0].device.startswith("cuda") else "cpu"
    percents = [device.percent for device in devices if device.percent is not None]
    memory = [device.memory_used_bytes for device in devices if device.memory_used_bytes is not None]
    power = [device.power_w for device in devices if device.power_w is not None]
    parts = [f"{len(devices)} gpus" if kind == "gpu" else "cpu"]
    if percents and kind == "gpu":
        parts.append(f"{min(percents):.0f}-{max(percents):.0f}%")
    elif percents:
        parts.append(f"{sum(percents):.0f}%")
    if memory:
        parts.append(f"{sum(memory) / GIB:.1f} GiB")
    if power:
        parts.append(f"{sum(power):.0f} W")
    return " ".join(parts)
