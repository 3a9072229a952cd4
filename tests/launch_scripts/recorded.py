"""A decorated main, as torch documents it."""

import sys

from torch.distributed.elastic.multiprocessing.errors import record

ARGUMENTS = [a for a in sys.argv[1:] if not a.startswith("--local-rank=")]  # the launch form puts it in front


@record
def main() -> None:
    if ARGUMENTS[0] == "exception":
        raise ValueError("recorded")
    sys.exit(int(ARGUMENTS[0]))


if __name__ == "__main__":
    main()
