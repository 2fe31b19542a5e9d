"""The same batches from a disk, a bucket, and any state of the cache between them."""

from pathlib import Path

import numpy as np
import pytest
from mapimages import still_recipe
from remote_sets import SHARDS, fill, in_cache, until

from pipeline import Loader, ShardSet

pytestmark = pytest.mark.usefixtures("network")


def batches(loader: Loader, steps: int) -> list[list[np.ndarray]]:
    found = []
    while len(found) < steps:
        for batch in loader:
            arrays = [batch.index, batch.label, *batch.targets.values()]
            arrays += [x for view in batch.views.values() for x in (view.window, view.pixels)]
            found.append([array.numpy().copy() for array in arrays])
            if len(found) == steps:
                break
    return found


def equal(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True)
    )


@pytest.fixture(scope="module")
def expected(local: Path) -> list[list[np.ndarray]]:
    """An epoch and a half from the disk."""
    return batches(Loader(ShardSet(local), still_recipe(), 8, seed=3, order="block", num_threads=1), 22)


@pytest.mark.parametrize("cache", ["cold", "warm", "half", "small", "none"])
def test_the_same_batches_from_anywhere(
    local: Path, address: str, expected: list[list[np.ndarray]], cache: str
) -> None:
    size = max(path.stat().st_size for path in local.glob("*.tar"))
    there = ShardSet(address, cache_size={"none": 0, "small": 6 * size / 1e9}.get(cache, 1))
    if cache in ("warm", "half"):
        fill(there, list(range(0, SHARDS, 1 if cache == "warm" else 2)))
    assert equal(batches(Loader(there, still_recipe(), 8, seed=3, num_threads=1), 22), expected)
    assert there.figures.from_cache + there.figures.by_range >= 22 * 8


def test_a_run_moves_in_mid_epoch(local: Path, address: str, expected: list[list[np.ndarray]]) -> None:
    places = [
        ShardSet(local),
        ShardSet(address),
        fill(ShardSet(address)),
        ShardSet(address, cache_size=0),
        ShardSet(local),
    ]
    state, found = None, []
    for place, world in zip(places, (1, 2, 1, 2, 1), strict=True):
        loaders = [
            Loader(place, still_recipe(), 8 // world, seed=3, order="block", num_threads=1, rank=r, world_size=world)
            for r in range(world)
        ]
        for loader in loaders if state else ():
            loader.load_state_dict(state)
        parts = [batches(loader, 4) for loader in loaders]
        found += [[np.concatenate(arrays) for arrays in zip(*step, strict=True)] for step in zip(*parts, strict=True)]
        state = loaders[0].state_dict()
    assert equal(found, expected[:20])


def test_block_is_the_order_of_a_remote_set(local: Path, address: str) -> None:
    orders = [
        Loader(ShardSet(where), still_recipe(), 8, num_threads=1).state_dict()["order"] for where in (local, address)
    ]
    assert orders == ["global", "block"]


@pytest.mark.parametrize("options", [{"order": "global"}, {"shuffle": False}], ids=["global", "stored"])
def test_other_orders_come_from_the_cache_too(local: Path, address: str, options: dict[str, object]) -> None:
    here, there = (
        Loader(ShardSet(where), still_recipe(), 8, num_threads=1, **options)  # type: ignore[arg-type]
        for where in (local, address)
    )
    assert equal(batches(there, 20), batches(here, 20))
    until(lambda: len(in_cache(there.shards)) >= 4)
