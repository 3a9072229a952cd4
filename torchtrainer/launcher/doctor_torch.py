"""What ``torchtrainer doctor`` looks at with torch or a driver: what can hang or crash in native code.

Each check runs in a process of its own. The processes that they fork end by themselves when their time is over.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torchtrainer.launcher.doctor_checks import Finding, judged
from torchtrainer.observe.devices import GpuMonitor, gpu_count
from torchtrainer.process.guard import die_with_parent, thread_count
from torchtrainer.process.paths import EnginePaths
from torchtrainer.process.signals import describe_exit

SLOW_IMPORT_S = 15.0
"""An import of torch that takes longer than this comes from a slow disk, a network file system or a busy machine."""
FORKED_STEP_S = 20
"""Longest life of a forked process that multiplies two small matrices, in whole seconds."""
GLOO_GROUP_S = 20.0
"""Longest wait of two processes of this machine for each other."""
GLOO_RANKS = 2

FORK_ADVICE = (
    "processes cannot be forked after the import: find what starts threads (a .pth file, sitecustomize, a plug-in of "
    "torch); until then each worker imports torch itself, which is slower (torchtrainer run --start-fresh)"
)


def check_gpus() -> list[Finding]:
    """GPUs that NVML shows, as far as CUDA_VISIBLE_DEVICES lets a process see them."""
    trouble = nvml_trouble()
    with GpuMonitor(os.environ) as monitor:
        uses = [str(use) for use in monitor.sample()]
    if trouble is not None:
        advice = "the driver is installed but does not answer: run nvidia-smi, reload or reinstall it, or reboot"
        return [judged("gpus", trouble, problem=advice)]
    if not uses:
        return [judged("gpus", "none")]
    return [judged(f"gpu {index}", use) for index, use in enumerate(uses)]


def nvml_trouble() -> str | None:
    """What NVML says against working, None if it works or there is no NVIDIA driver at all."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        no_driver = isinstance(error, pynvml.NVMLError_LibraryNotFound | pynvml.NVMLError_DriverNotLoaded)
        return None if no_driver and not list(Path("/dev").glob("nvidia[0-9]*")) else str(error)
    pynvml.nvmlShutdown()
    return None


def check_library_threads() -> list[Finding]:
    """Threads that Python itself and numpy start, with the environment as it is."""
    at_start = thread_count()
    site = (
        "" if at_start == 1 else "something that Python loads at its start (a .pth file, sitecustomize) starts threads"
    )
    findings = [judged("threads of python", str(at_start), problem=site)]
    try:
        import numpy
    except ImportError:
        return findings
    threads = thread_count()
    known = "" if threads == at_start else " (its OpenBLAS; held back by OPENBLAS_NUM_THREADS=1 before we fork)"
    return [*findings, judged("threads after import of numpy", f"{threads}{known}; numpy {numpy.__version__}")]


def check_torch() -> list[Finding]:
    """Import of torch as the spawner does it, a fork after it, and what this torch was built with."""
    started = time.monotonic()
    import torch

    import_s = time.monotonic() - started
    slow = "put the environment on a local disk; the first import after a boot or an update is slower than later ones"
    threads = thread_count()
    forked = run_forked(_multiply, limit_s=FORKED_STEP_S)
    fork_value = f"{threads} thread{'s' * (threads != 1)} after import of torch; a forked process "
    fork_value += "computes" if forked == 0 else describe_exit(forked)
    safe = threads == 1 and forked == 0
    return [
        judged("import of torch", f"{import_s:.1f} s", problem=slow if import_s > SLOW_IMPORT_S else ""),
        judged("fork after import", fork_value, problem="" if safe else FORK_ADVICE),
        _back_ends(torch),
        _cuda(torch),
    ]


def _multiply() -> int:
    import torch

    one = torch.ones(256, 256)
    return 0 if float((one @ one).sum()) == 256.0**3 else 1


def _back_ends(torch: Any) -> Finding:
    distributed = torch.distributed
    if not distributed.is_available():
        return judged("torch.distributed", "not built in", problem="install a torch with it", level="fail")
    built = {name: getattr(distributed, f"is_{name}_available")() for name in ("gloo", "nccl", "mpi")}
    value = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in built.items())
    if built["nccl"]:
        value += f" ({'.'.join(map(str, torch.cuda.nccl.version()))})"
    lacking = (
        "" if built["gloo"] else "install a torch with Gloo: CPU training and the exchange of small values need it"
    )
    return judged("torch.distributed", value, problem=lacking, level="fail")


def _cuda(torch: Any) -> Finding:
    visible = gpu_count(os.environ)
    built = torch.version.cuda
    value = "torch built without CUDA" if built is None else f"torch built for CUDA {built}"
    if visible == 0:
        return judged("cuda", f"{value}, no GPU visible")
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wrong = (
        ""
        if usable == visible
        else "install a torch build whose CUDA version the driver supports (nvidia-smi shows it)"
    )
    return judged("cuda", f"{value}, {usable} of {visible} visible GPUs usable", problem=wrong)


def check_gloo() -> list[Finding]:
    """Two forked processes form a group as workers do and add their numbers up."""
    import torchtrainer.comm.group  # noqa: F401  # imported here so that the forked processes have it already

    paths = EnginePaths.create()
    started = time.monotonic()
    try:
        limit_s = 2 * int(GLOO_GROUP_S)
        pids = [fork_process(partial(_add, rank, paths), limit_s=limit_s) for rank in range(GLOO_RANKS)]
        codes = [_exit_code(pid) for pid in pids]
        reports = [(paths.root / f"rank_{rank}").read_text() for rank in range(GLOO_RANKS) if codes[rank] > 0]
    finally:
        paths.remove()
    if not any(codes):
        return [judged("gloo", f"{GLOO_RANKS} processes summed their numbers in {time.monotonic() - started:.2f} s")]
    ended = ", ".join(f"rank {rank} {describe_exit(code)}" for rank, code in enumerate(codes))
    advice = "set GLOO_SOCKET_IFNAME to an interface that is up (lo on one machine), and look for firewall rules"
    return [judged("gloo", " ".join([ended, *reports[:1]]), problem=advice, level="fail")]


def _add(rank: int, paths: EnginePaths) -> int:
    from torchtrainer.comm.group import open_group

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")  # as workers have it
    try:
        group = open_group(
            backend="gloo",
            rank=rank,
            world_size=GLOO_RANKS,
            timeout_s=GLOO_GROUP_S,
            store_path=str(paths.store("doctor")),
        )
        total = group.sum([rank + 1.0])
        group.barrier()
    except Exception as error:
        (paths.root / f"rank_{rank}").write_text(" ".join(f"{type(error).__name__}: {error}".split()))
        return 1
    return 0 if total == [3.0] else 2


def run_forked(work: Callable[[], int], *, limit_s: int) -> int:
    """Runs ``work`` in a forked process; returns its exit code, negative for a signal, such as the alarm at the limit."""
    return _exit_code(fork_process(work, limit_s=limit_s))


def fork_process(work: Callable[[], int], *, limit_s: int) -> int:
    """Forks a process that does the work and ends with the returned code, or by SIGALRM at the limit; returns its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent(parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit_s)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # the copy of the parent's interpreter is not ours to dismantle


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
