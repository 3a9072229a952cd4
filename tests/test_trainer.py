"""The trainer from outside, with real worker processes: what it returns, what it shows, what state it carries."""

from __future__ import annotations

import json
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import BATCH_SIZE, LocalEngine, TrainerClosedError, TrainingOperator
from torchtrainer.observe.devices import proportional_memory, read_process_use

N_TRAIN, N_VALIDATION = 64, 21


def samples(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 20, generator=generator)
    return TensorDataset(x, x[:, :5].argmax(1))


def model_creator(config):
    return torch.nn.Linear(20, 5)


def data_creator(config):
    batch = config.get(BATCH_SIZE, 4)
    return DataLoader(samples(N_TRAIN, 0), batch_size=batch, shuffle=True), DataLoader(samples(N_VALIDATION, 1), 4)


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=config.get("lr", 0.1), momentum=0.9)


@pytest.fixture
def make(trainers):
    """Makes trainers that are shut down at the end of the test."""
    return partial(
        trainers,
        model_creator=model_creator,
        data_creator=data_creator,
        optimizer_creator=optimizer_creator,
        loss_creator=torch.nn.CrossEntropyLoss,
        num_workers=2,
    )


def reference_weights(world_size, epochs, batch):
    """The same training by hand: one process, the gradient of each global batch as the mean of the ranks' gradients."""
    from torch.utils.data.distributed import DistributedSampler

    torch.manual_seed(0)
    model = model_creator({})
    optimizer = optimizer_creator(model, {})
    data = samples(N_TRAIN, 0)
    loaders = []
    for rank in range(world_size):
        sampler = DistributedSampler(data, num_replicas=world_size, rank=rank, shuffle=True, seed=0)
        loaders.append(DataLoader(data, batch_size=batch, sampler=sampler))
    for epoch in range(epochs):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for batches in zip(*loaders, strict=True):
            optimizer.zero_grad()
            for x, y in batches:
                (torch.nn.functional.cross_entropy(model(x), y) / world_size).backward()
            optimizer.step()
    return model.state_dict()


def test_training_gives_the_weights_of_a_loop_written_by_hand(make) -> None:
    trainer = make()
    trainer.train()
    trainer.train()
    expected = reference_weights(world_size=2, epochs=2, batch=4)
    for name, value in trainer.get_model().state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_count_every_sample_once(make, world_size) -> None:
    trainer = make(num_workers=world_size, config={BATCH_SIZE: 7})
    stats = trainer.train()
    assert (stats["num_samples"], stats["epoch"], stats["batch_count"]) == (N_TRAIN, 1, -(-N_TRAIN // 7))
    assert isinstance(stats["epoch"], int)
    found = trainer.validate()
    assert found["num_samples"] == N_VALIDATION
    model = trainer.get_model().eval()
    x, y = samples(N_VALIDATION, 1).tensors
    with torch.no_grad():
        output = model(x)
    assert found["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(output, y).item(), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx((output.argmax(1) == y).double().mean().item())


def test_a_state_goes_from_two_ranks_to_one_and_back(make, tmp_path) -> None:
    two, one = make(), make(num_workers=1)
    two.train()
    state = two.state_dict()
    assert not any(key.startswith("module.") for key in state["models"][0])
    path = two.save(tmp_path / "model.pt")
    one.load(path)
    for name, value in one.get_model().state_dict().items():
        assert torch.equal(value, state["models"][0][name])
    assert one.train()["epoch"] == 2
    two.load_state_dict(one.state_dict())
    assert two.train()["epoch"] == 3


def foreign_files(folder, model):
    """Weights as other tools save them, by name, and what else may be in a file."""
    weights = model.state_dict()
    forms = {
        "bare.pth": weights,
        "ddp.pth": {f"module.{name}": value for name, value in weights.items()},
        "compiled.pth": {f"module._orig_mod.{name}": value for name, value in weights.items()},
        "lightning.ckpt": {
            "state_dict": {**{f"net.{name}": value for name, value in weights.items()}, "loss.weight": torch.ones(5)},
            "epoch": 7,
            "optimizer_states": [{}],
        },
        "example.pth.tar": {"epoch": 7, "model_state_dict": weights, "optimizer": {"state": {}}},
        "list.pt": {"models": [weights]},
    }
    for name, value in forms.items():
        torch.save(value, folder / name)
    return list(forms)


def test_weights_of_other_tools_are_loaded_and_nothing_else_changes(make, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.manual_seed(3)
    wanted = torch.nn.Linear(20, 5)
    trainer = make()
    trainer.train(num_steps=3)
    own = trainer.save("~/new/deep/own.pt")
    assert Path(own) == tmp_path / "new" / "deep" / "own.pt"
    for name in foreign_files(tmp_path, wanted):
        trainer.load("~/new/deep/own.pt")
        trainer.load(tmp_path / name)
        state = trainer.state_dict()
        assert torch.equal(state["models"][0]["weight"], wanted.weight), name
        assert (state["global_step"], state["epoch"]) == (3, 1)
    assert "the weights of loss.weight do not belong to the model and were left out" in capsys.readouterr().err
    trainer.train(num_steps=3)
    trainer.load_state_dict({f"module.{name}": torch.zeros_like(value) for name, value in wanted.state_dict().items()})
    zeros = trainer.apply_all_operators(
        lambda operator: operator.model.state_dict()["module.weight"].abs().sum().item()
    )
    assert zeros == [0.0, 0.0]
    assert trainer.train()["batch_count"] == 5, "the pass that was running goes on"


def test_a_file_that_is_no_state_is_refused_with_what_to_do(make, tmp_path) -> None:
    trainer = make(num_workers=1)
    torch.save(torch.nn.Linear(20, 5), tmp_path / "whole.pt")
    torch.save({"acc": 1.0, "tensors": [torch.ones(1)]}, tmp_path / "numbers.pt")
    torch.save(torch.nn.Linear(3, 5).state_dict(), tmp_path / "other.pt")
    (tmp_path / "noise.pt").write_bytes(b"not of torch")
    expected = {
        "whole.pt": r"class torch.nn.modules.linear.Linear.*Save model.state_dict\(\) instead",
        "numbers.pt": r"holds a dict with acc, tensors, which is not a state.*load_state_dict\(checkpoint",
        "noise.pt": r"not a file of tensors written by torch.save",
        "": r"load takes a file, and .* is a directory; it has ",
    }
    for name, text in expected.items():
        with pytest.raises(ValueError, match=text) as found:
            trainer.load(tmp_path / name)
        assert "weights_only" not in str(found.value)
    with pytest.raises(RuntimeError, match=r"weight has shape \(5, 3\) in the state and \(5, 20\) here"):
        trainer.load(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        trainer.load(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match="is a directory"):
        trainer.save(tmp_path)


def test_functions_run_on_every_rank_in_order(make) -> None:
    trainer = make()
    pids = trainer.apply_all_workers(lambda: __import__("os").getpid())
    assert len(set(pids)) == 2
    assert trainer.apply_all_operators(lambda operator: operator.world_rank) == [0, 1]
    assert [process.pid for process in trainer.status().processes] == pids


def test_the_status_says_who_does_what(make) -> None:
    trainer = make()
    trainer.train(num_steps=3)
    status = trainer.status()
    assert (status.step, status.epoch) == (3, 1)
    assert [p.ranks for p in status.processes] == [(0,), (1,)]
    assert all(p.device == "cpu" and p.step == 3 for p in status.processes)
    assert str(status.run_dir) in repr(status)


def test_callbacks_see_the_run(make) -> None:
    class Record:
        def __init__(self):
            self.events = []

        def on_step(self, event):
            self.events.append(("step", event.batch))

        def on_epoch_end(self, event):
            self.events.append(("epoch", event.epoch))

        def on_validate_end(self, event):
            self.events.append(("validate", event.metrics["num_samples"]))

        def on_run_end(self, event):
            self.events.append(("end", event.reason))

    record = Record()
    trainer = make(callbacks=[record])
    trainer.train()
    trainer.validate()
    trainer.shutdown()
    kinds = [event for event in record.events if event[0] != "step"]
    assert kinds == [("epoch", 1), ("validate", N_VALIDATION), ("end", "finished")]


def test_the_run_directory_holds_logs_and_history_for_its_owner_only(make, tmp_path) -> None:
    trainer = make(run_dir=tmp_path / "run")
    trainer.train()
    trainer.validate()
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "validate"]
    assert lines[0]["metrics"]["num_samples"] == N_TRAIN
    for rank in (0, 1):
        assert (tmp_path / "run" / "logs" / f"rank_{rank}" / "stdout.log").exists()
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_what_rank_0_prints_is_shown_and_what_others_print_is_kept(make, tmp_path, capfd) -> None:
    trainer = make(run_dir=tmp_path / "run")
    trainer.apply_all_operators(lambda operator: print(f"I am {operator.world_rank}"))
    shown = capfd.readouterr().out
    assert shown == "[rank 0] I am 0\n"
    assert "I am 1" in (tmp_path / "run" / "logs" / "rank_1" / "stdout.log").read_text()


def test_fit_trains_and_validates(make) -> None:
    history = make().fit(3, validate_every=2)
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert ["val_loss" in entry for entry in history] == [False, True, True]
    assert [entry["num_samples"] for entry in history] == [N_TRAIN] * 3


def test_a_trainer_that_was_shut_down_says_so(make) -> None:
    trainer = make()
    trainer.shutdown()
    for use in (trainer.train, trainer.validate, trainer.state_dict, trainer.get_model):
        with pytest.raises(TrainerClosedError, match="create a new TorchTrainer"):
            use()
    with pytest.raises(RuntimeError):
        trainer.train()
    trainer.shutdown()


def test_exec_workers_do_the_same_as_forked_ones(make) -> None:
    engine = LocalEngine(start_method="exec")
    try:
        forked, executed = make(), make(engine=engine)
        for trainer in (forked, executed):
            trainer.train()
        assert forked.validate() == executed.validate()
        for name, value in forked.get_model().state_dict().items():
            assert torch.equal(value, executed.get_model().state_dict()[name])
        executed.shutdown()
    finally:
        engine.close()


def test_one_rank_can_be_this_process(make) -> None:
    trainer = make(num_workers=1, use_local=True)
    assert trainer.train()["num_samples"] == N_TRAIN
    operator = trainer.get_local_operator()
    assert isinstance(operator, TrainingOperator)
    assert trainer.apply_all_workers(lambda: Path("/proc/self").resolve().name) == [Path("/proc/self").resolve().name]


@pytest.mark.slow
def test_sixteen_workers_start_and_train_on_two_cores_and_share_what_was_imported(make) -> None:
    trainer = make(num_workers=16, config={BATCH_SIZE: 32})
    stats = trainer.train()
    assert (stats["num_samples"], stats["batch_count"]) == (N_TRAIN, 2)
    status = trainer.status()
    assert [process.ranks for process in status.processes] == [(rank,) for rank in range(16)]
    for process in status.processes:
        resident, own = read_process_use(process.pid).rss_bytes, proportional_memory(process.pid)
        assert own < resident / 2, "most of what a worker has in memory is shared with the others"
