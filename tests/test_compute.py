"""How a step is computed, other than plainly: with the same numbers, or with those that were asked for."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from recovery_programs import digest
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import BATCH_SIZE, InvalidArgumentError, TorchTrainer, TrainingOperator
from torchtrainer.process.affinity import cores_for, memory_nodes
from torchtrainer.train.optimizers import FOREACH_GIVES_THE_SAME_BITS, choose_form

SAMPLES = 44
"""Not a whole number of steps, whatever a step is in these tests."""


def images(size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(size)
    return TensorDataset(
        torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 5, (size,), generator=generator)
    )


def data_creator(config):
    return DataLoader(images(SAMPLES), batch_size=config.get(BATCH_SIZE, 4)), DataLoader(images(10), batch_size=5)


def model_creator(config):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(144, 5),
    )


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def trainer(**options) -> TorchTrainer:
    defaults = {
        "model_creator": model_creator,
        "data_creator": data_creator,
        "optimizer_creator": optimizer_creator,
        "loss_creator": nn.CrossEntropyLoss,
        "num_workers": 2,
        "num_cpus_per_worker": 1,
        "run_dir": None,
    }
    return TorchTrainer(**{**defaults, **options})


def weights_after(epochs: int = 2, **options) -> dict[str, torch.Tensor]:
    with trainer(**options) as one:
        for _ in range(epochs):
            one.train()
        return one.state_dict()["models"][0]


# Gradient accumulation


def by_hand(world_size: int, batch: int, accumulate: int, epochs: int = 2) -> dict[str, torch.Tensor]:
    """The same training in one process: every step is the mean over all samples of all ranks' batches in it."""
    torch.manual_seed(0)
    model = model_creator({})
    optimizer, data = optimizer_creator(model, {}), images(SAMPLES)
    step = world_size * batch * accumulate
    for _ in range(epochs):
        for start in range(0, SAMPLES, step):
            x, y = (torch.stack(one) if one[0].dim() else torch.tensor(one) for one in zip(*(data[i] for i in range(start, min(start + step, SAMPLES))), strict=True))  # fmt: skip
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("options", [{}, {"strategy": "zero1"}], ids=["", "over the process group"])
def test_gradients_of_several_batches_make_one_step(ranks, options) -> None:
    found, expected = weights_after(num_workers=ranks, accumulate=3, **options), by_hand(ranks, 4, 3)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_steps_and_results_count_what_the_optimizer_does() -> None:
    with trainer(accumulate=3) as one:
        result = one.train()
        assert (result["batch_count"], result["num_samples"]) == (2, SAMPLES)  # 6 batches per rank
        assert one.train(num_steps=1)["num_samples"] == 24
        assert one.state_dict()["global_step"] == 3


def test_an_accumulated_pass_goes_on_in_the_middle_after_a_change_of_processes() -> None:
    found = []
    for middle in (lambda one: None, lambda one: one.resize(1)):
        with trainer(accumulate=2) as one:
            one.train(num_steps=1)
            middle(one)
            one.train()
            found.append(digest(one.state_dict()))
    assert found[0] == found[1]


class Own(TrainingOperator):
    def train_batch(self, batch, batch_info):
        return super().train_batch(batch, batch_info)


def test_accumulating_is_refused_where_the_user_makes_the_update() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"accumulate=2 is done by the built-in step, and Own has its own train_batch"
    ):
        trainer(accumulate=2, training_operator_cls=Own)


# Optimizers

SHAPES = [(16, 12), (16,), (), (3, 3, 2, 2), (70, 33)] * 4


def stepped(kind, options, *, dtype, form) -> list[torch.Tensor]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    optimizer = kind(parameters, **options)
    assert choose_form(optimizer, form) == ""
    assert (optimizer.param_groups[0]["foreach"] is True) == (form == "auto")
    for _ in range(10):
        for one in parameters:
            one.grad = torch.randn(one.shape).to(dtype)
        optimizer.step()
    states = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, torch.Tensor)]
    return [*parameters, *states]


OPTIONS = [{}, {"weight_decay": 0.1}, {"maximize": True}]
SPECIAL = {
    optim.SGD: [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.1}],
    optim.Adam: [{"amsgrad": True}],
    optim.AdamW: [{"amsgrad": True}],
    optim.Adagrad: [{"lr_decay": 0.1}],
    optim.RMSprop: [{"centered": True, "momentum": 0.9}],
    optim.Rprop: [],
}
CASES = [
    (kind, options)
    for kind in sorted(FOREACH_GIVES_THE_SAME_BITS, key=lambda kind: kind.__name__)
    for options in (OPTIONS[::2] if kind is optim.Rprop else OPTIONS) + SPECIAL.get(kind, [])
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{kind.__name__} {options}" for kind, options in CASES])
def test_many_parameters_at_once_get_the_same_bits(kind, options, dtype) -> None:
    one_by_one, at_once = (stepped(kind, options, dtype=dtype, form=form) for form in (False, "auto"))
    assert all(torch.equal(one, other) for one, other in zip(one_by_one, at_once, strict=True))


def test_a_form_stays_when_a_state_of_another_is_loaded() -> None:
    def make() -> optim.Optimizer:
        return optim.Adam([nn.Parameter(torch.ones(3)) for _ in range(20)])

    fused, plain = make(), make()
    assert choose_form(fused, True) == ""
    fused.load_state_dict(plain.state_dict())
    assert fused.param_groups[0]["fused"] is True


def test_what_the_user_chose_and_what_has_other_bits_is_left_alone() -> None:
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(20)]
    for optimizer in (optim.Adam(parameters, foreach=False), optim.NAdam(parameters), optim.LBFGS(parameters)):
        before = [{**group} for group in optimizer.param_groups]
        assert choose_form(optimizer, "auto") == ""
        assert optimizer.param_groups == before


def adafactor_creator(model, config):
    return optim.Adafactor(model.parameters(), lr=0.01)


def test_an_optimizer_without_a_fused_kernel_steps_as_it_is_with_one_notice(capfd) -> None:
    plain = weights_after(1, optimizer_creator=adafactor_creator)
    capfd.readouterr()
    found = weights_after(1, optimizer_creator=adafactor_creator, fused=True)
    said = capfd.readouterr().err
    assert said.count("fused=True: Adafactor has no fused kernel; it steps as it is") == 1
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


def test_half_precision_takes_fused_kernels_where_there_are_some() -> None:
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(20)]
    adam, rmsprop, chosen = optim.Adam(parameters), optim.RMSprop(parameters), optim.Adam(parameters, foreach=False)
    assert [choose_form(one, "auto", half=True) for one in (adam, rmsprop, chosen)] == [""] * 3
    assert [one.param_groups[0].get("fused") for one in (adam, rmsprop, chosen)] == [True, None, None]
    assert rmsprop.param_groups[0]["foreach"] is True


def test_parameters_with_their_channels_last_are_not_updated_by_fused_kernels() -> None:
    weight = torch.randn(8, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    optimizer = optim.SGD([nn.Parameter(weight)], lr=0.1, momentum=0.9)
    assert choose_form(optimizer, "auto", half=True) == ""
    assert not optimizer.param_groups[0]["fused"]
    assert choose_form(optimizer, True) == "SGD has none for parameters with their channels last"


def test_fused_kernels_give_the_same_numbers_but_for_rounding(capfd) -> None:
    plain, found = weights_after(), weights_after(fused=True)
    assert "fused" not in capfd.readouterr().err
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


# Memory format, precision


@pytest.mark.parametrize(
    "options", [{}, {"strategy": "zero1"}, {"training_operator_cls": Own}], ids=["", "zero1", "own"]
)
def test_channels_last_gives_the_same_numbers_but_for_rounding(options) -> None:
    plain, found = weights_after(), weights_after(memory_format="auto", **options)
    assert found["0.weight"].is_contiguous(memory_format=torch.channels_last)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_channels_last_survives_a_checkpoint_and_a_change_of_processes(tmp_path) -> None:
    with trainer(memory_format="channels_last") as one:
        one.train()
        one.save(tmp_path / "state")
        one.train()
        expected = digest(one.state_dict())
    with trainer(memory_format="channels_last") as one:
        one.resize(1)
        one.load(tmp_path / "state")
        one.train()
        assert digest(one.state_dict()) == expected


def test_half_precision_has_its_channels_last_unless_told_otherwise() -> None:
    found, as_made = (weights_after(precision="bf16", memory_format=one)["0.weight"] for one in (None, "as_made"))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert as_made.is_contiguous()


def test_half_precision_trains_and_is_not_full_precision() -> None:
    plain, found = weights_after(), weights_after(precision="bf16")
    assert all(one.dtype == torch.float32 for one in found.values())
    assert not torch.equal(plain["0.weight"], found["0.weight"])
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0.3, atol=0.1)


# Compiling


def plain_model(config):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 5))


def compile_cache() -> str | None:
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("", "run/compiled"),
        ("/elsewhere", "/elsewhere"),
        (f"{tempfile.gettempdir()}/torchinductor_me", "run/compiled"),  # torch's own, in a process that has compiled
    ],
)
def test_workers_keep_what_they_compile_in_the_run_directory(tmp_path, monkeypatch, chosen, expected) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", chosen)
    with trainer(run_dir=tmp_path / "run", compile=True) as one:
        assert one.apply_all_workers(compile_cache) == [str(tmp_path / expected)] * 2


@pytest.mark.timeout(240)
@pytest.mark.soak
def test_what_was_compiled_is_used_again_and_gives_the_same_bits(tmp_path) -> None:
    options = {"model_creator": plain_model, "compile": True, "num_workers": 1}
    found, files = [], []
    for _ in range(2):
        with trainer(run_dir=tmp_path / "run", resume=False, **options) as one:
            one.train()
            found.append(digest(one.state_dict()))
            cache = Path(one.status().run_dir) / "compiled"
            files.append(set(cache.rglob("*.so")))
    assert files[0], "something was compiled"
    assert found[0] == found[1]


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = plain_model({})

    def forward(self, x):
        return self.layers(x) + broken(x).mean()


def uncompilable_model(config):
    return Untraceable()


@torch.library.custom_op("torchtrainer_tests::broken", mutates_args=())
def broken(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


@broken.register_fake
def _(x):
    raise RuntimeError("no compiler can see through this")


@pytest.mark.timeout(240)
def test_a_model_that_cannot_be_compiled_runs_as_it_is_with_one_notice(capfd) -> None:
    plain = weights_after(1, model_creator=uncompilable_model)
    capfd.readouterr()
    found = weights_after(1, model_creator=uncompilable_model, compile=True)
    said = capfd.readouterr().err
    assert said.count("compile: a part of the model cannot be compiled and runs as it is") == 1
    assert "no compiler can see through this" in said
    assert "Traceback" not in said
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


def test_options_that_the_compiler_does_not_know_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"torch.compile does not take compile={'backend': 'nonsense'}"):
        trainer(compile={"backend": "nonsense"})


# Parameters without gradients, batches of changing sizes


class Partial(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = plain_model({}), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


def partial_model(config):
    return Partial()


def test_parameters_that_a_model_does_not_use_stay_as_they_are() -> None:
    before = weights_after(0, model_creator=partial_model)
    after = weights_after(1, model_creator=partial_model)
    assert torch.equal(before["unused.weight"], after["unused.weight"])
    assert not torch.equal(before["used.1.weight"], after["used.1.weight"])


# Cores


@pytest.mark.parametrize(
    ("place", "processes", "threads", "nodes", "own", "expected"),
    [
        (0, 2, 2, [[0, 1, 2, 3]], True, {0, 1}),
        (1, 2, 2, [[0, 1, 2, 3]], True, {2, 3}),
        (1, 3, 1, [[0, 1, 2, 3]], True, {1}),
        (2, 3, 1, [[0, 1, 2, 3]], True, {2, 3}),
        (2, 4, 2, [[0, 1, 8, 9], [4, 5, 6, 7]], True, {4, 5}),
        (0, 2, 2, [[0, 1], [2, 3]], False, {0, 1}),
        (3, 4, 1, [[0, 1], [2, 3]], False, {2, 3}),
        (0, 4, 2, [[0, 1], [2, 3]], False, set()),
        (0, 1, 1, [[0, 1], [2, 3]], False, set()),
        (0, 2, 1, [[0, 1, 2, 3]], False, set()),
    ],
)
def test_cores_are_shared_out_by_memory_node(place, processes, threads, nodes, own, expected) -> None:
    assert cores_for(place, processes, threads, nodes, own=own) == expected


def test_memory_nodes_are_read_as_the_system_lists_them(tmp_path) -> None:
    for node, cores in ((0, "0-2,8\n"), (1, "3\n"), (10, "4-5")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cores)
    assert memory_nodes(tmp_path) == [{0, 1, 2, 8}, {3}, {4, 5}]
    assert memory_nodes(tmp_path / "none") == []


def cores(operator) -> list[int]:
    return sorted(os.sched_getaffinity(0))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not bind processes to cores")
def test_each_process_has_cores_of_its_own_if_asked_to(capfd) -> None:
    here = sorted(os.sched_getaffinity(0))
    if len(here) < 2:
        pytest.skip("needs two cores")
    with trainer(cpu_affinity=True) as one:
        first, second = one.apply_all_operators(cores)
    assert set(first).isdisjoint(second)
    assert sorted(first + second) == here
    with trainer(cpu_affinity=True, num_cpus_per_worker=len(here)) as one:
        assert one.apply_all_operators(cores) == [here, here]
    assert capfd.readouterr().err.count("cpu_affinity=True: 2 processes with") == 1
