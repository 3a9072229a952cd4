"""All sources of notices of one process behind one cheap check."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torchtrainer.config import PreemptionConfig
from torchtrainer.preempt.clouds import BASE_URLS, DMI_ROOT, metadata_sources
from torchtrainer.preempt.local import CheckSource, FileSource
from torchtrainer.preempt.notice import Notice, is_more_urgent
from torchtrainer.preempt.poller import Poller, Source, WaitingSource
from torchtrainer.preempt.signals import SignalWatch, grace_from
from torchtrainer.preempt.slurm import TimeLimitSource, job_end
from torchtrainer.preempt.wake import Wake

CLOSE_TIMEOUT_S = 3.0
"""How long `NoticeWatch.close` waits for its threads: longer than a connection attempt, the only thing that they cannot abort."""


class NoticeWatch:
    """Watches for advance warnings in one process: the driver, or under a launcher each rank's.

    On a machine of no known cloud, outside Slurm, with the default settings, it starts no thread.

    Args:
        config: what to watch.
        environ: of this process.
        metadata: ask the cloud's metadata service; one process of a machine should.
        say: takes one line for the user when a source does not work; called in the threads of the sources.
        dmi_root: where the firmware says whose machine this is.
        base_urls: addresses of the metadata services.
    """

    def __init__(
        self,
        config: PreemptionConfig,
        environ: Mapping[str, str],
        *,
        metadata: bool,
        say: Callable[[str], None],
        dmi_root: Path = DMI_ROOT,
        base_urls: Mapping[str, str] = BASE_URLS,
    ) -> None:
        self._say = say
        self._news = Wake()
        self._stop = Wake()
        self._lock = threading.Lock()
        self._polled: Notice | None = None
        grace_s = grace_from(environ, say=say) if config.grace_s is None else config.grace_s
        self._signals = SignalWatch(
            config.signals, grace_s=grace_s, repeat_s=config.repeat_s, environ=environ, news=self._news
        )
        sources = _own_sources(config, environ, say)
        if metadata:
            sources += metadata_sources(config, stop=self._stop, dmi_root=dmi_root, base_urls=base_urls)
        self._pollers = [Poller(source, stop=self._stop, offer=self._offer, say=say) for source in sources]

    def start(self) -> None:
        """Installs the signals, if this is the main thread of the main interpreter, and starts the threads that are needed."""
        self._signals.install()
        for poller in self._pollers:
            poller.thread.start()

    def renew(self) -> None:
        """Takes the signals back if somebody has taken them since `start`; does nothing outside the main thread."""
        self._signals.renew()

    def pending(self) -> Notice | None:
        """The most urgent notice so far, or None; cheap, for every step. In any thread; in the main thread it renews the watch."""
        self._signals.renew()
        if self._signals.notice is None and self._polled is None:
            return None
        self._news.clear()  # before it is read, so that what comes meanwhile is news again
        signalled, polled = self._signals.notice, self._polled
        if signalled is None or (polled is not None and is_more_urgent(polled, signalled)):
            return polled
        return signalled

    def hear(self, signum: int) -> None:
        """Takes a signal that came to another process of the run. In the main thread."""
        self._signals.hear(signum)

    @property
    def urgent(self) -> bool:
        """Whether a stop signal came while another one was pending: leave now, without saving."""
        return self._signals.urgent

    def wait_fd(self) -> int:
        """A descriptor that is readable when there is news, until `pending` is asked."""
        return self._news.fileno()

    def acknowledge(self) -> None:
        """Tells a cloud that wants to know (Azure) that it may go ahead; only when all state of this machine is saved.

        Blocks for up to ``PreemptionConfig.metadata_timeout_s``, twice. Never raises. Call it before `close`.
        """
        for poller in self._pollers:
            reason = poller.source.acknowledge() if isinstance(poller.source, WaitingSource) else None
            if reason is not None:
                self._say(f"{poller.source.name}: could not tell that the state is saved ({reason})")

    def close(self) -> None:
        """Puts the signals back and ends the threads, within `CLOSE_TIMEOUT_S`; idempotent.

        From the main thread, as far as signals are concerned: see `SignalWatch.close`.
        """
        self._signals.close()
        self._stop.set()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for poller in self._pollers:
            if poller.thread.ident is not None:
                poller.thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [poller.source.name for poller in self._pollers if poller.thread.is_alive()]
        self._pollers = []
        self._news.close()
        if stuck:  # their thread still waits for the stop
            self._say(f"{', '.join(stuck)}: did not return within {CLOSE_TIMEOUT_S:.0f} s; left to end by itself")
        else:
            self._stop.close()

    def _offer(self, notice: Notice) -> None:
        with self._lock:
            if not is_more_urgent(notice, self._polled):
                return
            self._polled = notice
        self._news.set()


def _own_sources(config: PreemptionConfig, environ: Mapping[str, str], say: Callable[[str], None]) -> list[Source]:
    """What is asked in any process, not only in one of a machine."""
    sources: list[Source] = []
    end = job_end(environ)
    if end is not None and config.slurm_lead_s > 0:
        sources.append(TimeLimitSource(end, lead_s=config.slurm_lead_s))
    if config.file is not None:
        sources.append(FileSource(Path(config.file)))
    if config.check is not None:
        sources.append(CheckSource(config.check, interval_s=config.check_every_s, say=say))
    return sources
