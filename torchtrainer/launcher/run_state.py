"""The state of a run, read from its directory without disturbing the run.

Nothing that stands in the files is trusted: lines that are not what a run writes are counted and left out, and texts cannot
move the cursor of a terminal.
"""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchtrainer.driver.run_dir import BorrowedRunDirectory
from torchtrainer.observe.history import FAILURE
from torchtrainer.process.guard import is_alive
from torchtrainer.process.own_files import open_own, open_to_read, parse_json, printable
from torchtrainer.process.paths import RankPaths

State = Literal["running", "ended", "unknown"]

SEARCH_DEPTH = 2
"""Run directories are ``runs/<script>/<time>``, or ``runs/<name>`` if the user named them."""
MAX_READ_BYTES = 16 * 1024**2
"""Of a longer file, only the end is read."""
MAX_LINE = 200
"""Longest line of a text from a file, in characters."""
INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""Linux's name for the namespace in which every process of the machine is visible."""


class NotARunDirectoryError(ValueError):
    """The path is not the directory of a run; the text says what was looked for."""


@dataclass(frozen=True, kw_only=True)
class Liveness:
    """Whether a run lives.

    Attributes:
        state: ``unknown`` if the lock is missing or cannot be read.
        pid: the driver, as the lock says; None: it says nothing.
        pid_alive: whether there is a process with that pid; it may be another one by now.
    """

    state: State
    pid: int | None
    pid_alive: bool


@dataclass(frozen=True, kw_only=True)
class RankError:
    """The first line of a rank's error file.

    Attributes:
        rank: which one.
        time_s: when it was written, seconds since 1970.
        text: type and message; empty if the file is damaged.
        path: the file.
    """

    rank: int
    time_s: float
    text: str
    path: str


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Everything known about a run.

    Attributes:
        run_dir: its directory.
        liveness: whether it runs.
        active_s: when it last wrote something, seconds since 1970.
        results: lines of its history, oldest first.
        damaged_lines: lines of its history that are not what a run writes.
        logs: log files that are there, by rank.
        errors: of the ranks that failed, root cause first.
    """

    run_dir: str
    liveness: Liveness
    active_s: float
    results: tuple[Mapping[str, Any], ...]
    damaged_lines: int
    logs: tuple[str, ...]
    errors: tuple[RankError, ...]


def is_run_dir(path: Path) -> bool:
    """Whether a directory holds what a run writes: its lock or its history."""
    files = BorrowedRunDirectory(str(path))
    return _is_file(path / "lock") or _is_file(files.history)


def find_runs(top: Path, depth: int = SEARCH_DEPTH) -> list[Path]:
    """Run directories below ``top``; links are not followed, and nothing is looked for inside of a run."""
    try:
        entries = sorted(entry.path for entry in os.scandir(top) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
    found = []
    for path in map(Path, entries):
        if is_run_dir(path):
            found.append(path)
        elif depth > 1:
            found += find_runs(path, depth - 1)
    return found


def read_runs(top: Path) -> list[RunStatus]:
    """The state of every run below ``top``."""
    runs = []
    for path in find_runs(top):
        with suppress(NotARunDirectoryError):  # removed meanwhile
            runs.append(read_status(path))
    return runs


def read_status(run_dir: Path) -> RunStatus:
    """Reads what a run's directory holds. Nothing in it is changed.

    Raises:
        NotARunDirectoryError: it is not one.
    """
    if not run_dir.is_dir():
        raise NotARunDirectoryError(f"{run_dir} is not a directory")
    if not is_run_dir(run_dir):
        below = find_runs(run_dir)
        hint = f"; there are run directories below it, such as {below[-1]}" if below else ""
        raise NotARunDirectoryError(
            f"{run_dir} is not a run directory: it has neither lock nor history.jsonl, or they cannot be read{hint}"
        )
    files = BorrowedRunDirectory(str(run_dir))
    liveness = read_liveness(run_dir / "lock")
    results, damaged = read_results(files.history, running=liveness.state == "running")
    ranks = _ranks(files.logs)
    streams = [paths.stream(name) for paths in ranks.values() for name in ("stdout", "stderr")]
    written = [_modified_s(path) for path in (run_dir / "lock", files.history, *streams)]
    return RunStatus(
        run_dir=str(run_dir),
        liveness=liveness,
        active_s=max(written),
        results=tuple(results),
        damaged_lines=damaged,
        logs=tuple(str(path) for path in streams if _is_file(path)),
        errors=read_errors(ranks),
    )


def read_liveness(lock: Path) -> Liveness:
    """Whether somebody holds a run's lock.

    The lock is not taken to find out: a run that starts in that instant would think another one is there. The kernel
    lists the locks of the processes that we can see. Only where it does not (another system, a container that shares the
    directory with other containers), a shared lock is tried and let go at once.
    """
    try:
        fd = open_own(lock, os.O_RDONLY)
    except OSError:
        return Liveness(state="unknown", pid=None, pid_alive=False)
    try:
        first = os.read(fd, 32).split(b"\n")[0].strip()
        pid = int(first) if first.isdigit() and len(first) < 10 and int(first) > 0 else None
        holder = _listed_holder(fd)
        if holder is None and not (pid is not None and _holds(pid, fd)):
            state: State = "ended" if _every_lock_is_listed() or not _held_by_somebody(fd) else "running"
        else:
            state, pid = "running", holder or pid
    except OSError:
        return Liveness(state="unknown", pid=None, pid_alive=False)
    finally:
        os.close(fd)
    return Liveness(state=state, pid=pid, pid_alive=pid is not None and is_alive(pid))


def _listed_holder(fd: int) -> int | None:
    """The process that the kernel's list of locks names for the file."""
    at = os.fstat(fd)
    wanted = f"{os.major(at.st_dev):02x}:{os.minor(at.st_dev):02x}:{at.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:  # 1: FLOCK  ADVISORY  WRITE 4711 fe:00:2850852 0 EOF
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == wanted and words[4].isdecimal():
            return int(words[4])
    return None


def _holds(pid: int, fd: int) -> bool:
    """Whether a process has the file open and locked; some file systems are not listed under the number that they show."""
    here = os.fstat(fd)
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            lock = Path(f"/proc/{pid}/fdinfo/{descriptor.name}")
            if os.path.samestat(here, descriptor.stat()) and "FLOCK" in lock.read_text():
                return True
    except OSError:  # gone, or not ours to look at
        return False
    return False


def _every_lock_is_listed() -> bool:
    try:
        return str(Path("/proc/self/ns/pid").readlink()) == INITIAL_PID_NAMESPACE and Path("/proc/locks").exists()
    except OSError:
        return False


def _held_by_somebody(fd: int) -> bool:
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def read_results(history: Path, *, running: bool) -> tuple[list[dict[str, Any]], int]:
    """Reads the results in a history.

    Args:
        history: the file.
        running: its run lives, and may be writing the last line right now.

    Returns:
        The lines that are what a run writes, oldest first, and how many are not.
    """
    content = _read(history)
    lines = content.split(b"\n")
    last = lines.pop()
    damaged = int(bool(last) and not running)
    results = []
    for line in lines:
        try:
            record = parse_json(line)
            if record["kind"] == FAILURE:
                continue
            if not isinstance(record["metrics"], dict) or not isinstance(record["kind"], str):
                raise TypeError("not a result")
            json.dumps(record, allow_nan=False)  # what a run writes has no such numbers, and JSON has none
            results.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += 1
    return results, damaged


def read_errors(ranks: Mapping[int, RankPaths]) -> tuple[RankError, ...]:
    """The errors of the ranks that have an error file, the root cause first: the one that was written first."""
    errors = []
    for rank, paths in ranks.items():
        if not _is_file(paths.error):
            continue
        written_s = _modified_s(paths.error)
        try:
            message = parse_json(_read(paths.error))["message"]
            text = str(message["message"]).strip()
            # The time stamp has whole seconds; the file's own time tells those of one second apart, if nobody copied it.
            stamp_s = float(message["extraInfo"]["timestamp"])
        except (ValueError, TypeError, KeyError, OverflowError):
            text, stamp_s = "", written_s
        if math.isfinite(stamp_s) and not stamp_s <= written_s < stamp_s + 2:
            written_s = stamp_s
        errors.append(
            RankError(rank=rank, time_s=written_s, text=printable(text.split("\n")[0], MAX_LINE), path=str(paths.error))
        )
    return tuple(sorted(errors, key=lambda error: (error.time_s, error.rank)))


def _ranks(logs: Path) -> dict[int, RankPaths]:
    try:
        names = [entry.name for entry in os.scandir(logs)]
    except OSError:
        return {}
    numbers = (name.removeprefix("rank_") for name in names if name.startswith("rank_"))
    return {rank: RankPaths.of(logs, rank) for rank in sorted(int(n) for n in numbers if n.isdecimal() and len(n) < 7)}


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _modified_s(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path) -> bytes:
    """The end of a plain file, from the beginning of a line; nothing if it is anything else or cannot be read."""
    try:
        with open_to_read(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_READ_BYTES))
            content = file.read(MAX_READ_BYTES)
    except OSError:
        return b""
    return content[content.find(b"\n") + 1 :] if size > MAX_READ_BYTES else content
