"""Where files are: the only module that joins names of the engine's private directory and of a run's log directory."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torchtrainer.process.own_files import check_directory

PRIVATE_DIR_PREFIX = "torchtrainer-"
SOCKET_PATH_LIMIT = 103
"""Longest path, in bytes, that every system takes for a socket file."""


@dataclass(frozen=True)
class EnginePaths:
    """Private files of one engine: socket, rendezvous stores and what is handed to workers. Mode 0700, gone at the end.

    root/
      control.ipc        socket of the control plane
      <group>.spec       pickled creators of a group, removed when the group is built or gone
      <group>.store      rendezvous file of a group's process group
      <group>.logs/      output of a group whose run keeps nothing
      <group>.mp/        what multiprocessing in the workers keeps for its own sockets; it would stay after a kill
      <group>.written    what became of the latest snapshot
      <group>.writer/    output of the processes that write checkpoints
    """

    root: Path

    @classmethod
    def create(cls) -> EnginePaths:
        """Makes a fresh directory, in the user's runtime directory if there is one.

        Raises:
            OSError: no directory with a short enough path is writable.
        """
        return cls(_fresh_private_directory("/control.ipc"))

    @property
    def socket(self) -> str:
        """Socket of the control plane."""
        return str(self.root / "control.ipc")

    @property
    def endpoint(self) -> str:
        """Where driver and workers reach the control plane, as ZeroMQ spells it."""
        return f"ipc://{self.socket}"

    def spec(self, group: str) -> Path:
        """What a group's workers are built from."""
        return self.root / f"{group}.spec"

    def store(self, group: str) -> Path:
        """Rendezvous file of a group."""
        return self.root / f"{group}.store"

    def logs(self, group: str) -> Path:
        """Output of the ranks of a group whose run keeps nothing."""
        return self.root / f"{group}.logs"

    def multiprocessing(self, group: str) -> Path:
        """Temporary directory of multiprocessing in a group's workers."""
        return self.root / f"{group}.mp"

    def written(self, group: str) -> Path:
        """What became of the latest snapshot of a group."""
        return self.root / f"{group}.written"

    def writer_logs(self, group: str) -> Path:
        """Output of the processes that write a group's checkpoints."""
        return self.root / f"{group}.writer"

    def forget(self, group: str) -> None:
        """Removes the files of a group."""
        self.spec(group).unlink(missing_ok=True)
        self.store(group).unlink(missing_ok=True)
        shutil.rmtree(self.logs(group), ignore_errors=True)
        shutil.rmtree(self.multiprocessing(group), ignore_errors=True)
        self.written(group).unlink(missing_ok=True)
        shutil.rmtree(self.writer_logs(group), ignore_errors=True)

    def remove(self) -> None:
        """Removes the directory with all that is in it."""
        shutil.rmtree(self.root, ignore_errors=True)


@dataclass(frozen=True)
class LaunchPaths:
    """Private files of one launcher, for the attempts of its workers. Mode 0700, gone at the end.

    root/
      progress.<local_rank>               steps done, as a worker that counts them tells
      <generation>.<local_rank>.error     why a forked worker failed
      <generation>.<local_rank>.stacks    where its stack dumps go
      log_dir                             path of the log directory, where nobody asked for one
      mp/                                 what multiprocessing in the workers keeps for its own sockets
    """

    root: Path

    @classmethod
    def create(cls) -> LaunchPaths:
        """Makes a fresh directory.

        Raises:
            OSError: no directory with a short enough path is writable.
        """
        return cls(_fresh_private_directory("/mp/listener-xxxxxxxx"))

    def note_log_dir(self, path: str) -> None:
        """Remembers a log directory that was made because torch wants one: it goes at the end if no file is in it."""
        (self.root / "log_dir").write_text(path)

    def error(self, generation: int, local_rank: int) -> Path:
        """Error file of a worker, in the form that torch's launchers read."""
        return self.root / f"{generation}.{local_rank}.error"

    def stacks(self, generation: int, local_rank: int) -> Path:
        """Stack dumps of a worker."""
        return self.root / f"{generation}.{local_rank}.stacks"

    def progress(self, local_rank: int) -> Path:
        """Step counter of a worker."""
        return self.root / f"progress.{local_rank}"

    @property
    def multiprocessing(self) -> Path:
        """Temporary directory of multiprocessing in the workers."""
        return self.root / "mp"

    def remove(self) -> None:
        """Removes the directory with all that is in it, and the log directory that nobody asked for or wrote to."""
        try:
            log_dir = Path((self.root / "log_dir").read_text())
        except OSError:
            log_dir = None
        if log_dir is not None and not any(path.is_file() for path in log_dir.rglob("*")):
            shutil.rmtree(log_dir, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)


@dataclass(frozen=True)
class RankPaths:
    """Files that one rank writes, under the log directory of its run."""

    root: Path

    @classmethod
    def of(cls, log_dir: str | Path, rank: int) -> RankPaths:
        """The files of a rank."""
        return cls(Path(log_dir) / f"rank_{rank}")

    def stream(self, name: str) -> Path:
        """Log of ``stdout`` or ``stderr``."""
        return self.root / f"{name}.log"

    @property
    def error(self) -> Path:
        """The error file, in the form that torch's launchers read."""
        return self.root / "error.json"

    @property
    def stacks(self) -> Path:
        """Where a stack dump goes."""
        return self.root / "stacks.txt"

    def all(self) -> tuple[Path, ...]:
        """Every one of them, whether or not it is there."""
        return self.stream("stdout"), self.stream("stderr"), self.error, self.stacks, self.crash

    @property
    def crash(self) -> Path:
        """Where the rank's process, and those of its loaders, write the stack that they crash in."""
        return self.root / "crash.txt"


def _fresh_private_directory(longest_socket: str) -> Path:
    """Makes a directory in which a socket of this name has a path that every system takes."""
    candidates = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"]
    for base in candidates:
        if not base or not os.access(base, os.W_OK | os.X_OK):
            continue
        root = Path(tempfile.mkdtemp(prefix=PRIVATE_DIR_PREFIX, dir=base))
        if len(os.fsencode(f"{root}{longest_socket}")) <= SOCKET_PATH_LIMIT:
            return root
        root.rmdir()
    raise OSError(
        f"no writable directory with a short enough path for a socket ({SOCKET_PATH_LIMIT} bytes) among "
        f"{[c for c in candidates if c]}: set TMPDIR to one"
    )


def private_directory(path: Path) -> Path:
    """Makes a directory for the user's eyes only; parents are made with the usual mode.

    Raises:
        OSError: it cannot be made, is a link, belongs to somebody else, or others may write to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        check_directory(path)
    return path
