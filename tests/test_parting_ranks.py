"""Ranks that part are told before their second update: in every way of training, and over every way that gradients travel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_program
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import TorchTrainer, TrainingOperator
from torchtrainer.train.equality import _pieces_of

ROWS, BATCH = 36, 2
X = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(1))
BREAKS_AT = 2


class BuiltIn(TrainingOperator):
    """What goes wrong, on rank 1 in the step `BREAKS_AT`, stands in ``config``."""

    def setup(self, config):
        torch.manual_seed(0)
        model = nn.Linear(6, 1)
        self.updates = 0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.model, self.optimizer, self.criterion = self.register(
            models=model, optimizers=optimizer, criterion=nn.MSELoss()
        )
        self.register_data(train_loader=DataLoader(TensorDataset(X, X[:, :1].clone()), batch_size=BATCH))

    def breaks(self, how: str) -> bool:
        return self.config.get("how") == how and self.world_rank == 1 and self.global_step == BREAKS_AT

    def clip_gradients(self):
        if self.breaks("updates twice"):
            self.optimizer.step()

    def after_step(self, batch_info):
        if self.breaks("flips a bit"):  # after the update, which may round it away
            flip_a_bit(self)


class OwnBatch(BuiltIn):
    def train_batch(self, batch, batch_info):
        self.optimizer.zero_grad()
        loss = mse_loss(self.model(batch[0]), batch[1])
        if self.breaks("leaves out"):
            return {"loss": loss.item()}
        if self.breaks("keeps back"):
            with self.model.no_sync():
                loss.backward()
        else:
            loss.backward()
        if self.breaks("does not update"):
            return {"loss": loss.item()}
        self.optimizer.step()
        self.updates += 1
        if self.breaks("updates twice"):
            self.optimizer.step()
        if self.breaks("flips a bit"):
            flip_a_bit(self)
        return {"loss": loss.item()}


class OwnEpoch(OwnBatch):
    def train_epoch(self, iterator, info):
        for batch in iterator:
            if self.breaks("ends early"):
                break
            self.train_batch(batch, info)
        return {"updates": self.updates}


class Adversaries(BuiltIn):
    def setup(self, config):
        super().setup(config)
        maker, judge = nn.Linear(2, 6), nn.Linear(6, 1)
        optimizers = [torch.optim.Adam(one.parameters(), lr=0.01) for one in (maker, judge)]
        (self.maker, self.judge), self.optimizers = self.register(models=(maker, judge), optimizers=optimizers)

    def train_batch(self, batch, batch_info):
        made = self.maker(batch[0][:, :2])
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (self.judge(made.detach()).mean() - self.judge(batch[0]).mean()).backward()
        self.optimizers[1].step()
        if self.breaks("leaves out"):
            return {}
        (-self.judge(made).mean()).backward()
        if not self.breaks("does not update"):
            self.optimizers[0].step()
        if self.breaks("updates twice"):
            self.optimizers[0].step()
        if self.breaks("flips a bit"):
            flip_a_bit(self)
        return {}


FORMS = {
    "built-in": {"training_operator_cls": BuiltIn},
    "own-batch": {"training_operator_cls": OwnBatch},
    "own-epoch": {"training_operator_cls": OwnEpoch},
    "three-ranks": {"training_operator_cls": OwnBatch, "num_workers": 3},
    "adversaries": {"training_operator_cls": Adversaries},
    "zero1": {"training_operator_cls": OwnBatch, "strategy": "zero1"},
    "fsdp": {"training_operator_cls": OwnBatch, "strategy": "fsdp"},
    "comm-hook": {"training_operator_cls": OwnBatch, "comm_hook": "bf16"},
}
LIGHTNING_TOO = pytest.param("lightning", marks=pytest.mark.soak)
"""Where two other forms of the same test, and two other tests with Lightning, have the default suite do."""
OPTIONS = {"num_workers": 2, "num_cpus_per_worker": 1, "run_dir": None, "use_gpu": False, "timeout_s": 60}


def options_of(form: str, **more) -> dict[str, Any]:
    if form == "lightning":  # whose import takes seconds in every worker
        from parting_lightning import Lit

        return {**OPTIONS, "training_operator_cls": TrainingOperator.from_ptl(Lit), **more}
    return {**OPTIONS, **FORMS[form], **more}


def flip_a_bit(operator) -> None:
    """The lowest bit of one number, in the process of the last rank."""
    if operator.world_rank == operator.world_size - 1:
        own = isinstance(operator, BuiltIn)
        model = getattr(operator, "judge", operator.model) if own else operator.get_model()
        parameter = next(model.parameters())
        parameter.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def change_a_rate(operator) -> None:
    if operator.world_rank == 1:
        operator.optimizer.param_groups[0]["lr"] *= 2


def change_a_moment(operator) -> None:
    if operator.world_rank == 1:
        next(iter(operator.optimizer.state.values()))["momentum_buffer"].view(-1)[0] += 1e-6


@pytest.mark.parametrize(
    "form", [*(form for form in FORMS if form != "fsdp"), "lightning"]
)  # where no two ranks have the same number
def test_a_changed_bit_is_seen_before_the_next_update(form) -> None:
    with TorchTrainer(**options_of(form)) as trainer:
        trainer.train()
        trainer.apply_all_operators(flip_a_bit)
        with pytest.raises(RuntimeError, match=r"the ranks have different models: ranks \d and \d differ in .*weight"):
            trainer.train()


@pytest.mark.parametrize("form", [*(form for form in FORMS if form not in ("fsdp", "three-ranks")), LIGHTNING_TOO])
def test_a_bit_that_changes_in_the_middle_of_a_call_is_seen_in_the_next_step(form) -> None:
    options = options_of(form, config={"how": "flips a bit"})
    seen = rf"the ranks have different models: ranks \d and \d differ in .*weight in step {BREAKS_AT + 1}\."
    with TorchTrainer(**options) as trainer, pytest.raises(RuntimeError, match=seen):
        trainer.train()


def test_large_parameters_are_looked_at_in_pieces_of_their_memory() -> None:
    """Each changed bit shows in one piece, also where memory does not have the order of rows."""
    parameters = [
        nn.Parameter(torch.randn(300, 257)),
        nn.Parameter(torch.randn(3, 5, 7, 9)),
        nn.Parameter(torch.randn(3)),
    ]
    parameters[1].data = parameters[1].data.contiguous(memory_format=torch.channels_last)
    pieces = [piece for one in parameters for piece in _pieces_of(one)]
    assert sum(piece.words.nbytes for piece in pieces) == sum(one.nbytes for one in parameters)
    assert max(piece.words.nbytes for piece in pieces) <= 16 * 1024 < parameters[0].nbytes
    for parameter in parameters:
        for place in (0, parameter.numel() - 1):
            before = [int(piece.words.sum()) for piece in pieces]
            memory = torch.as_strided(parameter.detach(), (parameter.numel(),), (1,))
            memory[place : place + 1].view(torch.int32).bitwise_xor_(1)
            assert sum(one != int(piece.words.sum()) for one, piece in zip(before, pieces, strict=True)) == 1
    assert list(_pieces_of(nn.Parameter(torch.randn(4, 4)[:, :2]))) == [], "memory with gaps"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (change_a_rate, r"ranks \d and \d differ in the settings of group 0 of optimizer 0"),
        (
            change_a_moment,
            r"ranks \d and \d differ in momentum_buffer of parameter 0 of group 0 of optimizer 0",
        ),
    ],
)
@pytest.mark.parametrize("form", ["built-in", "own-batch", "comm-hook"])
def test_all_that_optimizers_hold_is_compared(form, change, what) -> None:
    with TorchTrainer(**options_of(form)) as trainer:
        trainer.train()
        trainer.apply_all_operators(change)
        with pytest.raises(RuntimeError, match=what):
            trainer.train()


def test_a_process_that_carries_several_ranks_is_compared() -> None:
    with TorchTrainer(**options_of("built-in", num_workers=3)) as trainer:
        trainer.train(num_steps=1)
        trainer.resize(2)
        trainer.apply_all_operators(flip_a_bit)
        with pytest.raises(RuntimeError, match=r"the ranks have different models: ranks \d and \d differ in weight"):
            trainer.train()


PARTS = "the ranks have parted: "
ALONE = r"would update .* by gradients that the ranks have not exchanged"


@pytest.mark.parametrize(
    ("form", "how", "what"),
    [
        ("built-in", "updates twice", ALONE),
        ("own-batch", "leaves out", rf"{PARTS}rank 1 .* weight and 1 more in step {BREAKS_AT}"),
        (
            "own-batch",
            "keeps back",
            rf"in step {BREAKS_AT} of rank 1, SGD {ALONE}: they were computed under no_sync|{PARTS}",
        ),
        ("own-batch", "does not update", rf"{PARTS}by step {BREAKS_AT + 1} the optimizers of rank"),
        ("own-batch", "updates twice", rf"in step {BREAKS_AT} of rank 1, SGD {ALONE}"),
        ("own-epoch", "leaves out", rf"{PARTS}rank 1 .* in step {BREAKS_AT}"),
        ("own-epoch", "ends early", rf"{PARTS}rank 1 went on without exchanging .* in step {BREAKS_AT}"),
        ("three-ranks", "leaves out", rf"{PARTS}rank 1 .* in step {BREAKS_AT}"),
        ("adversaries", "leaves out", rf"{PARTS}"),
        ("adversaries", "does not update", rf"{PARTS}by step {BREAKS_AT + 1}"),
        ("adversaries", "updates twice", ALONE),
        ("zero1", "leaves out", rf"{PARTS}"),
        ("fsdp", "does not update", rf"{PARTS}"),
        ("comm-hook", "leaves out", rf"{PARTS}"),
        ("comm-hook", "updates twice", ALONE),
        ("lightning", "leaves out", rf"{PARTS}"),
        pytest.param("lightning", "does not update", rf"{PARTS}", marks=pytest.mark.soak),
    ],
)
def test_a_step_that_is_not_alike_is_an_error_that_says_where(form, how, what) -> None:
    options = options_of(form, config={"how": how})
    with TorchTrainer(**options) as trainer, pytest.raises(RuntimeError, match=what):
        trainer.train()


def test_the_last_step_of_a_call_counts_too() -> None:
    """A rank that leaves out the last exchange is not waited for."""
    for form in ("own-batch", "comm-hook"):
        options = options_of(form, config={"how": "leaves out"})
        with TorchTrainer(**options) as trainer, pytest.raises(RuntimeError, match=rf"{PARTS}.* in step {BREAKS_AT}"):
            trainer.train(num_steps=BREAKS_AT + 1)


LAUNCHED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_parting_ranks import TorchTrainer, flip_a_bit, options_of

options = options_of(sys.argv[2], config={"how": sys.argv[3]})
with TorchTrainer(**options) as trainer:
    trainer.train(num_steps=2)
    if sys.argv[3] == "a bit":
        trainer.apply_all_operators(flip_a_bit)
    trainer.train()
"""


@pytest.mark.parametrize(
    ("form", "how"), [("built-in", "a bit"), ("own-batch", "leaves out"), ("comm-hook", "does not update")]
)
def test_launched_ranks_that_part_are_told(form, how, tmp_path) -> None:
    launcher = (sys.executable, "-m", "torchtrainer", "run", "--nproc-per-node", "2")
    program = run_program(tmp_path, LAUNCHED, str(Path(__file__).parent), form, how, python=launcher)
    assert program.process.returncode == 1
    assert "the ranks have " in program.errors + program.output
