"""The parameters whose gradients the ranks average: all that the optimizers update, and all trained registered ones.

They are looked up anew at every step boundary, since layers are unfrozen, added, and given to optimizers while a run is going on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from torchtrainer.errors import OperatorUseError
from torchtrainer.train.components import internals, optimizers_of

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

LOOSE = -1
"""The unit of parameters that only an optimizer knows."""


class TrainedParameters:
    """The parameters that were trained at some time, in an order that is the same on all ranks.

    A parameter stays among them when it is frozen again: what alternates between two models freezes one of them in every step.

    Args:
        operator: of this process.

    Attributes:
        parameters: in the order of `known_parameters`.
        by_rows: numbers of those whose gradients may be sparse.
        units: by parameter, the number of the registered module that it is in, or `LOOSE`.
        unit_set: all of them.
        strays: those that ``operator.optimizer`` does not update, whose gradients nobody clears between two steps.
    """

    def __init__(self, operator: TrainingOperator) -> None:
        self.parameters: list[nn.Parameter] = []
        self.by_rows: set[int] = set()
        self.units: list[int] = []
        self.unit_set: frozenset[int] = frozenset()
        self.strays: list[nn.Parameter] = []
        self._operator = operator
        self._ever: set[int] = set()
        self._grouped: list[Any] = []
        self._counted: list[int] = []
        self._frozen: list[nn.Parameter] = []
        self._look_up()

    def changed(self, *, begins: bool = False) -> bool:
        """Whether others are trained than before; if so, the attributes are new. Takes about a microsecond if not.

        Args:
            begins: a call begins: look at each parameter; else only at how many there are, and at those that were frozen.
        """
        same = self._counts() == self._counted and not any(one.requires_grad for one in self._frozen)
        if same and not begins:
            return False
        before = self.parameters
        self._look_up()
        return len(before) != len(self.parameters) or any(map(_is_not, before, self.parameters))

    def unit_by_id(self) -> dict[int, int]:
        """The unit of each parameter that an optimizer may hold, by its id; of FSDP that is the share of one."""
        numbered = reversed(list(enumerate(_modules(self._operator))))
        found = {id(one): unit for unit, module in numbered for one in module.parameters()}
        return found | {id(one): unit for one, unit in zip(self.parameters, self.units, strict=True)}

    def state(self) -> list[list[bool]]:
        """Which of the known parameters are trained now, and which ever were; for a process that joins."""
        known = list(known_parameters(self._operator))
        return [[one.requires_grad for one in known], [id(one) in self._ever for one in known]]

    def load(self, state: list[list[bool]]) -> None:
        """Trains what another process trains.

        Raises:
            OperatorUseError: that process has parameters that this one was not built with.
        """
        known = list(known_parameters(self._operator))
        if len(known) != len(state[0]):
            raise OperatorUseError(
                f"the other ranks train a model of {len(state[0])} parameters, and this process built one of "
                f"{len(known)}: neither setup nor the creators make what was added during the run, so no process can "
                "take it over"
            )
        for parameter, trained, ever in zip(known, *state, strict=True):
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
            if ever:
                self._ever.add(id(parameter))
        self._look_up()

    def names(self, numbers: list[int]) -> list[str]:
        """What users call some of the parameters, by their numbers."""
        found = parameter_names(self._operator)
        return [found.get(id(self.parameters[number]), f"parameter {number}") for number in numbers]

    def _counts(self) -> list[int]:
        """What changes when an optimizer gets other parameters, or the operator another optimizer."""
        counts = [len(group["params"]) for one in self._grouped for group in one.param_groups]
        counts.append(id(self._operator.__dict__.get("optimizer")))
        return counts

    def _look_up(self) -> None:
        known = list(known_parameters(self._operator))
        self._ever.update(id(one) for one in known if one.requires_grad)
        self._grouped = [one for one in optimizers_of(self._operator) if _groups(one)]
        self._counted = self._counts()
        self._frozen = [one for one in known if id(one) not in self._ever]
        self.parameters = [one for one in known if id(one) in self._ever]
        components = internals(self._operator).components
        leaves = components.sharding.gradient_leaves if components is not None else nn.Module.parameters
        numbered = reversed(list(enumerate(_modules(self._operator))))
        units = {id(one): unit for unit, module in numbered for one in leaves(module)}
        self.units = [units.get(id(one), LOOSE) for one in self.parameters]
        self.unit_set = frozenset(self.units)
        cleared = {id(one) for group in _groups(self._operator.__dict__.get("optimizer")) for one in group["params"]}
        self.strays = [one for one in self.parameters if id(one) not in cleared]
        by_rows = {id(one) for module in _modules(self._operator) for one in _rows_of(module)}
        self.by_rows = {number for number, one in enumerate(self.parameters) if id(one) in by_rows and one.dim()}


def known_parameters(operator: TrainingOperator) -> Iterator[nn.Parameter]:
    """Every parameter of the optimizers, the models and the criterion, once, trained or not, the same on all ranks."""
    seen: set[int] = set()
    for one in _all_parameters(operator):
        if id(one) not in seen and isinstance(one, torch.Tensor):
            seen.add(id(one))
            yield cast("nn.Parameter", one)  # or a tensor that the user gave an optimizer


def loose_parameters(operator: TrainingOperator) -> list[nn.Parameter]:
    """Those that only an optimizer knows, so that no module has them in its state."""
    of_modules = {id(one) for module in _modules(operator) for one in module.parameters()}
    components = internals(operator).components
    if components is not None and components.sharding.in_step:  # FSDP: leaves stand for parameters of modules
        of_modules |= {id(one) for module in _modules(operator) for one in components.sharding.gradient_leaves(module)}
    return [one for one in known_parameters(operator) if id(one) not in of_modules]


def parameter_names(operator: TrainingOperator) -> dict[int, str]:
    """What users call the known parameters, by their ids."""
    modules, names = _modules(operator), {}
    for place, optimizer in enumerate(optimizers_of(operator)):
        numbered = enumerate(one for group in _groups(optimizer) for one in group["params"])
        which = "the optimizer" if place == 0 else f"optimizer {place}"
        names.update({id(one): f"parameter {number} of {which}" for number, one in numbered})
    components = internals(operator).components
    models = len(components.raw_models) if components is not None else 0
    for place, module in reversed(list(enumerate(modules))):
        front = "criterion." if place >= models else f"models[{place}]." if models > 1 else ""
        names.update({id(one): front + name for name, one in module.named_parameters()})
    return names


def _modules(operator: TrainingOperator) -> list[nn.Module]:
    components = internals(operator).components
    return components.modules if components is not None else []


def _all_parameters(operator: TrainingOperator) -> Iterator[Any]:
    components = internals(operator).components
    for optimizer in optimizers_of(operator):
        for group in _groups(optimizer):
            yield from (one for one in group["params"] if not hasattr(one, "full_tensor"))  # a share of one, of FSDP
    for module in _modules(operator):
        yield from module.parameters() if components is None else components.sharding.gradient_leaves(module)


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """Parameter groups; none of an optimizer that is not of torch's kind."""
    groups = getattr(optimizer, "param_groups", None)
    return [one for one in groups if isinstance(one, dict) and "params" in one] if isinstance(groups, list) else []


def _rows_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of layers that were asked for sparse gradients, as ``nn.Embedding`` can be."""
    for part in module.modules():
        if getattr(part, "sparse", False) is True:
            yield from part.parameters(recurse=False)


def _is_not(one: object, other: object) -> bool:
    return one is not other
