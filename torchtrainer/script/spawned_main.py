"""The main module of a process that multiprocessing spawns from a worker.

multiprocessing would run the script again there. Here it finds the script's functions and classes as the worker has them, without
running it, so that a script needs no main guard.
"""

from __future__ import annotations

import os
import sys

from torchtrainer.process.fresh import MAIN_ALIAS
from torchtrainer.script.modules import MAIN
from torchtrainer.script.take_over import SCRIPT_FILE, take_over

if __name__ == MAIN_ALIAS:
    take_over(os.environ[SCRIPT_FILE])
    globals().update({name: one for name, one in vars(sys.modules[MAIN]).items() if name not in globals()})
