"""A bridge that delays and loses frames, for kernels without netem: what arrives at an interface leaves at all others, later or never.

    python slow_bridge.py SEED DELAY_S LOSS INTERFACE...

Writes a line once it forwards. Ends when it is killed, as the namespaces of a test are removed.
"""

from __future__ import annotations

import random
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence

ALL_PROTOCOLS = 0x0003  # ETH_P_ALL
LONGEST_FRAME = 65536


def forward(interfaces: Sequence[str], delay_s: float, loss: float, seed: int) -> None:
    """Forwards without end."""
    chance = random.Random(seed)
    ports = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS)) for _ in interfaces]
    for port, interface in zip(ports, interfaces, strict=True):
        port.bind((interface, 0))
    late: deque[tuple[float, int, bytes]] = deque()
    print("forwards", flush=True)
    while True:
        wait_s = max(0.0, late[0][0] - time.monotonic()) if late else None
        readable, _, _ = select.select(ports, [], [], wait_s)
        for port in readable:
            frame, (_, _, kind, *_) = port.recvfrom(LONGEST_FRAME)
            if kind != socket.PACKET_OUTGOING and chance.random() >= loss:  # not what we sent ourselves
                late.append((time.monotonic() + delay_s, ports.index(port), frame))
        while late and late[0][0] <= time.monotonic():
            _, source, frame = late.popleft()
            for number, port in enumerate(ports):
                if number != source:
                    port.send(frame)


if __name__ == "__main__":
    forward(sys.argv[4:], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[1]))
