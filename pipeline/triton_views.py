"""Triton kernels that cut all views of a batch from its decoded images: the GPU's counterpart of `cutting`.

The kernels read the images by address from the decoder's memory, whatever their sizes. Windows, weights and drawn
parameters come from the host's `plan`. For each kind of view:

    images --cut: weigh rows, then columns, flipped or not--> packed pixels, sums before the contrast
           --paint: jitter, gray--> view, solarized            if the view is not blurred
                                --> packed pixels --blur along x--> packed pixels --blur along y, solarize--> view

Between the kernels a pixel is one int32 with red in the lowest byte: one load instead of three. Weighted sums are
rounded and clipped exactly as in `simd.weigh`. Levels may differ by one after the jitter: it is float32 here but fixed
point on the CPU, the contrast's mean is summed in another order, and multiply and add may be fused.

Without a GPU, Triton's interpreter runs the kernels on the host. This is slow and only meant for tests.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from . import plan as columns
from .parameters import CONTRAST, HUE, LUMA, MMSEG, SATURATION, TORCHVISION
from .plan import RADIUS

if TYPE_CHECKING:
    from .recipes import Cut

BLOCK = 256  # pixels of one program
INTERPRETED = not torch.cuda.is_available()

# Globals that a kernel reads must be constexpr.
_TOP, _LEFT, _FLIPPED = (tl.constexpr(c) for c in (columns.TOP, columns.LEFT, columns.FLIPPED))
_ROW_TAPS, _ROW_SPANS = tl.constexpr(columns.ROW_TAPS), tl.constexpr(columns.ROW_SPANS)
_ROW_WEIGHTS, _COLUMNS = tl.constexpr(columns.ROW_WEIGHTS), tl.constexpr(columns.COLUMNS)
_STEPS, _BEFORE = tl.constexpr(columns.STEPS), tl.constexpr(columns.BEFORE_CONTRAST)
_OPERATIONS, _RULE = tl.constexpr(columns.OPERATIONS), tl.constexpr(columns.COLOUR_RULE)
_TORCHVISION, _MMSEG = tl.constexpr(TORCHVISION), tl.constexpr(MMSEG)
_GRAY, _RADIUS, _SOLARIZED = (tl.constexpr(c) for c in (columns.IS_GRAY, RADIUS, columns.SOLARIZED))
_CONTRAST, _SATURATION, _HUE = (tl.constexpr(c) for c in (CONTRAST, SATURATION, HUE))
_LUMA_R, _LUMA_G, _LUMA_B = (tl.constexpr(c) for c in LUMA)
_add = tl.standard._sum_combine  # the interpreter cannot run `tl.sum` if triton was imported for compiling


def _jit(function: Any) -> Any:
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = INTERPRETED
        return triton.jit(function)


@_jit
def _weighed(total):
    """Convert a sum with six fractional bits to a centred level, -128..127."""
    return tl.minimum(tl.maximum(total >> 6, -128), 127)


@_jit
def _packed(r, g, b):
    return r | (g << 8) | (b << 16)


@_jit
def _channels(pixel):
    return pixel & 255, (pixel >> 8) & 255, (pixel >> 16) & 255


@_jit
def _luma(r, g, b):
    return _LUMA_R * r + _LUMA_G * g + _LUMA_B * b


@_jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@_jit
def _saturate_hsv(r, g, b, factor):
    """Multiply the saturation of HSV by `factor`, up to 1. Value and hue stay unchanged."""
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    gain = tl.minimum(factor, value / tl.maximum(chroma, 1e-6))
    return value - (value - r) * gain, value - (value - g) * gain, value - (value - b) * gain


@_jit
def _turn_hue(r, g, b, shift):
    """Shift the hue of HSV by `shift`, where 1 is the whole circle. Value and saturation stay unchanged."""
    value = tl.maximum(tl.maximum(r, g), b)
    least = tl.minimum(tl.minimum(r, g), b)
    chroma = value - least
    over = tl.where(g == value, b - r, r - g)
    sector = tl.where(g == value, 2.0, 4.0)
    over = tl.where(r == value, g - b, over)
    sector = tl.where(r == value, 0.0, sector)
    hue = sector + over / tl.maximum(chroma, 1e-6) + 6.0 * shift
    hue = hue - 6.0 * tl.floor(hue / 6.0)
    red = tl.abs(hue - 3.0) - 1.0
    green = 2.0 - tl.abs(hue - 2.0)
    blue = 2.0 - tl.abs(hue - 4.0)
    r = least + chroma * tl.minimum(tl.maximum(red, 0.0), 1.0)
    g = least + chroma * tl.minimum(tl.maximum(green, 0.0), 1.0)
    b = least + chroma * tl.minimum(tl.maximum(blue, 0.0), 1.0)
    return r, g, b


@_jit
def _jitter(r, g, b, view, factors, stop, base_r, base_g, base_b):
    """Apply the first `stop` operations of the view's drawn order. The contrast moves each channel away from its base.

    All pixels of a program belong to one view, so the branches do not diverge.
    """
    rule = tl.load(view + _RULE)
    for step in range(stop):
        operation = tl.load(view + _OPERATIONS + step)
        factor = tl.load(factors + step)
        if operation == _HUE:
            r, g, b = _turn_hue(r, g, b, factor)
        elif operation == _SATURATION:
            if rule != _TORCHVISION:
                r, g, b = _saturate_hsv(r, g, b, factor)
            else:
                gray = (1.0 - factor) * _luma(r, g, b)
                r, g, b = _clip(r * factor + gray), _clip(g * factor + gray), _clip(b * factor + gray)
        elif operation == _CONTRAST:
            rest = 1.0 - factor
            r, g, b = (
                _clip(r * factor + rest * base_r),
                _clip(g * factor + rest * base_g),
                _clip(b * factor + rest * base_b),
            )
        elif rule != _TORCHVISION:
            r, g, b = _clip(r + 255.0 * factor), _clip(g + 255.0 * factor), _clip(b + 255.0 * factor)
        else:
            r, g, b = _clip(r * factor), _clip(g * factor), _clip(b * factor)
    return r, g, b


@_jit
def _cut(
    images,
    widths,
    views,
    factors,
    spans,
    weights,
    packed,
    sums,
    first,
    count,
    total,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut one block of pixels of one view; the grid is (B * V, blocks)."""
    own = tl.program_id(0)
    sample, row = own // count, own // count * total + first + own % count
    view = views + row * _COLUMNS
    image = tl.load(images + sample).to(tl.pointer_type(tl.uint8))
    width = tl.load(widths + sample)
    top, left, flipped = tl.load(view + _TOP), tl.load(view + _LEFT), tl.load(view + _FLIPPED)
    row_taps, column_taps = tl.load(view + _ROW_TAPS), tl.load(view + _ROW_TAPS + 1)
    row_spans, column_spans = tl.load(view + _ROW_SPANS), tl.load(view + _ROW_SPANS + 1)
    row_weights, column_weights = tl.load(view + _ROW_WEIGHTS), tl.load(view + _ROW_WEIGHTS + 1)

    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < S * S
    i, j = tl.minimum(pixel, S * S - 1) // S, pixel % S
    j = tl.where(flipped != 0, S - 1 - j, j)
    y, upper = tl.load(spans + (row_spans + i) * 2), tl.load(spans + (row_spans + i) * 2 + 1)
    x, half = tl.load(spans + (column_spans + j) * 2), tl.load(spans + (column_spans + j) * 2 + 1)
    row_weights = weights + row_weights + i * row_taps
    column_weights = weights + column_weights + j * column_taps
    corner = image + ((top + y).to(tl.int64) * width + left + x) * 3
    r, g, b = half, half, half
    for across in range(column_taps):
        cr, cg, cb = upper, upper, upper
        for down in range(row_taps):
            weight = tl.load(row_weights + down).to(tl.int32)
            at = corner + (down * width + across) * 3
            centre = weight * 128
            cr += (tl.load(at).to(tl.int32) * weight - centre) >> 8
            cg += (tl.load(at + 1).to(tl.int32) * weight - centre) >> 8
            cb += (tl.load(at + 2).to(tl.int32) * weight - centre) >> 8
        weight = tl.load(column_weights + across).to(tl.int32)
        r += (_weighed(cr) * weight) >> 8
        g += (_weighed(cg) * weight) >> 8
        b += (_weighed(cb) * weight) >> 8
    r, g, b = _weighed(r) + 128, _weighed(g) + 128, _weighed(b) + 128
    tl.store(packed + own.to(tl.int64) * (S * S) + pixel, _packed(r, g, b), inside)

    if tl.load(view + _STEPS) > 0:
        before = tl.load(view + _BEFORE)
        red, green, blue = r.to(tl.float32), g.to(tl.float32), b.to(tl.float32)
        red, green, blue = _jitter(red, green, blue, view, factors + row * 4, before, 0.0, 0.0, 0.0)
        to = sums + (own * tl.num_programs(1) + tl.program_id(1)) * 3
        tl.store(to, tl.reduce(tl.where(inside, red, 0.0), 0, _add))
        tl.store(to + 1, tl.reduce(tl.where(inside, green, 0.0), 0, _add))
        tl.store(to + 2, tl.reduce(tl.where(inside, blue, 0.0), 0, _add))


@_jit
def _store_view(out, own, pixel, inside, r, g, b, solarized, S: tl.constexpr):
    """Solarize if needed and store one block of the finished view u8 (S, S, 3)."""
    if solarized != 0:
        r, g, b = tl.minimum(r, 255 - r), tl.minimum(g, 255 - g), tl.minimum(b, 255 - b)
    to = out + (own.to(tl.int64) * (S * S) + pixel) * 3
    tl.store(to, r.to(tl.uint8), inside)
    tl.store(to + 1, g.to(tl.uint8), inside)
    tl.store(to + 2, b.to(tl.uint8), inside)


@_jit
def _paint(
    packed,
    sums,
    views,
    factors,
    out,
    first,
    count,
    total,
    blocks,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Apply jitter and gray to one block of pixels; the grid is (B * V, blocks). SUMS is a power of two >= blocks."""
    own = tl.program_id(0)
    row = own // count * total + first + own % count
    view = views + row * _COLUMNS
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < S * S
    at = packed + own.to(tl.int64) * (S * S) + pixel
    r, g, b = _channels(tl.load(at, inside, 0))
    steps, gray = tl.load(view + _STEPS), tl.load(view + _GRAY)
    if steps + gray > 0:
        x, y, z = r.to(tl.float32), g.to(tl.float32), b.to(tl.float32)
        if steps > 0:
            part = tl.arange(0, SUMS)
            of = sums + (own * blocks + part) * 3
            mean_r = tl.reduce(tl.load(of, part < blocks, 0.0), 0, _add) / (S * S)
            mean_g = tl.reduce(tl.load(of + 1, part < blocks, 0.0), 0, _add) / (S * S)
            mean_b = tl.reduce(tl.load(of + 2, part < blocks, 0.0), 0, _add) / (S * S)
            rule = tl.load(view + _RULE)
            if rule == _TORCHVISION:
                mean_r = _luma(mean_r, mean_g, mean_b)
                mean_g, mean_b = mean_r, mean_r
            elif rule == _MMSEG:  # away from black
                mean_r, mean_g, mean_b = 0.0 * mean_r, 0.0 * mean_g, 0.0 * mean_b
            x, y, z = _jitter(x, y, z, view, factors + row * 4, steps, mean_r, mean_g, mean_b)
        if gray != 0:
            x = _luma(x, y, z)
            y, z = x, x
        r, g, b = (x + 0.5).to(tl.int32), (y + 0.5).to(tl.int32), (z + 0.5).to(tl.int32)
    if tl.load(view + _RADIUS) > 0:
        tl.store(at, _packed(r, g, b), inside)
    else:
        _store_view(out, own, pixel, inside, r, g, b, tl.load(view + _SOLARIZED), S)


@_jit
def _blur(
    packed, views, gaussians, to, first, count, total, widest, LAST: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr
):
    """Blur one block of pixels along x into packed pixels or, if LAST, along y into the view. Edge pixels repeat."""
    own = tl.program_id(0)
    row = own // count * total + first + own % count
    radius = tl.load(views + row * _COLUMNS + _RADIUS)
    if radius > 0:
        pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < S * S
        i, j = pixel // S, pixel % S
        whole = packed + own.to(tl.int64) * (S * S)
        half = tl.full((BLOCK,), 32, tl.int32) + radius
        r, g, b = half, half, half
        for k in range(-radius, radius + 1):
            weight = tl.load(gaussians + row * widest + radius + k).to(tl.int32)
            if LAST:
                at = tl.minimum(tl.maximum(i + k, 0), S - 1) * S + j
            else:
                at = i * S + tl.minimum(tl.maximum(j + k, 0), S - 1)
            x, y, z = _channels(tl.load(whole + at, inside, 0))
            r += ((x - 128) * weight) >> 8
            g += ((y - 128) * weight) >> 8
            b += ((z - 128) * weight) >> 8
        r, g, b = _weighed(r) + 128, _weighed(g) + 128, _weighed(b) + 128
        if LAST:
            _store_view(to, own, pixel, inside, r, g, b, tl.load(views + row * _COLUMNS + _SOLARIZED), S)
        else:
            tl.store(to + own.to(tl.int64) * (S * S) + pixel, _packed(r, g, b), inside)


def cut_batch(
    cuts: "Sequence[Cut]", addresses: NDArray[np.int64], planned: Mapping[str, Tensor], device: torch.device
) -> list[Tensor]:
    """Queue the cutting on the current stream of `device`. Returns the views u8 (B, V, S, S, 3) of each kind there.

    `addresses` i64 (B,) are those of contiguous decoded images u8 (H, W, 3) with the planned sizes. `planned` holds the
    fields of a `Plan` on the host, pinned for a GPU. The caller must keep the images until the stream has finished the
    work queued here.
    """
    where = torch.from_numpy(addresses)
    images = (where if device.type == "cpu" else where.pin_memory()).to(device, non_blocking=True)
    on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in planned.items()}
    names = ("widths", "views", "factors", "spans", "weights", "gaussians")
    widths, views, factors, spans, weights, gaussians = (on_device[name] for name in names)
    samples, total = views.shape[:2]
    finished, first = [], 0
    for cut in cuts:
        count, side = cut.count, cut.size
        block = triton.next_power_of_2(side * side) if INTERPRETED else BLOCK  # the interpreter's cost is per program
        blocks = triton.cdiv(side * side, block)
        grid, which = (samples * count, blocks), (first, count, total)
        settings = {"S": side, "BLOCK": block}
        out = torch.empty(samples, count, side, side, 3, dtype=torch.uint8, device=device)
        packed = torch.empty(samples, count, side, side, dtype=torch.int32, device=device)
        sums = torch.empty(samples * count, blocks, 3, device=device)
        _cut[grid](images, widths, views, factors, spans, weights, packed, sums, *which, **settings)
        part = triton.next_power_of_2(blocks)
        _paint[grid](packed, sums, views, factors, out, *which, blocks, SUMS=part, **settings)
        if planned["views"][:, first : first + count, RADIUS].any():  # on the host
            along, widest = torch.empty_like(packed), gaussians.shape[2]
            _blur[grid](packed, views, gaussians, along, *which, widest, LAST=False, **settings)
            _blur[grid](along, views, gaussians, out, *which, widest, LAST=True, **settings)
        finished.append(out)
        first += count
    return finished
