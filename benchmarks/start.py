"""Seconds from the start of a command to its first optimizer step, against torchrun, interleaved in one run.

python benchmarks/start.py [--repeats 7] [--json FILE]
"""

from __future__ import annotations

import sys

from compare import PROGRAMS, TORCHRUN, compare

BASE = "torchrun, 2 workers"
FRESH = "torchtrainer, fresh script"
PRESTART = "torchtrainer, prestart() first"
COMMANDS = {
    BASE: [*TORCHRUN, str(PROGRAMS / "first_step_torchrun.py")],
    FRESH: [sys.executable, str(PROGRAMS / "first_step_torchtrainer.py")],
    PRESTART: [sys.executable, str(PROGRAMS / "first_step_torchtrainer.py"), "--prestart"],
}

if __name__ == "__main__":
    compare(
        COMMANDS,
        rows={
            BASE: (BASE, "FIRST"),
            FRESH: (FRESH, "FIRST"),
            PRESTART: (PRESTART, "FIRST"),
            "torchtrainer, second trainer in the process": (FRESH, "SECOND"),
        },
        base=BASE,
        title="seconds to the first optimizer step",
        description=__doc__,
    )
