"""Writes docs/benchmarks.md and its pictures from the samples of one run.

python benchmarks/page.py benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from estimate import Assumptions, paragraph
from figures import Row, arrivals_of, rows_of, wanted_accuracy
from peers import PLAIN
from plots import draw_accuracy, draw_control_plane, draw_scale, draw_start, draw_works

DOCS = Path(__file__).resolve().parents[1] / "docs"
MIB = 1 << 20
ESTIMATED_FROM = 1024
"""Ranks from whose costs the estimate goes on; the largest number that was measured if it is smaller."""

INTRODUCTION = """# Benchmarks

This page compares the cost of training with torchtrainer and with its peers, on the same work, in one run on one
machine. Only the ratios mean something: a quieter or larger machine gives other times. Each repetition runs every
command once, in turn, so that all see the same machine; the tables show the median and the range of the repetitions.

## Run them

```
make bench                                     everything, peers that are installed included
make bench BENCH_ARGS="--quick"                small sizes, once: whether it all runs
make bench BENCH_ARGS="--only mlp start"       some of it
make bench BENCH_ARGS="--data DIR --page"      resnet on the images below DIR/train/<class>/, and this page written anew
```

The samples of each run go to `benchmarks/results/`. A run first says about how long it will take. It skips peers that
are not installed, and shows the last lines of a command that fails while the others continue.

## What is measured

Each peer's program is below `benchmarks/programs/`, written as its documentation tells people to write it: `peer_by_hand.py` is the plain
DDP loop. All have 2 workers with 1 thread each, the same seeds, the same model, the same `DataLoader` in the training process, and SGD
with momentum.

| work | model | batch per worker | data |
| --- | --- | --- | --- |
| `mlp` | 64-128-10 | 32 | 32,000 random vectors: all but arithmetic shows |
| `resnet` | ResNet-18 for 32x32 images | 32 | 256 images: arithmetic shows |
| `transformer` | 2 layers, 128 wide, over 64 characters | 8 | 1,024 pieces of Python's help texts |
| `digits` | 3 convolutions | 8 | scikit-learn's digits, trained for 40 passes with a validation after each |

A step is from one batch to the next: loader, forward, backward, exchange, optimizer. Passes that warm up do not count. "Same weights" means that the
digest of all weights after the last step is that of the plain loop: the same bits. Accelerate deals the samples out in another order, so that its
weights are others by design, as they are with another precision or memory format.
"""


def cell(row: Row, digits: int) -> str:
    same = {True: "yes", False: "no", None: ""}[row.same_weights]
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return f"| {row.name} | {row.ms_per_step.shown(digits)} | {ratio} | {row.samples_per_s.shown(0)} | {same} |"


def facts(results: dict[str, Any]) -> Iterable[str]:
    """The run that the page is of."""
    machine = results["machine"]
    installed = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number[0].isdigit())
    missing = ", ".join(name for name, number in results["versions"].items() if not number[0].isdigit())
    yield "\n## This run\n"
    yield (
        f"Taken on {results['taken'][:10]}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine.get('memory_gib', '?')} GiB, {machine['system']} on {machine['architecture']}, load before it "
        f"{machine.get('load_before', '?')}. {installed}." + (f" Not installed: {missing}." if missing else "")
    )
    if results["quick"]:
        yield "\nIt was a quick run with small sizes, once each: it shows that everything runs, and its figures say little."


def works_section(works: dict[str, Any], pictures: Path, *, real_images: bool) -> Iterable[str]:
    """Time per step."""
    tables = {name: rows_of(samples, PLAIN) for name, samples in works.items() if name != "digits"}
    if not tables:
        return
    yield "\n## Time per step\n"
    for name, rows in tables.items():
        note = (", on images from a folder" if real_images else ", on random images") if name == "resnet" else ""
        yield f"\n`{name}`{note}:\n\n| | ms per step | ratio | samples/s | same weights |\n| --- | --- | --- | --- | --- |"
        yield from (cell(row, 0 if name == "resnet" else 2) for row in rows)
    draw_works(tables, pictures / "benchmarks_works.svg")
    yield "\n![Time per step as multiples of the plain loop's](benchmarks_works.svg)"


def accuracy_section(works: dict[str, Any], pictures: Path) -> Iterable[str]:
    """Time to accuracy."""
    wanted = wanted_accuracy(works.get("digits", {}), PLAIN)
    if wanted is None:
        return
    yield (
        f"\n## Time to accuracy\n\nSeconds from the start of the command until the validation accuracy of `digits` is {wanted:.1%}, which is 90 % of "
        "what the plain loop ends with.\n\n| | seconds | accuracy at the end |\n| --- | --- | --- |"
    )
    for one in arrivals_of(works["digits"], wanted):
        seconds = "never" if one.seconds is None else one.seconds.shown(1)
        yield f"| {one.name} | {seconds} | {one.final.median:.1%} |"
    draw_accuracy(works["digits"], wanted, pictures / "benchmarks_accuracy.svg")
    yield "\n![Validation accuracy over time](benchmarks_accuracy.svg)"


def medians(title: str, unit: str, samples: dict[str, Sequence[float]], factor: float = 1.0) -> Iterable[str]:
    """A table of medians."""
    yield f"\n{title}\n\n| | {unit} |\n| --- | --- |"
    for name, values in samples.items():
        found = [value * factor for value in values]
        yield f"| {name} | {statistics.median(found):,.2f} ({min(found):,.2f} to {max(found):,.2f}) |"


def parts_section(parts: dict[str, Any], pictures: Path) -> Iterable[str]:
    """Start, restart, checkpoints, recovery, exchange, memory."""
    if parts.keys() - {"scale", "control_plane"}:
        yield "\n## Start, checkpoints, recovery"
    if "start" in parts:
        yield from medians("From the start of the command to the first optimizer step:", "seconds", parts["start"])
        draw_start(parts["start"], pictures / "benchmarks_start.svg")
        yield "\n![Seconds to the first step](benchmarks_start.svg)"
    if "launch" in parts:
        sides = {f"{row}, {side}": values for row, found in parts["launch"].items() for side, values in found.items()}
        yield from medians(
            "`torchtrainer run` beside torchrun; restarts are from crash to all-reduce:", "seconds", sides
        )
    if "checkpoint" in parts:
        stalls = parts["checkpoint"]["stall_s"]
        yield from medians("How long training stands still for a checkpoint of ResNet-18 (89 MB):", "ms", stalls, 1e3)
    if "recovery" in parts:
        ours = [seconds for found in parts["recovery"]["torchtrainer"] for seconds in found["seconds"]]
        theirs = parts["recovery"]["torchrun"]
        sides = {"torchtrainer": ours, **({"torchrun --max-restarts": theirs} if theirs else {})}
        yield from medians("From SIGKILL of a worker to the end of the next step:", "seconds", sides)
    if "exchange" in parts:
        yield from exchange_table(parts["exchange"])
    if "memory" in parts:
        found = parts["memory"]
        yield (
            f"\n{found['workers']} workers hold {found['proportional_bytes'] / MIB:,.0f} MiB together (PSS); resident memory, which counts "
            f"what they share in each, is {found['resident_bytes'] / MIB:,.0f} MiB."
        )


def exchange_table(found: dict[str, Any]) -> Iterable[str]:
    """The exchange of gradients."""
    yield "\nAveraging gradients between processes, ms: shared memory, and Gloo's all-reduce in the same processes.\n"
    yield "| processes | bytes | shared memory | Gloo |\n| --- | --- | --- | --- |"
    for processes, sizes in found.items():
        for size, seconds in sizes.items():
            yield f"| {processes} | {int(size):,} | {seconds['shared'] * 1e3:.3f} | {seconds['gloo'] * 1e3:.3f} |"


def scale_section(parts: dict[str, Any], pictures: Path) -> Iterable[str]:
    """More processes, and very many ranks."""
    if "scale" in parts:
        yield """
## More processes on this machine

A tiny model, one thread per worker, and more workers than cores: a step takes as long as the work of all workers takes on the cores that there
are. Supervision is driver, host and spawner together: their processor time while `train()` runs, and the messages that the driver gets and
sends. No message is sent per step: workers send heartbeats once a second, so that a longer step sees more of them.

| workers | start, s | ms per step | driver, % of a core | with host and spawner | µs per step | messages per s | MiB per worker |
| --- | --- | --- | --- | --- | --- | --- | --- |"""
        for one in parts["scale"]:
            yield (
                f"| {one['workers']} | {one['start_s']:.2f} | {one['ms_per_step']:.2f} | {one['driver_share']:.1%} | "
                f"{one['supervision_share']:.1%} | {one['supervision_us_per_step']:,.0f} | {one['messages_per_s']:.0f} | "
                f"{one['worker_bytes'] / MIB:.0f} |"
            )
        draw_scale(parts["scale"], pictures / "benchmarks_scale.svg")
        yield "\n![Supervision, start and memory over the number of workers](benchmarks_scale.svg)"
    if "control_plane" in parts:
        yield from control_plane_section(parts["control_plane"], pictures)


def control_plane_section(costs: Sequence[dict[str, float]], pictures: Path) -> Iterable[str]:
    """The driver with synthetic workers."""
    yield """
## The control plane with very many ranks

The driver's real code behind its real socket; one other process speaks for all workers and their host. Processor time of the driver in all,
and per rank. A failure is a worker that is lost, whose rank another one carries; then a new worker is built, all hold at a step boundary, and
it joins.

| ranks | start | call, to all results | one heartbeat of each | one failure | watching, % of a core |
| --- | --- | --- | --- | --- | --- |"""
    for one in costs:
        cells = (
            f"{one[name]:.3f} s, {one[name] / one['ranks'] * 1e6:.0f} µs per rank"
            for name in ("start_s", "call_s", "beat_s", "failure_s")
        )
        yield f"| {one['ranks']:,} | {' | '.join(cells)} | {one['watching_s']:.1%} |"
    draw_control_plane(costs, pictures / "benchmarks_control_plane.svg")
    yield "\n![Driver time per rank over the number of ranks](benchmarks_control_plane.svg)"
    known = [cost for cost in costs if cost["ranks"] <= ESTIMATED_FROM] or list(costs)
    yield "\n## 10,000 GPUs, on paper\n\n"
    yield paragraph(known[-1], Assumptions())


def page_of(results: dict[str, Any], pictures: Path) -> str:
    """The page as Markdown; draws its pictures into a directory."""
    works, parts = results["works"], results["parts"]
    lines = [
        INTRODUCTION,
        *facts(results),
        *works_section(works, pictures, real_images=results["real_images"]),
        *accuracy_section(works, pictures),
        *parts_section(parts, pictures),
        *scale_section(parts, pictures),
    ]
    return "\n".join(line.rstrip("\n") for line in lines).rstrip() + "\n"


def write_page(results: dict[str, Any], docs: Path = DOCS) -> None:
    """Writes the page and its pictures."""
    (docs / "benchmarks.md").write_text(page_of(results, docs))


def main() -> None:
    """Reads the samples and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a JSON file that all.py wrote")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page goes (default: docs)")
    options = parser.parse_args()
    write_page(json.loads(options.results.read_text()), options.docs)


if __name__ == "__main__":
    main()
