"""The colour augmentation of whole batches on a GPU, in plain torch: the formulas of `cutting`, in float32.

The order of the jitter's operations differs by view, so every step computes one formula that covers all operations.
Brightness, contrast and saturation move a pixel away from a base (black, the mean gray, its own gray); a hue shift of 0
is a no-op. Values are rounded where `cutting` rounds them: after the jitter, and after each direction of the blur.
"""

import math
from collections.abc import Sequence
from functools import cache, reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .parameters import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    LUMA,
    ORDER,
    PAD_COLUMNS,
    PAD_ROWS,
    PADDING,
    PERMUTATIONS,
    RADII,
    SATURATION,
    SIGMA,
    SOLARIZE,
)

if TYPE_CHECKING:
    from .recipes import Augmentation


def apply(
    pixels: Tensor,
    params: Tensor,
    augmentations: "Sequence[Augmentation]",
    *,
    padded: bool = False,
    compiled: bool | None = None,
) -> Tensor:
    """Apply jitter, gray, blur and solarize to views u8 (B, V, S, S, 3), with parameters f32 (B, V, PARAMS).

    `augmentations` are those of the cut and share one rule. Operations that none of them can draw are skipped. In
    `padded` views the padding outside the image stays unchanged. `compiled` (default: on a GPU) fuses the steps into a
    few kernels, compiled at the first call for each shape. Otherwise each step reads and writes the whole batch.
    """
    jitter = augmentations[0].rule if any(a.jitter > 0 for a in augmentations) else None
    gray = any(a.gray > 0 for a in augmentations)
    blurred = [a.sigma[1] for a in augmentations if a.blur > 0]
    radius = max(1, math.ceil(RADII * max(blurred))) if blurred else 0
    solarize = any(a.solarize > 0 for a in augmentations)
    if not (jitter or gray or radius or solarize):
        return pixels
    augment = _compiled() if (pixels.is_cuda if compiled is None else compiled) else _augment
    return augment(pixels, params, _permutations(pixels.device), jitter, gray, radius, solarize, padded)


@cache
def _permutations(device: torch.device) -> Tensor:
    return torch.from_numpy(PERMUTATIONS).to(device)


@cache
def _compiled() -> Any:
    # Each kind of view, batch size and recipe has its own graph; torch's default limit is eight.
    many = torch._dynamo.config.patch(recompile_limit=256)
    return many(torch.compile(_augment, dynamic=False, fullgraph=True))


def _augment(
    pixels: Tensor,
    params: Tensor,
    permutations: Tensor,
    jitter: str | None,
    gray: bool,
    radius: int,
    solarize: bool,
    padded: bool,
) -> Tensor:
    p = params[..., None, None]  # (B, V, PARAMS, 1, 1): a column holds one number per view
    x = pixels.movedim(-1, 2).float()  # (B, V, 3, S, S)
    if jitter:
        x = _jitter(x, params, permutations, jitter)
    if gray:
        x = torch.where(p[:, :, GRAY, None] > 0, _luma(x), x)
    if jitter or gray:
        x = _round(x)
    if radius:
        x = _blur(x, params[..., SIGMA], radius)
    if solarize:
        x = torch.where(p[:, :, SOLARIZE, None] > 0, torch.minimum(x, 255 - x), x)
    if padded:
        place = torch.arange(x.shape[-1], 0, -1, device=x.device)  # counted from the bottom and from the right
        outside = (place[:, None] <= p[:, :, PAD_ROWS, None]) | (place <= p[:, :, PAD_COLUMNS, None])
        x = torch.where(outside, x.new_tensor(PADDING)[:, None, None], x)
    return x.to(torch.uint8).movedim(2, -1).contiguous()


def _round(x: Tensor) -> Tensor:
    return (x + 0.5).floor()


def _luma(x: Tensor) -> Tensor:
    """Return the luma of each pixel, (B, V, 1, S, S)."""
    r, g, b = x.unbind(2)
    return (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b).unsqueeze(2)


def _jitter(x: Tensor, params: Tensor, permutations: Tensor, rule: str) -> Tensor:
    order = params[..., ORDER].long()  # (B, V)
    operations = permutations[order.clamp(min=0)]  # (B, V, 4)
    for step in range(4):
        operation = operations[..., step]
        factor = params.gather(-1, operation[..., None])[..., 0]

        def only(which: int, otherwise: float, operation: Tensor = operation, factor: Tensor = factor) -> Tensor:
            chosen = (operation == which) & (order >= 0)
            return torch.where(chosen, factor, otherwise)[..., None, None, None]  # (B, V, 1, 1, 1)

        contrast, saturation = only(CONTRAST, 1.0), only(SATURATION, 1.0)
        if rule == "torchvision":
            gray = _luma(x)
            factor = only(BRIGHTNESS, 1.0) * contrast * saturation  # at most one of them differs from 1
            base = (1 - contrast) * gray.mean((-2, -1), keepdim=True) + (1 - saturation) * gray
            x = (x * factor + base).clamp(0, 255)
        else:
            mean = x.mean((-2, -1), keepdim=True) if rule == "tensorflow" else 0.0  # mmseg: away from black
            x = (x * contrast + (1 - contrast) * mean + 255 * only(BRIGHTNESS, 0.0)).clamp(0, 255)
            value = x.amax(2, keepdim=True)
            chroma = value - x.amin(2, keepdim=True)
            x = value - (value - x) * torch.minimum(saturation, value / chroma.clamp(min=1e-6))
        x = _turn_hue(x, only(HUE, 0.0))
    return x


def _turn_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of HSV by `shift`, where 1 is the whole circle. Value and saturation stay unchanged."""
    r, g, b = x.split(1, 2)
    value = x.amax(2, keepdim=True)
    chroma = value - x.amin(2, keepdim=True)
    over, sector = torch.where(g == value, b - r, r - g), torch.where(g == value, 2.0, 4.0)
    over, sector = torch.where(r == value, g - b, over), torch.where(r == value, 0.0, sector)
    hue = sector + over / chroma.clamp(min=1e-6) + 6 * shift  # in sixths of the circle
    k = (hue + torch.arange(5, 0, -2, device=x.device)[:, None, None]) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur with a Gaussian of each view's sigma (B, V); 0 is a no-op. Edge pixels are repeated outwards."""
    b, v, _, s, _ = x.shape
    distance = torch.arange(-radius, radius + 1, device=x.device).abs()
    reach = (RADII * sigma).ceil()[..., None]
    # A sigma of 0 gives one tap: its neighbours weigh exp(-0.5 / 1e-12) = 0.
    weights = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-6)[..., None]) ** 2) * (distance <= reach)
    weights = (weights / weights.sum(-1, keepdim=True)).reshape(b * v, 1, 1, 1, -1)
    x = x.reshape(b * v, 3, s, s)
    for padding, axis in (((radius, radius, 0, 0), 3), ((0, 0, radius, radius), 2)):
        padded = F.pad(x, padding, mode="replicate")
        taps = [weights[..., k] * padded.narrow(axis, k, s) for k in range(2 * radius + 1)]
        x = _round(reduce(torch.add, taps))
    return x.reshape(b, v, 3, s, s)
