"""The DALI pipeline that turns stored images into views. No other module uses DALI.

There are three forms of the graph, with the same views from each:

- ``operators`` decodes, slices each window and resizes it; the resize itself flips windows with x1 < x0. Colour
  augmentation is left to `colour.apply`. On a GPU everything except the decoder's parser runs on the device.
- ``fused`` decodes on the CPU, where one numba kernel per image cuts and augments all views. This is several times
  faster than operators on a CPU. There it writes the views, optionally normalised, into reusable `buffers`. For a GPU
  DALI copies the views: it uses its own pinned buffers, copies on its own stream as soon as a run's views are cut, and
  returns views whose copy has finished.
- ``triton`` only decodes; `triton_views` cuts and augments the decoded images in place.

The fused form decodes only the region of an image that its views show. Rows above it cost their entropy decoding, rows
below it cost nothing. A GPU decodes whole images, since nvImageCodec 0.9 crashes on regions there.

Runs are fed and taken explicitly, so each result belongs to the batch that was fed for it. DALI's dynamic executor
keeps a result's buffers alive while the result is referenced. On a GPU it also keeps them until the device has finished
the work queued by then (a DALI thread waits for it). An image that cannot be decoded makes its run raise; the next run
succeeds.
"""

import ctypes
import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from numba import types as numba_types
from numpy.typing import NDArray
from nvidia import dali
from nvidia.dali import backend, fn, types
from torch import Tensor

from . import callbacks, tuning
from .buffers import Buffers
from .normalise import Pixels, table
from .parameters import PAD_COLUMNS, PAD_ROWS, PADDING
from .recipes import IMAGENET_MEAN, IMAGENET_STD, Cut, Recipe

Form = Literal["fused", "operators", "triton"]
Images = Sequence[NDArray[np.uint8]]

_FILTERS = {"bilinear": types.DALIInterpType.INTERP_LINEAR, "bicubic": types.DALIInterpType.INTERP_CUBIC}


class DecodeError(RuntimeError):
    """A run failed, usually because an image of its batch cannot be decoded."""


@dataclass(frozen=True)
class Decoded:
    """A batch's decoded images u8 (H, W, 3) in DALI's memory, which stays valid while `owner` is referenced."""

    addresses: NDArray[np.int64]  # (B,)
    sizes: NDArray[np.int32]  # (B, 2): heights and widths
    owner: Any


def _call(schema: str, device: str, function: Callable[..., Any], *inputs: Any, **arguments: Any) -> Any:
    """Create an operator after checking DALI's registry, which reports a missing GPU kernel even without a GPU."""
    registry: Any = backend
    registered = {
        "cpu": registry.RegisteredCPUOps,
        "gpu": registry.RegisteredGPUOps,
        "mixed": registry.RegisteredMixedOps,
    }[device]()
    if schema not in registered:
        raise NotImplementedError(f"DALI {dali.__version__} has no {schema} for {device!r}")
    return function(*inputs, device=device, **arguments)


def _source(name: str, dtype: types.DALIDataType, ndim: int) -> Any:
    return _call("ExternalSource", "cpu", fn.external_source, name=name, dtype=dtype, ndim=ndim)


def _decode(
    images: Any,
    gpu: bool,
    hw_decoder_load: float | None,
    largest: tuple[int, int] | None = None,
    region: dict[str, Any] | None = None,
) -> Any:
    arguments: dict[str, Any] = {"output_type": types.DALIImageType.RGB, "adjust_orientation": False}
    if gpu:
        arguments["jpeg_fancy_upsampling"] = True  # upsample chroma as the CPU decoder does
        if hw_decoder_load is not None:
            arguments["hw_decoder_load"] = hw_decoder_load
        if largest:
            arguments["preallocate_height_hint"], arguments["preallocate_width_hint"] = largest
    if region:
        return _call("decoders__ImageSlice", "cpu", fn.decoders.image_slice, images, axes=(0, 1), **region, **arguments)
    return _call("decoders__Image", "mixed" if gpu else "cpu", fn.decoders.image, images, **arguments)


_WIDE = 0.8  # share of columns above which images are decoded in full width: partial rows cost an additional copy


def _regions(
    images: Images, windows: NDArray[np.float32], sizes: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the region of each image that its views show: start (y, x) and shape (height, width), i32 (B, 2) each.

    A file without a JPEG's end marker is decoded whole. If it is cut off, it then fails whatever its views show, as it
    does on every device.
    """
    edges = windows.reshape(len(images), -1, 2)
    low, high = np.floor(edges.min(1)), np.ceil(edges.max(1))
    doubtful = [image[-2:].tobytes() != b"\xff\xd9" for image in images]
    low[doubtful], high[doubtful] = 0, np.inf
    whole = high[:, 1] - low[:, 1] > _WIDE * sizes[:, 1]
    low[whole, 1], high[whole, 1] = 0, np.inf
    start = np.clip(low, 0, sizes - 1)
    return start.astype(np.int32), (np.clip(high, start + 1, sizes) - start).astype(np.int32)


_WINDOWS = {  # the inputs of the operators for each view: pairs (y, x)
    "start": types.DALIDataType.INT32,
    "shape": types.DALIDataType.INT32,
    "roi_start": types.DALIDataType.FLOAT,
    "roi_end": types.DALIDataType.FLOAT,
}


def _operators(image: Any, cuts: Sequence[Cut], device: str, batch_size: int) -> list[Any]:
    """Return each kind's views (V, S, S, 3), not augmented."""
    kinds, view = [], 0
    for cut in cuts:
        views = []
        for _ in range(cut.count):
            # One source per view and input: a subscript would be an operator, and DALI runs CPU operators in sequence.
            at = {name: _source(f"{name}{view}", dtype, 1) for name, dtype in _WINDOWS.items()}
            size = _source(f"size{view}", types.DALIDataType.FLOAT, 1) if cut.padded else (cut.size, cut.size)
            beyond = {"out_of_bounds_policy": "trim_to_shape"} if cut.padded else {}
            window = _call(
                "Slice", device, fn.slice, image, start=at["start"], shape=at["shape"], axes=(0, 1), **beyond
            )
            resized = _call(
                "Resize",
                device,
                fn.resize,
                window,
                size=size,
                roi_start=at["roi_start"],
                roi_end=at["roi_end"],
                roi_relative=cut.padded,
                interp_type=_FILTERS[cut.interpolation],
                antialias=cut.antialias,
                minibatch_size=batch_size,  # one launch for all images, instead of one for every 32
            )
            if cut.padded:
                whole = {"start": (0, 0), "shape": (cut.size, cut.size), "axes": (0, 1)}
                fill = {"out_of_bounds_policy": "pad", "fill_values": PADDING}
                resized = _call("Slice", device, fn.slice, resized, **whole, **fill)
            views.append(resized)
            view += 1
        kinds.append(_call("Stack", device, fn.stack, *views, axis=0))
    return kinds


def _fused(cuts: tuple[Cut, ...], gpu: bool) -> Any:
    """Create DALI's numba operator with functions that are already compiled.

    DALI would wrap Python functions and compile them in each process, which takes 3 to 10 s. This operator passes it
    two C functions; numba caches the first on disk. On a CPU the operator has a fourth input and a dummy output, since
    an operator must have an output.
    """
    from nvidia.dali.plugin.numba import NumbaFunction  # lazy: asks numba about CUDA, which may fail without a GPU

    shapes = tuple((cut.count, cut.size, cut.size, 3) for cut in cuts) if gpu else ((1,),)

    class Fused(NumbaFunction):
        def _get_run_fn_cpu(self, *_: Any) -> int:
            return callbacks.cut_all().address

        def _get_setup_fn_cpu(self, _: Any) -> int:
            return callbacks.write_shapes(shapes).address

    byte, real, long = types.DALIDataType.UINT8, types.DALIDataType.FLOAT, types.DALIDataType.INT64
    return Fused(
        run_fn=None,
        setup_fn=None,
        out_types=[byte] * len(shapes),
        outs_ndim=[len(shape) for shape in shapes],
        in_types=[byte, real, real, *([] if gpu else [long])],
        ins_ndim=[3, 2, 2, *([] if gpu else [2])],
        device="cpu",
    )


@cache
def _fits() -> bool:
    """Return whether this DALI calls a numba operator's functions as 2.4 does, and warn if not."""
    from nvidia.dali.plugin.numba import NumbaFunction

    operator: Any = NumbaFunction
    try:
        signatures = operator._run_fn_sig(None, False), operator._setup_fn_sig(None)
    except (AttributeError, TypeError):
        signatures = None
    word, number = numba_types.uint64, numba_types.int32
    run = [word, word, word, number] * 2
    setup = [word, word, number, word, word, number, number]
    fitting = signatures == (numba_types.void(*run), numba_types.void(*setup))
    if not fitting:
        warnings.warn(
            f"DALI {dali.__version__} calls numba functions in another way than 2.4 does: views are cut by its own "
            "operators, several times slower on a CPU; install a 2.4 release",
            stacklevel=2,
        )
    return fitting


def settled(form: Form | Literal["auto"], gpu: bool) -> Form:
    """Resolve "auto": "fused" on a CPU with a DALI that fits, otherwise "operators".

    A GPU keeps "operators" until docs/gpu.md has measured rates of all three forms.
    """
    if form != "auto":
        return form
    return "fused" if not gpu and _fits() else "operators"


_alive = weakref.WeakSet[Any]()  # pipelines


def _keep() -> None:
    """Leak all pipelines in a forked child. DALI's threads do not exist there, so freeing one would crash or hang."""
    for pipe in list(_alive):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipe))


os.register_at_fork(after_in_child=_keep)


class Graph:
    """A recipe's pixels on one device. ``submit`` batches, then ``take`` their views in the same order.

    One thread may submit while another takes; locks protect the pending runs, since DALI's executor has none for them.

    `device_id` is the GPU, or None for the CPU. The fused form on a CPU returns `pixels` other than u8 normalised with
    ImageNet's mean and std; all other views are u8. A GPU's JPEG engines decode the share `hw_decoder_load` of the
    images; None uses the fastest share, measured on the first batch. `largest` is the height and width for which the
    decoder preallocates memory. Raises NotImplementedError if DALI lacks an operator for the device.
    """

    def __init__(
        self,
        recipe: Recipe,
        batch_size: int,
        *,
        device_id: int | None = None,
        num_threads: int = 1,
        form: Form | Literal["auto"] = "auto",
        hw_decoder_load: float | None = None,
        largest: tuple[int, int] | None = None,
        pixels: Pixels = "uint8",
    ):
        gpu = device_id is not None
        self.form = settled(form, gpu)
        # Any number of runs may be pending; the depth is only how many runs the first call would start.
        self._settings = {"num_threads": num_threads, "device_id": device_id, "prefetch_queue_depth": 1}
        self._decoding = (gpu and self.form != "fused", hw_decoder_load, largest)
        sides = [(cut.padded, cut.size) for cut in recipe.cuts for _ in range(cut.count)]
        self._padded = {view: side for view, (padded, side) in enumerate(sides) if padded}
        self._submitting, self._running = Lock(), Lock()
        self._process = os.getpid()
        self._started = deque[Any]()  # the pipeline of each run not yet taken: tuning may replace self._pipe
        self._single: dali.Pipeline | None = None
        self._buffers: list[Buffers] = []  # one per kind, if the views are not in DALI's memory
        self._under_way = deque[list[Tensor]]()  # for each run, the views that DALI's threads may still write to
        self._words = table(IMAGENET_MEAN, IMAGENET_STD, getattr(torch, pixels)) if pixels != "uint8" else None
        if self.form == "fused" and not gpu:
            for cut in recipe.cuts:
                shape = (cut.size, cut.size, 3) if pixels == "uint8" else (3, cut.size, cut.size)
                self._buffers.append(Buffers((batch_size, cut.count, *shape), getattr(torch, pixels)))
        self._make = partial(self._pipeline, recipe.cuts, batch_size)
        self._pipe: Any = self._make()
        # Keep these views until DALI's threads have ended. The pipeline may outlive this object, as in a traceback.
        weakref.finalize(self._pipe, self._under_way.clear).atexit = False
        self._tunes = 3 if self._decoding[0] and hw_decoder_load is None else 0  # remaining attempts

    def _pipeline(self, cuts: tuple[Cut, ...], batch_size: int) -> Any:
        gpu = self._settings["device_id"] is not None
        pipe = dali.Pipeline(batch_size=batch_size, exec_dynamic=True, **self._settings)
        with pipe:
            parts = ("start", "shape") if self.form == "fused" else ()
            region = {name: _source(name, types.DALIDataType.INT32, 1) for name in parts}
            image = _decode(_source("image", types.DALIDataType.UINT8, 1), *self._decoding, region)
            if self.form == "fused":
                sources = [_source(name, types.DALIDataType.FLOAT, 2) for name in ("windows", "params")]
                sources += [] if gpu else [_source("places", types.DALIDataType.INT64, 2)]
                views: Any = _fused(cuts, gpu)(image, *sources)
                outputs = list(views) if isinstance(views, list | tuple) else [views]
                outputs = [kind.gpu() for kind in outputs] if gpu else outputs
            elif self.form == "triton":
                outputs = [image]
            else:
                outputs = _operators(image, cuts, "gpu" if gpu else "cpu", batch_size)
            pipe.set_outputs(*outputs)
        _alive.add(pipe)
        return pipe

    def _tune(self, images: Images) -> None:
        """Find the share of the JPEG engines that decodes these images fastest, before the first run."""
        self._tunes -= 1
        try:
            share = tuning.fastest_share(lambda share: self._seconds(share, images))
        except RuntimeError:  # an image cannot be decoded: try again with the next batch
            return
        self._tunes = 0
        if share != tuning.SHARES[0]:
            self._decoding = (self._decoding[0], share, *self._decoding[2:])
            self._pipe = self._make()

    def _seconds(self, share: float, images: Images) -> float:
        """Measure the seconds that it takes to decode `images`, with four batches in flight."""
        pipe: Any = dali.Pipeline(batch_size=len(images), exec_dynamic=True, **self._settings)
        with pipe:
            source = _source("image", types.DALIDataType.UINT8, 1)
            pipe.set_outputs(_decode(source, self._decoding[0], share, *self._decoding[2:]))
        start = 0.0
        for count in (1, 4):  # the first run is a warm-up that allocates memory
            start = time.perf_counter()
            for _ in range(count):
                pipe.feed_input("image", list(images))
                pipe.schedule_run()
            for _ in range(count):
                pipe.outputs()  # without a stream to wait on, the host waits
        return (time.perf_counter() - start) / count

    def submit(
        self,
        images: Images,
        windows: NDArray[np.float32],
        params: NDArray[np.float32],
        sizes: NDArray[np.int32],
    ) -> None:
        """Start a run on stored images (B arrays of bytes), windows f32 (B, T, 4) and parameters f32 (B, T, P).

        `sizes` i32 (B, 2) are the images' heights and widths. The run fails if an image is smaller when decoded.
        """
        with self._submitting:
            if self._pipe is None:  # closed, by another thread
                return
            if self._tunes:
                self._tune(images)
            self._feed(images, windows, params, sizes)
            with self._running:
                self._pipe.schedule_run()
                self._started.append(self._pipe)

    def _feed(
        self,
        images: Images,
        windows: NDArray[np.float32],
        params: NDArray[np.float32],
        sizes: NDArray[np.int32],
    ) -> None:
        feed = self._pipe.feed_input
        feed("image", list(images))
        if self.form == "fused":
            start, shape = _regions(images, windows, sizes)
            feed("start", start)
            feed("shape", shape)
            feed("windows", windows - np.tile(start, 2)[:, None].astype(np.float32))
            feed("params", params)
            if self._buffers:
                feed("places", self._places(len(images)))
        elif self.form == "operators":
            y0, x0, y1, x1 = np.moveaxis(windows, -1, 0)
            height, width = y1 - y0, np.abs(x1 - x0)
            zero, flipped = np.zeros_like(height), x1 < x0
            for view, side in self._padded.items():  # padded cuts have a relative roi: all that is inside the image
                height[:, view] = width[:, view] = 1
                feed(f"size{view}", np.ascontiguousarray(side - params[:, view, PAD_ROWS : PAD_COLUMNS + 1]))
            pairs = {
                "start": (y0, np.minimum(x0, x1)),
                "shape": (y1 - y0, np.abs(x1 - x0)),
                "roi_start": (zero, np.where(flipped, width, zero)),
                "roi_end": (height, np.where(flipped, zero, width)),
            }
            for name, pair in pairs.items():
                dtype = np.int32 if _WINDOWS[name] == types.DALIDataType.INT32 else np.float32
                for view, column in enumerate(np.stack(pair, -1).astype(dtype).swapaxes(0, 1)):
                    feed(f"{name}{view}", np.ascontiguousarray(column))

    def _places(self, count: int) -> NDArray[np.int64]:
        """Allocate the views of a run of `count` images. Returns the input of `cut_all`: i64 (count, kinds, 5)."""
        views = [buffers.take()[:count] for buffers in self._buffers]
        self._under_way.append(views)
        words = self._words.data_ptr() if self._words is not None else 0
        places = np.empty((count, len(views), 5), dtype=np.int64)
        for kind, view in enumerate(views):
            steps = np.arange(count) * view.stride(0) * view.itemsize
            places[:, kind, 0] = view.data_ptr() + steps
            places[:, kind, 1:] = view.shape[1], view.shape[-2], view.itemsize, words
        return places

    def take(self, stream: int | None = None) -> list[Any]:
        """Return the views of the oldest run not yet taken: per kind an array for `from_dlpack`, u8 (B, V, S, S, 3) or
        normalised as `pixels` says. The triton form returns one `Decoded`.

        On a GPU they are ready on the given CUDA `stream`; the host does not wait. Raises DecodeError if the run
        failed; later runs are not affected.
        """
        views = self._under_way.popleft() if self._buffers else []
        try:
            with self._running:
                outputs = self._started.popleft().outputs(cuda_stream=stream)
        except RuntimeError as error:
            raise DecodeError(_reason(error)) from None
        if views:
            return views
        if self.form == "triton":
            (images,) = outputs
            addresses = np.array([images[k].data_ptr() for k in range(len(images))], dtype=np.int64)
            return [Decoded(addresses, np.array(images.shape(), dtype=np.int32)[:, :2], images)]
        return [output.as_tensor() for output in outputs]

    def close(self) -> None:
        """Discard pending runs and free the memory; views already taken stay valid."""
        if self._process != os.getpid():  # in a forked child the lock may be held by a thread that does not exist
            return
        with self._submitting:
            self._started.clear()
            self._pipe = self._single = None

    __del__ = close

    def decode_one(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        """Decode one stored image on this device and return its height and width. Raises DecodeError if that fails."""
        if self._single is None:
            # This pipeline lives until the graph is closed: one thread is enough.
            self._single = dali.Pipeline(batch_size=1, exec_dynamic=True, **{**self._settings, "num_threads": 1})
            with self._single:
                self._single.set_outputs(_decode(_source("image", types.DALIDataType.UINT8, 1), *self._decoding))
            _alive.add(self._single)
        self._single.feed_input("image", [image])
        try:
            self._single.schedule_run()
            (decoded,) = self._single.outputs()
        except RuntimeError as error:
            raise DecodeError(_reason(error)) from None
        height, width, _ = decoded.shape()[0]
        return height, width


def _reason(error: RuntimeError) -> str:
    """Return the sentence of DALI's message that names the cause, without the tracebacks around it."""
    text = str(error).split("encountered:")[-1].split("Current pipeline object")[0]
    return " ".join(text.split()).strip(" :") or "DALI gives no reason"
