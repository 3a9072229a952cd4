"""What the ways to compute a step come to on this machine, each against the plain one, in one process with one thread.

    python benchmarks/compute.py [--repeats 60] [--json FILE]

``optimizers``: every form of torch's optimizers, with a few and with many parameters. ``models``: precision and memory format of convolutions, forward, backward and update together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

from torchtrainer.resnet import ResNet18

OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.1}),
    "SGD, momentum, weight decay": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}),
    "Adam": (optim.Adam, {"lr": 0.01}),
    "AdamW": (optim.AdamW, {"lr": 0.01}),
    "RMSprop": (optim.RMSprop, {"lr": 0.01}),
    "NAdam": (optim.NAdam, {"lr": 0.01}),
}
FORMS: dict[str, dict[str, bool]] = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
SETS: dict[str, list[tuple[int, ...]]] = {
    "4 parameters, 10 k": [(128, 64), (128,), (10, 128), (10,)],
    "64 parameters, 0.4 M": [(64, 64), (192,), (64,), (64,), (256, 64), (256,), (64, 256), (64,)] * 8,
    "60 parameters, 4 M": [(256, 256)] * 60,
}
BATCH = 16


def convolutions() -> nn.Module:
    """A few small convolutions."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2048, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"small convolutions": convolutions, "ResNet-18": lambda: ResNet18({})}


def interleaved(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of each step: medians of repeats that take turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number >= 2:  # the first ones warm up
                found[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(values) for name, values in found.items()}


def made(shapes: Sequence[tuple[int, ...]], kind: type[optim.Optimizer], options: dict[str, Any]) -> optim.Optimizer:
    """An optimizer over parameters with gradients."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for one in parameters:
        one.grad = torch.randn(one.shape)
    return kind(parameters, **options)


def optimizers(repeats: int) -> list[dict[str, Any]]:
    """One row per optimizer and set of parameters."""
    rows = []
    for name, (kind, options) in OPTIMIZERS.items():
        for size, shapes in SETS.items():
            forms = {}
            for form, how in FORMS.items():
                try:
                    forms[form] = made(shapes, kind, {**options, **how})
                except TypeError:
                    continue  # it has no such form
            found = interleaved({form: one.step for form, one in forms.items()}, repeats)
            row: dict[str, Any] = {"optimizer": name, "parameters": size, "plain_ms": found["plain"]}
            row.update({form: found["plain"] / found[form] for form in forms})
            rows.append(row)
            told = [f"{form} {row[form]:5.2f} x" for form in forms]
            print(f"{name:30s} {size:22s} {row['plain_ms']:8.3f} ms   {'   '.join(told)}", flush=True)
    return rows


def models(repeats: int) -> list[dict[str, Any]]:
    """One row per model."""
    rows = []
    for name, make in MODELS.items():
        steps = {
            f"{precision}{', channels last' if last else ''}": training_step(
                make(), half=precision == "bf16", last=last
            )
            for precision in ("fp32", "bf16")
            for last in (False, True)
        }
        found = interleaved(steps, repeats)
        rows.append({"model": name, "fp32_ms": found["fp32"], **{one: found["fp32"] / ms for one, ms in found.items()}})
        told = "   ".join(f"{one} {found['fp32'] / ms:4.2f} x" for one, ms in found.items())
        print(f"{name:30s} {found['fp32']:8.1f} ms   {told}", flush=True)
    return rows


def training_step(model: nn.Module, *, half: bool, last: bool) -> Callable[[], object]:
    """Forward, backward and update of one batch of 32 x 32 images."""
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    optimizer = optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60, help="of each optimizer step; models take a tenth of them")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("speed against the plain form; more is faster")
    rows = {"optimizers": optimizers(arguments.repeats), "models": models(max(3, arguments.repeats // 10))}
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
