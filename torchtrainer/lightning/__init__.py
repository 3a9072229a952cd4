"""Training a ``LightningModule``: an operator made of its hooks, over Lightning's public interface."""

from torchtrainer.lightning.operator import LightningOperator, operator_from_lightning

__all__ = ["LightningOperator", "operator_from_lightning"]
