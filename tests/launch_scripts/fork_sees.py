"""Writes what a program can find out about itself, its interpreter and what it starts, to ``$FORK_FACTS/RANK.json``.

``same`` has to be equal however the process was started; ``own`` is never the same in two processes.
"""

from __future__ import annotations

import builtins
import gc
import importlib.util
import inspect
import json
import logging
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import threading
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path

THIRD_PARTY = sorted(n for n in sys.modules if n.partition(".")[0] not in sys.stdlib_module_names)
FILTERS = [str(entry) for entry in warnings.filters]
LOGGERS = sorted(
    n for n in logging.root.manager.loggerDict if n.partition(".")[0] in ("numpy", "sympy", "torchtrainer")
)
RANK = int(os.environ["RANK"])


@dataclass(frozen=True)
class Point:
    """Defined in ``__main__``."""

    x: int
    y: int = 0


def seen_in_child(queue) -> None:
    parent = multiprocessing.parent_process()
    queue.put([Point(1, 2), sys.argv, parent is not None, multiprocessing.current_process().daemon])


def before_torch() -> dict[str, object]:
    from report import descriptors, interpreter, main_module, process, streams

    return {
        "third party": THIRD_PARTY,
        "filters": FILTERS,
        "own loggers": LOGGERS,
        "builtins": sorted(
            name for name in vars(builtins) if not name.startswith("__pybind11_internals")
        ),  # up to torch 2.7
        "main": {**main_module(), "names": sorted(n for n in globals() if n.startswith("__"))},
        "interpreter": interpreter(),
        "streams": streams(),
        "descriptors": descriptors(),
        "process": process(),
        "terminal": Path("/proc/self/stat").read_text().rpartition(")")[2].split()[4],
        "environ": dict(os.environ),
        "tempdir": tempfile.tempdir,
        "garbage": [gc.isenabled(), gc.get_threshold(), gc.get_debug(), len(gc.callbacks)],
        "threads": [t.name for t in threading.enumerate()] + [threading.main_thread() is threading.current_thread()],
        "hooks": [
            threading.gettrace() is None,
            sys.unraisablehook is sys.__unraisablehook__,
            sys.breakpointhook.__name__,
        ],
        "specs": {n: found(n) for n in ("torch", "torch.nn", "numpy", "torchtrainer", "no_such_module", "report")},
        "still no torch": "torch" in sys.modules,
        "source": inspect.getsource(Point),
        "pickled": pickle.dumps(Point(1, 2)).hex(),
        "equal": pickle.loads(pickle.dumps(Point(1))) == Point(1),
    }


def found(name: str) -> object:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        return str(error)
    return spec and [
        spec.name,
        spec.origin,
        spec.has_location,
        spec.parent,
        list(spec.submodule_search_locations or ()),
    ]


def own() -> dict[str, object]:
    import numpy
    import torch

    return {
        "random": random.random(),
        "numpy": float(numpy.random.rand()),
        "generator": float(numpy.random.default_rng().random()),
        "uuid": str(uuid.uuid4()),
        "name": next(tempfile._get_candidate_names()),
        "torch": torch.rand(1).item(),
        "torch's seed": torch.initial_seed(),
        "authkey": bytes(multiprocessing.current_process().authkey).hex(),
        "pid": os.getpid(),
    }


def torch_itself() -> dict[str, object]:
    import torch

    return {
        "filters": [str(entry) for entry in warnings.filters],
        "spec": found("torch"),
        "is loaded": sys.modules["torch"] is torch and sys.modules["torch.nn"] is torch.nn,
        "drawn": torch.rand(4, generator=torch.manual_seed(3)).tolist(),
        "parallel": torch.__config__.parallel_info(),
        "threads in backward": threads_in_backward(),
        "grad, dtype": [
            torch.is_grad_enabled(),
            str(torch.get_default_dtype()),
            torch.are_deterministic_algorithms_enabled(),
        ],
        "loggers": {n: logging.getLogger(n).level for n in ("torch", "torch.distributed", "torch._dynamo")},
        "sharing": torch.multiprocessing.get_sharing_strategy(),
        "compiled": torch.compile(lambda x: torch.sin(x) * 2, backend="eager")(torch.ones(2)).tolist(),
    }


def threads_in_backward() -> list[int]:
    import torch

    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(torch.get_num_threads())
            return gradient

    Look.apply(torch.ones(1, requires_grad=True)).sum().backward()
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    return seen


def training() -> list[str]:
    """Bits of the parameters after steps of DDP."""
    import torch
    from torch import distributed, nn

    distributed.init_process_group("gloo")
    torch.manual_seed(3)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 5)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(RANK)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(32, 64)), torch.randint(0, 5, (32,))).backward()
        optimizer.step()
    distributed.destroy_process_group()
    return [p.detach().numpy().tobytes().hex()[:400] for p in model.parameters()]


class Squares:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[int]:
        import torch

        return [index * index, torch.get_num_threads(), torch.utils.data.get_worker_info().id]


def loaded(method: str) -> list[object]:
    from torch.utils.data import DataLoader

    return [
        [t.tolist() for t in batch] for batch in DataLoader(Squares(), num_workers=2, multiprocessing_context=method)
    ]


def children() -> dict[str, object]:
    answers = {}
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        child = context.Process(target=seen_in_child, args=(queue,))
        child.start()
        answers[method] = [str(queue.get()), child.join(), child.exitcode]
    return answers


def main() -> None:
    same = {"before": before_torch()}
    facts = {"same": same, "own": own()}  # before a seed is set
    same["torch"] = torch_itself()
    same["training"] = training()
    if RANK == 0:
        same["children"] = children()
        same["loaders"] = {method: loaded(method) for method in ("fork", "spawn")}
    Path(os.environ["FORK_FACTS"], f"{RANK}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
