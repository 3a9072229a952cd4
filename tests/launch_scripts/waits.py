"""Says that it is ready and waits for a signal; ends by it, or ignores it for good where its argument is ``ignore``."""

import os
import signal
import sys
from types import FrameType


def told(number: int, frame: FrameType | None) -> None:
    sys.stdout.write(f"worker> {os.environ['RANK']} {signal.Signals(number).name}\n")
    if "ignore" not in sys.argv:
        sys.exit(0)


for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"):
    signal.signal(signal.Signals[name], told)
# Not signal.pause(): a signal that comes just before it would be handled only after the next one.
woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)
with open(os.environ["PARITY_READY"], "wb", buffering=0) as ready:
    ready.write(b".")
while True:
    os.read(woken, 1)
