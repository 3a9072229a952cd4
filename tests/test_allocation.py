"""Worker processes keep freed memory for the next step, unless the user has chosen otherwise."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

GNU = pytest.mark.skipif(not hasattr(os, "confstr"), reason="the GNU C library only")
MB = 1 << 20

PROGRAM = """
import resource, sys
from torchtrainer.process.allocation import keep_freed_memory

print(keep_freed_memory() if sys.argv[1] in ("keep", "ask") else None)
if sys.argv[1] == "ask":
    sys.exit()
import torch
def step():
    kept = [torch.ones(2_000_000) for _ in range(20)]
for _ in range(6):  # until blocks lie as they will
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 20 * 8_000_000 // resource.getpagesize()


def run(how: str, **environ: str) -> list[str]:
    """Whether it was done, and the page faults of a step."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.split()


@GNU
def test_memory_of_a_step_is_there_in_the_next_one() -> None:
    done, faults = run("keep")
    assert done == "True"
    assert int(faults) < PAGES / 10  # left to itself the library often gives all of it back; not always


@GNU
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_choice_of_the_users_stays(name) -> None:
    assert run("ask", **{name: "glibc.malloc.tcache_count=7" if name == "GLIBC_TUNABLES" else str(MB)})[0] == "False"
