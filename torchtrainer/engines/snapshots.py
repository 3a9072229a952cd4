"""The snapshots of one worker group, as the host sees them: who has copied what, and what has to be written.

The host holds the memory that the ranks copy into. When every rank has copied its share, or when no rank is left and what they
copied is whole, the snapshot is due to be written. There is never more than one under way.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchtrainer.control.messages import CheckpointEnded, SnapshotDone, SnapshotGrant, SnapshotRequest
from torchtrainer.engines.memory_files import MemoryFile

_NUMBER_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class CheckpointOrders:
    """Where and how the states of a group are kept. JSON data.

    Attributes:
        root: directory of the checkpoints.
        keep: how many verified ones stay.
        generation: of the run: an older one may not write any more.
        every_steps: optimizer steps between two checkpoints, or None.
        asynchronous: training continues while a checkpoint is written.
        write_s: longest time that writing one may take while somebody waits for it.
        run_dir: of the run.
        remote: URL to which checkpoints are copied; None: nowhere.
        signals: names of those that warn of a preemption; ranks hand them on to the driver.
    """

    root: str
    keep: int
    generation: int
    every_steps: int | None
    asynchronous: bool
    write_s: float
    run_dir: str = ""
    remote: str | None = None
    signals: list[str] = field(default_factory=list)


@dataclass
class Snapshots:
    """Regions and progress of one group's snapshots. Used by the host's only thread.

    Attributes:
        orders: where and how states are kept.
        writing: number of the snapshot that is being written; 0: none.
        written: the latest one that was, or could not be.
    """

    orders: CheckpointOrders
    world_size: int
    private_dir: Path
    writing: int = 0
    written: int = 0
    _memory: list[MemoryFile] = field(default_factory=list)
    _asked: list[SnapshotRequest] = field(default_factory=list)
    _answers: dict[int, bool] = field(default_factory=dict)
    _copied: dict[int, dict[int, SnapshotDone]] = field(default_factory=dict)
    _given_up: int = 0

    def __post_init__(self) -> None:
        self._memory = [MemoryFile.new(f"snapshot-{rank}", self.private_dir) for rank in range(self.world_size)]

    @property
    def regions(self) -> list[str]:
        """Paths by which processes of the same user open the ranks' regions, for as long as the host lives."""
        return [one.path for one in self._memory]

    def want(self, message: SnapshotRequest) -> list[tuple[int, SnapshotGrant]]:
        """A worker is ready to copy; returns the answers that are known now, with the workers that they are for."""
        self._asked.append(message)
        return self.answers(message.group)

    def answers(self, group: str) -> list[tuple[int, SnapshotGrant]]:
        """Answers to workers that wait for one; all of them get the same for the same snapshot."""
        given, waiting = [], []
        for asked in self._asked:
            if asked.number not in self._answers:
                if self._busy(asked.number) and asked.must:
                    waiting.append(asked)
                    continue
                self._answers[asked.number] = not self._busy(asked.number)
            answer = SnapshotGrant(
                group=group, worker=asked.worker, number=asked.number, go=self._answers[asked.number]
            )
            given.append((asked.worker, answer))
        self._asked = waiting
        self._answers = {number: go for number, go in self._answers.items() if number >= self._newest()}
        return given

    def _newest(self) -> int:
        return max(self._answers, default=0)

    def _busy(self, number: int) -> bool:
        return bool(self.writing) or any(one < number for one in self._copied)

    def copied(self, message: SnapshotDone) -> CheckpointEnded | None:
        """A worker has copied the shares of its ranks; returns what to tell if the snapshot failed on some rank."""
        if message.number <= self._given_up:
            return None
        shares = self._copied.setdefault(message.number, {})
        shares.update(dict.fromkeys(message.ranks, message))
        if len(shares) < self.world_size:
            return None
        errors = [share.error for share in shares.values() if share.error]
        if not errors:
            return None
        del self._copied[message.number]
        self.written = message.number
        return CheckpointEnded(
            group=message.group, number=message.number, step=int(message.meta["step"]), error=errors[0]
        )

    def give_up(self, group: str, step: int) -> list[CheckpointEnded]:
        """A worker is gone, and with it perhaps shares that the others wait for; returns what to tell of snapshots under way.

        Args:
            group: its name.
            step: at which the worker was lost.
        """
        begun = {*(number for number, go in self._answers.items() if go), *self._copied}
        told = max(self.written, self._given_up)
        lost = sorted(n for n in begun if n > told and len(self._copied.get(n, {})) < self.world_size)
        for number in lost:
            self._copied.pop(number, None)
            self._given_up = number
        error = "a worker process was lost while the state was copied"
        return [CheckpointEnded(group=group, number=number, step=step, error=error) for number in lost]

    def due(self, *, ranks_left: bool) -> int:
        """Number of a snapshot that is whole and not written; 0: there is none.

        Args:
            ranks_left: ranks still live, and say themselves when they have copied.
        """
        if self.writing:
            return 0
        for number, shares in self._copied.items():
            if len(shares) == self.world_size:
                return number
        if ranks_left:
            return 0
        found = {_number_in(one.fd) for one in self._memory}
        number = found.pop() if len(found) == 1 else 0
        return number if number > self.written and self._meta(number) else 0

    def begin(self, number: int) -> None:
        """The snapshot is being written from now on."""
        self.writing = number

    def end(self, outcome: dict[str, Any], group: str) -> CheckpointEnded:
        """The writer is gone; returns what to tell."""
        number, self.writing = self.writing, 0
        self.written = number
        shares = self._copied.pop(number, {})
        meta = self._meta_of(shares)
        return CheckpointEnded(
            group=group,
            number=number,
            step=int(meta.get("step", 0)),
            epoch=int(meta.get("epoch", 0)),
            stall_s=max((share.stall_s for share in shares.values()), default=0.0),
            **outcome,
        )

    def writer_arguments(self, number: int, result_path: Path) -> dict[str, Any]:
        """What the writer of a snapshot is started with; see `torchtrainer.checkpoint.writer.WriterArguments`."""
        orders = asdict(self.orders)
        return {
            "regions": self.regions,
            "number": number,
            "meta": self._meta(number),
            "result_path": str(result_path),
            **{name: orders[name] for name in ("root", "keep", "generation", "remote", "run_dir")},
        }

    def close(self) -> None:
        """Gives the memory back."""
        for one in self._memory:
            one.close()
        self._memory = []

    def _meta(self, number: int) -> dict[str, Any]:
        return self._meta_of(self._copied.get(number, {}))

    def _meta_of(self, shares: dict[int, SnapshotDone]) -> dict[str, Any]:
        return next((share.meta for share in shares.values()), {})


def read_outcome(path: Path) -> dict[str, Any]:
    """What a writer left behind, fields of `CheckpointEnded`; an error if it left nothing."""
    try:
        told: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {"error": "the process that wrote it ended before it was done"}
    return told


def _number_in(fd: int) -> int:
    """The number of the snapshot that a region holds whole; 0: none. See `torchtrainer.checkpoint.snapshot`."""
    return int.from_bytes(os.pread(fd, _NUMBER_BYTES, 0), "little")
