"""The driver's connection, counting messages."""

from __future__ import annotations

from torchtrainer.control.wire import Message
from torchtrainer.driver.connection import HostConnection
from torchtrainer.engines.local import LocalEngine


class CountedConnection(HostConnection):
    """Counts what the driver receives and sends."""

    received = 0
    sent = 0

    def send(self, message: Message) -> None:
        """Counts and sends."""
        self.sent += 1
        super().send(message)

    def _sort(self, message: Message) -> None:
        self.received += 1
        super()._sort(message)


class CountedEngine(LocalEngine):
    """The local engine with such a connection."""

    def connect(self) -> CountedConnection:
        """The one connection; starts the host process the first time."""
        if not isinstance(self._connection, CountedConnection):
            self._connection = CountedConnection(self.start_method, self.timeouts)
        return self._connection
