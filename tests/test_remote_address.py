"""A set at an address behaves like a set in a folder; anything missing gives an error of one sentence."""

import json
import logging
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from mapimages import encode, map_image, sample, write_set, write_tar
from remote_sets import IMAGES, in_cache, same
from servers import SECRET, Bucket, publish, web

from pipeline import ReadError, ShardError, ShardSet, host, remote

pytestmark = pytest.mark.usefixtures("network")


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
    caplog.set_level(logging.INFO)
    folder = write_set(tmp_path / "foreign", 12, 4)
    address = bucket.upload(folder, "foreign")
    here = ShardSet(folder)
    first = ShardSet(address)
    assert first.fingerprint == here.fingerprint and np.array_equal(first.table, here.table)
    assert sorted(requests) == [f"map-000{k}.tar" for k in range(4)]
    assert in_cache(first) == {0, 1, 2, 3}
    assert same(first, here) and len(requests) == 4  # from the cache, whose tars served the walk
    assert "4 shards have no table: downloading them" in caplog.text
    caplog.clear()
    again = ShardSet(address, cache_size=0)
    assert len(requests) == 4 and "fetching" not in caplog.text
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
        (["s3://bucket/in1k/map-0000.tar", "/data/x.tar"], "'/data/x.tar' is a local file in a list of addresses"),
        ("ftp://host/set", "cannot be read image by image"),
        ("pipe:cat x.tar", "cannot be read image by image"),
        (f"http://user:{SECRET}@127.0.0.1:1/set", "http://127.0.0.1:1/set: an address with a password"),
        (f"http://127.0.0.1:1/set?sig={SECRET}", "http://127.0.0.1:1/set: an address with a password"),
        ("http://127.0.0.1:1/set", r"http://127.0.0.1:1/set.* could not be read: no server answers there"),
        ("az://container/set", "az://container/set: no credentials are found: set AZURE"),
        ("s3:///set", "s3:///set is no address that can be read: it names no bucket"),
    ],
)
def test_what_an_address_lacks_is_one_sentence(address: str, spec: str, says: str) -> None:
    with pytest.raises((ShardError, ReadError), match=says) as caught:
        ShardSet(spec)
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)


def test_half_of_the_credentials_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ShardError, match="no credentials are found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        ShardSet(address)


@pytest.mark.parametrize("size", [float("inf"), float("nan"), -1])
def test_a_cache_of_no_size_is_refused(address: str, size: float) -> None:
    with pytest.raises(ValueError, match=f"cache_size {size} must be a number of GB, 0 or more"):
        ShardSet(address, cache_size=size)


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
    with pytest.raises(ShardError, match="does not match the manifest"):
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
