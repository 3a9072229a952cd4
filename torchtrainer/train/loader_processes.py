"""The processes of a torch loader: their death, told apart from errors of the user's code.

torch raises an error from its SIGCHLD handler, wherever the main thread is: in a backward pass as well as in the loader. For the
loaders of this package a death interrupts nothing but the wait for a batch; otherwise it is kept until a batch is wanted.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from torchtrainer.process.crashes import crash_file
from torchtrainer.process.guard import open_pidfd
from torchtrainer.process.oom import OomWatch
from torchtrainer.process.signals import MAY_BE_OUT_OF_MEMORY

SETTLE_S = 1.0
"""How long to wait for the end of a process whose connection broke: its files are closed a moment before it is gone."""
GONE_S = 5.0
"""How long to wait for processes that were killed."""


class LoaderDiedError(RuntimeError):
    """A process of a loader ended by itself; the batches that it was to read are lost.

    Attributes:
        pid, exit_code: of the first that was seen dead; ``-n``: killed by signal ``n``.
        oom: the system killed it for memory.
        stack: where it crashed, if it told that.
    """

    def __init__(self, pid: int, exit_code: int, *, oom: bool, stack: str = "") -> None:
        super().__init__(f"loader process {pid} ended with exit code {exit_code}")
        self.pid = pid
        self.exit_code = exit_code
        self.oom = oom
        self.stack = stack


class WatchedLoader:
    """The batches of a torch loader, whose processes are watched if it has any. Used by the thread that trains.

    Args:
        loader: whose batches.

    Attributes:
        loader: as given.
        died: what has happened to one of the processes; None: nothing.
        starting: processes come to be, which are not known yet.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self._iterator: Any = None
        self._processes: Sequence[Any] = ()
        self.died: LoaderDiedError | None = None
        self._deaths_seen = -1
        self._owner = os.getpid()
        self._oom = OomWatch()
        self.starting = False
        if loader.num_workers:
            _deaths.watch()

    def start(self) -> None:
        """Starts the processes, or has persistent ones start over.

        Raises:
            LoaderDiedError: one of them has ended: call `kill`.
        """
        self._processes = _processes_of(self.loader._iterator)
        self.starting = not self._processes
        try:
            self._waiting_for(self._start)
        finally:
            self.starting = False

    def _start(self) -> None:
        self._iterator = iter(self.loader)
        self._processes = _processes_of(self._iterator)
        if getattr(self._iterator, "_worker_pids_set", False):
            torch._C._remove_worker_pids(id(self._iterator))  # torch raises no errors about them any more
            self._iterator._worker_pids_set = False

    def __iter__(self) -> WatchedLoader:
        return self

    def __next__(self) -> Any:
        return self._waiting_for(self._iterator.__next__)

    def _waiting_for(self, get: Callable[[], Any]) -> Any:
        try:
            _deaths.waiting = self
            if self._deaths_seen == _deaths.count or not self._look_anew():
                return get()
        except Exception as error:
            if not self._look_closely(error):
                raise
        finally:
            _deaths.waiting = None
        assert self.died is not None
        raise self.died

    def look(self) -> bool:
        """Whether a process has failed; may run in a signal handler, at any instruction."""
        if self.died is None and os.getpid() == self._owner:
            for process in self._processes:
                code = process.exitcode
                if code:
                    self.died = self._death_of(process)
                    break
        return self.died is not None

    def _death_of(self, process: Any) -> LoaderDiedError:
        code = process.exitcode
        oom = code == MAY_BE_OUT_OF_MEMORY and self._oom.killed()
        return LoaderDiedError(process.pid, code, oom=oom, stack=crash_file.news() if code < 0 else "")

    def _look_anew(self) -> bool:
        """Whether a process has failed while nothing was wanted of it."""
        self._deaths_seen = _deaths.count
        return self.look()

    def _look_closely(self, error: Exception) -> bool:
        """Whether a process has ended, where an error may have come of that."""
        if self.look() or not self._processes:
            return self.died is not None
        if isinstance(error, OSError | EOFError):
            _await_an_end([one.pid for one in self._processes], SETTLE_S)
            return self.look()
        if type(error) is RuntimeError and "exited unexpectedly" in str(error):  # torch asks every few seconds
            ended = next((one for one in self._processes if one.exitcode is not None), None)
            self.died = None if ended is None else self._death_of(ended)
        return self.died is not None

    def stop(self) -> None:
        """Ends the pass; persistent processes stay."""
        if not self.loader.persistent_workers:
            self.close()
        self._iterator = None

    def close(self) -> None:
        """Ends the processes now, rather than when the last reference to them goes."""
        if self.look():
            self.kill()
            return
        iterators = {id(one): one for one in (self._iterator, self.loader._iterator) if one is not None}
        self._processes, self._iterator, self.loader._iterator = (), None, None
        for iterator in iterators.values():
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()

    def kill(self) -> list[LoaderDiedError]:
        """Ends the processes after one of them has died: torch's way would wait for locks that the dead one may have held.

        Returns:
            What is known of all that have died by themselves.
        """
        iterator = self.loader._iterator if self._iterator is None else self._iterator
        processes, died = self._processes, self.died
        deaths = [] if died is None else [died]
        deaths += [
            self._death_of(one) for one in processes if one.exitcode and died is not None and one.pid != died.pid
        ]
        self._processes, self._iterator, self.loader._iterator, self.died = (), None, None, None
        for process in processes:
            process.kill()
        for process in processes:
            process.join(GONE_S)
        if processes and iterator is not None:
            _forget(iterator)
        return deaths


def _processes_of(iterator: Any) -> Sequence[Any]:
    return tuple(getattr(iterator, "_workers", ()))


def _await_an_end(pids: Sequence[int], timeout_s: float) -> None:
    """Waits until one of these processes has ended; ``sentinel`` of `multiprocessing` only says that it has closed its files."""
    found = [fd for fd in map(open_pidfd, pids) if fd is not None]
    try:
        multiprocessing.connection.wait(found, timeout_s)
    finally:
        for fd in found:
            os.close(fd)


def _forget(iterator: Any) -> None:
    """Does what torch does when it ends an iterator's processes, without waiting for anybody."""
    iterator._shutdown = True
    queues = list(iterator._index_queues)
    if hasattr(iterator, "_pin_memory_thread"):
        iterator._pin_memory_thread_done_event.set()  # it reads from the other queue, and ends by itself
    else:
        queues.append(iterator._worker_result_queue)
    for queue in queues:
        queue.cancel_join_thread()
        queue.close()


class _Deaths:
    """What is known of the deaths of child processes; the handler may run at any instruction of the main thread.

    Attributes:
        count: how often the system has told of one.
        waiting: the loader that is being waited for.
    """

    def __init__(self) -> None:
        self.count = 0
        self.waiting: WatchedLoader | None = None
        self._installed = False
        self._before: Any = None

    def watch(self) -> None:
        """Has deaths noted from now on."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not self._installed and in_main_thread and hasattr(signal, "SIGCHLD"):
            signal_handling._set_SIGCHLD_handler()  # it does so once in a process: torch's is below ours from now on
            self._before = signal.getsignal(signal.SIGCHLD)
            signal.signal(signal.SIGCHLD, self._on_child_ended)
            self._installed = True

    def _on_child_ended(self, signum: int, frame: FrameType | None) -> None:
        self.count += 1
        waiting = self.waiting
        if waiting is not None and waiting.starting:
            return  # its processes are not known yet: they are looked at when the first batch is wanted
        if waiting is not None and waiting.look():
            self.waiting = None
            assert waiting.died is not None
            raise waiting.died
        if callable(self._before):
            self._before(signum, frame)


_deaths = _Deaths()
