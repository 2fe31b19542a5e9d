"""Stored images in, views out: everything of DALI.

Two forms of one graph. ``operators`` decodes, slices each window, resizes it (a window that runs backwards is mirrored
by the resize itself) and leaves the colours to `colour.apply`; it runs on the GPU with everything after the decoder's
parser on the device. ``fused`` is for the CPU: after the decoder one numba kernel per image cuts and colours all
views, several times faster there. Images are decoded whole: nvImageCodec 0.9 crashes on region decoding on some GPUs,
and the views of an image cover most of it anyway.

Runs are fed and taken by hand, so that each result belongs to the batch that was fed for it. The dynamic executor keeps
its buffers alive for as long as a result is held, and survives an image that it cannot decode: that run raises, the
next one goes on.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from nvidia import dali
from nvidia.dali import backend, fn, types

from .recipes import Cut, Recipe

Form = Literal["fused", "operators"]
Images = Sequence[NDArray[np.uint8]]

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class DecodeError(RuntimeError):
    """A run failed; most often because an image of its batch cannot be decoded."""


def _call(schema: str, device: str, function: Callable[..., Any], *inputs: Any, **arguments: Any) -> Any:
    """An operator, after a look at DALI's registry: a missing GPU kernel shows without a GPU."""
    registered = {
        "cpu": backend.RegisteredCPUOps,
        "gpu": backend.RegisteredGPUOps,
        "mixed": backend.RegisteredMixedOps,
    }[device]()
    if schema not in registered:
        raise NotImplementedError(f"DALI {dali.__version__} has no {schema} for {device!r}")
    return function(*inputs, device=device, **arguments)


def _source(name: str, dtype: types.DALIDataType, ndim: int) -> Any:
    return _call("ExternalSource", "cpu", fn.external_source, name=name, dtype=dtype, ndim=ndim)


def _decode(images: Any, gpu: bool, hw_decoder_load: float | None) -> Any:
    arguments: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if gpu:
        arguments["jpeg_fancy_upsampling"] = True  # as the CPU decoder upsamples chroma
        if hw_decoder_load is not None:
            arguments["hw_decoder_load"] = hw_decoder_load
    return _call("decoders__Image", "mixed" if gpu else "cpu", fn.decoders.image, images, **arguments)


def _operators(image: Any, cuts: Sequence[Cut], device: str) -> list[Any]:
    """Each kind's views (V, S, S, 3), uncoloured."""
    start, shape = (_source(name, types.INT32, 2) for name in ("start", "shape"))
    roi_start, roi_end = (_source(name, types.FLOAT, 2) for name in ("roi_start", "roi_end"))
    kinds, view = [], 0
    for cut in cuts:
        views = []
        for _ in range(cut.count):
            window = _call("Slice", device, fn.slice, image, start=start[view], shape=shape[view], axes=(0, 1))
            views.append(
                _call(
                    "Resize",
                    device,
                    fn.resize,
                    window,
                    size=(cut.size, cut.size),
                    roi_start=roi_start[view],
                    roi_end=roi_end[view],
                    interp_type=_FILTERS[cut.interpolation],
                    antialias=cut.antialias,
                )
            )
            view += 1
        kinds.append(_call("Stack", device, fn.stack, *views, axis=0))
    return kinds


@cache
def _fused(shapes: tuple[tuple[int, int], ...]) -> Any:
    """The operator that cuts and colours all views of one image; compiled once per process for each set of (V, S)."""
    from nvidia.dali.plugin.numba import NumbaFunction

    from .cutting import cut_image

    kinds = len(shapes)
    sizes = np.array([(count, size, size, 3) for count, size in shapes], dtype=np.int64)

    def set_shapes(outputs, inputs):
        for kind in range(kinds):
            for sample in range(len(outputs[kind])):
                for axis in range(4):
                    outputs[kind][sample][axis] = sizes[kind, axis]

    # One function per number of kinds, as DALI hands arrays over singly. It types them as possibly absent; [:] is an
    # array. It looks at as many inputs as there are outputs when it sets shapes (2.4), so it is fed no fewer.
    run = (
        lambda a, i, w, p: cut_image((a[:],), i[:], w[:], p[:]),
        lambda a, b, i, w, p: cut_image((a[:], b[:]), i[:], w[:], p[:]),
        lambda a, b, c, i, w, p: cut_image((a[:], b[:], c[:]), i[:], w[:], p[:]),
        lambda a, b, c, d, i, w, p, x: cut_image((a[:], b[:], c[:], d[:]), i[:], w[:], p[:]),
        lambda a, b, c, d, e, i, w, p, x, y: cut_image((a[:], b[:], c[:], d[:], e[:]), i[:], w[:], p[:]),
        lambda a, b, c, d, e, f, i, w, p, x, y, z: cut_image((a[:], b[:], c[:], d[:], e[:], f[:]), i[:], w[:], p[:]),
    )[kinds - 1]
    inputs = max(3, kinds)
    return NumbaFunction(
        run_fn=run,
        setup_fn=set_shapes,
        out_types=[types.UINT8] * kinds,
        outs_ndim=[4] * kinds,
        in_types=[types.UINT8] + [types.FLOAT] * (inputs - 1),
        ins_ndim=[3] + [2] * (inputs - 1),
        device="cpu",
    )


class Graph:
    """A recipe's pixels on one device. ``submit`` a batch, ``take`` its views, in the same order.

    `device_id` is the GPU, or None for the CPU. Raises NotImplementedError where DALI lacks an operator for the device.
    """

    def __init__(
        self,
        recipe: Recipe,
        batch_size: int,
        *,
        device_id: int | None = None,
        num_threads: int = 1,
        form: Form | None = None,
        hw_decoder_load: float | None = None,
    ):
        self.form: Form = form or ("fused" if device_id is None else "operators")
        gpu = device_id is not None
        if gpu and self.form == "fused":
            raise NotImplementedError("the fused form is for the CPU: leave `form` out on a GPU")
        # Any number of runs may be waiting; a depth of 1 only says how many the first call starts.
        self._settings = {"num_threads": num_threads, "device_id": device_id, "prefetch_queue_depth": 1}
        self._decoding = (gpu, hw_decoder_load)
        self._alone: dali.Pipeline | None = None
        self._pipe = dali.Pipeline(batch_size=batch_size, exec_dynamic=True, **self._settings)
        with self._pipe:
            image = _decode(_source("image", types.UINT8, 1), *self._decoding)
            if self.form == "fused":
                operator = _fused(tuple((cut.count, cut.size) for cut in recipe.cuts))
                windows, params = _source("windows", types.FLOAT, 2), _source("params", types.FLOAT, 2)
                views = operator(image, windows, params, *[params] * max(0, len(recipe.cuts) - 3))
                outputs = [views] if len(recipe.cuts) == 1 else list(views)
            else:
                outputs = _operators(image, recipe.cuts, "gpu" if gpu else "cpu")
            self._pipe.set_outputs(*outputs)

    def submit(self, images: Images, windows: NDArray[np.float32], params: NDArray[np.float32]) -> None:
        """Starts a run on stored images (B arrays of bytes), windows f32 (B, T, 4) and parameters f32 (B, T, P)."""
        feed = self._pipe.feed_input
        feed("image", list(images))
        if self.form == "fused":
            feed("windows", windows)
            feed("params", params)
        else:
            y0, x0, y1, x1 = np.moveaxis(windows, -1, 0)
            height, width = y1 - y0, np.abs(x1 - x0)
            zero, flipped = np.zeros_like(height), x1 < x0
            feed("start", np.stack([y0, np.minimum(x0, x1)], -1).astype(np.int32))
            feed("shape", np.stack([height, width], -1).astype(np.int32))
            feed("roi_start", np.stack([zero, np.where(flipped, width, zero)], -1))
            feed("roi_end", np.stack([height, np.where(flipped, zero, width)], -1))
        self._pipe.schedule_run()

    def take(self, stream: int | None = None) -> list[Any]:
        """The views of the oldest run not yet taken: per kind a u8 (B, V, S, S, 3) array for `from_dlpack`.

        On a GPU they are ready on the CUDA `stream` given, without the host waiting for them. Raises DecodeError when
        the run failed; the runs behind it are not touched.
        """
        try:
            outputs = self._pipe.outputs(cuda_stream=stream)
        except RuntimeError as error:
            raise DecodeError(_reason(error)) from None
        return [output.as_tensor() for output in outputs]

    def decode_alone(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        """Height and width of one stored image as this device decodes it. Raises DecodeError when it does not."""
        if self._alone is None:
            self._alone = dali.Pipeline(batch_size=1, exec_dynamic=True, **self._settings)
            with self._alone:
                self._alone.set_outputs(_decode(_source("image", types.UINT8, 1), *self._decoding))
        self._alone.feed_input("image", [image])
        try:
            self._alone.schedule_run()
            (decoded,) = self._alone.outputs()
        except RuntimeError as error:
            raise DecodeError(_reason(error)) from None
        height, width, _ = decoded.shape()[0]
        return height, width


def _reason(error: RuntimeError) -> str:
    """The sentence of DALI's message that says what happened, without the tracebacks around it."""
    text = str(error).split("encountered:")[-1].split("Current pipeline object")[0]
    return " ".join(text.split()).strip(" :") or "DALI gives no reason"
