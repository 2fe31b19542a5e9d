"""What every method is: the base class of `Method` in the files of trainer/methods."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import Batch


def fp32(x: Tensor) -> Tensor:
    """At least single precision, whatever autocast made of it: losses, variances and distances need its digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Method(nn.Module):
    """A network and its loss. A subclass sets the attributes and overrides `forward`, `backbone` and what it needs."""

    cfg: Any
    """the method's own Config"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """of the pixels, in the unit range: three numbers each; `export` writes them down"""
    headline_metrics: tuple[str, ...] = ()
    """the two metrics that stand in the terminal's line beside the loss"""

    def forward(self, batch: Batch, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's loss and its metrics, detached 0-d tensors. `progress` is a 0-d tensor in [0, 1].

        The mean of the loss over ranks is minimised: with trainer.parallel's collectives inside, its gradient is that
        of the loss of one process.
        """
        raise NotImplementedError

    def after_step(self, progress: Tensor) -> None:
        """Called after the optimizer moved the weights: an EMA teacher follows here."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For the optimizer. Biases, gains and other vectors do not decay."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def backbone(self) -> nn.Module:
        """The module to evaluate and to export."""
        raise NotImplementedError

    def scheduled(self, progress: Tensor) -> dict[str, Tensor]:
        """What changes with progress, as 0-d tensors for the log: an EMA's momentum, for example."""
        return {}

    def picture(self, batch: Batch, path: Path) -> bool:
        """Writes an image file of what has been learned, and returns True; False where there is nothing to show.

        In evaluation mode; `batch` lies on the method's device.
        """
        return False
