"""The local engine: worker processes on this machine, started by a host process of the driver's own."""

from __future__ import annotations

import atexit
import os
import secrets
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torchtrainer.config import Timeouts, TrainSettings
from torchtrainer.control.messages import CheckpointEnded, StartGroup
from torchtrainer.driver.connection import HostConnection
from torchtrainer.driver.controller import Controller, Listener
from torchtrainer.driver.decoding import decode_reply
from torchtrainer.driver.pickling import dumps
from torchtrainer.driver.views import WorkerView
from torchtrainer.engines.base import CallResult, GroupPlan
from torchtrainer.errors import InvalidArgumentError, NotAvailableError
from torchtrainer.observe.notices import notice_once
from torchtrainer.preempt.notice import Notice
from torchtrainer.script.modules import search_path
from torchtrainer.script.take_over import ScriptState
from torchtrainer.topology import Topology
from torchtrainer.topology import current as current_topology

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

T = TypeVar("T")
StartMethod = Literal["auto", "fork", "exec"]


@dataclass(frozen=True, kw_only=True)
class Script:
    """The script as it was when the trainer was made, for workers of any later start too.

    Attributes:
        environ, cwd, sys_path: of its process.
        state: pickled `ScriptState`.
    """

    environ: dict[str, str]
    cwd: str
    sys_path: list[str]
    state: bytes

    @classmethod
    def taken_now(cls) -> Script:
        """The script as it is; tells the user what of it cannot be carried."""
        state = ScriptState.taken_now()
        for text in state.left_out:
            notice_once(text)
        return cls(environ=dict(os.environ), cwd=os.getcwd(), sys_path=search_path(), state=state.dumps())


class LocalEngine:
    """Starts groups of worker processes on this machine, and keeps what makes the next start fast.

    Args:
        start_method: ``fork``: workers are forked from a process that has imported torch; ``exec``: each is a new
            interpreter; ``auto``: fork where that is safe (Linux).
        timeouts: deadlines of everything that waits in a run on this engine.
    """

    name = "local"
    topology: Topology | None = None

    def __init__(self, start_method: StartMethod = "auto", timeouts: Timeouts | None = None) -> None:
        if start_method not in ("auto", "fork", "exec"):
            raise InvalidArgumentError(f'start_method must be "auto", "fork" or "exec", got {start_method!r}')
        if start_method == "auto":
            start_method = "fork" if sys.platform == "linux" else "exec"
        self.start_method = start_method
        self.timeouts = timeouts or Timeouts()
        self._connection: HostConnection | None = None

    def connect(self) -> HostConnection:
        """Starts the host process unless it lives; returns at once, while torch is imported elsewhere."""
        if self._connection is None or not self._connection.alive:
            if self._connection is not None:
                self._connection.close()
            self._connection = HostConnection(self.start_method, self.timeouts)
        return self._connection

    def open_run(
        self,
        open_here: Callable[[], T],
        known: Callable[[T], dict[str, Any]],
        borrowed: Callable[[Mapping[str, Any]], T],
        settings: TrainSettings,
        gpus: tuple[int, ...],
    ) -> T:
        """Opens the run here: this process alone makes the trainer."""
        return open_here()

    def start_group(self, plan: GroupPlan, listener: Listener) -> LocalGroup:
        """Starts one process per rank and waits until every rank is built.

        Raises:
            BaseException: what user code raised while building; `EngineError` and its kind if processes were lost.
        """
        return LocalGroup(self, plan, listener)

    def start_workers(self, plan: GroupPlan, script: Script, listener: Listener) -> Controller:
        """The workers of a group, built; errors as for `start_group`."""
        connection = self.connect()
        controller = Controller(
            connection,
            self._start_message(plan, script, connection),
            logs_stay=plan.logs_stay,
            timeouts=plan.timeouts,
            hang_timeout_s=plan.hang_timeout_s,
            listener=listener,
            failure=plan.failure,
            min_workers=plan.min_workers,
            save_every_s=plan.save_every_s if plan.checkpoint is not None else None,
        )
        if plan.checkpoint is not None:
            connection.write_s = max(connection.write_s, plan.checkpoint.write_s)
        try:
            controller.wait_until_ready()
        except BaseException:
            controller.end(force=True)
            raise
        return controller

    def _start_message(self, plan: GroupPlan, script: Script, connection: HostConnection) -> StartGroup:
        group, settings = f"group-{secrets.token_hex(4)}", plan.settings
        return StartGroup(
            group=group,
            world_size=plan.world_size,
            nodes=[list(range(plan.world_size))],
            log_dir=os.path.abspath(plan.log_dir if plan.logs_stay else connection.paths.logs(group)),
            environ={**script.environ, **plan.environ},
            cwd=script.cwd,
            sys_path=script.sys_path,
            threads=plan.threads,
            backend=settings.backend,
            timeout_s=settings.timeout_s,
            gpus=list(plan.gpus),
            heartbeat_s=plan.timeouts.heartbeat_s,
            progress_s=plan.timeouts.progress_s,
            pause_s=plan.timeouts.pause_s,
            checkpoint=None if plan.checkpoint is None else asdict(plan.checkpoint),
            blob=script.state + _pickled_spec(plan),
        )

    def close(self) -> None:
        """Ends all groups and the host. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class LocalGroup:
    """Ranks in processes of this machine."""

    def __init__(self, engine: LocalEngine, plan: GroupPlan, listener: Listener) -> None:
        self._engine = engine
        self._plan = plan
        self._listener = listener
        self.world_size = plan.world_size
        self._script = Script.taken_now()
        self._begin()

    def _begin(self) -> None:
        self._controller = self._engine.start_workers(self._plan, self._script, self._listener)
        # A group that nobody holds any more ends.
        self._finalizer = weakref.finalize(self, self._controller.end, force=True)

    @property
    def retryable(self) -> bool:
        """See `Group`."""
        return self._controller.retryable

    def restart(self) -> None:
        """See `Group`."""
        self._finalizer()
        self._begin()

    def resize(self, processes: int) -> None:
        """See `Group`."""
        self._controller.resize(processes)

    @property
    def views(self) -> tuple[WorkerView, ...]:
        """What the heartbeats told of each rank."""
        if not self._controller.closed:
            self._controller.look()
        return self._controller.views

    def call(self, method: str, **keywords: Any) -> CallResult:
        """Runs a method on every rank; see `Controller.call`."""
        try:
            blob = dumps(keywords, method)
        except TypeError:
            for name, value in keywords.items():
                dumps(value, name)
            raise
        outcome = self._controller.call(method, blob)
        values = [decode_reply(reply) for reply in outcome.replies]
        return CallResult(values=values, stopped=outcome.stopped, snapshot=outcome.snapshot)

    def stop(self) -> None:
        """Has the running call end at the next step boundary, with the state saved."""
        self._controller.stop()

    def save(self) -> None:
        """Has the state saved at the next step boundary of the running call."""
        self._controller.save()

    def noticed(self, found: Notice | None) -> Notice | None:
        """What the driver found: the ranks look for none."""
        return found

    def await_checkpoint(self, snapshot: int, timeout_s: float) -> CheckpointEnded | None:
        """Waits until a snapshot is on disk; None if it took too long."""
        return self._controller.await_checkpoint(snapshot, timeout_s)

    def local_operator(self) -> TrainingOperator:
        """Raises `NotAvailableError`: this process is no rank."""
        raise NotAvailableError(
            "the operators live in the worker processes: use apply_all_operators(fn), or use_local=True to debug one here"
        )

    def wait_for_all(self) -> None:
        """Returns at once: this process alone makes the calls."""

    def end(self, force: bool = False) -> None:
        """Ends the workers and waits until they are gone. Idempotent."""
        self._controller.end(force)


def _pickled_spec(plan: GroupPlan) -> bytes:
    """The creators and options; each part is tried by itself if the whole does not pickle."""
    parts = {name: value for name, value in vars(plan.spec).items() if value is not None and name != "settings"}
    try:
        return dumps(plan.spec, "the trainer's arguments", in_place=True)
    except TypeError:
        for name, value in parts.items():
            dumps(value, name)
        raise


_shared: list[LocalEngine] = []
"""The engine of this process, made when first needed: its host process is one per driver, as the start of a second trainer
is fast only if the first one's spawner still lives."""


def shared_engine() -> LocalEngine:
    """The local engine that all trainers of this process use; ended when the interpreter exits."""
    if not _shared:
        _shared.append(LocalEngine())
        atexit.register(_shared[0].close)
    return _shared[0]


def prestart() -> None:
    """Starts importing torch for the workers now, in the background, while this process does other things.

    Optional. Call it at the top of a script, before its own heavy imports: both then go on side by side. Calling it again
    does nothing, nor does it under a launcher such as torchrun, whose processes are the workers.
    """
    if current_topology() is None:
        shared_engine().connect()
