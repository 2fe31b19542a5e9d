"""Two vector primitives that a compiler does not find by itself: weighted sums of rows of bytes, and their transpose.

Written as portable LLVM vector code through numba (no processor's own instructions), because the loops that LLVM makes
of plain numba are 2 times (weighted sum) and 10 times (transpose) slower, and views are cut by little else. Both work
on addresses: the caller answers for the bounds.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .kernel import kernel

LANES = 64  # bytes of a row that are summed at once; a power of two
_BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _vector(element: ir.Type, values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, len(values)), values)


def _pointer(builder: ir.IRBuilder, address: ir.Value, to: ir.Type) -> ir.Value:
    return builder.inttoptr(address, to.as_pointer())


@intrinsic
def _weigh_block(typing_context, out, source, stride, weights, taps):
    """LANES bytes at `out`: the sum over k < taps of weights[k] (int16, 2**14 = 1) times those at source + k * stride.

    A byte is centred and put into the upper half of an int16; the upper halves of the 32-bit products then carry six
    fractional bits. A weight may reach 2, as a bicubic's does at an edge; sums leave headroom for its overshoot.
    """

    def codegen(context, builder, signature, arguments):
        out, source, stride, weights, taps = arguments
        byte_row, short_row = ir.VectorType(_BYTE, LANES), ir.VectorType(_SHORT, LANES)
        wide_row = ir.VectorType(_INT, LANES)
        centre = _vector(_BYTE, [-128] * LANES)
        to_upper_half = _vector(_INT, [lane for pair in range(LANES) for lane in (pair, LANES + pair)])
        total = cgutils.alloca_once(builder, short_row)
        # Half a unit for the final rounding; each product below is rounded down, by half a fractional bit on average.
        half = builder.trunc(builder.ashr(taps, taps.type(1)), _SHORT)
        half = builder.add(half, _SHORT(32))
        builder.store(_splat(builder, half, LANES), total)
        with cgutils.for_range(builder, taps) as loop:
            row = builder.load(
                _pointer(builder, builder.add(source, builder.mul(loop.index, stride)), byte_row), align=1
            )
            weight = builder.load(
                _pointer(builder, builder.add(weights, builder.shl(loop.index, taps.type(1))), _SHORT), align=2
            )
            row = builder.xor(row, centre)
            row = builder.bitcast(builder.shuffle_vector(byte_row(None), row, to_upper_half), short_row)
            product = builder.mul(builder.sext(row, wide_row), builder.sext(_splat(builder, weight, LANES), wide_row))
            product = builder.trunc(builder.ashr(product, _vector(_INT, [16] * LANES)), short_row)
            builder.store(builder.add(builder.load(total), product), total)
        result = builder.ashr(builder.load(total), _vector(_SHORT, [6] * LANES))
        for sign, bound in (("<", -128), (">", 127)):
            limit = _vector(_SHORT, [bound] * LANES)
            result = builder.select(builder.icmp_signed(sign, result, limit), limit, result)
        result = builder.xor(builder.trunc(result, byte_row), centre)
        builder.store(result, _pointer(builder, out, byte_row), align=1)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


def _splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(one, one, _vector(_INT, [0] * lanes))


@intrinsic
def _transpose_block(typing_context, out, out_stride, source, stride):
    """The 16 x 16 bytes at `source`, transposed, at `out`: four rounds that interleave row i with row i + 8."""

    def codegen(context, builder, signature, arguments):
        out, out_stride, source, stride = arguments
        row_type = ir.VectorType(_BYTE, 16)
        halves = [_vector(_INT, [lane for k in range(8) for lane in (at + k, 16 + at + k)]) for at in (0, 8)]
        rows = [
            builder.load(_pointer(builder, builder.add(source, builder.mul(stride, _LONG(i))), row_type), align=1)
            for i in range(16)
        ]
        for _ in range(4):
            rows = [builder.shuffle_vector(rows[i], rows[i + 8], half) for i in range(8) for half in halves]
        for i, row in enumerate(rows):
            builder.store(
                row, _pointer(builder, builder.add(out, builder.mul(out_stride, _LONG(i))), row_type), align=1
            )
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@kernel
def weigh(out, source, weights, taps):
    """out[:] = sum over k < taps of weights[k] / 2**14 * source[k], rounded and clipped; u8 rows, i16 weights.

    `out` u8 (n,), `source` u8 (>= taps, >= n) with contiguous rows at any distance, `weights` i16 (>= taps,).
    Weights must sum to 2**14 (but for their rounding). The result is within 0.5 + taps / 128 levels of the real sum.
    """
    n = len(out)
    if n >= LANES:
        to, base, stride, steps = out.ctypes.data, source.ctypes.data, source.strides[0], weights.ctypes.data
        for start in range(0, n - LANES + 1, LANES):
            _weigh_block(to + start, base + start, stride, steps, taps)  # type: ignore[call-arg]
        if n % LANES:  # the last block overlaps the one before it
            _weigh_block(to + n - LANES, base + n - LANES, stride, steps, taps)  # type: ignore[call-arg]
        return
    for j in range(n):
        total = np.int64(32 + (taps >> 1))
        for k in range(taps):
            total += ((np.int64(source[k, j]) - 128) * 256 * np.int64(weights[k])) >> 16
        out[j] = np.uint8(128 + min(max(total >> 6, np.int64(-128)), np.int64(127)))


@kernel
def transpose(out, source):
    """out[j, i] = source[i, j] for u8 matrices with contiguous rows at any distance."""
    rows, columns = source.shape
    to, out_stride, base, stride = out.ctypes.data, out.strides[0], source.ctypes.data, source.strides[0]
    for i in range(0, rows - 15, 16):
        for j in range(0, columns - 15, 16):
            _transpose_block(to + j * out_stride + i, out_stride, base + i * stride + j, stride)  # type: ignore[call-arg]
        for row in range(i, i + 16):
            for j in range(columns & ~15, columns):
                out[j, row] = source[row, j]
    for row in range(rows & ~15, rows):
        for j in range(columns):
            out[j, row] = source[row, j]
