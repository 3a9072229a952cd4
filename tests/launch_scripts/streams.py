"""Writes marked lines to both streams; the arguments are further lines for standard output."""

import os
import sys

ARGUMENTS = [a for a in sys.argv[1:] if not a.startswith("--local-rank=")]  # the launch form puts it in front
RANK = os.environ["RANK"]
for fruit in ("apple", "orange", "a,b", *ARGUMENTS):
    sys.stdout.write(f"worker> {RANK} out {fruit}\n")
    sys.stderr.write(f"worker> {RANK} err {fruit}\n")
