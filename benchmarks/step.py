"""Milliseconds per training step on a small model, against a loop by hand under torchrun, interleaved in one run.

    python benchmarks/step.py [--repeats 7] [--json FILE]

``supervision only`` runs the peer's own loop in our worker processes, so that the ratio is what driver, host and heartbeats cost.
"""

from __future__ import annotations

import sys

from compare import PROGRAMS, TORCHRUN, compare

BASE = "loop by hand under torchrun"
COMMANDS = {
    BASE: [*TORCHRUN, str(PROGRAMS / "mlp_by_hand.py")],
    "torchtrainer, supervision only": [sys.executable, str(PROGRAMS / "mlp_torchtrainer.py"), "--same-loop"],
    "torchtrainer": [sys.executable, str(PROGRAMS / "mlp_torchtrainer.py")],
}

if __name__ == "__main__":
    compare(
        COMMANDS,
        rows={name: (name, "MS_PER_STEP") for name in COMMANDS},
        base=BASE,
        title="ms per step, 2 workers with 1 thread each",
        description=__doc__,
    )
