"""Jitter and grayscale of one view on the CPU, in 16-bit fixed point, 32 pixels at a time.

A level is 128 units, so 0..255 fits an int16. The error of an operation is one to three units, 0.02 levels. float32
would have half the lanes and need conversions on both sides. The code is portable LLVM vector code, since numba would
widen int16 to 64 bits. Additions saturate, which makes the clipping exact.

The operations run in the drawn order while a block stays in registers. The contrast needs the mean of its input, which
takes two passes: bytes -> operations before the contrast -> int16 and sums; int16 -> the rest and the gray -> bytes.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .kernel import kernel
from .parameters import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    LUMA,
    MMSEG,
    ORDER,
    PERMUTATIONS,
    RULE,
    SATURATION,
    TENSORFLOW,
    TORCHVISION,
)
from .simd import splat

LANES = 32  # pixels of a block; a column of a view has memory for at least as many rows
LEVEL = 128
TOP = 255 * LEVEL
_SHIFT, _AFFINE, _AFFINE_FAR, _SATURATE, _SATURATE_FAR, _SATURATE_HSV, _HUE = range(7)
_NUMBERS = 8  # number of int16 parameters of a step: see `_plan`

_BYTE, _SHORT, _INT, _LONG, _FLOAT = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType())
_BYTES, _SHORTS, _INTS, _FLOATS = (ir.VectorType(element, LANES) for element in (_BYTE, _SHORT, _INT, _FLOAT))


class _Row:
    """A vector of LANES int16 in the code being generated. An int operand is broadcast."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def like(self, other: "_Row | int") -> ir.Value:
        return other.value if isinstance(other, _Row) else ir.Constant(_SHORTS, [other] * LANES)

    def _saturating(self, name: str, other: "_Row | int") -> "_Row":
        kind = ir.FunctionType(_SHORTS, (_SHORTS, _SHORTS))
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.sat.v{LANES}i16")
        return _Row(self.builder, self.builder.call(function, (self.value, self.like(other))))

    def __add__(self, other: "_Row | int") -> "_Row":
        return self._saturating("sadd", other)

    def __sub__(self, other: "_Row | int") -> "_Row":
        return self._saturating("ssub", other)

    def __mul__(self, other: "_Row | int") -> "_Row":
        """Return the product, which must fit an int16."""
        return _Row(self.builder, self.builder.mul(self.value, self.like(other)))

    def part(self, share: "_Row | int") -> "_Row":
        """Return the product divided by 2**16, rounded down."""
        wide = (self.builder.sext(value, _INTS) for value in (self.value, self.like(share)))
        upper = self.builder.ashr(self.builder.mul(*wide), ir.Constant(_INTS, [16] * LANES))
        return _Row(self.builder, self.builder.trunc(upper, _SHORTS))

    def __rshift__(self, bits: int) -> "_Row":
        return _Row(self.builder, self.builder.ashr(self.value, self.like(bits)))

    def __lshift__(self, bits: int) -> "_Row":
        return _Row(self.builder, self.builder.shl(self.value, self.like(bits)))

    def _chosen(self, sign: str, other: "_Row | int") -> "_Row":
        bound = self.like(other)
        keep = self.builder.icmp_signed(sign, self.value, bound)
        return _Row(self.builder, self.builder.select(keep, self.value, bound))

    def at_most(self, other: "_Row | int") -> "_Row":
        return self._chosen("<", other)

    def at_least(self, other: "_Row | int") -> "_Row":
        return self._chosen(">", other)

    def equals(self, other: "_Row") -> ir.Value:
        return self.builder.icmp_signed("==", self.value, other.value)

    def where(self, mask: ir.Value, other: "_Row") -> "_Row":
        """Return this vector in the lanes of the mask, and `other` elsewhere."""
        return _Row(self.builder, self.builder.select(mask, self.value, other.value))

    def floats(self) -> ir.Value:
        return self.builder.sitofp(self.value, _FLOATS)


class _Pixels(NamedTuple):
    r: _Row
    g: _Row
    b: _Row

    def clipped(self) -> "_Pixels":
        return _Pixels(*(x.at_least(0).at_most(TOP) for x in self))

    def luma(self) -> _Row:
        """Return the luma, rounded down three times. Green's weight exceeds the maximum of an int16 share, 0.5."""
        r, g, b = (round(65536 * share) for share in LUMA)
        return self.r.part(r) + self.g.part(g - 65536) + self.g + self.b.part(b) + 1


class _Numbers:
    """The int16 parameters of one step. Indexing loads one and broadcasts it."""

    def __init__(self, builder: ir.IRBuilder, address: ir.Value) -> None:
        self.builder, self.address = builder, address

    def scalar(self, i: int) -> ir.Value:
        address = self.builder.add(self.address, _LONG(2 * i))
        return self.builder.load(self.builder.inttoptr(address, _SHORT.as_pointer()), align=2)

    def __getitem__(self, i: int) -> _Row:
        return _Row(self.builder, splat(self.builder, self.scalar(i), LANES))


def _shift(pixels: _Pixels, n: _Numbers) -> _Pixels:
    return _Pixels(*(x + n[0] for x in pixels)).clipped()


def _away(pixels: _Pixels, anchors: tuple[_Row, ...], n: _Numbers, far: bool) -> _Pixels:
    """Move every value x away from its anchor a: x + (factor - 1) * (x - a), clipped.

    factor - 1 is split into a share of at most a half and, if it is `far` from 0, whole numbers: -1, added before the
    share, or up to 2, added after it. In this order a sum that leaves the range does not return to it.
    """
    moved = []
    for x, anchor in zip(pixels, anchors, strict=True):
        d = x - anchor
        near = (x + d * n[1] if far else x) + d.part(n[0])
        moved.append(near + d * n[2] + d * n[3] if far else near)
    return _Pixels(*moved).clipped()


def _affine(pixels: _Pixels, n: _Numbers, far: bool) -> _Pixels:
    return _away(pixels, (n[4], n[5], n[6]), n, far)


def _saturate(pixels: _Pixels, n: _Numbers, far: bool) -> _Pixels:
    gray = pixels.luma()
    return _away(pixels, (gray, gray, gray), n, far)


def _saturate_hsv(pixels: _Pixels, factor: ir.Value) -> _Pixels:
    """Multiply the saturation of HSV by `factor`, up to 1. Value and hue stay unchanged. The division needs float32."""
    r, g, b = pixels
    value = r.at_least(g).at_least(b)
    chroma = value - r.at_most(g).at_most(b)
    builder = r.builder
    most = builder.fdiv(value.floats(), chroma.at_least(1).floats())
    gain = splat(builder, factor, LANES)
    gain = builder.select(builder.fcmp_ordered("<", gain, most), gain, most)

    def moved(x: _Row) -> _Row:
        distance = builder.fadd(builder.fmul((value - x).floats(), gain), ir.Constant(_FLOATS, [0.5] * LANES))
        return value - _Row(builder, builder.fptosi(distance, _SHORTS))

    return _Pixels(*(moved(x) for x in pixels))


def _turn_hue(pixels: _Pixels, n: _Numbers) -> _Pixels:
    """Shift the hue of HSV. Value and saturation stay unchanged.

    In sixths of the circle, with the largest channel's position as zero, the hue is over / chroma, where `over` is the
    difference of the other two channels. The channel 2 k sixths further on exceeds the least by the chroma times
    clip(2 - |over / chroma + turn + 2 k|, 0, 1). Multiplying by the chroma avoids the division. The code uses half
    units, in which 2 chromas fit an int16; values that saturate are far outside the clip.
    """
    r, g, b = pixels
    value = r.at_least(g).at_least(b)
    least = r.at_most(g).at_most(b)
    chroma = value - least
    red, green = value.equals(r), value.equals(g)
    over = (g - b).where(red, (b - r).where(green, r - g))
    half = chroma >> 1
    near = (over >> 1) + chroma.part(n[0])
    rises = []
    for k in range(3):  # n[0]: fractional part of turn; then the whole part of turn + 2 k, as the sum of two numbers
        whole = n[1 + 2 * k]
        far = near + half * whole + half * n[2 + 2 * k]
        far = far.at_least(_Row(far.builder, far.like(0)) - far)
        rise = (half + half - far).at_least(0).at_most(TOP // 2 + 1)
        rises.append(least + (rise + rise).at_most(chroma))
    here, next_, last = rises  # the channels at 0, 2 and -2 sixths from the largest channel

    return _Pixels(
        here.where(red, next_.where(green, last)),
        last.where(red, here.where(green, next_)),
        next_.where(red, last.where(green, here)),
    )


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _pass(builder: ir.IRBuilder, bytes_in: bool, source, target, size, steps, numbers, factors, start, stop, extra):
    """Process one column: 3 channels of `size` pixels. `source` and `target` are (address, channel stride).

    With `bytes_in`, the input is bytes and the output int16, whose sums are added to the int64 (3,) at `extra`.
    Otherwise the input is int16 and the output bytes, gray if `extra`. If the size is no multiple of LANES, the last
    block overlaps the one before it.
    """
    pixels = [cgutils.alloca_once(builder, _SHORTS) for _ in range(3)]
    sums = [cgutils.alloca_once_value(builder, ir.Constant(_INTS, [0] * LANES)) for _ in range(3)]
    last = builder.sub(size, _LONG(LANES))
    last = builder.select(builder.icmp_signed(">", last, _LONG(0)), last, _LONG(0))
    with cgutils.for_range_slice(builder, _LONG(0), size, _LONG(LANES), _LONG) as (at, _):
        begin = builder.select(builder.icmp_signed("<", at, last), at, last)
        for c in range(3):
            row = builder.add(source[0], builder.mul(source[1], _LONG(c)))
            if bytes_in:
                value = builder.zext(_load(builder, builder.add(row, begin), _BYTES), _SHORTS)
                builder.store((_Row(builder, value) << 7).value, pixels[c])
            else:
                row = builder.add(row, builder.shl(begin, _LONG(1)))
                builder.store(_load(builder, row, _SHORTS), pixels[c])
        with cgutils.for_range_slice(builder, start, stop, _LONG(1), _LONG) as (step, _):
            _dispatch(builder, pixels, step, steps, numbers, factors)
        now = _Pixels(*(_Row(builder, builder.load(pixel)) for pixel in pixels))
        if bytes_in:
            fresh = builder.and_(
                _lanes(builder, ">=", builder.sub(at, begin)), _lanes(builder, "<", builder.sub(size, begin))
            )
            for x, total in zip(now, sums, strict=True):
                counted = builder.select(fresh, x.value, ir.Constant(_SHORTS, [0] * LANES))
                builder.store(builder.add(builder.load(total), builder.sext(counted, _INTS)), total)
        else:
            gray = now.luma()
            wanted = builder.icmp_signed("!=", extra, _LONG(0))
            now = _Pixels(*(_Row(builder, builder.select(wanted, gray.value, x.value)) for x in now))
        for c in range(3):
            row = builder.add(target[0], builder.mul(target[1], _LONG(c)))
            if bytes_in:
                _store(builder, builder.add(row, builder.shl(begin, _LONG(1))), now[c].value)
            else:
                level = (now[c] + LEVEL // 2) >> 7
                _store(builder, builder.add(row, begin), builder.trunc(level.value, _BYTES))
    if bytes_in:
        kind = ir.FunctionType(_INT, (_INTS,))
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{LANES}i32")
        for c, total in enumerate(sums):
            address = builder.inttoptr(builder.add(extra, _LONG(8 * c)), _LONG.as_pointer())
            found = builder.sext(builder.call(reduce, (builder.load(total),)), _LONG)
            builder.store(builder.add(builder.load(address), found), address)


def _lanes(builder: ir.IRBuilder, sign: str, bound: ir.Value) -> ir.Value:
    places = ir.Constant(_SHORTS, list(range(LANES)))
    return builder.icmp_signed(sign, places, splat(builder, builder.trunc(bound, _SHORT), LANES))


def _dispatch(builder: ir.IRBuilder, pixels: list[ir.Value], step, steps, numbers, factors) -> None:
    """Apply the step's operation to `pixels`, with one jump per block."""
    operation = builder.load(builder.inttoptr(builder.add(steps, builder.shl(step, _LONG(3))), _LONG.as_pointer()))
    own = _Numbers(builder, builder.add(numbers, builder.mul(step, _LONG(2 * _NUMBERS))))
    address = builder.add(factors, builder.shl(step, _LONG(2)))
    end = builder.append_basic_block("end")
    jump = builder.switch(operation, end)
    done = {
        _SHIFT: lambda now: _shift(now, own),
        _AFFINE: lambda now: _affine(now, own, False),
        _AFFINE_FAR: lambda now: _affine(now, own, True),
        _SATURATE: lambda now: _saturate(now, own, False),
        _SATURATE_FAR: lambda now: _saturate(now, own, True),
        _SATURATE_HSV: lambda now: _saturate_hsv(now, _load(builder, address, _FLOAT)),
        _HUE: lambda now: _turn_hue(now, own),
    }
    for code, change in done.items():
        block = builder.append_basic_block(f"operation{code}")
        jump.add_case(_LONG(code), block)
        builder.position_at_end(block)
        changed = change(_Pixels(*(_Row(builder, builder.load(pixel)) for pixel in pixels)))
        for pixel, row in zip(pixels, changed, strict=True):
            builder.store(row.value, pixel)
        builder.branch(end)
    builder.position_at_end(end)


def _intrinsic(bytes_in: bool):
    @intrinsic
    def column(
        typing_context, source, distance, target, target_distance, size, steps, numbers, factors, start, stop, extra
    ):
        def codegen(context, builder, signature, arguments):
            a = arguments
            _pass(builder, bytes_in, (a[0], a[1]), (a[2], a[3]), *a[4:])
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11), codegen

    return column


_first_pass, _second_pass = _intrinsic(True), _intrinsic(False)


@kernel
def _plan(p, i, means, steps, numbers, factors):
    """Write the operation of step i and its int16 and float32 parameters. `means` f32 (3,) in units: for contrast."""
    operation = PERMUTATIONS[np.int64(p[ORDER]), i]
    factor, rule = p[operation], p[RULE]
    n = numbers[i]
    n[:] = 0
    if operation == HUE:
        turn = 6 * (factor - np.rint(factor))
        whole = np.rint(turn)
        n[0] = np.rint((turn - whole) * 32768)
        for k in range(3):
            sixths = (whole + 2 * k + 9) % 6 - 3
            if sixths == -3 and n[0] < 0:  # -3 and 3 are the same hue: take the nearer one
                sixths = -sixths
            n[1 + 2 * k] = min(max(sixths, -2), 2)
            n[2 + 2 * k] = sixths - n[1 + 2 * k]
        steps[i] = _HUE
    elif operation == BRIGHTNESS and rule != TORCHVISION:
        n[0] = np.rint(min(max(factor, np.float32(-1)), np.float32(1)) * TOP)
        steps[i] = _SHIFT
    elif operation == SATURATION and rule != TORCHVISION:
        factors[i] = factor
        steps[i] = _SATURATE_HSV
    else:
        whole = np.rint(factor - 1)
        n[0] = min(np.rint((factor - 1 - whole) * 65536), 32767)
        n[1], n[2], n[3] = min(whole, 0), min(max(whole, 0), 1), max(whole - 1, 0)
        far = 1 if whole != 0 else 0
        if operation == CONTRAST and rule != MMSEG:  # MMSEG's contrast moves away from black
            gray = LUMA[0] * means[0] + LUMA[1] * means[1] + LUMA[2] * means[2]
            for c in range(3):
                n[4 + c] = np.rint(means[c] if rule == TENSORFLOW else gray)
        steps[i] = _SATURATE + far if operation == SATURATION else _AFFINE + far


# Both take arrays instead of addresses, since numba frees an array after the last use of its name.
@kernel
def _before_contrast(scratch, columns, size, steps, numbers, factors, stop, sums):
    """Apply steps 0..stop-1 to `columns`, write them to `scratch` i16 (size, 3, padded), and sum each channel."""
    padded, plan, shorts, floats = scratch.shape[2], steps.ctypes.data, numbers.ctypes.data, factors.ctypes.data
    for x in range(size):
        source, target = columns.ctypes.data + 3 * padded * x, scratch.ctypes.data + 6 * padded * x
        _first_pass(source, padded, target, 2 * padded, size, plan, shorts, floats, 0, stop, sums.ctypes.data)


@kernel
def _from_contrast(columns, scratch, size, steps, numbers, factors, start, stop, gray):
    """Apply steps start..stop-1 and gray to `scratch`, and write the result to `columns`."""
    padded, plan, shorts, floats = scratch.shape[2], steps.ctypes.data, numbers.ctypes.data, factors.ctypes.data
    for x in range(size):
        source, target = scratch.ctypes.data + 6 * padded * x, columns.ctypes.data + 3 * padded * x
        _second_pass(source, 2 * padded, target, padded, size, plan, shorts, floats, start, stop, gray)


@kernel
def jitter_and_gray(columns, size, p):
    """Augment `columns` u8 (size, 3 * padded), (x, channel, y), in place, by the parameters f32 (PARAMS,).

    `padded` is at least LANES. A factor may be at most 3.5; `recipes` allows 3.
    """
    scratch = np.empty((size, 3, columns.shape[1] // 3), dtype=np.int16)
    sums = np.zeros(3, dtype=np.int64)
    means = np.zeros(3, dtype=np.float32)
    steps, numbers = np.empty(4, dtype=np.int64), np.empty((4, _NUMBERS), dtype=np.int16)
    factors = np.empty(4, dtype=np.float32)
    contrast = stop = 0
    if p[ORDER] >= 0:
        stop = 4
        while PERMUTATIONS[np.int64(p[ORDER]), contrast] != CONTRAST:
            _plan(p, contrast, means, steps, numbers, factors)
            contrast += 1
    _before_contrast(scratch, columns, size, steps, numbers, factors, contrast, sums)
    for c in range(3):
        means[c] = sums[c] / (size * size)
    for i in range(contrast, stop):
        _plan(p, i, means, steps, numbers, factors)
    _from_contrast(columns, scratch, size, steps, numbers, factors, contrast, stop, np.int64(p[GRAY] > 0))
