"""The directory of a run: found or made, locked against a second live run, and the owner of its file names."""

from __future__ import annotations

import os
import stat
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from torchtrainer.driver.event_journal import FILE_NAME, OLDER_NAME
from torchtrainer.errors import InvalidArgumentTypeError, RunDirectoryError
from torchtrainer.process.own_files import (
    LINES_BYTES,
    RECORD_BYTES,
    check_directory,
    check_file,
    check_tree,
    open_own,
    others_may_write,
    read_own,
)
from torchtrainer.process.paths import RankPaths, private_directory

RUNS = "runs"
_NUMBER_BYTES = 20
_FILES = {
    "lock": None,
    "run.json": RECORD_BYTES,
    ".run.json.unready": None,
    "calls.jsonl": LINES_BYTES,
    "shown": None,
    "reached": None,
    "history.jsonl": LINES_BYTES,
}
_DIRECTORIES = ("calls", "checkpoints", "compiled", "logs", "traces")
_NAMES = (*_FILES, *_DIRECTORIES)
"""Contents of a run directory: files, each with its size limit, and directories."""


class RunFiles:
    """Names of the files of a run below its ``root``."""

    root: Path

    @property
    def logs(self) -> Path:
        """Directory for the ranks' output."""
        return self.root / "logs"

    @property
    def shown_steps(self) -> Path:
        """File that records how far callbacks have seen the run."""
        return self.root / "shown"

    @property
    def reached(self) -> Path:
        """How many optimizer steps the ranks had taken when they were ended without their driver."""
        return self.root / "reached"

    def steps_reached(self) -> int:
        """The number in `reached`; 0: none, or nobody could write it."""
        try:
            content = read_own(self.reached, _NUMBER_BYTES)
        except OSError:
            return 0
        return int(content) if content.isdigit() else 0

    @property
    def history(self) -> Path:
        """One line per result."""
        return self.root / "history.jsonl"

    @property
    def traces(self) -> Path:
        """Directory for traces of steps."""
        return self.root / "traces"

    @property
    def compiled(self) -> Path:
        """Directory for the output of ``torch.compile``."""
        return self.root / "compiled"


class RunDirectory(RunFiles):
    """Files of one run.

    root/
      lock            held while the run lives; holds the pid of its driver
      run.json        which script and arguments made the run, and how it stands
      calls.jsonl     one line per completed call; calls/ holds results that are no JSON
      checkpoints/    see `torchtrainer.checkpoint.store`
      shown           how far callbacks have seen the run
      reached         how many steps the ranks had taken when they were ended without their driver
      history.jsonl   one line per train() or validate()
      compiled/       what torch.compile has made
      traces/         one file per process and profile_steps()
      logs/           driver.jsonl, driver.1.jsonl: see `torchtrainer.driver.event_journal`
      logs/rank_<r>/  stdout.log, stderr.log, error.json, stacks.txt

    Args:
        root: the directory; made if it is not there.

    Raises:
        RunDirectoryError: it is not writable, not ours, or in use.
    """

    durable = True

    def __init__(self, root: Path) -> None:
        self._lock_fd: int | None = None
        self._owner_pid = os.getpid()
        self.root = root.absolute()
        with telling_unusable(root):
            self._keep_others_out()
            private_directory(self.root)
            check_run_files(self.root)
            check_compiled(self.root)
            private_directory(self.logs)
            self._lock()

    @property
    def shown(self) -> str | None:
        """The directory as users see it."""
        return str(self.root)

    def close(self) -> None:
        """Lets go of the directory. Idempotent; does nothing in a forked copy of the driver."""
        if self._lock_fd is not None and self._owner_pid == os.getpid():
            os.close(self._lock_fd)
            self._lock_fd = None

    def close_copy(self) -> None:
        """In a forked process: closes its copy of the lock, which the owner keeps."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _keep_others_out(self) -> None:
        """A directory of the user's that no run was in yet becomes one that others may not write to, if they could."""
        try:
            found = self.root.lstat()
        except FileNotFoundError:
            return
        fresh = stat.S_ISDIR(found.st_mode) and not any(os.path.lexists(self.root / name) for name in _NAMES)
        if fresh and others_may_write(self.root, found):
            self.root.chmod(stat.S_IMODE(found.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))

    def _lock(self) -> None:
        if sys.platform == "win32":  # no advisory locks there
            return
        import fcntl

        fd = open_own(self.root / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = os.read(fd, 32).strip()
            pid = told.decode() if told.isdigit() else "unknown"
            os.close(fd)
            if pid == str(os.getpid()):
                who, what = "another trainer of this process", "shut that trainer down"
            else:
                who, what = f"a live run (pid {pid})", f"stop that run (kill {pid})"
            raise RunDirectoryError(
                f"run_dir {self.root} is in use by {who}: {what}, or pass another run_dir."
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        self._lock_fd = fd
        _locked.add(self)


_locked: weakref.WeakSet[RunDirectory] = weakref.WeakSet()
"""Directories whose lock this process holds."""


def _let_go_in_child() -> None:
    """In a forked process, such as that of a data loader: it may outlive this one, and the lock would with it."""
    for directory in list(_locked):
        directory.close_copy()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


class BorrowedRunDirectory(RunFiles):
    """The directory of a run that another process owns, or that there is none of: nothing is made, locked or removed.

    Args:
        root: the owner's directory; None: the run keeps nothing.
    """

    def __init__(self, root: str | None) -> None:
        self.durable = root is not None
        self.root = Path(os.devnull if root is None else root)

    @property
    def shown(self) -> str | None:
        """The directory as users see it; None if nothing is kept."""
        return str(self.root) if self.durable else None

    def close(self) -> None:
        """Leaves everything to the owner."""


@contextmanager
def telling_unusable(root: Path) -> Iterator[None]:
    """What the system says of a run directory in this block is an error of the directory: a RunDirectoryError."""
    try:
        yield
    except RunDirectoryError:
        raise
    except OSError as error:
        raise RunDirectoryError(
            f"run_dir {root} cannot be used: {error}. Pass run_dir=<a directory you can write to>, or run_dir=None to keep "
            "nothing."
        ) from error


def check_run_files(root: Path) -> None:
    """Checks every file in its directory that a run resumes from or writes to, as far as it exists.

    What is in checkpoints is verified when one of them is used.

    Raises:
        UnsafeFileError: something is not what a run puts there, or others may write to it.
        OSError: it cannot be looked at.
    """
    check_directory(root)
    for name, limit_bytes in _FILES.items():
        check_file(root / name, limit_bytes)
    for name in _DIRECTORIES:
        if os.path.lexists(root / name):
            check_directory(root / name)
    for path in (root / "calls").glob("*.pt"):
        check_file(path)
    for name in (FILE_NAME, OLDER_NAME):
        check_file(root / "logs" / name, LINES_BYTES)
    for directory in (root / "logs").glob("rank_*"):
        check_directory(directory)
        for path in RankPaths(directory).all():
            check_file(path)


def check_compiled(root: Path) -> None:
    """Looks at the compiled models of a run, all of which torch would run, for something of somebody else's.

    Raises:
        UnsafeFileError: there is something.
        OSError: they cannot be looked at.
    """
    check_tree(root / "compiled")


def is_live(root: Path) -> bool:
    """Whether a run in this directory is going on."""
    if sys.platform == "win32":  # no advisory locks there
        return False
    import fcntl

    try:
        fd = open_own(root / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def automatic_root(now: datetime) -> Path:
    """Where ``run_dir="auto"`` points: ``./runs/<script or notebook>/<time>``, a fresh directory for each run."""
    base = Path(RUNS) / program_name()
    stamp = now.strftime("%Y-%m-%d_%H-%M-%S")
    candidate, number = base / stamp, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = base / f"{stamp}_{number}"
    return candidate


def program_name() -> str:
    """Name of the script or notebook that runs, without its ending."""
    notebook = os.environ.get("JPY_SESSION_NAME")
    if notebook:
        return Path(notebook).stem
    if "ipykernel" in sys.modules:
        return "notebook"
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(script).stem if script else "interactive"


def check_run_dir(run_dir: object) -> None:
    """Raises an InvalidArgumentTypeError if this cannot be meant as a run directory."""
    if run_dir is not None and not isinstance(run_dir, str | os.PathLike):
        raise InvalidArgumentTypeError(f'run_dir must be a path, "auto" or None, got {run_dir!r}')


def open_run_dir(run_dir: str | os.PathLike[str] | None) -> RunDirectory | BorrowedRunDirectory:
    """Opens the directory that the user asked for.

    Args:
        run_dir: a path, "auto", or None to keep nothing.

    Raises:
        RunDirectoryError: it cannot be used.
    """
    check_run_dir(run_dir)
    if run_dir is None:
        return BorrowedRunDirectory(None)
    return RunDirectory(automatic_root(datetime.now()) if run_dir == "auto" else Path(run_dir).expanduser())
