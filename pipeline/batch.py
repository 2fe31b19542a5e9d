"""What the loader hands out.

Letters: B images, V views of one kind, S side in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .normalise import normalise
from .recipes import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class View:
    """All views of one kind, as they were cut."""

    pixels: Tensor  # u8 (B, V, S, S, 3), RGB; or (B, V, 3, S, S), normalised, of the type that the Loader was asked for
    window: Tensor  # f32 (B, V, 4): (y0, x0, y1, x1) in pixels of the stored image; flipped where x1 < x0; on the host
    mask: Tensor | None = None  # u8 (B, V, S, S): the class of each pixel, 255 for none; where the recipe has `masks`

    def tensor(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The pixels as a network takes them: (B, V, 3, S, S) of `dtype`, (pixel / 255 - mean) / std per channel.

        `mean` and `std` are of the unit range. Computed in float32 and rounded once. Pixels that the Loader has
        normalised are handed out as they are, or rounded once more to `dtype`; ValueError for another mean or std.
        """
        if self.pixels.dtype == torch.uint8:
            return normalise(self.pixels, mean, std, dtype)
        if (tuple(mean), tuple(std)) != (IMAGENET_MEAN, IMAGENET_STD):
            raise ValueError(
                "these pixels are normalised already, with ImageNet's mean and std: for others ask the Loader for "
                "pixels='uint8'"
            )
        return self.pixels.to(dtype)

    def __repr__(self) -> str:
        mask = "" if self.mask is None else f", mask {_described(self.mask)}"
        return f"pixels {_described(self.pixels)}, window {_described(self.window)}{mask}"


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
                kind: replace(
                    view,
                    pixels=view.pixels.to(device, non_blocking=True),
                    mask=None if view.mask is None else view.mask.to(device, non_blocking=True),
                )
                for kind, view in self.views.items()
            },
            targets={name: target.to(device, non_blocking=True) for name, target in self.targets.items()},
            label=self.label.to(device, non_blocking=True),
        )

    def __repr__(self) -> str:
        lines = [f"Batch of {len(self.index)} images on {self.label.device}"]
        for kind, view in self.views.items():
            lines.append(f"  views[{kind!r}]: {view}")
        lines += [f"  targets[{name!r}]: {_described(target)}" for name, target in self.targets.items()]
        return "\n".join([*lines, f"  label {_described(self.label)}, index {_described(self.index)}"])


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
