"""Reads standard input to its end."""

import sys

for line in sys.stdin:
    sys.stdout.write(f"worker> read {line.rstrip()}\n")
sys.stdout.write("worker> end\n")
