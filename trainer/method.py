"""`Method`, the base class of the methods in trainer/methods."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import Batch


def fp32(x: Tensor) -> Tensor:
    """Return `x` in at least single precision. Losses, variances and distances need it, even under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Method(nn.Module):
    """A network and its loss. A subclass sets the attributes and implements at least `forward` and `backbone`."""

    cfg: Any
    """the method's own Config"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """mean and standard deviation of each colour channel, in the unit range; `export` records them"""
    headline_metrics: tuple[str, ...] = ()
    """the two metrics that the terminal shows beside the loss"""

    def forward(self, batch: Batch, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's loss and its metrics, which are detached 0-d tensors. `progress` is 0-d, in [0, 1].

        The trainer minimises the mean of the loss over ranks. A loss that uses the collectives of trainer.parallel has
        the same gradient as the loss of one process on the whole batch.
        """
        raise NotImplementedError

    def after_step(self, progress: Tensor) -> None:
        """Update what follows the weights, such as an EMA teacher. Called after each optimizer step."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups. Biases, gains and other vectors have no weight decay."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def backbone(self) -> nn.Module:
        """Return the module to evaluate and to export."""
        raise NotImplementedError

    def scheduled(self, progress: Tensor) -> dict[str, Tensor]:
        """Return quantities that depend on progress, such as an EMA's momentum, as 0-d tensors for the log."""
        return {}

    def picture(self, batch: Batch, path: Path) -> bool:
        """Write an image file that shows what was learned. Return False if the method has nothing to show.

        The method must be in evaluation mode, and `batch` on its device.
        """
        return False
