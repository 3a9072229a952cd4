"""What processes and GPUs use: ``/proc`` and NVML, read from outside the training and without torch.

Every value is a frozen record of plain numbers (`dataclasses.asdict` gives JSON), memory is in bytes, power in watts,
and what a machine cannot tell is None. Nothing here raises because a driver, a process or a file is missing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

MIB = 1024**2
GIB = 1024**3


def format_bytes(size: int) -> str:
    """Writes a size the way people read it: ``512 MiB``, ``12.1 GiB``."""
    return f"{size / MIB:.0f} MiB" if size < GIB else f"{size / GIB:.1f} GiB"


@dataclass(frozen=True, kw_only=True)
class DeviceUse:
    """How busy one device is: a GPU as a whole, or the CPU as one process uses it.

    Attributes:
        device: ``cpu``, or ``cuda:N`` as the process numbers its visible GPUs.
        percent: use since the last look; a process on the CPU reaches 100 per core.
        memory_used_bytes: memory in use on the GPU, or resident memory of the process.
        memory_total_bytes: memory of the GPU; None for the CPU.
        power_w: electrical power in watts; None for the CPU.
    """

    device: str
    percent: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_w: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.percent is not None:
            parts.append(f"{self.percent:.0f}%")
        if self.memory_used_bytes is not None and self.memory_total_bytes is not None:
            parts.append(f"{self.memory_used_bytes / GIB:.1f}/{format_bytes(self.memory_total_bytes)}")
        elif self.memory_used_bytes is not None:
            parts.append(format_bytes(self.memory_used_bytes))
        if self.power_w is not None:
            parts.append(f"{self.power_w:.0f} W")
        return " ".join([self.device, *parts])


@dataclass(frozen=True, kw_only=True)
class ProcessUse:
    """What one process has used so far.

    Attributes:
        pid: process id.
        rss_bytes: resident memory, pages shared with other processes included.
        cpu_s: processor seconds, user and system, of all its threads since it started.
    """

    pid: int
    rss_bytes: int | None
    cpu_s: float

    def on_cpu(self, percent: float | None) -> DeviceUse:
        """This use as a `DeviceUse` of the CPU, with the percentage that a `CpuMeter` found."""
        return DeviceUse(device="cpu", percent=percent, memory_used_bytes=self.rss_bytes)


class CpuMeter:
    """Turns growing processor seconds into a percentage between two looks. One meter per process watched.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[float, float] | None = None

    def percent(self, cpu_s: float) -> float | None:
        """Says how busy the process was since the last call: 100 is one core.

        Args:
            cpu_s: processor seconds so far, as in `ProcessUse`.

        Returns:
            None at the first look, when no time has passed, and when the seconds went back (another process).
        """
        now = self._clock()
        last, self._last = self._last, (now, cpu_s)
        if last is None or now <= last[0] or cpu_s < last[1]:
            return None
        return 100.0 * (cpu_s - last[1]) / (now - last[0])


def read_process_use(pid: int, *, proc: Path = Path("/proc")) -> ProcessUse | None:
    """Reads what a process uses: any process where there is a ``/proc``, else only the calling one.

    Args:
        pid: whose use.
        proc: where the proc file system is mounted.

    Returns:
        None if the process is gone or cannot be seen. Without ``/proc``, memory is the peak so far.
    """
    try:
        stat = (proc / str(pid) / "stat").read_text()
        resident_pages = int((proc / str(pid) / "statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return _own_use(pid) if pid == os.getpid() and not (proc / "self").exists() else None
    # The command name is in parentheses and may hold blanks and parentheses itself.
    user_ticks, system_ticks = stat.rpartition(")")[2].split()[11:13]
    return ProcessUse(
        pid=pid,
        rss_bytes=resident_pages * os.sysconf("SC_PAGE_SIZE"),
        cpu_s=(int(user_ticks) + int(system_ticks)) / os.sysconf("SC_CLK_TCK"),
    )


def _own_use(pid: int) -> ProcessUse:
    try:
        import resource
    except ImportError:  # Windows
        return ProcessUse(pid=pid, rss_bytes=None, cpu_s=time.process_time())
    used = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024
    return ProcessUse(pid=pid, rss_bytes=used.ru_maxrss * unit, cpu_s=used.ru_utime + used.ru_stime)


def proportional_memory(pid: int, *, proc: Path = Path("/proc")) -> int | None:
    """Reads a process's fair share of memory (PSS): a page shared by n processes counts as 1/n. In bytes.

    Args:
        pid: whose memory.
        proc: where the proc file system is mounted.

    Returns:
        None where the kernel does not tell (not Linux, no permission, process gone).
    """
    try:
        lines = (proc / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None


class GpuMonitor:
    """Looks at the GPUs that a process with the given environment would see, in its numbering.

    Only NVML is used: no CUDA context is made, so that looking neither takes GPU memory nor spoils a later fork. NVML
    numbers GPUs by PCI bus; CUDA does so for equal GPUs, or with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.

    Args:
        environ: the environment whose ``CUDA_VISIBLE_DEVICES`` counts.
        nvml: a module like ``pynvml``; None: the installed one. Without it, or without a driver, there are no GPUs.
    """

    def __init__(self, environ: Mapping[str, str], *, nvml: Any = None) -> None:
        self._nvml = _load_nvml() if nvml is None else nvml
        self._devices: list[Any] = []
        if self._nvml is None:
            return
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError:
            self._nvml = None
            return
        with suppress(self._nvml.NVMLError):
            self._devices = self._visible(environ.get("CUDA_VISIBLE_DEVICES"))

    @property
    def count(self) -> int:
        """How many GPUs are visible."""
        return len(self._devices)

    def sample(self) -> tuple[DeviceUse, ...]:
        """Reads the use of every visible GPU, first ``cuda:0``; a value that a GPU does not offer is None."""
        return tuple(self._use_of(index, device) for index, device in enumerate(self._devices))

    def close(self) -> None:
        """Lets go of NVML; samples are empty from here on. Closing twice does nothing."""
        nvml, self._nvml, self._devices = self._nvml, None, []
        if nvml is not None:
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def __enter__(self) -> GpuMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _visible(self, wanted: str | None) -> list[Any]:
        every = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]
        if wanted is None:
            return every
        visible: dict[str, Any] = {}
        for name in (part.strip() for part in wanted.split(",")):
            device = self._find(name, every)
            if device is None:  # CUDA ignores the first wrong entry and all that follow
                break
            key = self._text(self._nvml.nvmlDeviceGetUUID(device))
            if key in visible:  # CUDA shows no GPU at all when one is named twice
                return []
            visible[key] = device
        return list(visible.values())

    def _find(self, name: str, every: list[Any]) -> Any:
        if name.isdecimal():
            return every[int(name)] if int(name) < len(every) else None
        if name.startswith("MIG-"):
            with suppress(self._nvml.NVMLError):
                return self._nvml.nvmlDeviceGetHandleByUUID(name)
            return None
        if not name.startswith("GPU-"):
            return None
        matching = [d for d in every if self._text(self._nvml.nvmlDeviceGetUUID(d)).startswith(name)]
        return matching[0] if len(matching) == 1 else None

    def _use_of(self, index: int, device: Any) -> DeviceUse:
        utilisation = self._ask(self._nvml.nvmlDeviceGetUtilizationRates, device)
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, device)
        milliwatts = self._ask(self._nvml.nvmlDeviceGetPowerUsage, device)
        return DeviceUse(
            device=f"cuda:{index}",
            percent=None if utilisation is None else float(utilisation.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_w=None if milliwatts is None else milliwatts / 1000,
        )

    def _ask(self, question: Callable[[Any], Any], device: Any) -> Any:
        try:
            return question(device)
        except self._nvml.NVMLError:  # not supported by this GPU, or the GPU fell off the bus
            return None

    @staticmethod
    def _text(value: str | bytes) -> str:
        return value.decode() if isinstance(value, bytes) else value


def gpu_count(environ: Mapping[str, str], *, nvml: Any = None) -> int:
    """Counts the GPUs that a process with this environment would see, without making a CUDA context.

    Args:
        environ: the environment whose ``CUDA_VISIBLE_DEVICES`` counts.
        nvml: as in `GpuMonitor`.
    """
    with GpuMonitor(environ, nvml=nvml) as monitor:
        return monitor.count


def _load_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml
