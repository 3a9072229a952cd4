"""How long a training on two machines stands still after a fault; beside torchrun's in the same run.

    python benchmarks/several_machines.py [--repeats 3] [--json FILE]

The machines are network namespaces joined by a bridge, which needs root on Linux. The same script, a trainer with a checkpoint after
every third step and timeout_s=10, runs under both launchers with the same rendezvous. Measured is from right before the fault to the
end of the next step that both ranks take, or the one that is left.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from machines import OURS, TORCHRUN, Machines, machines
from nodes import Launcher, Worker, why_no_nodes

LAUNCHERS = {"torchtrainer run": OURS, "torchrun": TORCHRUN}
CUT_S = 15.0
"""For how long the link is cut: longer than ``timeout_s``, so that the ranks fail."""


def kill_worker(cluster: Machines, launchers: list[Launcher], workers: Sequence[Worker]) -> list[Worker]:
    """A worker gets SIGKILL."""
    workers[1].tell("kill")
    workers[0].tell("go")
    return cluster.desk.world(nodes=2, launchers=launchers)


def replace_launcher(cluster: Machines, launchers: list[Launcher], workers: Sequence[Worker]) -> list[Worker]:
    """A launcher gets SIGKILL, with its worker, and is started again at once."""
    launchers[1].process.kill()
    workers[1].tell("kill")  # torchrun's outlive their launcher
    workers[0].tell("go")
    launchers[1] = cluster.launch(cluster.nodes[1])
    return cluster.desk.world(nodes=2, launchers=launchers)


def cut_link(cluster: Machines, launchers: list[Launcher], workers: Sequence[Worker]) -> list[Worker]:
    """A link is cut and mended; a launcher that has ended meanwhile is started again."""
    cluster.nodes[1].cut()
    for worker in workers:
        worker.tell("go")
    time.sleep(CUT_S)
    cluster.nodes[1].heal()
    if launchers[1].process.poll() is not None:
        launchers[1] = cluster.launch(cluster.nodes[1])
    return cluster.desk.world(nodes=2, launchers=launchers[:1])


def lose_power(cluster: Machines, launchers: list[Launcher], workers: Sequence[Worker]) -> list[Worker]:
    """A machine loses its power; the other one goes on alone, as --nnodes 1:2 lets it."""
    cluster.nodes[1].lose_power()
    workers[0].tell("go")
    return cluster.desk.world(nodes=1, launchers=launchers[:1])


FAULTS: dict[str, tuple[str, Callable[[Machines, list[Launcher], Sequence[Worker]], list[Worker]]]] = {
    "a worker is killed": ("2", kill_worker),
    "a launcher is killed and started again": ("2", replace_launcher),
    f"a link is cut for {CUT_S:g} s": ("2", cut_link),
    "a machine loses its power, the other one goes on alone": ("1:2", lose_power),
}


def stands_still_s(command: Sequence[str], fault: str) -> float:
    """Seconds from a fault to the end of the next step."""
    nnodes, act = FAULTS[fault]
    with tempfile.TemporaryDirectory() as directory, machines(Path(directory), command=command) as cluster:
        launchers = cluster.launch_all(nnodes=nnodes)
        workers = cluster.held(launchers)
        began_s = time.monotonic()
        first = act(cluster, launchers, workers)[0]
        for _ in range(2):  # each says when it begins a step: the second time, one is done
            if "step" not in first.next():
                raise RuntimeError(f"{fault}: the ranks failed again")
        return time.monotonic() - began_s


def main() -> None:
    """Measures, prints a table, and writes the single figures if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="how often each fault is made under each launcher")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    args = parser.parse_args()
    if why_no_nodes() is not None:
        sys.exit(f"no namespaces can be made here: {why_no_nodes()}")
    found: dict[str, dict[str, list[float | None]]] = {fault: {name: [] for name in LAUNCHERS} for fault in FAULTS}
    for _ in range(args.repeats):
        for fault, figures in found.items():
            for name, command in LAUNCHERS.items():
                try:
                    figures[name].append(stands_still_s(command, fault))
                except (AssertionError, RuntimeError, TimeoutError) as error:  # it did not go on
                    print(f"{name}, {fault}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
                    figures[name].append(None)
    print(f"| seconds to the next step, median of {args.repeats} | {' | '.join(LAUNCHERS)} |\n|--|--|--|")
    for fault, figures in found.items():
        print(f"| {fault} | {' | '.join(map(shown, figures.values()))} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def shown(figures: Sequence[float | None]) -> str:
    """The median, and how often the training did not go on."""
    went_on = [figure for figure in figures if figure is not None]
    lost = f", {len(figures) - len(went_on)} of {len(figures)} did not go on" if len(went_on) < len(figures) else ""
    return (f"{statistics.median(went_on):.1f}" if went_on else "-") + lost


if __name__ == "__main__":
    main()
