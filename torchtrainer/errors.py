"""Every error that torchtrainer raises, as one tree.

Errors cross process boundaries, so each one pickles: ``args`` are exactly what the constructor takes. Each message says
what happened, to which rank and process, at which step, where the log is, and what to change. An exception raised by
the user's own code is not wrapped: it is raised as it is, with a `RemoteTraceback` as its cause.
"""

from __future__ import annotations


class TorchTrainerError(Exception):
    """Base of all errors of this package."""


class InvalidArgumentError(TorchTrainerError, ValueError):
    """An argument has a value that cannot work; the message shows the value and what is accepted."""


class InvalidArgumentTypeError(TorchTrainerError, TypeError):
    """An argument has the wrong type, an unknown name, or belongs to an interface that was retired."""


class NotAvailableError(TorchTrainerError, NotImplementedError):
    """The feature is part of the interface, but this version does not have it yet."""


class NotSerializableError(TorchTrainerError, TypeError):
    """An object that has to travel between processes does not pickle; the message names the attribute."""


class OperatorUseError(TorchTrainerError, RuntimeError):
    """A hook needs something that the operator's ``setup`` did not provide; the message says what to set."""


class UnshardableLoaderError(TorchTrainerError, ValueError):
    """A loader cannot be dealt out to the ranks; the message says why and what to return instead."""


class TrainerClosedError(TorchTrainerError, RuntimeError):
    """The trainer was shut down, or its run failed; create a new `TorchTrainer`."""


class TrainerBusyError(TorchTrainerError, RuntimeError):
    """The trainer was called while another call is running, from a callback or another thread."""


class RunDirectoryError(TorchTrainerError, OSError):
    """The run directory is not usable: not writable, not ours, or in use by a live run."""


class EngineError(TorchTrainerError, RuntimeError):
    """The processes that carry the training could not be started or were lost."""


class WorkerStartError(EngineError):
    """A worker process did not become ready for orders."""


class WorkerDiedError(EngineError):
    """A worker process ended by itself: killed by a signal, or by ``sys.exit`` in user code.

    Args:
        message: the full report, for people.
        rank: the rank that the process carried.
        exit_code: its exit status; ``-n`` means killed by signal ``n``; None if unknown.
    """

    def __init__(self, message: str, rank: int | None = None, exit_code: int | None = None) -> None:
        super().__init__(message, rank, exit_code)
        self.rank = rank
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


class WorkerHungError(WorkerDiedError):
    """A worker process made no progress for longer than allowed; it was stopped, its stacks are in the message."""


class WorkerError(TorchTrainerError, RuntimeError):
    """User code raised an exception that does not pickle; the message holds its traceback."""


class RemoteTraceback(TorchTrainerError):
    """The cause of a user's exception that was raised in a worker: where it happened, and the traceback there."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


class CheckpointError(TorchTrainerError, RuntimeError):
    """Base of all errors about checkpoints."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written; older ones are intact. The message says where, why and what to change."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint is corrupt: its manifest or a file does not match its digest."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint was written in a newer format than this version reads; it is left as it is."""


class CheckpointFencedError(CheckpointError):
    """A newer run owns the checkpoints now; this one may not write any more."""


class SnapshotError(CheckpointError):
    """A rank's state could not be copied: memory is short, or it holds objects that a checkpoint cannot hold."""


class ResumeError(TorchTrainerError, RuntimeError):
    """A run cannot be resumed; the message says what differs and how to start anew."""


class CallMismatchError(ResumeError):
    """The script makes a different call than the run that it would resume; the message names both."""


class Preempted(SystemExit):
    """The run stopped because its machine or its time runs out; its state is saved, and the same command resumes it.

    Not an ``Exception``: it passes through ``except Exception`` and ends the script with exit code 75.

    Args:
        code: exit code.
        text: what happened, in one line.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code)
        self.text = text
