"""A worker process from its first line of torch to its last: join the group, build the rank, serve calls.

This module is imported by the spawner before it forks, so that workers find it, and all it imports, ready. Long because the life of a
worker is told in one place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import cloudpickle
import torch

from torchtrainer.comm.group import open_group
from torchtrainer.control.messages import AdoptRanks, Call, Failure, Heard, Join, LoaderLost, Logged, Reply, WorkerReady
from torchtrainer.control.wire import ForWorker
from torchtrainer.driver.policies import STEPPING_METHODS
from torchtrainer.observe.notices import forward_notices, warn
from torchtrainer.process.affinity import bind
from torchtrainer.process.allocation import keep_freed_memory
from torchtrainer.process.child import flush_output
from torchtrainer.process.error_file import write_error_file
from torchtrainer.process.paths import RankPaths
from torchtrainer.script.take_over import ScriptState, take_over
from torchtrainer.spec import BuildSpec
from torchtrainer.train.progress import Progress, StepMark
from torchtrainer.train.refetching import LoaderLoss
from torchtrainer.worker.assembly import Assembled, build_worker, run_initialization_hook
from torchtrainer.worker.encoding import encode_result
from torchtrainer.worker.executor import Executor
from torchtrainer.worker.link import Link, StepBarrier
from torchtrainer.worker.reassignment import Released
from torchtrainer.worker.saver import RegionSaver

EXIT_FAILED = 1
FIRST_RANK_METHODS = frozenset({"get_model", "state_dict", "facts"})
"""Calls whose result is the same on all ranks: it is taken from rank 0, the others only take part."""


MAX_KEPT_REPLY_BYTES = 64 * 1024
"""Size limit of the reply to a call, kept in shared memory until the next one; who takes over the rank makes a longer one again."""


@dataclass(frozen=True)
class Latest:
    """The call that came last; its arguments, where it can be made again."""

    call: int
    method: str
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerArguments:
    """A worker's arguments, from the host; see `torchtrainer.control.messages.StartGroup` for units.

    ``ranks``: those that it carries at first, none for a spare, which is built like ``rank`` with the answers of ``record``.
    ``memory``: paths of what is shared with the other workers, fields of `MemoryPaths`.
    """

    group: str
    name: str
    worker: int
    rank: int
    ranks: list[int]
    world_size: int
    local_rank: int
    local_world_size: int
    endpoint: str
    spec_path: str
    store_path: str
    log_dir: str
    threads: int
    backend: str
    timeout_s: float
    gpu: int | None
    heartbeat_s: float
    progress_s: float
    pause_s: float
    memory: dict[str, Any]
    record: list[Any] | None = None
    checkpoint: dict[str, Any] | None = None


def _to_be_kept(method: str, replies: dict[int, tuple[str, bytes, bool, int]]) -> tuple[str, bytes, bool, int] | None:
    """The reply of a process's one rank if it is to outlive the process: a call that only reads can be made again."""
    if method in FIRST_RANK_METHODS or len(replies) != 1:
        return None
    (reply,) = replies.values()
    return reply if len(reply[1]) <= MAX_KEPT_REPLY_BYTES else None


def main(arguments: dict[str, Any]) -> int:
    """Lives the life of a worker; returns its exit code."""
    worker = Worker(WorkerArguments(**arguments))
    try:
        return worker.run()
    finally:
        worker.link.close()


class Worker:
    """The ranks of one process. Everything here runs in the main thread."""

    def __init__(self, arguments: WorkerArguments) -> None:
        self.arguments = arguments
        RankPaths.of(arguments.log_dir, arguments.rank).error.unlink(missing_ok=True)  # of an earlier run in this place
        self.progress = Progress()
        self.progress.mark = StepMark(arguments.memory["steps"], arguments.worker)
        self.progress.on_loader_lost = self._on_loader_lost
        self.gate = StepBarrier(arguments.pause_s)
        self.link = Link(
            endpoint=arguments.endpoint,
            group=arguments.group,
            name=arguments.name,
            worker=arguments.worker,
            progress=self.progress,
            gate=self.gate,
        )
        forward_notices(self._tell)
        self.link.heartbeat_every_s = arguments.heartbeat_s
        self.saver = self._make_saver(arguments.checkpoint) if arguments.checkpoint is not None else None
        self._latest = Latest(call=0, method="")
        self._built: Assembled | None = None
        self._script: ScriptState | None = None
        self._interruptible = False
        signal.signal(signal.SIGINT, self._on_interrupt)
        self._pid = os.getpid()
        self._listen()

    def _listen(self) -> None:
        """Has warnings of a preemption handed on, also where user code has put something in the place since."""
        for name in (self.arguments.checkpoint or {}).get("signals", ()):
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != self._on_notice:
                signal.signal(getattr(signal, name), self._on_notice)

    def _make_saver(self, orders: dict[str, Any]) -> RegionSaver:
        arguments = self.arguments
        return RegionSaver(
            group=arguments.group,
            worker=arguments.worker,
            regions=orders["regions"],
            asynchronous=orders["asynchronous"],
            wait_s=max(orders["write_s"], arguments.pause_s),
            send=self.link.send,
            receive=self.link.next_snapshot_message,
        )

    def run(self) -> int:
        """Builds what the process carries, and serves calls until there are no more."""
        before = set(sys.modules)
        try:
            built = self._built = self._build()
        except BaseException as error:
            return self._report(error, call=0)
        self.link.ranks = lambda: built.executor.ranks
        self._say_ready(built, sorted(set(sys.modules) - before))
        next_order = self.link.next_order if built.reassignment is None else built.reassignment.next_order
        while (order := next_order()) is not None:
            try:
                with contextlib.suppress(Released):
                    self._take(built, order)
            except SystemExit as error:
                return self._report(error, self.link.call)
            except BaseException as error:
                self._report(error, self.link.call)
            self._end_call(built)
        built.executor.close()
        # The process group ends with the process: torch's own way now and then aborts on its way out.
        return 0

    def _say_ready(self, built: Assembled, modules: list[str]) -> None:
        self.progress.enter("idle")
        operator = built.executor.operator
        self.link.send(
            WorkerReady(
                group=self.arguments.group,
                worker=self.arguments.worker,
                device=str(operator.device),
                facts={**built.executor.facts(), "bound": built.bound, "recovers": built.recovers},
                modules=modules,
                record=built.record if self.arguments.worker == 0 else [],
            )
        )

    def _end_call(self, built: Assembled) -> None:
        self.link.call = 0
        if built.reassignment is not None:
            built.reassignment.call = 0
        self.link.heartbeat_every_s = self.arguments.heartbeat_s
        self.progress.enter("idle")

    def _build(self) -> Assembled:
        arguments = self.arguments
        torch.set_num_threads(arguments.threads)
        keep_freed_memory()
        device = torch.device("cpu") if arguments.gpu is None else torch.device("cuda", arguments.gpu)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        spec = self._load_spec()
        binding = bind(arguments.local_rank, arguments.local_world_size, arguments.threads, spec.settings.cpu_affinity)
        if binding.refused and arguments.rank == 0:
            warn(f"cpu_affinity=True: {binding.refused}; processes run on any core")
        self.progress.enter("initialization_hook")
        run_initialization_hook(spec)
        self.progress.enter("join process group")
        founding = arguments.record is None
        group = open_group(
            backend=arguments.backend,
            rank=arguments.rank if founding else 0,
            world_size=arguments.world_size if founding else 1,
            timeout_s=arguments.timeout_s,
            store_path=arguments.store_path,
            device=device,
        )
        return build_worker(
            spec,
            group=group if founding else None,
            arguments=arguments,
            device=device,
            progress=self.progress,
            gate=self.gate,
            saver=self.saver,
            link=self.link,
            shared_by=binding.shared_by,
        )

    def _load_spec(self) -> BuildSpec:
        """The user's code and options, in a process that is made like the script first."""
        self._script, spec, left_out = take_over(self.arguments.spec_path)
        for text in left_out:
            warn(text)
        assert isinstance(spec, BuildSpec)
        return spec

    def _take(self, built: Assembled, order: ForWorker) -> None:
        """Does what an order asks for."""
        executor, reassignment = built.executor, built.reassignment
        if isinstance(order, Call):
            self._serve(built, order.call, order.method, order.blob)
        elif reassignment is None:
            return
        elif isinstance(order, Join):
            self._begin(built, order.call)
            reassignment.join(order, executor.checkpointer)
            kept = reassignment.kept_reply(order.call) if order.call else None
            if kept is not None:  # it was lost in the moment before it told
                self._latest = Latest(call=order.call, method=order.method)
                self._settle(built, order.method, kept)
                self._send_reply(executor.turn, *kept)
            elif order.call:
                self._serve(built, order.call, order.method, order.blob)
        else:
            known = executor.ranks
            reassignment.between_calls(order)
            if isinstance(order, AdoptRanks) and order.call == self._latest.call:
                late = {rank: self._late_result(executor, rank) for rank in order.ranks if rank not in known}
                if self._latest.method == "validate":  # made here: the records have to follow before it is told
                    self._settle(built, self._latest.method)
                for rank, reply in self._replies(self._latest, late).items():
                    self._send_reply(rank, *reply)

    def _late_result(self, executor: Executor, rank: int) -> Any:
        """What the latest call comes to for a rank that was taken over after it, whose operator is in place."""
        latest = self._latest
        if latest.method in FIRST_RANK_METHODS:
            return getattr(executor, latest.method)(**latest.keywords)
        return executor.late_result(rank)

    def _begin(self, built: Assembled, call: int) -> None:
        built.executor.sync.call = call
        if built.reassignment is not None:
            built.reassignment.call = call

    def _settle(self, built: Assembled, method: str, reply: tuple[Any, ...] | None = None) -> None:
        built.executor.settle(method, reply)
        if built.reassignment is not None:
            built.reassignment.tell_collectives()
            built.reassignment.tell_adopted()

    def _serve(self, built: Assembled, number: int, method: str, blob: bytes) -> None:
        executor = built.executor
        self.link.call = number
        self._begin(built, number)
        keywords: dict[str, Any] = cloudpickle.loads(blob) if blob else {}
        self._latest = Latest(call=number, method=method, keywords=keywords if method in FIRST_RANK_METHODS else {})
        self.progress.enter(method)
        self._listen()
        if method in STEPPING_METHODS:
            self.link.heartbeat_every_s = self._progress_every_s(executor.ranks)
        self._interruptible = True
        try:
            values = executor.call(method, **keywords)
        except Exception:
            # The state is saved and the process about to leave. A loop of the user's own that did not expect its batches to
            # end has nothing to tell: it runs again.
            if not (self.gate.stopped and self.gate.save_wanted):
                raise
            values = dict.fromkeys(executor.ranks)
        finally:
            self._interruptible = False
        try:
            replies = self._replies(self._latest, values)
        except BaseException:
            self._settle(built, method)
            raise
        self._settle(built, method, _to_be_kept(method, replies))
        if method in STEPPING_METHODS:
            self.link.send_heartbeat()
        for rank, reply in replies.items():
            self._send_reply(rank, *reply)

    def _progress_every_s(self, ranks: Sequence[int]) -> float:
        """Seconds between two reports in a pass: rank 0 shows it, and all others together tell their loss as often."""
        arguments = self.arguments
        if 0 in ranks:
            return arguments.progress_s
        return min(arguments.progress_s * arguments.world_size, arguments.heartbeat_s)

    def _replies(self, latest: Latest, values: dict[int, Any]) -> dict[int, tuple[str, bytes, bool, int]]:
        """What a call came to by rank: form and blob of the value, whether it was stopped, and the latest snapshot."""
        snapshot = self.saver.taken if self.saver is not None else 0
        found = {}
        for rank, value in values.items():
            form, blob = encode_result(latest.method, None if rank and latest.method in FIRST_RANK_METHODS else value)
            found[rank] = (form, blob, self.gate.stopped, snapshot)
        return found

    def _send_reply(self, rank: int, form: str, blob: bytes, stopped: bool, snapshot: int) -> None:
        flush_output()
        self.link.send(
            Reply(
                group=self.arguments.group,
                worker=self.arguments.worker,
                rank=rank,
                call=self._latest.call,
                form=form,
                stopped=stopped,
                snapshot=snapshot,
                step=self.progress.step,
                epoch=self.progress.epoch,
                blob=blob,
            )
        )

    def _on_loader_lost(self, loss: LoaderLoss) -> None:
        arguments = self.arguments
        self.link.send(
            LoaderLost(group=arguments.group, worker=arguments.worker, step=self.progress.step, **asdict(loss))
        )

    def _tell(self, level: int, text: str) -> None:
        """Hands a line for the user on to the driver."""
        at = self.arguments
        self.link.send(Logged(group=at.group, worker=at.worker, rank=at.rank, pid=os.getpid(), level=level, text=text))

    def _on_notice(self, signum: int, frame: FrameType | None) -> None:
        """Hands a warning of a preemption on to the driver, which has all ranks stop; a loader's process leaves it to us."""
        if os.getpid() == self._pid:
            self.link.send(Heard(group=self.arguments.group, worker=self.arguments.worker, signum=signum))

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Interrupts the running call, once; between calls there is nothing to interrupt."""
        if self._interruptible:
            self._interruptible = False
            raise KeyboardInterrupt

    def _report(self, error: BaseException, call: int) -> int:
        """Tells the driver why this rank failed, and leaves an error file; returns the exit code to end with."""
        text = "".join(traceback.format_exception(error))
        if call == 0 and self._script is not None and (hint := self._script.hint()):
            text = f"{text}\n{hint}\n"
        leaving = isinstance(error, SystemExit)
        exit_code = _exit_code(error.code) if isinstance(error, SystemExit) else None
        paths = RankPaths.of(self.arguments.log_dir, self.arguments.rank)
        said = _text_of(error)
        with contextlib.suppress(OSError):  # a full disk must not hide the user's error
            write_error_file(paths.error, type_name=type(error).__name__, text=said, traceback=text)
        flush_output()
        if self._built is not None and self._built.reassignment is not None:
            self._built.reassignment.tell_collectives()  # then it may be the loss of another rank that this is about
        self.link.send(
            Failure(
                group=self.arguments.group,
                worker=self.arguments.worker,
                rank=self.arguments.rank if self._built is None else self._built.executor.turn,
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
