"""Slurm: the end of the job's time as a notice, and putting the job back into the queue."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping

from torchtrainer.preempt.notice import Notice, monotonic_at

REQUEUE_TIMEOUT_S = 10.0
"""For ``scontrol requeue``."""
NEAR_THE_LIMIT_S = 3600.0
"""A user signal that comes longer than this before the end of the job's time counts as a preemption at an unknown time."""
_LONGEST_PAUSE_S = 30.0
"""The wall clock may be set meanwhile."""


def job_end(environ: Mapping[str, str]) -> float | None:
    """When the job's time ends, in seconds since 1970; None if Slurm did not say.

    An end that has passed is none either: of a job that was given more time, or whose environment another session inherited.
    """
    try:
        end = float(environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return None
    return end if end > time.time() else None


def deadline_near_limit(environ: Mapping[str, str]) -> float | None:
    """The end of the job's time on the monotonic clock if it is so near that a signal now must be about it, else None."""
    end = job_end(environ)
    if end is None or end - time.time() > NEAR_THE_LIMIT_S:
        return None
    return monotonic_at(end)


class TimeLimitSource:
    """Gives notice some seconds before the job's time ends, for jobs that were submitted without ``--signal``.

    Args:
        end: of the job's time, in seconds since 1970.
        lead_s: how long before it.
    """

    name = "Slurm time limit"

    def __init__(self, end: float, *, lead_s: float) -> None:
        self._end = end
        self._lead_s = lead_s
        self._given = False

    @property
    def interval_s(self) -> float:
        """Until the notice is due, or a while."""
        due_s = self._end - self._lead_s - time.time()
        return _LONGEST_PAUSE_S if self._given else min(max(0.0, due_s), _LONGEST_PAUSE_S)

    def poll(self) -> Iterator[Notice]:
        """Gives the notice when it is due."""
        left_s = self._end - time.time()
        if left_s > self._lead_s or self._given:
            return
        self._given = True
        yield Notice(
            source=self.name,
            deadline=monotonic_at(self._end),
            must_stop=True,
            text=f"the time of this Slurm job ends in {max(0.0, left_s):.0f} s",
        )


def requeue(environ: Mapping[str, str]) -> str | None:
    """Puts this Slurm job back into the queue, which ends it; call it in every rank's process, after the state is saved.

    Only rank 0 (``RANK``, else ``SLURM_PROCID``) does it. Blocks for up to `REQUEUE_TIMEOUT_S`. Never raises.

    Args:
        environ: of this process; ``PATH`` finds ``scontrol``.

    Returns:
        One line for people about how it went; None where it is another rank's task.
    """
    if environ.get("RANK", environ.get("SLURM_PROCID", "0")) != "0":
        return None
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return (
            "this is not a Slurm job (no SLURM_JOB_ID), so nothing was requeued: start the same command again to "
            "continue"
        )
    if "SLURM_ARRAY_JOB_ID" in environ:  # of a task, the number alone can mean the whole array
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ.get('SLURM_ARRAY_TASK_ID', '')}"
    reason = _scontrol_requeue(job, environ)
    if reason is None:
        return f"Slurm job {job} is requeued and resumes when it starts again"
    return (
        f"Slurm job {job} was not requeued ({reason}): submit it again to continue, unless Slurm requeues it by itself"
    )


def _scontrol_requeue(job: str, environ: Mapping[str, str]) -> str | None:
    """Runs ``scontrol``; returns why it did not work, or None."""
    program = shutil.which("scontrol", path=environ.get("PATH"))
    if program is None:
        return "scontrol is not on PATH"
    try:
        done = subprocess.run(
            [program, "requeue", job],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=REQUEUE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"scontrol did not answer within {REQUEUE_TIMEOUT_S:.0f} s"
    except OSError as error:
        return f"scontrol could not be started: {error}"
    if done.returncode == 0:
        return None
    return " ".join(done.stderr.split()) or f"scontrol exited with status {done.returncode}"
