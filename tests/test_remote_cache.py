"""The shard cache: shards are downloaded whole and ahead of use, kept, verified, and told apart from other files."""

import os
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from mapimages import still_recipe
from remote_sets import IMAGES, SHARDS, cache_of, fill, in_cache, same, until
from servers import Bucket

from pipeline import Loader, ReadError, ShardSet, remote, shard_cache
from trainer import metrics

pytestmark = pytest.mark.usefixtures("network")


def test_shards_lie_on_the_disk_and_are_read_there(address: str, local: Path, requests: list[str]) -> None:
    found = fill(ShardSet(address))
    requests.clear()
    assert same(found, ShardSet(local))
    assert requests == []
    figures = found.figures
    assert figures.from_cache == IMAGES and figures.by_range == 0
    assert figures.fetched == sum(path.size for path in found.paths)
    again = ShardSet(address, cache_size=1)
    assert same(again, ShardSet(local)) and requests == ["manifest.json"]


def test_the_log_says_what_the_network_costs(address: str, local: Path) -> None:
    found = ShardSet(address, cache_size=1)
    network = metrics.Network(found)
    found.read(0)
    told = network.since_last_line(2.0)
    assert told["cache_hits"] == 0 and 0 < told["network_waits"] < 1
    assert told["network_mb_per_s"] == pytest.approx(int(found.table["size"][0]) / 2e6)
    fill(found, [0])
    network.since_last_line(2.0)
    found.read(0)
    assert network.since_last_line(2.0) == {"cache_hits": 1, "network_mb_per_s": 0, "network_waits": 0}
    assert metrics.Network(ShardSet(local)).since_last_line(2.0) == {}


def test_a_set_that_moved_finds_its_cache(bucket: Bucket, local: Path, address: str, requests: list[str]) -> None:
    fill(ShardSet(address))
    moved = bucket.upload(local, "elsewhere")
    requests.clear()
    assert same(ShardSet(moved), ShardSet(local))
    assert not [name for name in requests if name.endswith(".tar")]


def test_fill_and_keep_has_every_hit_that_is_possible(address: str) -> None:
    """Over epochs of random orders a cache of half the set finds nearly half; least recently used: 15 %."""
    found = ShardSet(address)
    size = max(o.size for o in found.paths)
    found = ShardSet(address, cache_size=20 * size / 1e9)
    order = np.random.default_rng(0)
    epochs = [order.permutation(SHARDS).tolist() for _ in range(5)]
    fetched = []
    for epoch, following in pairwise(epochs):
        for k in range(SHARDS):
            coming = [*epoch[k:], *following]
            held = in_cache(found)
            fetched.append(coming[0] not in held)
            found.expect(coming, 1)
            until(lambda now=coming[0]: now in in_cache(found))
    later = fetched[2 * SHARDS :]
    assert 1 - sum(later) / len(later) >= 0.45
    assert sum(found.paths[s].size for s in in_cache(found)) <= 20 * size


def test_the_network_does_not_wait_for_the_disk(address: str, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard has its name when its bytes are on the disk, and others arrive meanwhile."""
    sync, early = os.fsync, []

    def slow(file: int) -> None:
        part = Path(f"/proc/self/fd/{file}").readlink()
        early.append(part.suffix == ".part" and part.with_suffix("").exists())
        time.sleep(0.1)
        sync(file)

    monkeypatch.setattr(os, "fsync", slow)
    found, began = ShardSet(address), time.monotonic()
    assert same(fill(found), ShardSet(local))
    assert time.monotonic() - began < 0.1 * SHARDS
    assert len(early) >= SHARDS and not any(early)


def test_only_what_the_window_needs_is_fetched(address: str) -> None:
    found = ShardSet(address)
    loader = Loader(found, still_recipe(), 6, num_threads=1)
    order, ahead = loader._prepare.next_shards(0, 0)
    assert ahead == 32
    next(iter(loader))
    until(lambda: in_cache(found) == set(order[:32]))
    time.sleep(0.1)
    assert in_cache(found) == set(order[:32])
    assert not list(cache_of(found).folder.glob("*.part"))


def test_wrong_bytes_are_fetched_again_and_then_named(
    bucket: Bucket, local: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address = bucket.upload(local, "wrong")
    found = ShardSet(address)
    get, spoilt = remote.Folder.get, ["map-0002.tar"]

    async def spoil(self: remote.Folder, wanted: remote.Object, start: int, stop: int) -> bytes:
        data = await get(self, wanted, start, stop)
        if wanted.name in spoilt:
            spoilt.remove(wanted.name)
            return bytes(len(data))
        return data

    monkeypatch.setattr(remote.Folder, "get", spoil)
    fill(found, [1, 2, 3])
    assert "map-0002.tar arrived with another sha256" in caplog.text
    assert same(fill(found), ShardSet(local))
    body = bytearray((local / "map-0005.tar").read_bytes())
    body[600] ^= 1
    bucket.client.put_object(Bucket=bucket.name, Key="wrong/map-0005.tar", Body=bytes(body))
    bad = ShardSet(address, cache=local.parent / "other cache")
    bad.expect([4, 5, 6], 3)
    with pytest.raises(ReadError, match=r"map-0005.tar arrived twice with another sha256 than its manifest says"):
        until(lambda: not bad.read(0))
    assert 5 not in in_cache(bad)


def test_a_full_disk_closes_the_cache_and_the_run_goes_on(
    address: str, local: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = ShardSet(address)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # writing more raises OSError, as a full disk does
    try:
        found.expect(range(SHARDS), SHARDS)
        until(lambda: cache_of(found).closed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("the shard cache is off from here on") == 1
    found.expect(range(SHARDS), 3)
    assert same(found, ShardSet(local))
    assert not list(cache_of(found).folder.glob("*.part"))


def test_space_is_left_to_others(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shard_cache, "FREE", 1 << 60)
    found = ShardSet(address)
    found.expect(range(SHARDS), SHARDS)
    until(lambda: cache_of(found).closed)
    assert in_cache(found) == set() and "has no space for a shard" in caplog.text


def test_what_others_put_into_the_folder_stays(address: str, local: Path) -> None:
    size = max(path.stat().st_size for path in local.glob("*.tar"))
    found = ShardSet(address, cache_size=3 * size / 1e9)
    folder = cache_of(found).folder
    mine = {folder / name: name for name in ("notes.txt", "7.tar", "000001.tar.bak", "x.tar.part")}
    for path, text in mine.items():
        path.write_text(text)
    (folder / "000009.tar.part").write_text("left by a killed process")
    for shard in range(9):
        fill(found, [shard])
    assert {path: path.read_text() for path in mine} == mine
    assert not (folder / "000009.tar.part").exists() and len(in_cache(found)) <= 3


def test_a_torn_or_foreign_file_is_not_read(address: str, local: Path) -> None:
    found = ShardSet(address)
    path = cache_of(found).path(0)
    path.write_bytes(b"short")
    assert found.read(0) == ShardSet(local).read(0)
    os.truncate(cache_of(fill(found, [1])).path(1), 700)
    again = ShardSet(address)
    assert [again.read(i) for i in range(6)] == [ShardSet(local).read(i) for i in range(6)]
    found.expect([0, 1], 2)
    until(lambda: cache_of(found).path(1).stat().st_size == found.paths[1].size)  # it is fetched once more


def test_one_process_fetches_and_another_takes_over(address: str, local: Path) -> None:
    program = (
        "import sys, time; from pipeline import ShardSet; s = ShardSet(sys.argv[1]); s.expect([0], 1)\n"
        "while not s._files.cache.path(0).exists(): time.sleep(0.01)\n"
        "print('holds', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, address], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "holds\n"
        found = ShardSet(address)
        found.expect([0, 1], 2)
        time.sleep(0.2)
        assert in_cache(found) == {0}  # the other one has the lock, and has no use for 1
        assert same(found, ShardSet(local))
        other.kill()
    until(lambda: in_cache(found) == {0, 1})
