"""Shards in buckets and on web servers: the same samples as from a disk, whatever the network does."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from mapimages import encode, map_image, sample, still_recipe, write_set, write_tar
from servers import SECRET, Bucket, Proxy, publish, s3, web

from pipeline import Loader, ReadError, ShardError, ShardSet, host, remote, shard_cache
from trainer import metrics

IMAGES, SHARDS = 120, 40  # three windows of the block order
QUICK = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(milliseconds=20)},
}
IMPATIENT = {"timeout": timedelta(seconds=5), "read_timeout": timedelta(milliseconds=400)}


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with s3() as found:
        yield found


@pytest.fixture(scope="module")
def proxy(bucket: Bucket) -> Iterator[Proxy]:
    found = Proxy(bucket.endpoint)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def surroundings(bucket: Bucket, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(remote, "_RUNNING", QUICK)
    monkeypatch.setattr(remote, "_STARTING", QUICK)
    monkeypatch.setattr(remote, "_CLIENT", {"timeout": timedelta(seconds=20)})
    monkeypatch.setattr(shard_cache, "FREE", 0)
    monkeypatch.setattr(shard_cache, "_PATIENCE", 0.05)
    proxy.faults.clear()
    proxy.down, proxy.latency = False, 0.0


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(write_set(tmp_path_factory.mktemp("data") / "set", IMAGES, SHARDS))


@pytest.fixture(scope="module")
def address(bucket: Bucket, local: Path) -> str:
    return bucket.upload(local, "in1k")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the objects that parts were asked of."""
    seen: list[str] = []
    get = remote.Folder.get

    async def noted(self: remote.Folder, wanted: remote.Object, start: int, stop: int) -> bytes:
        seen.append(wanted.name)
        return await get(self, wanted, start, stop)

    monkeypatch.setattr(remote.Folder, "get", noted)
    return seen


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


# --- what lies at an address ---


def test_an_address_is_like_a_folder(local: Path, address: str) -> None:
    here = ShardSet(local)
    listed = [f"{address}/{path.name}" for path in here.paths]
    for spec in (address, f"{address}/", f"{address}/map-{{0000..0039}}.tar", listed):
        there = ShardSet(spec)
        assert there.fingerprint == here.fingerprint
        assert np.array_equal(there.table, here.table)
    assert there.remote and not here.remote
    assert same(there, here)
    assert str(there.shard_of(4)) == f"{address}/map-0001.tar"
    assert there.key(4) == here.key(4) == "image-00004"
    again = pickle.loads(pickle.dumps(there))
    assert again.fingerprint == here.fingerprint
    assert same(again, here)


def test_some_shards_of_a_set(local: Path, address: str) -> None:
    here, there = (ShardSet(f"{folder}/map-00{{03,01}}.tar") for folder in (local, address))
    assert there.fingerprint == here.fingerprint
    assert there.table.tolist() == here.table.tolist()
    assert same(there, here)


def test_names_with_blanks_and_signs(bucket: Bucket, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for k, name in enumerate(("a b.tar", "c%20d.tar", "schlüssel+#.tar")):
        write_tar(folder / name, sample(f"k{k}", encode(map_image(k, 20, 30)), k, "png"))
    there = ShardSet(bucket.upload(folder, "odd names/in one"))
    assert [there.key(i) for i in range(3)] == ["k0", "k1", "k2"]
    assert same(there, ShardSet(folder))


def test_the_table_is_fetched_once(address: str, requests: list[str]) -> None:
    ShardSet(address)
    assert requests == ["manifest.json", "map-train.samples.npy"]
    found = ShardSet(address)
    assert requests[2:] == ["manifest.json"]
    assert isinstance(found.table, np.memmap)


def test_a_foreign_set_is_fetched_once_to_find_its_images(
    bucket: Bucket, tmp_path: Path, requests: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_set(tmp_path / "foreign", 12, 4)
    address = bucket.upload(folder, "foreign")
    here = ShardSet(folder)
    first = ShardSet(address)
    assert first.fingerprint == here.fingerprint and np.array_equal(first.table, here.table)
    assert sorted(requests) == [f"map-000{k}.tar" for k in range(4)]
    assert in_cache(first) == {0, 1, 2, 3}
    assert same(first, here) and len(requests) == 4  # from the cache, whose tars served the walk
    again = ShardSet(address, cache_size=0)
    assert len(requests) == 4
    assert again.fingerprint == here.fingerprint
    assert same(again, here)


def test_a_foreign_set_without_a_cache_for_its_shards(bucket: Bucket, tmp_path: Path, requests: list[str]) -> None:
    folder = write_set(tmp_path / "foreign", 12, 4)
    size = (folder / "map-0000.tar").stat().st_size
    address = bucket.upload(folder, "uncached")
    found = ShardSet(address, cache_size=0)
    assert found.fingerprint == ShardSet(folder).fingerprint
    for table in (host.cache_folder("tables")).iterdir():
        table.unlink()
    half = ShardSet(address, cache_size=2.5 * size / 1e9)
    assert len(requests) == 8 and len(in_cache(half)) == 2
    for table in (host.cache_folder("tables")).iterdir():
        table.unlink()
    assert np.array_equal(ShardSet(address, cache_size=2.5 * size / 1e9).table, found.table)
    assert len(requests) == 10  # what lies in the cache is walked there


def test_splits_are_named(bucket: Bucket, tmp_path: Path) -> None:
    folder = publish(write_set(tmp_path / "two", 6, 2))
    write_tar(folder / "val-0000.tar", sample("v", encode(map_image(1, 20, 30)), 1, "png"))
    publish(folder, "val", "val.manifest.json")
    info = {"splits": {s: {"filenames": []} for s in ("train", "val")}}
    (folder / "_info.json").write_text(json.dumps(info))
    address = bucket.upload(folder, "two")
    with web(tmp_path) as site:
        for where in (address, f"{site.url}/two"):
            with pytest.raises(ShardError, match="holds the splits train, val: name one"):
                ShardSet(where)
            assert len(ShardSet(f"{where}/map-{{0000..0001}}.tar")) == 6
            assert ShardSet(f"{where}/val-0000.tar").table["label"].tolist() == [1]


def test_a_web_server(local: Path, tmp_path: Path) -> None:
    here = ShardSet(local)
    with web(local.parent) as site:
        for spec in (f"{site.url}/set", f"{site.url}/set/map-{{0000..0039}}.tar"):
            there = ShardSet(spec)
            assert there.fingerprint == here.fingerprint and np.array_equal(there.table, here.table)
        assert same(there, here)


def test_timms_layout_on_a_web_server(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "hub", 12, 4)
    names = [path.name for path in sorted(folder.glob("*.tar"))]
    (folder / "_info.json").write_text(
        json.dumps({"splits": {"train": {"filenames": names, "shard_lengths": [3] * 4}}})
    )
    with web(tmp_path) as site:
        found = ShardSet(f"{site.url}/hub")
        assert found.fingerprint == ShardSet(folder).fingerprint
        assert same(found, ShardSet(folder))
        (folder / "_info.json").unlink()
        with pytest.raises(ShardError, match=r"does not say what it holds.*name the tars by a pattern"):
            ShardSet(f"{site.url}/hub")


def test_a_hub_redirects_and_the_token_stays(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with web(local.parent) as store, web(local.parent) as hub:
        monkeypatch.setattr(remote, "_HUB", hub.url)
        hub.token, hub.moved_to = SECRET, store.url
        found = ShardSet(f"{hub.url}/set", cache_size=0)
        assert same(found, ShardSet(local))
        assert all("range" in headers for method, path, headers in store.seen if method == "GET")
        assert all("authorization" in headers for _, _, headers in hub.seen)
        assert not any("authorization" in headers for _, _, headers in store.seen)
        hub.token = "another"
        with pytest.raises(ShardError, match=r"access is denied.*HF_TOKEN") as caught:
            ShardSet(f"{hub.url}/set")
        assert SECRET not in str(caught.value)


def test_google_answers_like_this(
    bucket: Bucket, address: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Google's XML interface, which moto speaks as far as reading goes; no other server of it is at hand."""
    account = tmp_path / "account.json"
    account.write_text(
        json.dumps(
            {
                "gcs_base_url": bucket.endpoint,
                "disable_oauth": True,
                "client_email": "",
                "private_key": "",
                "private_key_id": "",
            }
        )
    )
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    assert same(ShardSet(address.replace("s3://", "gs://")), ShardSet(local))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("s3://bucket/nothing", "s3://bucket/nothing holds nothing: check the address"),
        ("s3://nobody/in1k", "s3://nobody/in1k is missing: check the address"),
        ("s3://bucket/in1k/map-{0039..0041}.tar", r"map-0040.tar is missing \(2 of 3 shards\)"),
        (["s3://bucket/in1k/map-0000.tar"] * 2, "named twice"),
        (["s3://bucket/in1k/map-0000.tar", "/data/x.tar"], "'/data/x.tar' is a file among addresses"),
        ("ftp://host/set", "cannot be read image by image"),
        ("pipe:cat x.tar", "cannot be read image by image"),
        (f"http://user:{SECRET}@127.0.0.1:1/set", "http://127.0.0.1:1/set: an address with a password"),
        (f"http://127.0.0.1:1/set?sig={SECRET}", "http://127.0.0.1:1/set: an address with a password"),
        ("http://127.0.0.1:1/set", r"http://127.0.0.1:1/set.* could not be had: no server answers there"),
        ("az://container/set", "az://container/set: no credentials are found: set AZURE"),
    ],
)
def test_what_an_address_lacks_is_one_sentence(address: str, spec: str, says: str) -> None:
    with pytest.raises((ShardError, ReadError), match=says) as caught:
        ShardSet(spec)
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)


def test_a_server_that_ignores_ranges_is_refused(local: Path) -> None:
    with web(local.parent) as site:
        site.ranges = False
        with pytest.raises((ShardError, ReadError), match=r"ignores byte ranges.*as a stream"):
            ShardSet(f"{site.url}/set")


def test_an_unfinished_upload_is_named(bucket: Bucket, local: Path) -> None:
    address = bucket.upload(local, "unfinished")
    bucket.client.put_object(Bucket=bucket.name, Key="unfinished/map-0003.tar", Body=b"x" * 1024)
    with pytest.raises(ShardError, match=r"map-0003.tar has 1024 bytes where its manifest says"):
        ShardSet(address)
    bucket.client.delete_object(Bucket=bucket.name, Key="unfinished/map-0003.tar")
    with pytest.raises(ShardError, match=r"map-0003.tar is missing \(1 of 40 shards\): upload it"):
        ShardSet(address)
    bucket.client.put_object(
        Bucket=bucket.name, Key="unfinished/map-0003.tar", Body=(local / "map-0003.tar").read_bytes()
    )
    bucket.client.put_object(Bucket=bucket.name, Key="unfinished/map-train.samples.npy", Body=b"")
    with pytest.raises(ShardError, match="is not the table that the manifest speaks of"):
        ShardSet(address)


def test_obstore_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ShardError, match=r'needs obstore: pip install -e "\.\[remote\]"'):
        ShardSet("s3://bucket/set")


def test_a_profile_is_read_by_boto3(
    bucket: Bucket, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text(f"[team]\naws_access_key_id=key\naws_secret_access_key={SECRET}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert len(ShardSet(address)) == IMAGES
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ShardError, match="profile 'nobody' gives no credentials"):
        ShardSet(address)
    monkeypatch.setitem(sys.modules, "obstore.auth.boto3", None)
    with pytest.raises(ShardError, match="AWS_PROFILE is read by boto3, which is not installed"):
        ShardSet(address)


# --- the network ---


@pytest.mark.parametrize(
    "faults",
    [["reset"], ["cut 700"], ["cut 20"] * 2, ["stall 700"], ["503"], ["429", "500"]],
    ids="+".join,
)
def test_what_passes_is_retried(
    address: str, local: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, faults: list[str]
) -> None:
    if "stall" in faults[0]:
        monkeypatch.setattr(remote, "_CLIENT", IMPATIENT)
    found = ShardSet(address, cache_size=0)
    proxy.drop()
    proxy.faults[:] = faults
    assert found.read(5) == ShardSet(local).read(5)
    assert not proxy.faults


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("reset", "could not be had: no connection"),
        ("503", "could not be had: the server answers 503"),
        ("stall 0", "could not be had: no answer in time"),
        ("403", "access is denied: check the address, and set AWS_ACCESS_KEY_ID"),
        ("404", "is missing"),
    ],
)
def test_what_lasts_is_an_outage_and_makes_no_sample_bad(
    address: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str, says: str
) -> None:
    if "stall" in fault:
        monkeypatch.setattr(remote, "_CLIENT", IMPATIENT)
    loader = Loader(ShardSet(address, cache_size=0), still_recipe(), 4, num_threads=1)
    first = next(iter(loader)).index
    state = loader.state_dict()
    loader.close()
    proxy.drop()
    proxy.faults[:] = [fault] * 1000
    with pytest.raises(ReadError, match=says) as caught:
        next(iter(loader))
    assert loader.bad == {} and "\n" not in str(caught.value) and SECRET not in str(caught.value)
    assert loader.state_dict() == state
    proxy.faults.clear()
    later = next(iter(loader)).index  # the run goes on where it stood
    assert not set(later.tolist()) & set(first.tolist())


def test_an_object_that_changed_is_noticed(bucket: Bucket, local: Path) -> None:
    address = bucket.upload(local, "changing")
    found = ShardSet(address, cache_size=0)
    path = local / "map-0001.tar"
    for body in (bytes(path.stat().st_size), b"short"):
        bucket.client.put_object(Bucket=bucket.name, Key="changing/map-0001.tar", Body=body)
        with pytest.raises(ReadError, match=r"map-0001.tar has changed since this run began"):
            found.read(4)
    assert found.read(1) == ShardSet(local).read(1)
    bucket.client.delete_object(Bucket=bucket.name, Key="changing/map-0001.tar")
    with pytest.raises(ReadError, match=r"map-0001.tar is missing"):
        found.read(4)


def test_a_fork_raises_where_it_would_hang(address: str) -> None:
    found = ShardSet(address)
    child = os.fork()
    if child == 0:
        codes = 0
        for k, use in enumerate((lambda: found.read(0), lambda: ShardSet(address))):
            try:
                use()
            except RuntimeError as error:
                codes |= ("before this process was forked" in str(error)) << k
        os._exit(codes)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_the_images_of_a_batch_are_asked_for_together(
    address: str, local: Path, proxy: Proxy, requests: list[str]
) -> None:
    found = ShardSet(address, cache_size=0)
    found.read(0)
    requests.clear()
    proxy.latency = 0.1
    wanted = np.arange(0, IMAGES, 6)
    start = time.perf_counter()
    found.advise(wanted)
    images = [found.read(int(i)) for i in wanted]
    assert time.perf_counter() - start < 1.0 < 0.1 * len(wanted)
    assert images == [ShardSet(local).read(int(i)) for i in wanted]
    requests.clear()
    found.advise(np.arange(9, 15))  # two whole shards: images side by side come together
    assert [found.read(i) for i in range(9, 15)] == [ShardSet(local).read(i) for i in range(9, 15)]
    assert len(requests) == 2


# --- the cache ---


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
    assert caplog.text.count("not kept on disk from here on") == 1
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
    assert in_cache(found) == set() and "has no space for one" in caplog.text


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


# --- exactness ---


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


def test_a_program_ends_at_once_in_an_outage(address: str, proxy: Proxy) -> None:
    """Ctrl-C while threads wait for a server that is silent: nobody waits for them to give up."""
    program = (
        "import signal, sys; sys.path.insert(0, 'tests'); from mapimages import still_recipe\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored\n"
        "from pipeline import Loader, ShardSet\n"
        "loader = Loader(ShardSet(sys.argv[1]), still_recipe(), 8, num_threads=1)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: next(iter(loader))\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    argv = [sys.executable, "-c", program, address]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as run:
        assert run.stdin and run.stdout
        assert run.stdout.readline() == "ready\n"
        proxy.drop()
        proxy.faults[:] = ["stall 0"] * 1000
        before = proxy.connections
        run.stdin.write("go\n")
        run.stdin.flush()
        until(lambda: proxy.connections > before)
        run.send_signal(signal.SIGINT)  # a real one: it ends a wait for a lock
        assert run.stdout.readline() == "interrupted\n"
        start = time.monotonic()
        assert run.wait(30) == 0
    assert time.monotonic() - start < 10
