"""A worker process from its first line of torch to its last: join the group, build the rank, serve calls.

This module is imported by the spawner before it forks, so that workers find it, and all it imports, ready.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle
import torch

from torchtrainer.comm.group import open_group
from torchtrainer.control.messages import Call, Failure, Heard, Reply, WorkerReady
from torchtrainer.process.child import flush_output
from torchtrainer.process.error_file import write_error_file
from torchtrainer.process.paths import RankPaths
from torchtrainer.spec import BuildSpec
from torchtrainer.train.progress import Progress
from torchtrainer.worker.encoding import encode_result
from torchtrainer.worker.link import Link, StopGate
from torchtrainer.worker.runtime import RankRuntime, run_initialization_hook
from torchtrainer.worker.saver import RegionSaver

EXIT_FAILED = 1
FIRST_RANK_METHODS = frozenset({"get_model", "state_dict", "facts"})
"""Calls whose result is alike on all ranks: it is taken from rank 0, the others only take part."""


@dataclass(frozen=True)
class WorkerArguments:
    """What the host tells a worker; see `torchtrainer.control.messages.StartGroup` for units."""

    group: str
    name: str
    rank: int
    world_size: int
    socket: str
    spec_path: str
    store_path: str
    log_dir: str
    threads: int
    backend: str
    timeout_s: float
    gpu: int | None
    heartbeat_s: float
    progress_s: float
    hold_s: float
    checkpoint: dict[str, Any] | None = None


def main(arguments: dict[str, Any]) -> int:
    """Lives the life of a worker; returns its exit code."""
    worker = Worker(WorkerArguments(**arguments))
    try:
        return worker.run()
    finally:
        worker.link.close()


class Worker:
    """One rank in one process. Everything here runs in the main thread."""

    def __init__(self, arguments: WorkerArguments) -> None:
        self.arguments = arguments
        RankPaths.of(arguments.log_dir, arguments.rank).error.unlink(missing_ok=True)  # of an earlier run in this place
        self.progress = Progress()
        self.gate = StopGate(arguments.hold_s)
        self.link = Link(
            socket=arguments.socket,
            group=arguments.group,
            name=arguments.name,
            rank=arguments.rank,
            progress=self.progress,
            gate=self.gate,
        )
        self.link.beat_every_s = arguments.heartbeat_s
        self.saver = self._make_saver(arguments.checkpoint) if arguments.checkpoint is not None else None
        self._interruptible = False
        signal.signal(signal.SIGINT, self._on_interrupt)
        self._pid = os.getpid()
        for name in (arguments.checkpoint or {}).get("signals", ()):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._on_notice)

    def _make_saver(self, orders: dict[str, Any]) -> RegionSaver:
        arguments = self.arguments
        return RegionSaver(
            group=arguments.group,
            rank=arguments.rank,
            world_size=arguments.world_size,
            region=orders["region"],
            asynchronous=orders["asynchronous"],
            wait_s=max(orders["write_s"], arguments.hold_s),
            send=self.link.send,
            receive=self.link.next_snapshot_message,
        )

    def run(self) -> int:
        """Builds the rank and serves calls until there are no more."""
        before = set(sys.modules)
        try:
            runtime = self._build()
        except BaseException as error:
            return self._report(error, call=0)
        self.progress.enter("idle")
        self.link.send(
            WorkerReady(
                group=self.arguments.group,
                rank=self.arguments.rank,
                device=str(runtime.operator.device),
                facts=runtime.facts(),
                modules=sorted(set(sys.modules) - before),
            )
        )
        while (call := self.link.next_call()) is not None:
            try:
                self._serve(runtime, call)
            except SystemExit as error:
                return self._report(error, call.call)
            except BaseException as error:
                self._report(error, call.call)
            self.link.call = 0
            self.link.beat_every_s = self.arguments.heartbeat_s
            self.progress.enter("idle")
        runtime.close()
        # The process group ends with the process: torch's own way now and then aborts on its way out.
        return 0

    def _build(self) -> RankRuntime:
        arguments = self.arguments
        torch.set_num_threads(arguments.threads)
        device = torch.device("cpu") if arguments.gpu is None else torch.device("cuda", arguments.gpu)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        spec: BuildSpec = cloudpickle.loads(Path(arguments.spec_path).read_bytes())
        _take_over_main()
        self.progress.enter("initialization_hook")
        run_initialization_hook(spec)
        self.progress.enter("join process group")
        collective = open_group(
            backend=arguments.backend,
            rank=arguments.rank,
            world_size=arguments.world_size,
            timeout_s=arguments.timeout_s,
            store_path=arguments.store_path,
            device=device,
        )
        self.progress.enter("setup")
        return RankRuntime(
            spec,
            collective=collective,
            device=device,
            local_rank=arguments.rank,
            progress=self.progress,
            gate=self.gate,
            saver=self.saver,
            every_steps=arguments.checkpoint["every_steps"] if arguments.checkpoint is not None else None,
        )

    def _serve(self, runtime: RankRuntime, call: Call) -> None:
        self.link.call = call.call
        self.progress.enter(call.method)
        if self.arguments.rank == 0:
            self.link.beat_every_s = self.arguments.progress_s
        keywords: dict[str, Any] = cloudpickle.loads(call.blob) if call.blob else {}
        self._interruptible = True
        try:
            value = getattr(runtime, call.method)(**keywords)
        except Exception:
            # The state is saved and the process about to leave. A loop of the user's own that did not expect its batches to
            # end has nothing to tell: it runs again.
            if not (self.gate.stopped and self.gate.save_wanted):
                raise
            value = None
        finally:
            self._interruptible = False
        if self.arguments.rank and call.method in FIRST_RANK_METHODS:
            value = None
        form, blob = encode_result(call.method, value)
        flush_output()
        if self.arguments.rank == 0:
            self.link.send_beat()
        self.link.send(
            Reply(
                group=self.arguments.group,
                rank=self.arguments.rank,
                call=call.call,
                form=form,
                stopped=self.gate.stopped,
                snapshot=self.saver.taken if self.saver is not None else 0,
                step=self.progress.step,
                epoch=self.progress.epoch,
                blob=blob,
            )
        )

    def _on_notice(self, signum: int, frame: FrameType | None) -> None:
        """Hands a warning of a preemption on to the driver, which has all ranks stop; a loader's process leaves it to us."""
        if os.getpid() == self._pid:
            self.link.send(Heard(group=self.arguments.group, rank=self.arguments.rank, signum=signum))

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Interrupts the running call, once; between calls there is nothing to interrupt."""
        if self._interruptible:
            self._interruptible = False
            raise KeyboardInterrupt

    def _report(self, error: BaseException, call: int) -> int:
        """Tells the driver why this rank failed, and leaves an error file; returns the exit code to end with."""
        text = "".join(traceback.format_exception(error))
        leaving = isinstance(error, SystemExit)
        exit_code = _exit_code(error.code) if isinstance(error, SystemExit) else None
        paths = RankPaths.of(self.arguments.log_dir, self.arguments.rank)
        said = _text_of(error)
        with contextlib.suppress(OSError):  # a full disk must not hide the user's error
            write_error_file(paths.error, type_name=type(error).__name__, text=said, traceback=text)
        flush_output()
        self.link.send(
            Failure(
                group=self.arguments.group,
                rank=self.arguments.rank,
                call=call,
                kind="exit" if leaving else "error",
                type_name=type(error).__name__,
                text=said,
                traceback=text,
                phase=self.progress.phase,
                step=self.progress.step,
                exit_code=exit_code,
                blob=_pickled_exception(error),
            )
        )
        return EXIT_FAILED if exit_code is None else exit_code


def _take_over_main() -> None:
    """Makes the classes of the user's script or notebook those of ``__main__`` here too.

    cloudpickle made them anew, from their code. Loader workers send batches and exceptions by plain pickle, which finds a
    class by its module and name; without this, an object of such a class would never arrive, and the rank would wait.
    """
    main = types.ModuleType("__main__")
    for kind in list(cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.values()):
        if kind.__module__ == "__main__" and "." not in kind.__qualname__:
            setattr(main, kind.__name__, kind)
    sys.modules["__main__"] = main


def _text_of(error: BaseException) -> str:
    """``str(error)``, also for exceptions whose own ``__str__`` fails."""
    try:
        return str(error)
    except Exception as failed:
        return f"(its __str__ raised {type(failed).__name__})"


def _exit_code(code: object) -> int:
    """Exit code of a `SystemExit`, as the interpreter would choose it."""
    if code is None:
        return 0
    return code if isinstance(code, int) else 1


def _pickled_exception(error: BaseException) -> bytes:
    """The exception for the user's process, without frames; empty if it does not pickle (its text goes anyway)."""
    try:
        data = cloudpickle.dumps(error.with_traceback(None))
        cloudpickle.loads(data)  # an exception whose constructor wants other arguments fails here, not at the user
    except Exception:
        return b""
    return bytes(data)
