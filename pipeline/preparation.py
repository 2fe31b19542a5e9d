"""The host's part of a batch: stored bytes, windows and targets for a range of positions of an epoch.

Nothing here refers to the loader, so the threads do not keep it alive.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle, islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import draws
from . import order as orders
from .graph import Form
from .masks import cut_masks
from .plan import plan
from .recipes import Recipe
from .samples import Samples
from .shards import ShardError
from .streams import Sample, Stream

Order = Literal["global", "block"]

_STORED_AHEAD = 4  # number of shards that a remote set prefetches in the stored order


@dataclass(frozen=True)
class Span:
    """The positions of an epoch that form this rank's part of a batch, and the next batch's (epoch, position)."""

    epoch: int
    start: int
    stop: int
    after: tuple[int, int]


@dataclass(frozen=True)
class Prepared:
    """A batch of B images and T views each, before decoding. Tensors are pinned if they will be copied to a GPU."""

    span: Span
    index: NDArray[np.int64]  # (B,)
    images: list[NDArray[np.uint8]]  # stored bytes
    sizes: NDArray[np.int32]  # (B, 2): heights and widths of the stored images, from their headers
    windows: NDArray[np.float32]  # (B, T, 4)
    params: NDArray[np.float32]  # (B, T, P)
    drawn: dict[str, Tensor]  # for the operators form: the parameters (B, V, P) by kind
    planned: dict[str, Tensor]  # for the triton form: the fields of a `Plan` by name
    targets: dict[str, Tensor]
    label: Tensor  # i64 (B,)
    masks: dict[str, Tensor]  # u8 (B, V, S, S) by kind, if the recipe has masks


@dataclass(frozen=True)
class Task:
    """The settings of a preparation. `batch` is the global batch size; each of the `ranks` takes its part of it."""

    recipe: Recipe
    seed: int
    batch: int
    rank: int
    ranks: int
    drop_last: bool
    form: Form
    pinned: bool
    """Whether to pin tensors in memory, so that copies to a GPU do not block the host."""

    def share(self, size: int) -> tuple[int, int]:
        """Return this rank's part of a batch of `size` samples as (start, stop)."""
        share = -(-size // self.ranks)
        return min(self.rank * share, size), min((self.rank + 1) * share, size)


class Preparation:
    """Prepares batches of a shard set, in any sequence and from several threads. `order` None is the stored order."""

    def __init__(self, task: Task, samples: Samples, order: Order | None):
        self._task, self.samples, self._order = task, samples, order
        self._distributions = draws.distributions(task.recipe)

    def __len__(self) -> int:
        """Steps per epoch."""
        whole, rest = divmod(len(self.samples.shards), self._task.batch)
        return whole + (rest > 0 and not self._task.drop_last)

    @property
    def bad(self) -> dict[int, str]:
        """The bad samples found so far: number -> reason."""
        return dict(self.samples.bad)

    def start(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the (epoch, position) of the first batch at or after a position. Raises ValueError if out of range."""
        n = len(self.samples.shards)
        if not 0 <= position < n:
            raise ValueError(f"the loader's state has epoch {epoch!r} and position {position!r}, of {n} samples")
        return (epoch + 1, 0) if n - position < (self._task.batch if self._task.drop_last else 1) else (epoch, position)

    def restart(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the (epoch, position) at which to resume after prefetched batches were discarded."""
        return epoch, position

    def span(self, epoch: int, position: int) -> Span:
        """Return the span of the batch at a position."""
        n = len(self.samples.shards)
        taken = min(self._task.batch, n - position)
        start, stop = (position + end for end in self._task.share(taken))
        end = position + taken
        return Span(epoch, start, stop, self.start(epoch, end) if end < n else (epoch + 1, 0))

    def positions(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples at these positions of an epoch."""
        if self._order is None:
            return np.arange(start, stop)
        if self._order == "block":
            return orders.block_positions(self._task.seed, epoch, start, stop, self.samples.shards.first)
        return orders.positions(self._task.seed, epoch, start, stop, len(self.samples.shards))

    def shuffle_quality(self, epoch: int) -> dict[str, float]:
        n = len(self.samples.shards)
        stop = min(n, 1 << 18)
        found = self.positions(epoch, 0, stop)
        return orders.shuffle_quality(found, self.samples.shards.first, n, batch=min(256, stop))

    def next_shards(self, epoch: int, position: int) -> tuple[list[int], int]:
        """Return the shards in the order of their next use, and how many of them to prefetch now."""
        first = self.samples.shards.first
        if self._order == "block":
            order, ahead = orders.next_shards(self._task.seed, epoch, position, first)
            return order.tolist(), ahead
        if self._order is None:  # the stored order, then again from its start
            now = int(np.searchsorted(first, position, side="right")) - 1
            return [*range(now, len(first) - 1), *range(now)], _STORED_AHEAD
        return list(range(len(first) - 1)), len(first) - 1

    def __call__(self, span: Span) -> Prepared | None:
        """Prepare the batch of a span. Returns None only for a stream that has ended."""
        index, images, masks = self.samples.load(span.epoch, self.positions(span.epoch, span.start, span.stop))
        rows = self.samples.shards.table[index]
        sizes = np.stack([rows["height"], rows["width"]], axis=-1)
        return self._prepared(span, index, images, sizes, rows["label"], masks)

    def again(self, prepared: Prepared, faults: dict[int, str]) -> Prepared | None:
        """Prepare a batch again without the samples at the indices in `faults`, a dict of index -> reason."""
        for k, reason in faults.items():
            self.samples.reject(int(prepared.index[k]), reason)
        return self(prepared.span)

    def _prepared(
        self,
        span: Span,
        index: NDArray[Any],
        images: list[NDArray[np.uint8]],
        sizes: NDArray[Any],
        label: NDArray[Any],
        masks: Sequence[NDArray[np.uint8]] = (),
    ) -> Prepared:
        recipe = self._task.recipe
        windows, params = draws.draw(self._distributions, self._task.seed, span.epoch, index, sizes)
        cut = {}
        if recipe.masks:  # before the targets: this may redraw windows in place
            redraw = partial(self._redraw, span.epoch, index, sizes)
            cut = cut_masks(recipe.cuts, masks, windows, params, redraw)
        planned = vars(plan(recipe.cuts, windows, params, sizes)) if self._task.form == "triton" else {}
        return Prepared(
            span,
            index,
            images,
            sizes,
            windows,
            params,
            drawn=self._tensors(by_kind(recipe, params) if self._task.form == "operators" else {}),
            planned=self._tensors(planned),
            targets=self._tensors(_targets(recipe, windows) if recipe.targets else {}),
            label=self._tensors({"label": label.astype(np.int64)})["label"],
            masks=self._tensors(cut),
        )

    def _tensors(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        found = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {name: tensor.pin_memory() for name, tensor in found.items()} if self._task.pinned else found

    def _redraw(self, epoch: int, index: NDArray[Any], sizes: NDArray[Any], attempt: int) -> NDArray[np.float32]:
        return draws.draw(self._distributions, self._task.seed, epoch, index, sizes, attempt)[0]


class StreamPreparation(Preparation):
    """Prepares the batches of a stream in sequence, from one thread; a call ignores its span and takes the next one."""

    def __init__(self, task: Task, stream: Stream, shuffle: bool):
        if task.recipe.masks:
            raise ValueError(
                f"recipe {task.recipe.name!r} asks for masks, which a stream does not have: use a ShardSet"
            )
        self._task, self._stream, self._shuffle = task, stream, shuffle
        self._distributions = draws.distributions(task.recipe)

    def __len__(self) -> int:
        raise TypeError("a stream has no length until it is read: count its batches, or use a ShardSet")

    @property
    def bad(self) -> dict[int, str]:
        return dict(self._stream.bad)

    def start(self, epoch: int, position: int) -> tuple[int, int]:
        if position:
            raise ValueError(
                f"this state is {position} samples into an epoch: a stream resumes only at the start of an epoch; "
                "restart the epoch, or make a ShardSet of its shards, which resumes anywhere"
            )
        return self.restart(epoch, position)

    def restart(self, epoch: int, position: int) -> tuple[int, int]:
        self._coming = self._batches(epoch)
        return epoch, 0

    def span(self, epoch: int, position: int) -> Span:
        return Span(epoch, position, position, (epoch, position))

    def shuffle_quality(self, epoch: int) -> dict[str, float]:
        raise TypeError("the order of a stream is unknown until it is read")

    def __call__(self, span: Span) -> Prepared | None:
        found = next(self._coming, None)
        if found is None:
            return None
        span, samples = found
        index = np.array([s.number for s in samples], dtype=np.int64)
        sizes = np.array([(s.height, s.width) for s in samples], dtype=np.int32).reshape(-1, 2)
        return self._prepared(span, index, [s.image for s in samples], sizes, np.array([s.label for s in samples]))

    def again(self, prepared: Prepared, faults: dict[int, str]) -> Prepared | None:
        """Prepare a batch again with good samples of the batch in place of the bad ones: a stream cannot go back."""
        for k, reason in faults.items():
            self._stream.reject(int(prepared.index[k]), f"number {prepared.index[k]}", reason)
        good = [k for k in range(len(prepared.images)) if k not in faults]
        if not good:
            raise ShardError(f"no sample of a whole batch can be decoded: {next(iter(faults.values()))}")
        spare = cycle(good)
        places = [next(spare) if k in faults else k for k in range(len(prepared.images))]
        images = [prepared.images[k] for k in places]
        return self._prepared(
            prepared.span, prepared.index[places], images, prepared.sizes[places], prepared.label.numpy()[places]
        )

    def _batches(self, first: int) -> Iterator[tuple[Span, list[Sample]]]:
        """Yield the span and this rank's samples of each batch, epoch after epoch."""
        task = self._task
        for epoch in count(first):
            samples = self._stream.samples(task.seed, epoch, self._shuffle)
            position, batch = 0, list(islice(samples, task.batch))
            while len(batch) == task.batch or (batch and not task.drop_last):
                following = list(islice(samples, task.batch))
                last = len(following) < (task.batch if task.drop_last else 1)
                end = position + len(batch)
                start, stop = task.share(len(batch))
                after = (epoch + 1, 0) if last else (epoch, end)
                yield Span(epoch, position + start, position + stop, after), batch[start:stop]
                position, batch = end, following
            if not position:
                raise ShardError(f"the stream has {len(batch)} samples, which do not fill a batch of {task.batch}")
            if self._stream.once:
                return


def _targets(recipe: Recipe, windows: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Compute the recipe's targets. Raises ValueError unless they are a dict of arrays with one row per image."""
    assert recipe.targets is not None
    found: object = recipe.targets(by_kind(recipe, windows))
    if not isinstance(found, dict):
        raise ValueError(f"targets of recipe {recipe.name!r} returned {type(found).__name__}, not a dict of arrays")
    for name, target in found.items():
        if not isinstance(target, np.ndarray) or target.shape[:1] != (len(windows),):
            raise ValueError(
                f"target {name!r} of recipe {recipe.name!r} has shape {np.shape(target)}: "
                f"it must be an array with one row for each of the {len(windows)} images"
            )
        if target.dtype.kind not in "biufc":
            raise ValueError(f"target {name!r} of recipe {recipe.name!r} holds {target.dtype.str}, not numbers")
    return {name: np.require(target, requirements=("C", "W")) for name, target in found.items()}


def by_kind(recipe: Recipe, views: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Split an array of all views (B, T, ...) by kind: (B, V, ...) each, as copies that the receiver may modify."""
    ends = np.cumsum([cut.count for cut in recipe.cuts])[:-1]
    parts = np.split(views, ends, axis=1)
    return {cut.kind: part.copy() for cut, part in zip(recipe.cuts, parts, strict=True)}
