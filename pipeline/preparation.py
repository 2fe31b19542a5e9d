"""From positions of an epoch to all that the host does for a batch: bytes, windows, targets.

Nothing here knows the loader, so that none of its threads keeps one alive.
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

_STORED_AHEAD = 4  # shards of a remote set that are fetched ahead where they are read one after the other


@dataclass(frozen=True)
class Span:
    """A batch before anything is read: this rank's positions of an epoch, and where the epoch stands after it."""

    epoch: int
    start: int
    stop: int
    after: tuple[int, int]  # (epoch, position)


@dataclass(frozen=True)
class Prepared:
    """What the host knows of a batch before its pixels. Tensors are pinned where a GPU will have copies of them."""

    span: Span
    index: NDArray[np.int64]  # (B,)
    images: list[NDArray[np.uint8]]
    sizes: NDArray[np.int32]  # (B, 2): of the stored images, as their headers say
    windows: NDArray[np.float32]  # (B, T, 4)
    params: NDArray[np.float32]  # (B, T, P)
    drawn: dict[str, Tensor]  # by kind: the parameters (B, V, P), where torch is to colour the views
    planned: dict[str, Tensor]  # a `Plan` by the names of its fields, of the triton form
    targets: dict[str, Tensor]
    label: Tensor  # i64 (B,)
    masks: dict[str, Tensor]  # by kind: u8 (B, V, S, S), where the recipe has them


@dataclass(frozen=True)
class Task:
    """Which batches: `batch` samples of all `ranks` together, of which `rank` takes its part."""

    recipe: Recipe
    seed: int
    batch: int
    rank: int
    ranks: int
    drop_last: bool
    form: Form
    pinned: bool
    """Whether what a GPU reads is put where it can be copied from without the host waiting."""

    def share(self, size: int) -> tuple[int, int]:
        """This rank's part of a batch of `size`: from where, to where."""
        share = -(-size // self.ranks)
        return min(self.rank * share, size), min((self.rank + 1) * share, size)


class Preparation:
    """The batches of a shard set, in any order and from several threads at once. `order` None: as stored."""

    def __init__(self, task: Task, samples: Samples, order: Order | None):
        self._task, self.samples, self._order = task, samples, order
        self._distributions = draws.distributions(task.recipe)

    def __len__(self) -> int:
        """Steps per epoch."""
        whole, rest = divmod(len(self.samples.shards), self._task.batch)
        return whole + (rest > 0 and not self._task.drop_last)

    @property
    def bad(self) -> dict[int, str]:
        """Why each bad sample met so far was rejected."""
        return dict(self.samples.bad)

    def start(self, epoch: int, position: int) -> tuple[int, int]:
        """Where the first batch at or behind a position lies. Raises ValueError where the set has no such position."""
        n = len(self.samples.shards)
        if not 0 <= position < n:
            raise ValueError(f"the loader's state has epoch {epoch!r} and position {position!r} of {n}")
        return (epoch + 1, 0) if n - position < (self._task.batch if self._task.drop_last else 1) else (epoch, position)

    def restart(self, epoch: int, position: int) -> tuple[int, int]:
        """Where iterating goes on after what was read ahead was given up."""
        return epoch, position

    def span(self, epoch: int, position: int) -> Span:
        """The batch at a position."""
        n = len(self.samples.shards)
        taken = min(self._task.batch, n - position)
        start, stop = (position + end for end in self._task.share(taken))
        end = position + taken
        return Span(epoch, start, stop, self.start(epoch, end) if end < n else (epoch + 1, 0))

    def positions(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at these positions of an epoch."""
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
        """The shards in the order of their next use, and how many of them are wanted now."""
        first = self.samples.shards.first
        if self._order == "block":
            order, ahead = orders.next_shards(self._task.seed, epoch, position, first)
            return order.tolist(), ahead
        if self._order is None:  # as stored, and then from the start
            now = int(np.searchsorted(first, position, side="right")) - 1
            return [*range(now, len(first) - 1), *range(now)], _STORED_AHEAD
        return list(range(len(first) - 1)), len(first) - 1

    def __call__(self, span: Span) -> Prepared | None:
        """The batch of a span. None, of a stream only: there are no more."""
        index, images, masks = self.samples.load(span.epoch, self.positions(span.epoch, span.start, span.stop))
        rows = self.samples.shards.table[index]
        sizes = np.stack([rows["height"], rows["width"]], axis=-1)
        return self._prepared(span, index, images, sizes, rows["label"], masks)

    def again(self, prepared: Prepared, faults: dict[int, str]) -> Prepared | None:
        """The same batch without the samples at the places that `faults` names, with the reasons."""
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
        if recipe.masks:  # before the targets: windows may move
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
    """The batches of a stream, one after the other and by one thread: a span only says that another one is wanted."""

    def __init__(self, task: Task, stream: Stream, shuffle: bool):
        if task.recipe.masks:
            raise ValueError(
                f"recipe {task.recipe.name!r} asks for masks, which a stream does not have: use a ShardSet"
            )
        self._task, self._stream, self._shuffle = task, stream, shuffle
        self._distributions = draws.distributions(task.recipe)

    def __len__(self) -> int:
        raise TypeError("a stream has no length before it was read: count its batches, or use a ShardSet")

    @property
    def bad(self) -> dict[int, str]:
        return dict(self._stream.bad)

    def start(self, epoch: int, position: int) -> tuple[int, int]:
        if position:
            raise ValueError(
                f"this state was taken {position} samples into an epoch: a stream goes on at the start of one only; "
                "restart the epoch, or make a ShardSet of its shards, which goes on anywhere"
            )
        return self.restart(epoch, position)

    def restart(self, epoch: int, position: int) -> tuple[int, int]:
        self._coming = self._batches(epoch)
        return epoch, 0

    def span(self, epoch: int, position: int) -> Span:
        return Span(epoch, position, position, (epoch, position))

    def shuffle_quality(self, epoch: int) -> dict[str, float]:
        raise TypeError("the order of a stream is not known before it was read")

    def __call__(self, span: Span) -> Prepared | None:
        found = next(self._coming, None)
        if found is None:
            return None
        span, samples = found
        index = np.array([s.number for s in samples], dtype=np.int64)
        sizes = np.array([(s.height, s.width) for s in samples], dtype=np.int32).reshape(-1, 2)
        return self._prepared(span, index, [s.image for s in samples], sizes, np.array([s.label for s in samples]))

    def again(self, prepared: Prepared, faults: dict[int, str]) -> Prepared | None:
        """Good samples of the batch take the place of the others: the stream has gone on."""
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
        """This rank's samples of each batch, epoch after epoch."""
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
    """What the recipe's targets say of a batch. Raises ValueError where it is not a row of each array per image."""
    assert recipe.targets is not None
    found: object = recipe.targets(by_kind(recipe, windows))
    if not isinstance(found, dict):
        raise ValueError(f"targets of recipe {recipe.name!r} returned {type(found).__name__}: a dict of arrays is due")
    for name, target in found.items():
        if not isinstance(target, np.ndarray) or target.shape[:1] != (len(windows),):
            raise ValueError(
                f"target {name!r} of recipe {recipe.name!r} has shape {np.shape(target)}: "
                f"an array with a row for each of the {len(windows)} images is due"
            )
    return found


def by_kind(recipe: Recipe, views: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """All views' numbers (B, T, ...) by kind: (B, V, ...) each."""
    ends = np.cumsum([cut.count for cut in recipe.cuts])[:-1]
    parts = np.split(views, ends, axis=1)
    return {cut.kind: np.ascontiguousarray(part) for cut, part in zip(recipe.cuts, parts, strict=True)}
