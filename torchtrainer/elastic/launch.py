"""One launch on this machine, from the parsed command line to its outcome."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.run as torchrun
from torch.distributed.elastic import events
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.events import handlers as event_handlers
from torch.distributed.elastic.metrics import initialize_metrics
from torch.distributed.elastic.metrics.api import MetricsConfig
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, registry
from torch.distributed.elastic.rendezvous.api import rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from torchtrainer.elastic import run_path
from torchtrainer.elastic.agent import Agent, AgentOptions, Preempted, raise_signal
from torchtrainer.elastic.endpoint import Reach, UnreachableError, await_endpoint, connect_timeout_s, join_limit
from torchtrainer.elastic.loopback import dynamic_handler, listen_here
from torchtrainer.errors import EngineError
from torchtrainer.launcher.failure import WorkerEnd, preempted
from torchtrainer.launcher.fork_safety import Program
from torchtrainer.launcher.summary import Summary
from torchtrainer.launcher.watch import ProcessWatch
from torchtrainer.process.cgroups import usable_cores
from torchtrainer.process.paths import LaunchPaths
from torchtrainer.process.starters import Starter
from torchtrainer.topology import LOOPBACK

DEFAULT_MASTER_PORT = 29500
"""Where static rendezvous meets if no port is given, as torchrun has it."""
DEFAULT_STOP_TIMEOUT_S = 30.0
"""Time from asking workers to end to killing them, unless an option or the environment says otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a launch ended on this machine.

    Attributes:
        return_values: by global rank; None for programs.
        failure: what torch's launcher would raise; None: all workers ran to their end.
        ends: of the workers of the last attempt, root cause first.
        preempted: workers stopped for a preemption with their state saved.
        connected: the rendezvous was there; without it no worker can have been started.
    """

    return_values: dict[int, Any]
    failure: BaseException | None
    ends: tuple[WorkerEnd, ...]
    preempted: bool
    connected: bool = True


def record_failure(failure: BaseException, ends: Sequence[WorkerEnd]) -> None:
    """Writes the root cause to the error file that a scheduler gave this launcher, as torch's launcher does.

    Args:
        failure: what ended the launch.
        ends: of its workers, root cause first.
    """

    def fail() -> None:
        raise failure

    try:
        record(fail)()
    except BaseException as error:
        if error is not failure:
            raise
    wanted = os.environ.get("TORCHELASTIC_ERROR_FILE")
    root = ends[0].error if ends else None
    if wanted and root is not None and not Path(wanted).exists():  # a program that does not record its errors itself
        Path(wanted).write_text(json.dumps({"message": root.message}))


def resolve_rendezvous(args: argparse.Namespace) -> bool:
    """Fills in what one machine alone needs no options for; returns whether no other machine can join.

    Changes ``args`` as torchrun does: ``--standalone``, and plain launches on one machine, meet at a free local port.
    """
    alone = args.standalone
    if not alone and args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port is None:
        alone = torchrun.parse_min_max_nnodes(args.nnodes)[1] == 1
    if alone:
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    if args.master_port is None:
        args.master_port = DEFAULT_MASTER_PORT
    return bool(alone)


def _check_names(args: argparse.Namespace) -> None:
    """Says which names there are where one is unknown: torch would only say so after the rendezvous, or as a KeyError."""
    known = {
        "--event-log-handler": (args.event_log_handler, tuple(event_handlers._log_handlers)),
        "--rdzv-backend": (args.rdzv_backend, tuple(rendezvous_handler_registry._registry)),
    }
    for option, (name, names) in known.items():
        if names and name not in names:
            raise ValueError(f"{option} {name!r} is not known: this torch has {', '.join(sorted(names))}")


def _one_per_core(workers: str) -> bool:
    return workers == "cpu" or (workers == "auto" and not torch.accelerator.is_available())


def _check_features(args: argparse.Namespace, config: LaunchConfig) -> None:
    """Says which option the installed torch has nothing for; the others are ours to do, whatever torch knows of them."""
    for name, field in (
        ("numa_binding", "numa_options"),
        ("duplicate_stdout_filters", "duplicate_stdout_filters"),
        ("duplicate_stderr_filters", "duplicate_stderr_filters"),
    ):
        if getattr(args, name) and not hasattr(config, field):
            raise ValueError(f"--{name.replace('_', '-')} needs a newer torch than {torch.__version__}")


class Launch:
    """A launch that is about to happen: options are checked and read, nothing runs yet.

    Args:
        args: as `options.parse` returns them.
        program: what the workers run.
        paths: private files of this launcher.
        threads_assumed: torch was imported with one OpenMP thread, because the user had not said how many.

    Raises:
        ValueError: options that only torch can judge are wrong, such as GPUs that are not there.
    """

    def __init__(
        self, args: argparse.Namespace, program: Program, paths: LaunchPaths, *, threads_assumed: bool
    ) -> None:
        self._args = args
        self._program = program
        self._paths = paths
        self._closed = resolve_rendezvous(args)
        _check_names(args)
        config, entrypoint, arguments = torchrun.config_from_args(args)
        if _one_per_core(args.nproc_per_node.strip()):  # torch knows nothing of the quota of a container
            config.nproc_per_node = min(config.nproc_per_node, usable_cores())
        _check_features(args, config)
        if args.log_dir is None and config.logs_specs is not None:
            paths.note_log_dir(config.logs_specs.root_log_dir)
        if threads_assumed and "OMP_NUM_THREADS" not in os.environ:  # torch sets it for several workers, and it is one
            reason = "its number of threads was not known when torch was imported"
            self._program = dataclasses.replace(program, exec_reason=reason)
        self._config: LaunchConfig = config
        self._entrypoint = entrypoint
        self._arguments = arguments
        if args.run_path:  # torch starts a function for it; exec'd, the same is a short program
            self._entrypoint = sys.executable
            self._arguments = ["-u", run_path.__file__, *arguments]
        if not self._config.run_id:
            self._config.run_id = str(uuid.uuid4().int)
        self.handler: RendezvousHandler | None = None
        self.signals = [signal.Signals[name.strip()] for name in args.signals_to_handle.split(",")]

    @property
    def device(self) -> str:
        """The device that the workers run on, in words."""
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            return f"{count} GPU{'s' if count != 1 else ''}"
        cores = usable_cores()
        return f"{cores} CPU core{'s' if cores != 1 else ''}"

    def run(self, starter: Starter, summary: Summary) -> Outcome:
        """Runs it to its end.

        Args:
            starter: starts the workers.
            summary: tells the user.

        Raises:
            SignalException: a signal ended it, and its workers are gone.
            RendezvousError and others of torch: the machines did not come together.
        """
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = self._value("signals_to_handle")
        agents: list[Agent] = []
        reports = {}
        dump = getattr(signal, "SIGUSR2", None)
        if dump is not None and dump not in self.signals:
            reports[dump] = lambda: agents[0].print_stacks() if agents else None
        with ProcessWatch(starter, self.signals, reports, raise_signal) as watch:
            try:
                handler = self.handler = watch.run(self._make_handler, self._patience())
            except SignalException as error:
                return Outcome(return_values={}, failure=error, ends=(), preempted=False, connected=False)
            reach = Reach(self._args, self._config.rdzv_configs)
            options = {"spec": self._spec(handler), **self._agent_options()}
            agent = Agent(self._orders(), watch, self._paths, summary, reach, **options)
            agents.append(agent)
            outcome = None
            try:
                outcome = self._run_agent(agent)
            finally:
                # Not after a signal: closed is closed, and the other machines are to form again without this one.
                if outcome is None or not isinstance(outcome.failure, SignalException):
                    # Cut off, the others know without this machine's word; told to end once more, it does not wait to give it.
                    with contextlib.suppress(UnreachableError, SignalException):
                        watch.run(handler.shutdown, reach.look)
            return outcome

    def _run_agent(self, agent: Agent) -> Outcome:
        log = self._value("event_log_handler")
        initialize_metrics(MetricsConfig(self._config.metrics_cfg))
        try:
            result = agent.run()
        except Preempted:
            return Outcome(return_values={}, failure=None, ends=tuple(agent.ends), preempted=True)
        except SignalException as error:
            events.record(agent.get_event_failed(), log)
            return Outcome(return_values={}, failure=error, ends=tuple(agent.ends), preempted=preempted(agent.ends))
        except Exception:
            events.record(agent.get_event_failed(), log)
            raise
        events.record(agent.get_event_succeeded(), log)
        if result is None:  # the rendezvous was closed: this machine is not needed any more
            return Outcome(return_values={}, failure=None, ends=(), preempted=False)
        failure = ChildFailedError(name=self._program.name, failures=result.failures) if result.is_failed() else None
        return Outcome(return_values=result.return_values, failure=failure, ends=tuple(agent.ends), preempted=False)

    def _orders(self) -> AgentOptions:
        numa = getattr(self._config, "numa_options", None)
        return AgentOptions(
            program=self._program,
            forked=self._program.exec_reason is None and numa is None,
            signals=self.signals,
            hang_timeout_s=self._args.hang_timeout_s,
            stop_timeout_s=self._stop_timeout_s(),
            virtual_local_rank=bool(self._value("virtual_local_rank")),
            closed_membership=self._closed,
            machines=self._args.nnodes,
            join_limit=join_limit(self._args, self._config.rdzv_configs),
        )

    def _make_handler(self) -> RendezvousHandler:
        params = self._parameters()
        if self._closed:
            return dynamic_handler(params)
        await_endpoint(self._args, self._config.rdzv_configs)
        handler = registry.get_rendezvous_handler(params)
        listen_here(handler, params)
        return handler

    def _patience(self) -> Callable[[], None]:
        """A function that ends the wait for a host that accepts connections but never answers, as torch would not."""
        limit_s = 2 * connect_timeout_s(self._args, self._config.rdzv_configs)
        deadline_s = time.monotonic() + limit_s

        def look() -> None:
            if time.monotonic() > deadline_s:
                raise EngineError(
                    f"the rendezvous {self._args.rdzv_backend} at {self._config.rdzv_endpoint} takes connections but does not "
                    f"answer, for {limit_s:g} s: is it a launcher that listens there, and does its machine respond?"
                )

        return look

    def _parameters(self) -> RendezvousParameters:
        config = self._config
        return RendezvousParameters(
            backend=config.rdzv_backend,
            endpoint=config.rdzv_endpoint,
            run_id=config.run_id,
            min_nodes=config.min_nodes,
            max_nodes=config.max_nodes,
            local_addr=config.local_addr or (LOOPBACK if self._closed else None),
            **config.rdzv_configs,
        )

    def _spec(self, handler: RendezvousHandler) -> WorkerSpec:
        config = self._config
        address, port = self._static_address()
        values: dict[str, Any] = {
            "role": config.role,
            "local_world_size": config.nproc_per_node,
            "entrypoint": self._entrypoint,
            "args": tuple(self._arguments),
            "rdzv_handler": handler,
            "max_restarts": config.max_restarts,
            "monitor_interval": config.monitor_interval,
            "master_addr": address,
            "master_port": port,
            "local_addr": config.local_addr,
            **{name: getattr(self._config, name, None) for name in NEWER_SPEC_FIELDS},
        }
        known = {field.name for field in dataclasses.fields(WorkerSpec)}
        return WorkerSpec(**{name: value for name, value in values.items() if name in known})

    def _static_address(self) -> tuple[str | None, int | None]:
        if self._config.rdzv_backend != "static":
            return None, None
        address, port = parse_rendezvous_endpoint(self._config.rdzv_endpoint.strip(), default_port=-1)
        if not address or port == -1:
            raise ValueError(
                f"--rdzv-endpoint {self._config.rdzv_endpoint!r} has no port: give HOST:PORT, or --master-addr and --master-port"
            )
        return address, port

    def _agent_options(self) -> dict[str, Any]:
        options = {
            "logs_specs": self._config.logs_specs,
            "start_method": self._config.start_method,
            "log_line_prefix_template": self._config.log_line_prefix_template,
            "shutdown_timeout": int(self._stop_timeout_s()),
        }
        known = inspect.signature(LocalElasticAgent.__init__).parameters
        return {name: value for name, value in options.items() if name in known}

    def _value(self, name: str) -> Any:
        """A field of torch's configuration; where an older torch has none, the option of the same name."""
        return getattr(self._config, name, getattr(self._args, name))

    def _stop_timeout_s(self) -> float:
        chosen = self._value("shutdown_timeout")
        if chosen is None:
            chosen = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", DEFAULT_STOP_TIMEOUT_S)
        return float(chosen)


NEWER_SPEC_FIELDS = (
    "event_log_handler",
    "numa_options",
    "duplicate_stdout_filters",
    "duplicate_stderr_filters",
    "virtual_local_rank",
)
"""Fields of torch's ``WorkerSpec`` that not every supported version has."""
