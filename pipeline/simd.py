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

    A byte is centred and put into the upper half of an int16, even and odd bytes apart, so that nothing is shuffled;
    the upper halves of the 32-bit products then carry six fractional bits. A weight may reach 2, as a bicubic's does at
    an edge; sums leave headroom for its overshoot.
    """

    def codegen(context, builder, signature, arguments):
        out, source, stride, weights, taps = arguments
        pairs, wide = ir.VectorType(_SHORT, LANES // 2), ir.VectorType(_INT, LANES // 2)

        def constant(value: int) -> ir.Constant:
            return _vector(_SHORT, [value] * (LANES // 2))

        centres = constant(-0x7F80)  # 128 in both bytes
        # Half a unit for the final rounding; each product below is rounded down, by half a fractional bit on average.
        half = builder.add(builder.trunc(builder.ashr(taps, taps.type(1)), _SHORT), _SHORT(32))
        totals = [cgutils.alloca_once_value(builder, splat(builder, half, LANES // 2)) for _ in range(2)]
        with cgutils.for_range(builder, taps) as loop:
            address = builder.add(source, builder.mul(loop.index, stride))
            row = builder.xor(builder.load(_pointer(builder, address, pairs), align=1), centres)
            address = builder.add(weights, builder.shl(loop.index, taps.type(1)))
            weight = builder.load(_pointer(builder, address, _SHORT), align=2)
            weight = builder.sext(splat(builder, weight, LANES // 2), wide)
            upper = builder.shl(row, constant(8)), builder.and_(row, constant(-0x100))
            for total, byte in zip(totals, upper, strict=True):
                product = builder.mul(builder.sext(byte, wide), weight)
                product = builder.trunc(builder.ashr(product, _vector(_INT, [16] * (LANES // 2))), pairs)
                builder.store(builder.add(builder.load(total), product), total)
        levels = []
        for total in totals:
            result = builder.ashr(builder.load(total), constant(6))
            for sign, bound in (("<", -128), (">", 127)):
                limit = constant(bound)
                result = builder.select(builder.icmp_signed(sign, result, limit), limit, result)
            levels.append(result)
        even, odd = builder.and_(levels[0], constant(0xFF)), builder.shl(levels[1], constant(8))
        builder.store(builder.xor(builder.or_(even, odd), centres), _pointer(builder, out, pairs), align=1)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
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
def _weigh_row(to, n, base, stride, weights, taps):
    for start in range(0, n - LANES + 1, LANES):
        _weigh_block(to + start, base + start, stride, weights, taps)  # type: ignore[call-arg]
    if n % LANES:  # the last block overlaps the one before it
        _weigh_block(to + n - LANES, base + n - LANES, stride, weights, taps)  # type: ignore[call-arg]


@kernel
def weigh(out, source, first, taps, weights):
    """out[i] = sum over k < taps[i] of weights[i, k] / 2**14 * source[first[i] + k], rounded and clipped.

    `out` u8 (m, n), `source` u8 (rows, >= n), both with contiguous rows at any distance; `first`, `taps` i64 (<= m,)
    and `weights` i16 (<= m, >= taps), whose last ones serve all rows beyond. A row's weights must sum to 2**14 (but for
    their rounding). The result is within 0.5 + taps / 128 levels of the real sum. All rows in one call: a slice of an
    array for each would cost more than the sums.
    """
    m, n = out.shape
    if n >= LANES:
        to, base, own = out.ctypes.data, source.ctypes.data, weights.ctypes.data
        for i in range(m):
            row = base + first[min(i, len(first) - 1)] * source.strides[0]
            at = own + min(i, len(weights) - 1) * weights.strides[0]
            _weigh_row(to + i * out.strides[0], n, row, source.strides[0], at, taps[min(i, len(taps) - 1)])
        return
    for i in range(m):
        low, count, shares = first[min(i, len(first) - 1)], taps[min(i, len(taps) - 1)], min(i, len(weights) - 1)
        for j in range(n):
            total = np.int64(32 + (count >> 1))
            for k in range(count):
                total += ((np.int64(source[low + k, j]) - 128) * 256 * np.int64(weights[shares, k])) >> 16
            out[i, j] = np.uint8(128 + min(max(total >> 6, np.int64(-128)), np.int64(127)))


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
