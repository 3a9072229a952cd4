"""How long a training stands still when a worker is killed, and what it loses; beside torchrun's restart in the same run.

    python benchmarks/recovery.py [--kills 200] [--seed 0] [--restarts 10] [--json FILE]

Workers of trainers with 2 and 4 ranks get SIGKILL from inside the user's code, at places drawn by the seed: any rank, any phase,
one per epoch. Measured is from right before the kill to the end of the next optimizer step that needs the rank that was killed,
both on the machine's monotonic clock. All metrics and the digest of the final state are compared with those of a run without
kills; a parameter gets a gradient of one over the global batch from each sample, so that it counts how often each one was used.

torchrun runs a DDP loop by hand that saves a checkpoint per epoch, with 2 ranks; measured is from right before the kill to the end
of the first step after the restart. The steps that it takes again are not counted as time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from compare import LIMIT_S, PROGRAMS, TORCHRUN
from programs.recovery_training import (
    BATCH,
    DONE_NS,
    KILLED_NS,
    MEASURED,
    PHASES,
    SAVE_EVERY,
    SHARED_SIZE,
    STEPS,
    Clipping,
    Kill,
    Loss,
    arm,
    data_creator,
    model_creator,
    optimizer_creator,
    scheduler_creator,
    shared_memory,
)

from torchtrainer import CheckpointConfig, TorchTrainer

BACK_S = 60.0
"""Longest wait for a replacement before the next kill."""
MEDIAN_S, P99_S = 0.4, 1.0
"""What is to be reached."""

# Our side


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to.

    Attributes:
        metrics: of all calls.
        digest: of the final state.
        taken: optimizer steps.
        uses: how often each sample was used.
        seconds: from each kill to the next step.
        failures: that the trainer counted.
    """

    metrics: list[dict[str, float]]
    digest: str
    taken: int
    uses: list[float]
    seconds: list[float]
    failures: int


def digest(state: dict) -> str:
    sha = hashlib.sha256()
    for one in (*state["models"], *(values["state"] for values in state["optimizers"])):
        for key, value in sorted(one.items(), key=lambda item: str(item[0])):
            for name, tensor in value.items() if isinstance(value, dict) else [("", value)]:
                sha.update(f"{key}{name}".encode())
                sha.update(tensor.contiguous().numpy().tobytes() if isinstance(tensor, torch.Tensor) else b"")
    sha.update(repr(state["schedulers"]).encode())
    return sha.hexdigest()


def draw(random_: random.Random, world_size: int) -> Kill:
    phase = random_.choice(PHASES)
    most = {"load": STEPS * BATCH, "validation": MEASURED // BATCH // world_size, "save": 1}
    at = random_.randint(1, most.get(phase, STEPS - 1))  # after the last step of a call there is none to wait for
    return Kill(phase=phase, rank=random_.randrange(world_size), at=at)


def train(world_size: int, rounds: int, kills: Sequence[Kill]) -> Outcome:
    """Validates and trains in turn; the kills come one per round."""
    samples = world_size * BATCH * STEPS
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "shared")
        path.write_bytes(bytes(8 * SHARED_SIZE))
        config = {"samples": samples, "world_size": world_size, "path": str(path)}
        metrics, seconds = [], []
        with TorchTrainer(
            model_creator=model_creator,
            data_creator=data_creator,
            optimizer_creator=optimizer_creator,
            scheduler_creator=scheduler_creator,
            scheduler_step_freq="batch",
            loss_creator=Loss,
            training_operator_cls=Clipping,
            config=config,
            num_workers=world_size,
            num_cpus_per_worker=1,
            run_dir=Path(directory, "run"),
            checkpoint=CheckpointConfig(every_steps=SAVE_EVERY),
        ) as trainer:
            memory = shared_memory(str(path))
            for number in range(rounds):
                if number < len(kills):
                    arm(memory, number + 1, kills[number])
                metrics += [trainer.validate(), trainer.train()]
                if number < len(kills):
                    assert int(memory[KILLED_NS]), f"{kills[number]} did not come to pass"
                    seconds.append((int(memory[DONE_NS]) - int(memory[KILLED_NS])) / 1e9)
                    wait_until_replaced(trainer, world_size)
            state = trainer.state_dict()
            failures = len(trainer.status().failures)
    return Outcome(
        metrics=metrics,
        digest=digest(state),
        taken=state["optimizers"][0]["param_groups"][0]["taken"],
        uses=(state["models"][0]["used"] * -world_size * BATCH)[:samples].tolist(),
        seconds=seconds,
        failures=failures,
    )


def wait_until_replaced(trainer, world_size: int) -> None:
    deadline = time.monotonic() + BACK_S
    while len(trainer.status().processes) < world_size:
        if time.monotonic() > deadline:
            sys.exit(f"no replacement came within {BACK_S} s:\n{trainer.status()}")
        time.sleep(0.005)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the kills did to the training of so many ranks."""

    ranks: int
    kills: int
    recovered: int
    steps_lost: int
    samples_lost_or_doubled: int
    same_metrics: bool
    same_digest: bool
    seconds: list[float]


def measure(world_size: int, number: int, random_: random.Random) -> Found:
    """Trains once without kills and once with them."""
    kills = [draw(random_, world_size) for _ in range(number)]
    undisturbed, disturbed = train(world_size, number, []), train(world_size, number, kills)
    return Found(
        ranks=world_size,
        kills=number,
        recovered=min(disturbed.failures, len(disturbed.seconds)),
        steps_lost=number * STEPS - disturbed.taken,
        samples_lost_or_doubled=sum(used != number for used in disturbed.uses),
        same_metrics=disturbed.metrics == undisturbed.metrics,
        same_digest=disturbed.digest == undisturbed.digest,
        seconds=disturbed.seconds,
    )


# torchrun's side

RESTARTED = re.compile(r"^RESTARTED (\S+) (\d+)$", re.MULTILINE)


def restarts(kills: int, seed: int) -> tuple[list[float], int]:
    """Seconds from each kill to the next step under torchrun, and how many steps were taken again."""
    # torch 2.14's launcher keeps one store for all attempts, in which restarts now and then fail; this is in its favour.
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with tempfile.TemporaryDirectory() as directory:
        program = [str(PROGRAMS / "recovery_by_hand.py"), directory, str(seed), str(kills)]
        command = [*TORCHRUN, "--max-restarts", str(2 * kills), *program]
        done = subprocess.run(
            command,
            env=environ,
            capture_output=True,
            text=True,
            timeout=LIMIT_S * 2,
            check=False,
        )
    found = RESTARTED.findall(done.stdout)
    if not found:
        sys.exit(f"torchrun's side failed:\n{done.stdout}\n{done.stderr}")
    return [float(seconds) for seconds, _ in found], sum(int(steps) for _, steps in found)


# The report


def percentile_99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def report(found: Sequence[Found], theirs: Sequence[float], steps_again: int) -> None:
    """Prints what was found."""
    for one in found:
        print(
            f"{one.ranks} ranks: {one.recovered}/{one.kills} recovered, {one.steps_lost} steps lost, "
            f"{one.samples_lost_or_doubled} samples lost or doubled, metrics {'equal' if one.same_metrics else 'DIFFER'}, "
            f"final state {'equal' if one.same_digest else 'DIFFERS'}"
        )
    ours = [value for one in found for value in one.seconds]
    median, p99 = statistics.median(ours), percentile_99(ours)
    verdict = "met" if median <= MEDIAN_S and p99 <= P99_S else "not met"
    print("seconds from SIGKILL to the end of the next step")
    print(f"torchtrainer  median {median:.3f}  p99 {p99:.3f}  longest {max(ours):.3f}   {len(ours)} kills")
    if theirs:
        print(
            f"torchrun      median {statistics.median(theirs):.3f}  longest {max(theirs):.3f}   {len(theirs)} kills, "
            f"{steps_again} steps taken again"
        )
        print(f"ratio of medians {median / statistics.median(theirs):.3f}")
    print(f"target: median <= {MEDIAN_S} s, p99 <= {P99_S} s: {verdict}")


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restarts", type=int, default=10, help="kills under torchrun; 0: leave it out")
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    options = parser.parse_args()
    random_ = random.Random(options.seed)
    shares = {2: options.kills - options.kills // 2, 4: options.kills // 2}
    found = [measure(ranks, kills, random_) for ranks, kills in shares.items() if kills]
    theirs, steps_again = restarts(options.restarts, options.seed) if options.restarts else ([], 0)
    report(found, theirs, steps_again)
    if options.json:
        samples = {"torchtrainer": [asdict(one) for one in found], "torchrun": theirs, "steps_taken_again": steps_again}
        options.json.write_text(json.dumps(samples, indent=1) + "\n")


if __name__ == "__main__":
    main()
