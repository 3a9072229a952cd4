"""Sets how many threads there are to be, for a program that imports torch later."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
