"""How long a training on two machines stands still after a fault; beside torchrun's in the same run.

    python benchmarks/several_machines.py [--repeats 3] [--only TEXT] [--json FILE]

The machines are network namespaces joined by a bridge, which needs root on Linux. The same script, a trainer with a checkpoint after
every third step, runs under both launchers with the same rendezvous. A launcher that ends is started again at once, as a scheduler
does it. Measured is from right before the fault to the end of the next step that all ranks take, or the one that is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from machines import OURS, TORCHRUN, Machines, machines, texts
from nodes import Launcher, Node, Worker, why_no_nodes

LAUNCHERS = {"torchtrainer run": OURS, "torchrun": TORCHRUN}
TIMEOUT_S = 10.0
"""``timeout_s`` of the trainer."""
CUT_S = 15.0
"""For how long a link is cut, so that the ranks fail."""
SHORT_CUT_S = 10.0
"""For how long it is cut where ``timeout_s`` is twice as long."""
BACK_S = 10.0
"""How long a machine takes to be back after it has lost its power."""
LIMIT_S = 120.0
"""How long a training may stand still until it counts as one that does not go on."""


@dataclass
class Cluster:
    """Two machines with a training that is held before a step.

    Attributes:
        machines: with their network.
        launchers: one for each machine.
        workers: by rank.
        nnodes: as the launchers are told.
        gone: machines without power, where nobody starts a launcher.
    """

    machines: Machines
    nnodes: str
    launchers: list[Launcher] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)

    @property
    def nodes(self) -> list[Node]:
        """The machines themselves."""
        return self.machines.nodes

    def launch(self, at: int) -> None:
        """Starts a launcher on a machine, in the place of the one before."""
        self.launchers[at] = self.machines.launch(self.nodes[at], nnodes=self.nnodes)

    @contextlib.contextmanager
    def scheduled(self) -> Iterator[None]:
        """Starts launchers again that end with a failure meanwhile."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.05):
                for at, launcher in enumerate(self.launchers):
                    if at not in self.gone and launcher.process.poll() not in (None, 0):
                        self.launch(at)

        scheduler = threading.Thread(target=look)
        scheduler.start()
        try:
            yield
        finally:
            over.set()
            scheduler.join()

    def go(self, *ranks: int) -> None:
        """Lets ranks take the step before which they are held."""
        for rank in ranks:
            with contextlib.suppress(OSError):  # it has ended
                self.workers[rank].tell("go")

    def goes_on(self, nodes: int = 2) -> None:
        """Waits until a step is done by all ranks; starts that fail are waited out."""
        deadline_s = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline_s:
            with self.scheduled():
                world = self.machines.desk.world(nodes=nodes, launchers=())
            if takes_a_step(world[0]):
                return
        raise RuntimeError("the ranks failed again and again")

    def held_again(self) -> None:
        """Waits until all ranks are held once more."""
        with self.scheduled():
            self.workers = self.machines.held(())


def takes_a_step(worker: Worker) -> bool:
    """Whether a worker gets through a step: it says when it begins one, the second time one is done."""
    return "step" in worker.next() and "step" in worker.next()


def kill_worker(cluster: Cluster) -> None:
    cluster.workers[1].tell("kill")
    cluster.go(0)
    cluster.goes_on()


def kill_launcher(cluster: Cluster) -> None:
    cluster.launchers[1].process.kill()
    cluster.workers[1].tell("kill")  # torchrun's outlive their launcher
    cluster.go(0)
    cluster.goes_on()


def cut_link(cluster: Cluster) -> None:
    cluster.nodes[1].cut()
    cluster.go(0, 1)
    time.sleep(CUT_S)
    cluster.nodes[1].heal()
    cluster.goes_on()


def lose_what_it_sends(cluster: Cluster) -> None:
    cluster.nodes[1].cut_towards(cluster.nodes[0])
    cluster.go(0, 1)
    time.sleep(CUT_S)
    cluster.nodes[1].heal_towards(cluster.nodes[0])
    cluster.goes_on()


def lose_what_is_sent_to_it(cluster: Cluster) -> None:
    cluster.nodes[0].cut_towards(cluster.nodes[1])
    cluster.go(0, 1)
    time.sleep(CUT_S)
    cluster.nodes[0].heal_towards(cluster.nodes[1])
    cluster.goes_on()


def cut_shortly(cluster: Cluster) -> None:
    cluster.nodes[1].cut()
    cluster.go(0, 1)
    time.sleep(SHORT_CUT_S)
    cluster.nodes[1].heal()
    if "step" not in cluster.workers[0].next():  # it has failed
        cluster.goes_on()


def lose_power(cluster: Cluster) -> None:
    cluster.gone.add(1)
    cluster.nodes[1].lose_power()
    cluster.go(0)


def lose_power_and_come_back(cluster: Cluster) -> None:
    lose_power(cluster)
    time.sleep(BACK_S)
    cluster.nodes[1].heal()
    cluster.gone.clear()
    cluster.goes_on()


def go_on_alone(cluster: Cluster) -> None:
    lose_power(cluster)
    cluster.goes_on(nodes=1)


def three_faults(cluster: Cluster) -> None:
    cluster.workers[1].tell("kill")
    cluster.go(0)
    cluster.held_again()
    cluster.workers[0].tell("kill")
    cluster.go(1)
    cluster.held_again()
    kill_launcher(cluster)


def kill_worker_on_a_slow_network(cluster: Cluster) -> None:
    cluster.machines.lan.disturb(delay_s=0.2, loss=0.05)
    kill_worker(cluster)


def end(cluster: Cluster) -> None:
    cluster.workers[1].tell("kill")
    cluster.go(0)
    codes = [launcher.finish(LIMIT_S) for launcher in cluster.launchers]
    if codes != [1, 1]:
        raise RuntimeError(f"the launches ended with {codes}")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to the machines.

    Attributes:
        act: does it, and returns when the next step is done.
        nnodes: as the launchers are told.
        timeout_s: of the trainer.
        shared: the run directory.
    """

    act: Callable[[Cluster], None]
    nnodes: str = "2"
    timeout_s: float = TIMEOUT_S
    shared: bool = True


FAULTS = {
    "a worker is killed": Fault(act=kill_worker),
    "a launcher is killed, with its worker": Fault(act=kill_launcher),
    f"a link is cut for {CUT_S:g} s": Fault(act=cut_link),
    f"what a machine sends is lost for {CUT_S:g} s": Fault(act=lose_what_it_sends),
    f"what is sent to a machine is lost for {CUT_S:g} s": Fault(act=lose_what_is_sent_to_it),
    f"a link is cut for {SHORT_CUT_S:g} s, `timeout_s` is {2 * SHORT_CUT_S:g}": Fault(
        act=cut_shortly, timeout_s=2 * SHORT_CUT_S
    ),
    f"a machine loses its power and is back after {BACK_S:g} s": Fault(act=lose_power_and_come_back),
    "a machine loses its power, the other one goes on alone (`--nnodes 1:2`)": Fault(act=go_on_alone, nnodes="1:2"),
    "three in a row: a worker here, a worker there, a launcher": Fault(act=three_faults),
    "a worker is killed, with 200 ms of delay and 5 % of packets lost": Fault(act=kill_worker_on_a_slow_network),
    "a worker is killed, the run directory is not shared: until all launches have ended": Fault(act=end, shared=False),
}


def stands_still_s(command: Sequence[str], fault: Fault) -> float:
    """Seconds from a fault to the end of the next step.

    Raises:
        RuntimeError: there is none.
    """
    directory = tempfile.TemporaryDirectory()
    with directory as name, machines(Path(name), command=command, shared=fault.shared) as lan:
        lan.desk.environ["TIMEOUT_S"] = str(fault.timeout_s)
        cluster = Cluster(lan, fault.nnodes, lan.launch_all(nnodes=fault.nnodes))
        try:
            cluster.workers = lan.held(cluster.launchers)
            began_s = time.monotonic()
            fault.act(cluster)
        except (AssertionError, RuntimeError, OSError) as error:  # no worker came, or none said anything
            raise RuntimeError(f"{error}\n{texts([one for node in lan.nodes for one in node.launchers])}") from error
        return time.monotonic() - began_s


def main() -> None:
    """Measures, prints a table, and writes the single figures if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="how often each fault is made under each launcher")
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults with these words")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    args = parser.parse_args()
    if why_no_nodes() is not None:
        sys.exit(f"no namespaces can be made here: {why_no_nodes()}")
    faults = {name: fault for name, fault in FAULTS.items() if args.only in name}
    found: dict[str, dict[str, list[float | None]]] = {name: {one: [] for one in LAUNCHERS} for name in faults}
    for _ in range(args.repeats):
        for name, figures in found.items():
            for launcher, command in LAUNCHERS.items():
                figure = None
                try:
                    figure = stands_still_s(command, faults[name])
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                figures[launcher].append(figure)
                print(f"{launcher}: {name}: {'not' if figure is None else f'{figure:.1f} s'}", file=sys.stderr)
    print(f"| seconds to the next step, median of {args.repeats} | {' | '.join(LAUNCHERS)} |\n|--|--|--|")
    for name, figures in found.items():
        print(f"| {name} | {' | '.join(map(shown, figures.values()))} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def shown(figures: Sequence[float | None]) -> str:
    """The median, and how often the training did not go on."""
    went_on = [figure for figure in figures if figure is not None]
    lost = f", {len(figures) - len(went_on)} of {len(figures)} did not go on" if len(went_on) < len(figures) else ""
    return (f"{statistics.median(went_on):.1f}" if went_on else "-") + lost


if __name__ == "__main__":
    main()
