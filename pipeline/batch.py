"""What the loader hands out.

Letters: B images, V views of one kind, S side in pixels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """All views of one kind, as they were cut."""

    pixels: Tensor  # u8 (B, V, S, S, 3), RGB
    window: Tensor  # f32 (B, V, 4): (y0, x0, y1, x1) in pixels of the stored image; flipped where x1 < x0; on the host


@dataclass(frozen=True)
class Batch:
    """One step's samples. `index` is each sample's place in the ShardSet; ``shards.key(i)`` names it."""

    views: dict[str, View]
    targets: dict[str, Tensor]  # what the recipe's `targets` computed, by name
    label: Tensor  # i64 (B,), -1 where there is none
    index: Tensor  # i64 (B,)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with pixels, targets and labels on `device`; windows and indices stay on the host."""
        return replace(
            self,
            views={
                kind: replace(view, pixels=view.pixels.to(device, non_blocking=True))
                for kind, view in self.views.items()
            },
            targets={name: target.to(device, non_blocking=True) for name, target in self.targets.items()},
            label=self.label.to(device, non_blocking=True),
        )
