"""Helpers for the loader's tests: a small set, a small recipe, and batches in a comparable form."""

import hashlib
from collections.abc import Iterable

from mapimages import still_recipe

from pipeline import Batch, Loader, ShardSet
from pipeline.recipes import Recipe

N = 24
RECIPE = still_recipe(size=32, queries=2)


def loader(shards: ShardSet, batch_size: int = 4, recipe: Recipe = RECIPE, **options: object) -> Loader:
    return Loader(shards, recipe, batch_size, **{"seed": 5, "num_threads": 1, **options})  # type: ignore[arg-type]


def facts(batches: Iterable[Batch]) -> dict[tuple[int, int], str]:
    """(place in the sequence, sample) -> a hash of all that the batch says of it: pixels, windows, targets, label."""
    found = {}
    place = 0
    for batch in batches:
        tensors = [t for view in batch.views.values() for t in (view.pixels, view.window)]
        tensors += [*batch.targets.values(), batch.label]
        for b, i in enumerate(batch.index.tolist()):
            content = b"".join(t[b].contiguous().numpy().tobytes() for t in tensors)
            found[place, i] = hashlib.sha256(content).hexdigest()
            place += 1
    return found


def epochs(source: Loader, count: int) -> list[dict[tuple[int, int], str]]:
    return [facts(source) for _ in range(count)]
