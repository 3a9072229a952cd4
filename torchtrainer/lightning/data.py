"""Where a Lightning module's data come from: loaders that were given, a data module, or the module itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchtrainer.errors import NotAvailableError
from torchtrainer.lightning.module import find_base, overrides
from torchtrainer.train.rng import isolated_rng


def is_datamodule(value: Any) -> bool:
    """Whether this is a ``LightningDataModule``, as a class or as an object."""
    return find_base(value if isinstance(value, type) else type(value), "LightningDataModule") is not None


class ModuleData:
    """The data hooks of a module and its data module. Where both have one, the data module's counts, as in Lightning.

    Args:
        module: the user's.
        datamodule: the user's; None: there is none.
        given: train and validation loader; one that is not None goes before any hook.
    """

    def __init__(self, module: Any, datamodule: Any, given: tuple[Any, Any]) -> None:
        self.datamodule = datamodule
        self._module = module
        self._given = given

    def prepare(self, *, local_rank: int, rank: int, barrier: Callable[[], None]) -> None:
        """Prepares the data on one rank, while the others wait, and then sets them up on all."""
        for one in self._owners():
            if (local_rank if one.prepare_data_per_node else rank) == 0:
                with isolated_rng():  # the other ranks do not draw what this one draws
                    one.prepare_data()
        barrier()
        for one in self._owners():
            one.setup(stage="fit")

    def loaders(self) -> dict[str, Any]:
        """The loaders, as `TrainingOperator.register_data` takes them.

        Raises:
            NotAvailableError: several loaders of a kind.
        """
        return {
            "train_loader": self._loader(self._given[0], "train_dataloader"),
            "validation_loader": self._loader(self._given[1], "val_dataloader"),
        }

    def to_device(self, batch: Any, device: torch.device) -> Any:
        """The batch, moved by the hooks for it."""
        batch = self._owner("on_before_batch_transfer").on_before_batch_transfer(batch, 0)
        batch = self._owner("transfer_batch_to_device").transfer_batch_to_device(batch, device, 0)
        return self._owner("on_after_batch_transfer").on_after_batch_transfer(batch, 0)

    def state_dict(self) -> Any:
        """What the data module keeps; None: there is none."""
        return None if self.datamodule is None else self.datamodule.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Gives the data module what `state_dict` returned."""
        if self.datamodule is not None and state is not None:
            self.datamodule.load_state_dict(state)

    def _owners(self) -> list[Any]:
        return [self._module] if self.datamodule is None else [self.datamodule, self._module]

    def _owner(self, hook: str) -> Any:
        """Whose hook is called."""
        base = find_base(type(self.datamodule), "LightningDataModule")
        return self.datamodule if base is not None and overrides(self.datamodule, base, hook) else self._module

    def _loader(self, given: Any, hook: str) -> Any:
        """The loader that was given, else that of the hook; None if there is none."""
        loader, owner = given, self._owner(hook)
        base = find_base(type(owner)) or find_base(type(owner), "LightningDataModule")
        if loader is None and overrides(owner, base, hook):
            loader = getattr(owner, hook)()
        if not isinstance(loader, list | tuple | dict):
            return loader
        members = list(loader.values()) if isinstance(loader, dict) else list(loader)
        if len(members) > 1:
            raise NotAvailableError(
                f"{hook} of {type(owner).__name__} gives {len(members)} loaders; only one is supported here. Join the "
                "data sets, for instance with torch.utils.data.ConcatDataset"
            )
        return members[0] if members else None
