"""The C functions that DALI's numba operator calls in the fused form of the `graph`."""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from .cutting import cut_view, look_up
from .kernel import kept

_ARRAYS, _NDIMS = types.CPointer(types.voidptr), types.CPointer(types.int32)
_SHAPES, _INT = types.CPointer(types.CPointer(types.int64)), types.int32
_RUN = types.void(_ARRAYS, _SHAPES, _NDIMS, _INT, _ARRAYS, _SHAPES, _NDIMS, _INT)
_SETUP = types.void(_SHAPES, _NDIMS, _INT, _SHAPES, _NDIMS, _INT, _INT)


@intrinsic
def _pointer(typing_context, address):
    """Cast an integer address to a pointer."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), codegen


@cache
def cut_all() -> Any:
    """Compile the C function that cuts all views of one decoded image, with the signature of DALI's numba operator.

    The views are written to DALI's outputs or, if there is a fourth input, to the memory that it describes. It has an
    i64 row for each kind: address, number of views, side, bytes of an element, and address of a `normalise.table`
    (unused for u8).
    """

    def run(outputs, out_shapes, out_ndims, kinds, inputs, in_shapes, in_ndims, count):
        image = carray(inputs[0], (in_shapes[0][0], in_shapes[0][1], in_shapes[0][2]), np.uint8)
        windows = carray(inputs[1], (in_shapes[1][0], in_shapes[1][1]), np.float32)
        params = carray(inputs[2], (in_shapes[2][0], in_shapes[2][1]), np.float32)
        done = 0
        for kind in range(kinds if count == 3 else in_shapes[3][0]):
            if count == 3:
                to = words = carray(outputs[kind], 1, np.uint8).ctypes.data
                views, side, size = out_shapes[kind][0], out_shapes[kind][1], 1
            else:
                to, views, side, size, words = carray(inputs[3], (in_shapes[3][0], 5), np.int64)[kind]
            names: Any = _pointer(words)  # type: ignore[call-arg]
            normalised = np.empty((side, side, 3), dtype=np.uint8)
            for v in range(views):
                at: Any = _pointer(to + v * 3 * side * side * size)  # type: ignore[call-arg]
                view = carray(at, (side, side, 3), np.uint8) if size == 1 else normalised
                cut_view(view, image, windows[done + v], params[done + v])
                if size == 2:
                    look_up(carray(at, (3, side, side), np.uint16), view, carray(names, (3, 256), np.uint16))
                elif size == 4:
                    look_up(carray(at, (3, side, side), np.uint32), view, carray(names, (3, 256), np.uint32))
            done += views

    with kept() as possible:
        return cfunc(_RUN, cache=possible)(run)


@cache
def write_shapes(shapes: tuple[tuple[int, ...], ...]) -> Any:
    """Compile the C function that tells DALI the shapes of the outputs of each sample."""
    sizes, axes = np.array(shapes, dtype=np.int64), len(shapes[0])

    @cfunc(_SETUP)
    def setup(out_shapes, out_ndims, kinds, in_shapes, in_ndims, count, samples):
        for kind in range(kinds):
            for sample in range(samples):
                for axis in range(axes):
                    out_shapes[kind * samples + sample][axis] = sizes[kind, axis]

    return setup
