"""Saves the state of ranks that a launcher started: rank 0 collects it and writes a checkpoint in the background.

Every save is a collective call at the same step boundary. Rank 0 copies the state that is alike on all ranks, gets from the
others what is only theirs, and writes in a thread while the training goes on. Never more than one checkpoint is under way, so
the memory that this takes on rank 0 is that of one state.
"""

from __future__ import annotations

import io
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from torchtrainer.checkpoint.snapshot import gathered
from torchtrainer.checkpoint.store import CheckpointStore
from torchtrainer.checkpoint.writer import STATE, copy_to, write_state
from torchtrainer.comm.group import Collective
from torchtrainer.comm.rank_channel import gather_to_first
from torchtrainer.control.messages import CheckpointEnded
from torchtrainer.engines.snapshots import CheckpointOrders
from torchtrainer.errors import TorchTrainerError
from torchtrainer.train.state import detached
from torchtrainer.worker.checkpointer import Collected


class GatheringSaver:
    """Saves states of all ranks; see `torchtrainer.worker.checkpointer.Saver`. Used by the thread that trains.

    Args:
        collective: the ranks.
        orders: where and how states are kept.
        stopping: whether the ranks are about to stop, so that this state may not be left out.

    Attributes:
        taken: number of the latest state that was copied, the same on all ranks; 0: none.
        ended: what became of the latest one; on rank 0.
    """

    def __init__(
        self, collective: Collective, orders: CheckpointOrders, *, stopping: Callable[[], bool] = lambda: True
    ) -> None:
        self._collective = collective
        self._orders = orders
        self._stopping = stopping
        self._number = 0
        self.taken = 0
        self.ended: CheckpointEnded | None = None
        self._good: CheckpointEnded | None = None
        self._untold: deque[CheckpointEnded] = deque()
        self._store: CheckpointStore | None = None
        self._problems: list[str] = []
        self._thread: threading.Thread | None = None

    def save(self, collect: Callable[[], Collected], *, must: bool) -> None:
        """See `torchtrainer.worker.checkpointer.Saver`; rank 0 copies all that is shared, so ``movable`` is of no use here."""
        started = time.monotonic()
        self._number += 1
        first = self._collective.rank == 0
        collected = collect()
        shared, mine, meta = collected.shared, list(collected.mine.values()), collected.meta
        free = not first or self._is_free(wait=must or self._stopping() or not self._orders.asynchronous)
        problem = why_unsafe([shared, mine] if first else mine) if free else None
        answers = self._collective.all_gather([free, problem])
        problem = next((found for _, found in answers if found is not None), None)
        if not answers[0][0]:
            return
        ended = CheckpointEnded(
            group="", number=self._number, step=int(meta["step"]), epoch=int(meta.get("epoch", 0)), error=problem or ""
        )
        if problem is not None:
            self._note(ended)
            return
        ranks = self._parts(mine)
        self.taken = self._number
        if first:
            state = gathered(detached(shared), ranks)
            ended = replace(ended, stall_s=time.monotonic() - started)
            # A daemon: `close` waits for it, for a limited time.
            self._thread = threading.Thread(
                target=self._write, args=(state, dict(meta), ended), name="torchtrainer-writer", daemon=True
            )
            self._thread.start()
        if not self._orders.asynchronous:
            self.finish(self._orders.write_s)

    def news(self) -> list[CheckpointEnded]:
        """Outcomes of saved states since the last call."""
        found = []
        while self._untold:
            found.append(self._untold.popleft())
        return found

    def finish(self, timeout_s: float) -> CheckpointEnded | None:
        """Waits until what is being written is on disk, or cannot be. A collective call, with one answer.

        Args:
            timeout_s: that of rank 0 counts.

        Returns:
            What became of the latest state; None if it took too long.
        """
        told = None
        if self._collective.rank == 0 and self._is_free(wait=True, timeout_s=timeout_s):
            told = self.ended and asdict(self.ended)
        told, good = self._collective.all_gather([told, self._good and asdict(self._good)])[0]
        if self._collective.rank and good is not None and (self._good is None or self._good.number < good["number"]):
            self._note(replace(CheckpointEnded(**good), problems=[]))
        return None if told is None else CheckpointEnded(**told)

    def close(self) -> None:
        """Waits for what is being written, for up to ``write_s``; not a collective call."""
        self._is_free(wait=True)

    def _parts(self, mine: list[Any]) -> list[Any]:
        """What each rank has for itself; on rank 0. Of this process, ``mine``."""
        first = self._collective.rank == 0
        buffer = io.BytesIO()
        if not first:
            torch.save(mine, buffer)
        others = gather_to_first(self._collective, buffer.getvalue())[1:]
        loaded = [torch.load(io.BytesIO(one), map_location="cpu", weights_only=True) for one in others]
        return [*detached(mine), *(one for part in loaded for one in part)] if first else []

    def _is_free(self, *, wait: bool, timeout_s: float | None = None) -> bool:
        if self._thread is None:
            return True
        if wait:
            self._thread.join(self._orders.write_s if timeout_s is None else timeout_s)
        if self._thread.is_alive():
            return False
        self._thread = None
        return True

    def _note(self, ended: CheckpointEnded) -> None:
        self.ended = ended
        if not ended.error:
            self._good = ended
        self._untold.append(ended)

    def _write(self, state: Mapping[str, Any], meta: Mapping[str, Any], ended: CheckpointEnded) -> None:
        started = time.monotonic()
        orders = self._orders
        try:
            if self._store is None:
                self._store = CheckpointStore(
                    Path(orders.root),
                    keep=orders.keep,
                    generation=orders.generation,
                    on_problem=self._problems.append,
                )
            with_calls = Path(orders.run_dir) if orders.remote is not None else None
            checkpoint = write_state(self._store, state, meta, with_calls=with_calls)
            if orders.remote is not None:
                copy_to(orders.remote, checkpoint, keep=orders.keep, on_problem=self._problems.append)
            size_bytes = checkpoint.file(STATE).stat().st_size
            ended = replace(ended, path=str(checkpoint.path), size_bytes=size_bytes)
        except (TorchTrainerError, OSError) as error:
            ended = replace(ended, error=str(error))
        except Exception:
            ended = replace(ended, error=traceback.format_exc())
        problems = list(self._problems)
        self._problems.clear()
        self._note(replace(ended, seconds=time.monotonic() - started, problems=problems))


def why_unsafe(state: Any) -> str | None:
    """Why a state may not go into a checkpoint, which is loaded with ``weights_only=True``; None if it may."""
    buffer = io.BytesIO()
    try:
        torch.save(_without_tensors(state), buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        return (
            f"the state holds objects that a checkpoint cannot hold ({str(error).splitlines()[0]}): use tensors, "
            "numbers, "
            "text, and lists and dicts of them, also in what state_dict() returns"
        )
    return None


def _without_tensors(value: Any) -> Any:
    """The same containers; tensors are safe, and need not be copied to see that."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return None
    if isinstance(value, dict):
        return {key: _without_tensors(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return [_without_tensors(one) for one in value]
    return value
