"""For ``--run-path``: arguments, then an end that is none."""

import os
import sys

ARGUMENTS = [a for a in sys.argv[1:] if not a.startswith("--local-rank=")]  # the launch form puts it in front
sys.stdout.write(f"worker> {os.environ['RANK']} {sys.argv} {__name__}\n")
if ARGUMENTS == ["raise"]:
    raise ValueError("by path")
sys.exit(int(ARGUMENTS[0]) if ARGUMENTS else 0)
