"""Two hand-written vector primitives: weighted sums of rows of bytes, and the transpose of bytes.

They are portable LLVM vector code in numba intrinsics, without instructions of a specific processor. Plain numba loops
are 2 times (weighted sum) and 10 times (transpose) slower, and cutting views consists of little else. Both work on raw
addresses; the caller is responsible for bounds.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .kernel import kernel

LANES = 64  # bytes of a row that are summed at once; a power of two
_FEW = 40  # with up to so many positive weights, rounding cannot take a sum out of the range of a byte
_BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _vector(element: ir.Type, values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, len(values)), values)


def _pointer(builder: ir.IRBuilder, address: ir.Value, to: ir.Type) -> ir.Value:
    return builder.inttoptr(address, to.as_pointer())


def _summed(clips: bool) -> Any:
    @intrinsic
    def block(typing_context, out, source, stride, weights, taps):
        """Write LANES bytes to `out`: the sum over k < taps of weights[k] times the bytes at source + k * stride.

        Weights are int16, where 2**14 stands for 1. A byte is centred and put into the upper half of an int16, even and
        odd bytes separately, so that nothing is shuffled. The upper halves of the 32-bit products then have six
        fractional bits. A weight may reach 2, as for bicubic at an edge; sums leave headroom for the overshoot. Without
        `clips`, all sums must be in the range of a byte.
        """

        def codegen(context, builder, signature, arguments):
            out, source, stride, weights, taps = arguments
            pairs, wide = ir.VectorType(_SHORT, LANES // 2), ir.VectorType(_INT, LANES // 2)

            def constant(value: int) -> ir.Constant:
                return _vector(_SHORT, [value] * (LANES // 2))

            centres = constant(-0x7F80)  # 128 in both bytes
            # Half a unit for the final rounding, plus half a fractional bit per tap, since products are rounded down.
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
            sums = [builder.load(total) for total in totals]
            if clips:
                for sign, bound in (("<", -(1 << 13)), (">", (1 << 13) - 1)):
                    limit = constant(bound)
                    sums = [builder.select(builder.icmp_signed(sign, x, limit), limit, x) for x in sums]
            even = builder.and_(builder.lshr(sums[0], constant(6)), constant(0xFF))
            odd = builder.and_(builder.shl(sums[1], constant(2)), constant(-0x100))
            builder.store(builder.xor(builder.or_(even, odd), centres), _pointer(builder, out, pairs), align=1)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), codegen

    return block


_weigh_block, _weigh_block_clipped = _summed(False), _summed(True)


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(one, one, _vector(_INT, [0] * lanes))


TALL = 32  # rows that are transposed at once, if there are enough


def _transposed(height: int) -> Any:
    @intrinsic
    def block(typing_context, out, out_stride, source, stride):
        """Transpose 16 or TALL rows of 16 bytes from `source` to `out`.

        Four rounds interleave row i with row i + 8. In the tall block, each vector also holds row i + 16.
        """

        def codegen(context, builder, signature, arguments):
            out, out_stride, source, stride = arguments

            def load(row: int) -> ir.Value:
                address = builder.add(source, builder.mul(stride, _LONG(row)))
                return builder.load(_pointer(builder, address, ir.VectorType(_BYTE, 16)), align=1)

            rows = [load(i) for i in range(16)]
            if height == TALL:
                both = _vector(_INT, list(range(TALL)))
                rows = [builder.shuffle_vector(row, load(i + 16), both) for i, row in enumerate(rows)]
            lanes = [range(half + at, half + at + 8) for at in (0, 8) for half in range(0, height, 16)]
            pairs = [lane for part in lanes for k in part for lane in (k, height + k)]
            halves = [_vector(_INT, part) for part in (pairs[:height], pairs[height:])]
            for _ in range(4):
                rows = [builder.shuffle_vector(rows[i], rows[i + 8], half) for i in range(8) for half in halves]
            for i, row in enumerate(rows):
                address = builder.add(out, builder.mul(out_stride, _LONG(i)))
                builder.store(row, _pointer(builder, address, row.type), align=1)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), codegen

    return block


_transpose_block, _transpose_tall_block = _transposed(16), _transposed(TALL)


@kernel
def _weigh_row(to, n, base, stride, weights, taps, clips):
    for start in range(0, n, LANES):
        at = min(start, n - LANES)  # the last block overlaps the one before it
        if clips:
            _weigh_block_clipped(to + at, base + at, stride, weights, taps)
        else:
            _weigh_block(to + at, base + at, stride, weights, taps)


@kernel
def weigh(out, source, first, taps, weights, clips=True):
    """Set out[i] to the sum over k < taps[i] of weights[i, k] / 2**14 * source[first[i] + k], rounded and clipped.

    `out` is u8 (m, n), `source` u8 (rows, >= n); their rows are contiguous with any stride between rows. `first` and
    `taps` are i64 (<= m,), `weights` i16 (<= m, >= taps); their last entries apply to all further rows. A row's weights
    must sum to 2**14, up to rounding. Negative weights require `clips`. The result is within 0.5 + taps / 128 levels of
    the exact sum. One call handles all rows, since slicing an array for each row would cost more than the sums.
    """
    m, n = out.shape
    if n >= LANES:
        to, base, own = out.ctypes.data, source.ctypes.data, weights.ctypes.data
        for i in range(m):
            row = base + first[min(i, len(first) - 1)] * source.strides[0]
            at = own + min(i, len(weights) - 1) * weights.strides[0]
            count = taps[min(i, len(taps) - 1)]
            _weigh_row(to + i * out.strides[0], n, row, source.strides[0], at, count, clips or count > _FEW)
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
    """Set out[j, i] = source[i, j] for u8 matrices with contiguous rows and any stride between rows."""
    rows, columns = source.shape
    to, out_stride, base, stride = out.ctypes.data, out.strides[0], source.ctypes.data, source.strides[0]
    whole = rows & ~15 if columns >= 16 else 0
    i = 0
    while i < whole:
        for j in range(0, columns, 16):
            at = min(j, columns - 16)  # the last block overlaps the one before it
            if whole - i >= TALL:
                _transpose_tall_block(to + at * out_stride + i, out_stride, base + i * stride + at, stride)
            else:
                _transpose_block(to + at * out_stride + i, out_stride, base + i * stride + at, stride)
        i += TALL if whole - i >= TALL else 16
    for row in range(whole, rows):
        for j in range(columns):
            out[j, row] = source[row, j]
