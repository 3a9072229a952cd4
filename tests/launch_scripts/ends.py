"""What runs after the last line of a script."""

import atexit
import sys
import threading
import weakref


class Finalised:
    pass


def after() -> None:
    threading.main_thread().join()
    sys.stdout.write("worker> thread\n")


kept = Finalised()
weakref.finalize(kept, sys.stdout.write, "worker> finalised\n")
atexit.register(sys.stdout.write, "worker> atexit\n")
threading.Thread(target=after).start()
with open(1, "w", closefd=False) as buffered:
    buffered.write("worker> buffered\n")
sys.stdout.write("worker> no end of line")
