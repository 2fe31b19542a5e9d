"""A remote set for tests: its size, requests with long and short retries, and the contents of its cache."""

import time
from collections.abc import Callable
from datetime import timedelta

from pipeline import ShardSet, shard_cache

IMAGES, SHARDS = 120, 40  # three windows of the block order
QUICK = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(milliseconds=20)},
}
IMPATIENT = {"timeout": timedelta(seconds=5), "read_timeout": timedelta(milliseconds=400)}


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def cache_of(found: ShardSet) -> shard_cache.Cache:
    return found._files.cache  # type: ignore[union-attr]


def in_cache(found: ShardSet) -> set[int]:
    folder = cache_of(found).folder
    assert folder
    return {int(path.stem) for path in folder.iterdir() if path.suffix == ".tar"}


def fill(found: ShardSet, shards: list[int] | None = None) -> ShardSet:
    """Waits until these shards (all) lie in the cache."""
    wanted = list(range(len(found.paths))) if shards is None else shards
    found.expect(wanted, len(wanted))
    until(lambda: in_cache(found) >= set(wanted))
    return found


def same(found: ShardSet, expected: ShardSet) -> bool:
    return all(found.read(i) == expected.read(i) for i in range(len(expected)))
