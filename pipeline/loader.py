"""Batches of views: prefetched, resumable at every step, not stopped by bad samples.

A batch is a range of positions in an epoch. Everything random about it follows from (seed, epoch, sample, view). The
loader's state is therefore three numbers, and prefetching does not change the result:

    positions -> samples -> bytes, windows, targets      a few threads, `2 * prefetch` batches ahead
              -> decode, cut, augment                    DALI, `prefetch` batches ahead, fed in order by one thread
              -> Batch                                   when the trainer requests the next one
"""

import json
import operator
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import colour
from .batch import Batch, View
from .graph import Decoded, DecodeError, Form, Graph, settled
from .host import cores
from .normalise import Pixels, normalise
from .preparation import Order, Preparation, Prepared, StreamPreparation, Task, by_kind
from .recipes import IMAGENET_MEAN, IMAGENET_STD, Recipe, describe
from .samples import Samples
from .shards import ReadError, ShardSet, Spec
from .streams import Stream

_VERSION = 1
_MOST = 2**31 - 1
_MOST_THREADS = 1024  # more threads, as by a typing error, would abort the process


@dataclass
class _Run:
    """A batch submitted to DALI. `_repair` may take its views early; `views` stays None if the run failed."""

    fed: Future[Prepared | None]  # resolves to None after the end of a stream that can be read only once
    taken: bool = False
    views: list[Any] | None = None
    failure: str = ""


class Loader:
    """Batches of a recipe's views, epoch after epoch.

    Iterating yields the rest of the current epoch, from where a loaded state or an interrupted loop left it. The next
    iteration starts the next epoch. `batch_size` is per rank; every rank takes the same number of steps over disjoint
    samples. The incomplete last batch of an epoch is dropped. With ``drop_last=False`` the ranks share it, and some may
    get an empty batch. ``shuffle=False`` keeps the stored order. ``order="block"``, for slow storage, shuffles shards
    and then samples within a window of shards; it is the default for a remote set ("global" for others). `num_threads`
    are DALI's (default: this process's cores divided by the ranks of the machine). For `max_bad` see `samples.Samples`.
    `hw_decoder_load` is the share of images that a GPU's JPEG engines decode (default: the fastest for the first
    batch). `form` selects how views are cut (see `graph`); "auto" is "fused" on a CPU and "operators" on a GPU.
    `pixels` other than "uint8" yields the result of `View.tensor` in that type, with ImageNet's mean and std.
    `prefetch` is how many batches DALI computes ahead. Each of them holds its decoded images and views on the device,
    and two more batches of stored bytes on the host.

    A batch stays valid while it, or any tensor or array that shares its memory, is referenced. On a GPU its pixels,
    targets and labels are ready on the stream that is current when it is requested; the host does not wait. One thread
    at a time may iterate.

    Raises ValueError for a number out of range or a set smaller than one global batch, ShardError for too many bad
    samples, and ReadError if stored bytes cannot be read. The state does not change then, and iterating again resumes
    from it.
    """

    def __init__(
        self,
        shards: ShardSet | Stream | Spec,
        recipe: Recipe,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        order: Order | None = None,
        max_bad: float | None = None,
        hw_decoder_load: float | None = None,
        prefetch: int = 2,
        form: Form | Literal["auto"] = "auto",
        pixels: Pixels = "uint8",
    ):
        if num_threads is None:
            num_threads = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        batch_size = _whole("batch_size", batch_size, 1, _MOST)
        seed = _whole("seed", seed, 0, 2**63 - 1)
        world_size = _whole("world_size", world_size, 1, _MOST)
        rank = _whole("rank", rank, 0, world_size - 1)
        prefetch = _whole("prefetch", prefetch, 1, _MOST_THREADS)
        self.num_threads = _whole("num_threads", num_threads, 1, _MOST_THREADS)
        self.shards = shards if isinstance(shards, ShardSet | Stream) else ShardSet(shards)
        self.recipe, self.batch_size, self.rank, self.world_size = recipe, batch_size, rank, world_size
        self.device = _device(device)
        self._shuffle, self._depth = shuffle, prefetch
        global_batch = batch_size * world_size
        if order is None:
            order = "block" if isinstance(self.shards, ShardSet) and self.shards.remote else "global"
        if order not in ("global", "block"):
            raise ValueError(f"order must be 'global' or 'block', not {order!r}")
        if form not in ("auto", *get_args(Form)):
            raise ValueError(f"form must be 'auto' or one of {get_args(Form)}, not {form!r}")
        if pixels not in get_args(Pixels):
            raise ValueError(f"pixels must be one of {get_args(Pixels)}, not {pixels!r}")
        if form == "triton" and self.device.type == "cpu" and torch.cuda.is_available():
            raise ValueError("form 'triton' needs device='cuda' on a machine with a GPU: set it, or use form='fused'")
        if form == "triton" and any(cut.padded for cut in recipe.cuts):
            raise ValueError("form 'triton' cannot cut views that extend beyond the image: use 'operators' or 'fused'")
        if hw_decoder_load is not None and not 0 <= hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load is a share, in [0, 1], not {hw_decoder_load}")
        if drop_last and isinstance(self.shards, ShardSet) and len(self.shards) < global_batch:
            raise ValueError(
                f"{len(self.shards)} samples do not fill one batch of {batch_size} on {world_size} ranks: "
                "lower batch_size, or keep incomplete batches with drop_last=False"
            )
        form = settled(form, self.device.type == "cuda")
        self._build = partial(
            Graph,
            recipe,
            batch_size,
            device_id=self.device.index if self.device.type == "cuda" else None,
            num_threads=self.num_threads,
            form=form,
            hw_decoder_load=hw_decoder_load,
            largest=self.shards.usual_size if isinstance(self.shards, ShardSet) else None,
            pixels=pixels,
        )
        self._dtype: torch.dtype = getattr(torch, pixels)
        self._identity = {
            "version": _VERSION,
            "seed": seed,
            "order": order if shuffle else "stored",
            "shards": self.shards.fingerprint,
            "recipe": describe(recipe),
        }
        pinned = self.device.type == "cuda"
        task = Task(recipe, seed, global_batch, rank, world_size, drop_last, form, pinned)
        self._prepare: Preparation
        if isinstance(self.shards, Stream):
            if self.shards.once and world_size > 1:
                raise ValueError("standard input feeds one process only: give each rank a command, or shards")
            self._prepare = StreamPreparation(task, self.shards, shuffle)
        else:
            self._prepare = Preparation(
                task, Samples(self.shards, seed, max_bad, recipe.masks), order if shuffle else None
            )
        self._pool: ThreadPoolExecutor | None = None
        self._feeder: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._announced: tuple[list[int], int] | None = None
        self._built: Graph | None = None
        self._ahead: deque[Future[Prepared | None]] = deque()
        self._runs: deque[_Run] = deque()
        self._read: deque[tuple[torch.cuda.Event, Decoded]] = deque()  # images that the device may still be reading
        self._epoch, self._position = self._prepare.start(0, 0)
        self.close()

    def __len__(self) -> int:
        """Steps per epoch, on every rank."""
        return len(self._prepare)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self._epoch

    @property
    def bad(self) -> dict[int, str]:
        """The bad samples that this process has found so far: index in the set -> reason."""
        return self._prepare.bad

    def add_bad(self, bad: dict[int, str]) -> None:
        """Add bad samples that other processes found, so that `max_bad` applies to all processes together.

        Raises ShardError if there are too many, ValueError if this loader reads a stream.
        """
        if not isinstance(self._prepare, Preparation):
            raise ValueError("add_bad needs a ShardSet: processes do not share the sample numbers of a stream")
        self._prepare.samples.add_bad(bad)

    def shuffle_quality(self) -> dict[str, float]:
        """Return `order.shuffle_quality` of the first quarter million samples of the current epoch."""
        return self._prepare.shuffle_quality(self._epoch)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        while self._epoch == epoch:
            yield self._next()

    def forever(self) -> Iterator[Batch]:
        """Yield batches epoch after epoch, without end."""
        return chain.from_iterable(repeat(self))

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last yielded batch: the same on all ranks, serialisable as JSON."""
        state = {**self._identity, "epoch": self._epoch, "position": self._position}
        return json.loads(json.dumps(state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`, which may come from another batch size, world size or number of threads.

        Raises ValueError, naming the field, for a state of another seed, order, recipe or shard set.
        """
        mine = self.state_dict()
        for name in self._identity:
            if not isinstance(state, dict) or name not in state:
                raise ValueError(f"the loader's state has no {name!r}: it was not taken from a Loader")
            _same(name, state[name], mine[name])
        epoch, position = (state.get(name) for name in ("epoch", "position"))
        if not (isinstance(epoch, int) and isinstance(position, int) and 0 <= epoch < 2**32):
            raise ValueError(f"the loader's state has epoch {epoch!r} and position {position!r}")
        self._epoch, self._position = self._prepare.start(epoch, position)
        self.close()

    def close(self) -> None:
        """Stop the threads and free the device's memory. Yielded batches stay valid; iterating starts again."""
        for threads in (self._pool, self._feeder):
            if threads is not None:
                threads.shutdown(wait=False, cancel_futures=True)
        for event, _ in self._read:
            event.synchronize()
        self._read.clear()
        if self._built is not None:
            self._built.close()
        self._pool = self._feeder = self._built = None
        self._ahead.clear()
        self._runs.clear()
        self._front = self._epoch, self._position = self._prepare.restart(self._epoch, self._position)

    @property
    def _graph(self) -> Graph:
        if self._built is None:
            self._built = self._build()
        return self._built

    def _fill(self) -> None:
        """Queue as many batches as `prefetch` allows: threads prepare them and feed them to DALI."""
        if self._pool is None or self._feeder is None:
            start = partial(ThreadPoolExecutor, initializer=_work_for, initargs=(self.device,))
            self._pool = start(1 if isinstance(self.shards, Stream) else 2 * self._depth, "loader")
            self._feeder, self._process = start(1, "loader_feeds"), os.getpid()
        self._announce()
        while True:
            # Without shuffling (evaluation) a single epoch is usual: do not prefetch the next one.
            while len(self._ahead) < 2 * self._depth and self._wanted(self._front[0]):
                span = self._prepare.span(*self._front)
                self._ahead.append(self._pool.submit(self._prepare, span))
                self._front = span.after
            if len(self._runs) >= self._depth or not self._ahead:
                return
            self._runs.append(_Run(self._feeder.submit(_feed, self._graph, self._ahead.popleft())))

    def _wanted(self, epoch: int) -> bool:
        return self._shuffle or isinstance(self.shards, Stream) or epoch == self._epoch

    def _announce(self) -> None:
        """Tell a remote set which shards come next, whenever that changes."""
        if isinstance(self.shards, Stream) or not self.shards.remote:
            return
        order, ahead = self._prepare.next_shards(self._epoch, self._position)
        if (order, ahead) != self._announced:
            self._announced = (order, ahead)
            self.shards.expect(order, ahead)

    def _next(self) -> Batch:
        if self._pool is not None and self._process != os.getpid():  # threads do not survive a fork: this would hang
            raise RuntimeError("this loader was started before the process forked: make one in each process")
        try:
            with self._current_device():
                self._fill()
                run = self._runs.popleft()
                prepared = run.fed.result()
                if prepared is None:
                    raise ReadError("standard input has ended: give the shards as files to read them once more")
                views = self._take(run)
                if views is None:
                    prepared, views = self._repair(run, prepared)
                batch = self._batch(prepared, views)
                self._fill()
            self._epoch, self._position = prepared.span.after
            return batch
        except BaseException:  # also Ctrl-C: the prefetched batches no longer match the state
            self.close()
            raise

    def _take(self, run: _Run) -> list[Any] | None:
        """Return the run's pixels by kind, or None if it failed."""
        prepared = run.fed.result()
        if prepared is not None and not run.taken:
            run.taken = True
            try:
                run.views = self._graph.take(self._stream()) if prepared.images else []
                if (
                    self._graph.form == "triton"
                    and run.views
                    and not np.array_equal(run.views[0].sizes, prepared.sizes)
                ):
                    run.views, run.failure = None, "an image has another size than its header says"
            except DecodeError as error:
                run.failure = str(error)
        return run.views

    def _current_device(self) -> AbstractContextManager[Any]:
        """Return a context with the loader's GPU current: pinned memory and the default stream belong to that GPU."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _stream(self) -> int | None:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else None

    def _repair(self, run: _Run, prepared: Prepared) -> tuple[Prepared, list[Any]]:
        """Return the batch prepared and decoded again without the samples that the device cannot decode."""
        assert self._feeder is not None
        for later in self._runs:  # DALI returns runs in order: take the later ones before submitting another
            self._take(later)
        while True:
            reasons = map(self._refusal, prepared.images, prepared.sizes.tolist())
            faults = {k: reason for k, reason in enumerate(reasons) if reason}
            again = self._prepare.again(prepared, faults) if faults else None
            if again is None:
                raise RuntimeError(
                    f"a batch failed, but each of its images can be decoded ({prepared.index.tolist()}): {run.failure}"
                )
            prepared, run = again, _Run(self._feeder.submit(_submit, self._graph, again))
            views = self._take(run)
            if views is not None:
                return prepared, views

    def _refusal(self, image: NDArray[np.uint8], size: list[int]) -> str | None:
        try:
            height, width = self._graph.decode_one(image)
        except DecodeError as error:
            return f"cannot be decoded: {error}"
        if [height, width] != size:
            return f"decoded to {height} x {width} pixels, but its header says {size[0]} x {size[1]}"
        return None

    def _batch(self, prepared: Prepared, pixels_by_kind: list[Any]) -> Batch:
        views = {}
        windows = by_kind(self.recipe, prepared.windows)
        if prepared.planned and prepared.images:
            pixels_by_kind = self._cut(prepared.planned, *pixels_by_kind)
        for k, cut in enumerate(self.recipe.cuts):
            if prepared.images:
                pixels = torch.from_dlpack(pixels_by_kind[k])
            else:
                pixels = torch.empty(0, cut.count, cut.size, cut.size, 3, dtype=torch.uint8, device=self.device)
            if self._graph.form == "operators":
                drawn = self._on_device(prepared.drawn[cut.kind])
                pixels = colour.apply(pixels, drawn, cut.augmentations, padded=cut.padded)
            if pixels.dtype != self._dtype:  # the fused form on a CPU has normalised them already
                compiled = self.device.type == "cuda"
                pixels = normalise(pixels, IMAGENET_MEAN, IMAGENET_STD, self._dtype, compiled=compiled)
            mask = self._on_device(prepared.masks[cut.kind]) if self.recipe.masks else None
            views[cut.kind] = View(pixels, torch.from_numpy(windows[cut.kind]), mask)
        return Batch(
            views,
            {name: self._on_device(target) for name, target in prepared.targets.items()},
            self._on_device(prepared.label),
            torch.from_numpy(prepared.index),
        )

    def _cut(self, planned: dict[str, Tensor], images: Decoded) -> list[Tensor]:
        """Queue the triton form's cutting and return the views by kind. Keep the images until the device is done."""
        from .triton_views import cut_batch  # lazy: imports triton

        views = cut_batch(self.recipe.cuts, images.addresses, planned, self.device)
        if self.device.type == "cuda":
            while self._read and self._read[0][0].query():
                self._read.popleft()
            event = torch.cuda.Event()
            event.record()
            self._read.append((event, images))
        return views

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def _work_for(device: torch.device) -> None:
    """Make `device` current in a new thread, so that pinned memory belongs to it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _feed(graph: Graph, preparing: Future[Prepared | None]) -> Prepared | None:
    return _submit(graph, preparing.result())


def _submit(graph: Graph, prepared: Prepared | None) -> Prepared | None:
    """Submit a batch to DALI and return it."""
    if prepared is not None and prepared.images:  # a rank's share of the last batch may be empty
        graph.submit(prepared.images, prepared.windows, prepared.params, prepared.sizes)
    return prepared


def _whole(name: str, value: Any, least: int, most: int) -> int:
    """Return `value` as an int. Raises TypeError if it is not a whole number, ValueError if it is out of bounds."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} {value} must be a whole number") from None
    if not least <= number <= most:
        raise ValueError(f"{name} {value} must be a whole number from {least} to {most}")
    return number


def _device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'cpu' or 'cuda[:i]', not {device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda[:i]', not {str(device)!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError(f"device {str(device)!r}: PyTorch finds no CUDA device here; use device='cpu'")
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= count:
            raise ValueError(f"device {str(device)!r}: there are only {count} CUDA devices here")
        return torch.device("cuda", index)
    return device


def _same(name: str, theirs: Any, mine: Any) -> None:
    """Raise ValueError at the first field in which a state differs from this loader."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            _same(f"{name}.{key}", theirs.get(key), mine.get(key))
    elif isinstance(theirs, list) and isinstance(mine, list) and len(theirs) == len(mine):
        for k, pair in enumerate(zip(theirs, mine, strict=True)):
            _same(f"{name}[{k}]", *pair)
    elif theirs != mine:
        raise ValueError(
            f"this state was saved with {name} = {theirs!r}, but the loader has {mine!r}: "
            "resume with the saved setting, or start a new run"
        )
