"""Ranks in the calling process: ``use_local`` (one rank, for debuggers) and spmd (a launcher started the processes)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from torchtrainer.config import Timeouts, TrainSettings
from torchtrainer.driver.controller import Listener
from torchtrainer.engines.base import GroupPlan
from torchtrainer.engines.spmd_group import SpmdGroup, device_of
from torchtrainer.errors import EngineError, InvalidArgumentError
from torchtrainer.process.child import flush_output
from torchtrainer.process.own_files import open_own
from torchtrainer.process.paths import RankPaths, private_directory
from torchtrainer.topology import Topology, to_environ
from torchtrainer.topology import current as current_topology

if TYPE_CHECKING:
    from torchtrainer.comm.group import Collective
    from torchtrainer.comm.rendezvous import Rendezvous

T = TypeVar("T")


class LocalModeEngine:
    """``use_local=True``: the only rank is the calling process, so that a debugger stops inside the user's code."""

    name = "use_local"
    topology: Topology | None = None

    def __init__(self) -> None:
        self.timeouts = Timeouts()

    def open_run(
        self,
        open_here: Callable[[], T],
        known: Callable[[T], dict[str, Any]],
        borrowed: Callable[[Mapping[str, Any]], T],
        settings: TrainSettings,
        gpus: tuple[int, ...],
    ) -> T:
        """Opens the run here."""
        return open_here()

    def start_group(self, plan: GroupPlan, listener: Listener) -> SpmdGroup:
        """Builds the rank here."""
        from torchtrainer.comm.group import SingleCollective

        return SpmdGroup(plan, SingleCollective(), local_rank=0, listener=listener, gather=False)


class SpmdEngine:
    """Attaches to the processes that torchrun, srun, mpirun or an operator started; every call is collective.

    Args:
        topology: where this process stands.
        timeouts: deadlines.
    """

    name = "spmd"

    def __init__(self, topology: Topology, timeouts: Timeouts | None = None) -> None:
        self.topology = topology
        self.timeouts = timeouts or Timeouts()
        self._place: Rendezvous | None = None
        self._joined: Collective | None = None
        self._logs: list[TextIO] = []
        self._stdout = sys.stdout

    def open_run(
        self,
        open_here: Callable[[], T],
        known: Callable[[T], dict[str, Any]],
        borrowed: Callable[[Mapping[str, Any]], T],
        settings: TrainSettings,
        gpus: tuple[int, ...],
    ) -> T:
        """Joins the other ranks; rank 0 opens the run and the others learn of it, or why there is none.

        Raises:
            TorchTrainerError: what kept a rank from it, on every rank.
            EngineError: the ranks did not find each other.
        """
        from torchtrainer.engines.spmd_memory import share_from_first

        collective = self._join(settings, gpus)
        try:
            return share_from_first(collective, open_here, known, borrowed)
        except BaseException:
            self._leave()
            raise

    def start_group(self, plan: GroupPlan, listener: Listener) -> SpmdGroup:
        """Builds this process's rank.

        Only rank 0 prints: until the group ends, standard output of the other ranks goes to their log files, or nowhere if
        nothing is kept.
        """
        collective = self._joined or self._join(plan.settings, plan.gpus)
        give_back = self._send_stdout_to_log(plan) if self.topology.rank else lambda: None
        try:
            group = SpmdGroup(
                plan,
                collective,
                local_rank=self.topology.local_rank,
                listener=listener,
                gather=True,
                one_machine=self.topology.one_machine,
                on_end=give_back,
            )
            self._wait_until_built(collective)
        except BaseException:
            give_back()
            self._leave()
            raise
        self._joined = None  # the group's now
        return group

    def _wait_until_built(self, collective: Collective) -> None:
        try:
            collective.barrier()
        except RuntimeError as error:  # of the backend
            raise EngineError(
                f"rank {self.topology.rank} is built, but another of the {self.topology.world_size} ranks ended before it "
                f"was: look for that rank's own error. torch says: {error}"
            ) from error

    def _join(self, settings: TrainSettings, gpus: tuple[int, ...]) -> Collective:
        from torchtrainer.comm.group import join_group
        from torchtrainer.comm.rendezvous import Rendezvous

        self._leave()
        self._place = self._place or Rendezvous(self.topology)
        with _gloo_on_loopback(self.topology):
            self._joined = join_group(
                self.topology,
                backend=settings.backend,
                timeout_s=settings.timeout_s,
                device=device_of(gpus, self.topology.local_rank),
                place=self._place,
            )
        return self._joined

    def _leave(self) -> None:
        joined, self._joined = self._joined, None
        if joined is not None:
            joined.close()

    def _send_stdout_to_log(self, plan: GroupPlan) -> Callable[[], None]:
        """Returns what gives standard output back, to the log of another trainer that still lives or to where it went before."""
        if plan.logs_stay:
            paths = RankPaths.of(plan.log_dir, self.topology.rank)
            private_directory(paths.root)
            fd = open_own(paths.stream("stdout"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        else:
            fd = os.open(os.devnull, os.O_WRONLY)
        flush_output()
        log = open(fd, "w", buffering=1)  # noqa: SIM115
        if not self._logs:
            self._stdout = sys.stdout
        self._logs.append(log)
        sys.stdout = log

        def give_back() -> None:
            if log in self._logs:
                self._logs.remove(log)
                if sys.stdout is log:  # else the script has put something else there since, which may write to the log
                    sys.stdout = self._logs[-1] if self._logs else self._stdout
                    log.close()

        return give_back


_attached: list[SpmdEngine] = []
"""The engine of this launch, made on first use: the ranks meet for a second trainer where they met for the first."""


def spmd_engine() -> SpmdEngine:
    """The engine that all trainers of this process use while its place in the launch stays the same.

    Raises:
        InvalidArgumentError: no launcher started this process.
    """
    topology = current_topology()
    if topology is None:
        raise InvalidArgumentError(
            'engine="spmd" needs a launcher, but RANK and WORLD_SIZE (or those of srun or mpirun) are not set: start the '
            'script with torchrun, or use engine="local"'
        )
    if not _attached or _attached[0].topology != topology:
        _attached[:] = [SpmdEngine(topology)]
    return _attached[0]


@contextmanager
def _gloo_on_loopback(at: Topology) -> Iterator[None]:
    """On one machine, has Gloo listen on loopback only. It reads the environment, which is as it was afterwards."""
    name = "GLOO_SOCKET_IFNAME"
    wanted = to_environ(at).get(name)
    if wanted is None or name in os.environ:
        yield
        return
    os.environ[name] = wanted
    try:
        yield
    finally:
        del os.environ[name]
