"""What methods have in common that train linear heads, several at a time, on a backbone that does not move."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trainer import method


class Frozen(method.Method):
    """A backbone in evaluation mode without gradients, and `heads` beside each other that do not feel one another.

    `scales` are the heads' shares of the run's learning rate, `decays` their weight decays; None: the run's.
    """

    def __init__(
        self,
        cfg: Any,
        *,
        encoder: nn.Module,
        heads: Sequence[nn.Module],
        scales: Sequence[float],
        decays: Sequence[float | None],
    ) -> None:
        super().__init__()
        self.cfg, self.mean, self.std = cfg, cfg.mean, cfg.std
        self.encoder: Any = encoder.requires_grad_(False).eval()
        self.heads = nn.ModuleList(heads)
        self._scales, self._decays = scales, decays

    def backbone(self) -> nn.Module:
        return self.encoder

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.encoder.eval()
        return self

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """A group for each head; all that it has decays, as in mmsegmentation and in DINOv3's evaluation."""
        return [
            {
                "params": list(head.parameters()),
                "weight_decay": weight_decay if decay is None else decay,
                "lr_scale": scale,
            }
            for head, scale, decay in zip(self.heads, self._scales, self._decays, strict=True)
        ]


def normal_(layer: nn.Linear | nn.Conv2d) -> None:
    """N(0, 0.01) and bias 0."""
    with torch.no_grad():
        nn.init.normal_(layer.weight, std=0.01)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
