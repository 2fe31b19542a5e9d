"""The batches that the loader yields.

Shapes: B images, V views of one kind, S pixels per side of a view.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .normalise import normalise
from .recipes import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class View:
    """All views of one kind, with their windows."""

    pixels: Tensor  # u8 (B, V, S, S, 3), RGB; or normalised (B, V, 3, S, S) in the Loader's `pixels` type
    window: Tensor  # f32 (B, V, 4): (y0, x0, y1, x1) in pixels of the stored image; flipped if x1 < x0; on the host
    mask: Tensor | None = None  # u8 (B, V, S, S): the class of each pixel, 255 for none; set if the recipe has `masks`

    def tensor(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the pixels as a network's input: (B, V, 3, S, S) of `dtype`, (pixel / 255 - mean) / std per channel.

        `mean` and `std` refer to pixels in [0, 1]. The result is computed in float32 and rounded once. Pixels that the
        Loader has already normalised are only cast to `dtype`; another mean or std then raises ValueError.
        """
        if self.pixels.dtype == torch.uint8:
            return normalise(self.pixels, mean, std, dtype)
        if (tuple(mean), tuple(std)) != (IMAGENET_MEAN, IMAGENET_STD):
            raise ValueError(
                "these pixels are normalised already, with ImageNet's mean and std: for other values give the Loader "
                "pixels='uint8'"
            )
        return self.pixels.to(dtype)

    def __repr__(self) -> str:
        mask = "" if self.mask is None else f", mask {_described(self.mask)}"
        return f"pixels {_described(self.pixels)}, window {_described(self.window)}{mask}"


@dataclass(frozen=True)
class Batch:
    """The samples of one step. `index` is each sample's number in the ShardSet; ``shards.key(i)`` is its name."""

    views: dict[str, View]  # by kind
    targets: dict[str, Tensor]  # the arrays that the recipe's `targets` computed, by name
    label: Tensor  # i64 (B,), -1 if a sample has no label
    index: Tensor  # i64 (B,)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with pixels, masks, targets and labels on `device`. Windows and `index` stay on the host."""
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
