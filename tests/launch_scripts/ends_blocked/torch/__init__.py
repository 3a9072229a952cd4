"""Stands in the place of torch and takes for ever to be imported."""

import os
import signal

os.write(1, b"ready\n")
while True:
    signal.pause()
