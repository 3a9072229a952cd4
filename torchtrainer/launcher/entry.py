"""The interpreter that a launcher runs in: started as ``python -u entry.py FORM arguments``, like a worker would be.

It is given by its path, so that ``ps`` shows the user's whole command line, and notes what a fresh interpreter has before it
imports anything: workers that are forked from it get exactly that.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

FRESH_MODULES = frozenset(sys.modules)
OWN_DIRECTORY = str(Path(__file__).resolve().parent)

if __name__ == "__main__":
    if sys.path and sys.path[0] == OWN_DIRECTORY:
        del sys.path[0]  # it has modules of its own that nobody means
    search_path = list(sys.path)
    if find_spec("torchtrainer") is None:  # a source tree that is not installed
        sys.path.append(str(Path(__file__).resolve().parents[2]))
    from torchtrainer.launcher.program import go_on

    go_on(sys.argv[1:], search_path, FRESH_MODULES)
