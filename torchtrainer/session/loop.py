"""One script's own loop on one rank: its run directory, its notices, its checkpoints and its loaders.

Rank 0 owns the directory and writes; every call but `SessionLoop.should_stop` is a collective one.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import os
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from torchtrainer.call_replay import EXIT_TERMINATED, STATE
from torchtrainer.checkpoint.store import CheckpointStore, next_generation
from torchtrainer.checkpoint.verified import verify
from torchtrainer.checkpoint.writer import read_state
from torchtrainer.comm.rank_channel import attached, open_channel
from torchtrainer.config import PreemptionConfig, Timeouts, check_shares
from torchtrainer.driver.fingerprint import differences
from torchtrainer.driver.run_dir import RUNS, RunDirectory, program_name
from torchtrainer.driver.run_record import RunState, find_beside, wanted_run
from torchtrainer.engines.snapshots import CheckpointOrders
from torchtrainer.engines.spmd_agreement import Agreement
from torchtrainer.engines.spmd_gate import StepCounter
from torchtrainer.engines.spmd_memory import share_from_first
from torchtrainer.engines.spmd_saver import GatheringSaver, why_unsafe
from torchtrainer.errors import (
    CheckpointWriteError,
    EngineError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    Preempted,
    ResumeError,
)
from torchtrainer.observe.notices import notice, notice_once
from torchtrainer.preempt.watch import NoticeWatch
from torchtrainer.process.leaving import keep_exit_code
from torchtrainer.process.signals import EXIT_PREEMPTED
from torchtrainer.resume import OpenRun, choose, seen_here
from torchtrainer.run_places import kept_below
from torchtrainer.session.loaders import SessionLoader
from torchtrainer.topology import WORKER_MARK, current
from torchtrainer.train.data_order import Dealing, even_of
from torchtrainer.train.rng import rng_from_data, rng_to_data
from torchtrainer.train.state import detached
from torchtrainer.worker.checkpointer import Collected

RUN_DIR = "TORCHTRAINER_RUN_DIR"
"""Environment variable: where a session keeps its checkpoints, unless the script says otherwise."""


class SessionLoop:
    """The session of one rank of a script with its own training loop. One per process, used by the training thread.

    Args:
        run_dir: directory of the run; None: that of the environment, else ``./runs/<script>``.
        keep: how many checkpoints stay.
        preemption: where warnings come from.
        resume, may_change: which session is resumed.

    Raises:
        ResumeError: ``resume=True``, and there is nothing to continue with, or something else.
        RunDirectoryError: the directory cannot be used.
        EngineError: the ranks have formed no process group, or this is a worker of a trainer.
    """

    def __init__(
        self,
        *,
        run_dir: str | os.PathLike[str] | None,
        keep: int,
        preemption: PreemptionConfig,
        resume: bool | str,
        may_change: Sequence[str],
    ) -> None:
        if WORKER_MARK in os.environ:
            raise EngineError(
                "torchtrainer.session saves and stops scripts that have their own training loop; this is a worker of a "
                "TorchTrainer, which does so by itself: remove the call"
            )
        self._collective = attached()
        self._first = self._collective.rank == 0
        self._run: OpenRun | None = None
        self.finished = False
        root = Path(run_dir or os.environ.get(RUN_DIR) or Path(RUNS) / program_name())
        opened = share_from_first(
            self._collective, lambda: self._open(root, keep, resume, may_change), dict, _seen_here
        )
        self._changed: list[str] = opened["changed"]
        self._checkpoint = verify(Path(opened["checkpoint"])) if opened["checkpoint"] else None
        self._write_s = Timeouts().write_s
        self._saver = GatheringSaver(
            self._collective,
            CheckpointOrders(
                root=opened["root"],
                keep=keep,
                generation=opened["generation"],
                every_steps=None,
                asynchronous=True,
                write_s=self._write_s,
            ),
        )
        self._watch(preemption)
        self._loaders: list[SessionLoader] = []
        self._positions: list[Mapping[str, int]] = []
        self._positions_ranks = 0
        self._orders: list[Mapping[str, Any] | None] = []
        self._counter = StepCounter.of_launch(os.environ)
        self._asked = 0
        self._steps_before = 0
        self._stopping = False
        atexit.register(self.close)

    def _watch(self, preemption: PreemptionConfig) -> None:
        """Begins to look for warnings, and to agree on them."""
        launched = current()
        self._notices = NoticeWatch(
            preemption, os.environ, metadata=launched is None or launched.local_rank == 0, say=notice
        )
        self._agreement = Agreement(
            open_channel(self._collective),
            rank=self._collective.rank,
            world_size=self._collective.world_size,
            pause_s=Timeouts().pause_s,
            look=self._look,
        )
        self._notices.start()
        self._agreement.begin()

    def _open(self, root: Path, keep: int, resume: bool | str, may_change: Sequence[str]) -> dict[str, Any]:
        """On rank 0: takes the directory, and finds what is there to continue with. JSON data."""
        wanted = wanted_run(settings_of_script(), world_size=self._collective.world_size, may_change=may_change)
        wanted = replace(wanted, asked=root.name, script_run=_launch_of(os.environ) or wanted.script_run)
        found = find_beside(kept_below(root), wanted, notice_once)
        if resume == "auto" and found is not None and found[1].script_run == wanted.script_run:
            resume = True  # the launcher has started the ranks anew: it is the same session, even if rank 0 was done
        path, previous = choose(root, resume, wanted)
        directory = RunDirectory(path)
        self._run = OpenRun(directory=directory, record=wanted, records=[])
        self._run.write_record()
        checkpoints = directory.root / "checkpoints"
        generation = next_generation(checkpoints)
        newest = None
        if checkpoints.is_dir() and resume is not False:
            newest = CheckpointStore(checkpoints, keep=keep, generation=generation, on_problem=notice).newest()
        return {
            "root": str(checkpoints),
            "generation": generation,
            "checkpoint": None if newest is None else str(newest.path),
            "changed": [] if previous is None else differences(previous.parts, wanted.parts),
        }

    # Stopping

    def should_stop(self) -> bool:
        """Whether the ranks agreed to stop at this step; see `torchtrainer.session.should_stop`."""
        if self._stopping:
            return True
        self._notices.renew()
        self._asked += 1
        if self._counter is not None:
            self._counter.show(self._steps_before + self._asked)
        self._stopping = self._agreement.gate.stop_requested(self._asked)
        return self._stopping

    def _look(self) -> None:
        """In the agreement's thread."""
        found = self._notices.pending()
        if found is None or not found.must_stop:
            return
        if self._notices.urgent:
            notice(f"{found.source} came again: leaving at once")
            raise Preempted(EXIT_TERMINATED, found.text)
        if not self._agreement.gate.stopped:
            self._agreement.wish(stop=True)

    # Checkpoints

    def save(self, state: Any, step: int) -> str:
        """Saves the state of all ranks; see `torchtrainer.session.save_checkpoint`."""
        if type(step) is not int or step < 0:
            raise InvalidArgumentError(f"step must be a whole number of at least 0, got {step!r}")
        problem = why_unsafe(state)
        data = b""
        if problem is None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            data = buffer.getvalue()
        answers = self._collective.all_gather([problem, hashlib.sha256(data).hexdigest()])
        for rank, (found, _) in enumerate(answers):
            if found is not None:
                raise InvalidArgumentTypeError(f"save_checkpoint, rank {rank}: {found}")
        loaders = [one.of_rank for one in self._loaders]
        mine: dict[str, Any] = {"rng": rng_to_data(), "loaders": [one.state_dict() for one in loaders]}
        if answers[self._collective.rank][1] != answers[0][1]:  # most scripts have the same state on all ranks
            mine["own"] = state
        meta = {"step": step, "world_size": self._collective.world_size, "loop": "own"}
        shared = {"state": state, "orders": [one.saved_order() for one in loaders]}
        collected = Collected(shared=shared, mine={self._collective.rank: mine}, movable=set(), meta=meta)
        self._saver.save(lambda: collected, must=True)
        ended = self._saver.finish(self._write_s)
        if ended is None:
            raise CheckpointWriteError(
                f"the checkpoint of step {step} was not on disk after {self._write_s:g} s (write_s): the disk may have become "
                "slow; older checkpoints are intact"
            )
        if ended.error:
            raise CheckpointWriteError(ended.error)
        for text in ended.problems if self._first else ():
            notice(text)
        if self._stopping:
            self._note("preempted")
            keep_exit_code(EXIT_PREEMPTED)
        return ended.path

    def latest(self) -> Any:
        """The state to continue from; see `torchtrainer.session.latest_checkpoint`."""
        if self._checkpoint is None:
            return None
        checkpoint, rank = self._checkpoint, self._collective.rank
        if checkpoint.meta.get("loop") != "own":
            raise ResumeError(f"{checkpoint.path} was saved by a TorchTrainer: give this script a run_dir of its own")
        saved = read_state(checkpoint.file(STATE))
        ranks = saved["ranks"]
        self._check_ranks(ranks)
        self._steps_before = checkpoint.step
        mine = ranks[rank] if rank < len(ranks) else ranks[0]
        self._positions, self._positions_ranks = mine["loaders"], len(ranks)
        self._orders = saved["shared"].get("orders", [])
        for number in range(min(len(self._loaders), len(self._positions))):
            self._put_back(number)
        if rank < len(ranks):
            rng_from_data(detached(mine["rng"]))
        if self._first:
            age_s = max(0.0, time.time() - checkpoint.path.stat().st_mtime)
            allowed = f"; {', '.join(self._changed)}, as may_change allows" if self._changed else ""
            notice(
                f"resuming {checkpoint.path.parents[1]} (state of step {checkpoint.step}, saved {age_s:.0f} s ago){allowed}; "
                "session.configure(resume=False) starts anew"
            )
        return detached(mine["own"] if "own" in mine else saved["shared"]["state"])

    def _check_ranks(self, ranks: list[Any]) -> None:
        here = self._collective.world_size
        if len(ranks) != here and any("own" in one for one in ranks):
            raise ResumeError(
                f"the checkpoint is of {len(ranks)} ranks with states that differ, which {here} ranks cannot take over: start "
                f"{len(ranks)} ranks, or pass another run_dir to session.configure"
            )

    # Loaders

    def loader(
        self, loader: Any, *, seed: int, training: bool, even_batches: bool | str, min_batch_size: int
    ) -> SessionLoader:
        """A resumable loader; see `torchtrainer.session.loader`."""
        check_shares(even_batches, min_batch_size)
        dealing = Dealing(even=even_of(even_batches), smallest=lambda: min_batch_size)
        number = len(self._loaders)
        name = f"session.loader number {number + 1}"
        made = SessionLoader(loader, self._collective, seed=seed, training=training, name=name, dealing=dealing)
        self._loaders.append(made)
        if number < len(self._positions):
            self._put_back(number)
        return made

    def _put_back(self, number: int) -> None:
        loader, position = self._loaders[number].of_rank, self._positions[number]
        if self._positions_ranks != self._collective.world_size and position["samples"] and not loader.any_world_size:
            raise ResumeError(
                f"loader {number + 1} is a stream that was left in the middle of a pass, which only "
                f"{self._positions_ranks} ranks can continue: start as many, or pass another run_dir to "
                "session.configure"
            )
        loader.load_state_dict(dict(position))
        order = self._orders[number] if number < len(self._orders) else None
        if order is not None:
            loader.put_order(order)

    def finish(self) -> None:
        """The script's work is done; see `torchtrainer.session.finish`. Idempotent."""
        if not self.finished:
            self.close()

    def _note(self, state: RunState) -> None:
        if self._run is not None:
            self._run.note(state, step=self._steps_before + self._asked, epoch=0)

    def close(self) -> None:
        """Finishes what is being written, notes how the script ends, and lets go of the directory and of signals."""
        atexit.unregister(self.close)
        self.finished = True
        if self._stopping:  # whether or not the state was saved, the work is not done
            self._note("preempted")
        self._agreement.close()
        self._saver.close()
        self._notices.close()
        for one in self._loaders:
            one.of_rank.close()
        if self._run is not None:
            self._run.note_end()
            self._run.directory.close()


def settings_of_script() -> dict[str, Any]:
    """The values of the script's own names, as far as they can be settings: numbers, text, and what is made of them."""
    kinds = (bool, int, float, complex, str, bytes, dict, list, tuple, set, frozenset, Path, Namespace, SimpleNamespace)
    return {
        name: value
        for name, value in vars(sys.modules["__main__"]).items()
        if not name.startswith("_")
        and (isinstance(value, kinds) or (is_dataclass(value) and not isinstance(value, type)))
    }


def _launch_of(environ: Mapping[str, str]) -> str | None:
    """Names the launch whose launcher starts ranks anew; None: there is none that does."""
    run = environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run}-{os.getppid()}"


def _seen_here(told: Mapping[str, Any]) -> dict[str, Any]:
    """What rank 0 found, on another rank, which must be able to read it too."""
    if told["checkpoint"] is not None:
        seen_here(told["checkpoint"])
    return dict(told)
