"""Sample tables and manifests: used while they match the shards, made again if they are damaged."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mapimages import image, sample, still_recipe, write_set, write_tar

from pipeline import Loader, tables
from pipeline.order import block_positions
from pipeline.shards import SAMPLE, ShardError, ShardSet


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def test_an_index_file_is_never_believed(tmp_path: Path) -> None:
    folder = write_set(tmp_path, 6, 1)
    before = ShardSet(folder).table.copy()
    (folder / "map-0000.idx").write_text("v1.2 1\njpg 512 999999 nonsense.jpg\n")
    assert np.array_equal(ShardSet(folder).table, before)


@pytest.mark.parametrize("change", [{"file": "../elsewhere.tar"}, {"file": 5}, {"bytes": None}])
def test_a_manifest_of_something_else_is_left_alone(tmp_path: Path, change: dict) -> None:
    folder = ours(tmp_path / "set")
    manifest = json.loads((folder / "manifest.json").read_text())
    shard = {**manifest["shards"][0], **change}
    manifest["shards"][0] = {name: value for name, value in shard.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert len(ShardSet(folder)) == 7


def other_rows(column: str, value: int) -> Callable[[bytes], bytes]:
    """The table with one number changed in its middle."""

    def changed(data: bytes) -> bytes:
        table = np.load(io.BytesIO(data))
        table[column][len(table) // 2] = value
        out = io.BytesIO()
        np.save(out, table)
        return out.getvalue()

    return changed


DAMAGED_TABLES: list[Callable[[bytes], bytes]] = [
    lambda data: b"",
    lambda data: data[:9],
    lambda data: data[:-1],
    lambda data: b"rubbish",
    lambda data: b"PK\3\4" + data,
    other_rows("shard", 1000),
    other_rows("shard", -1),
    other_rows("offset", -5),
    other_rows("size", -5),
]


def test_foreign_tables_are_kept_and_renewed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(tmp_path, 9, 3)
    first = ShardSet(folder).table.copy()
    scan = tables._scan

    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(tables, "_scan", refuse)
    again = ShardSet(folder)
    assert np.array_equal(again.table, first)
    assert isinstance(again.table, np.memmap)
    monkeypatch.setattr(tables, "_scan", scan)
    write_tar(folder / "map-0001.tar", sample("new", image(99), 5))
    assert len(ShardSet(folder)) == 7
    kept = {path: path.read_bytes() for path in (cache / "dense-ssl" / "tables").iterdir()}
    for damaged in DAMAGED_TABLES:
        for path, content in kept.items():
            path.write_bytes(damaged(content))
        again = ShardSet(folder)
        assert len(again) == 7 and again.read(6)
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")  # cannot be written, even by root
    assert len(ShardSet(folder)) == 7


def ours(folder: Path, samples: tuple[int, ...] = (4, 3)) -> Path:
    """A set as tools/shard_imagenet.py leaves it, written here from its description."""
    write_set(folder, sum(samples), 1)
    (folder / "map-0000.tar").unlink()
    start, entries, parts = 0, [], []
    for k, count in enumerate(samples):
        path = folder / f"map-train-{k:04d}.tar"
        numbers = range(start, start + count)
        members = [m for j in numbers for m in sample(f"k{j}", image(j, 40, 50), j)]
        write_tar(path, members)
        table = ShardSet([path]).table.copy()
        np.save(path.with_suffix(".samples.npy"), table)
        table["shard"] = k
        parts.append(table)
        entries.append({"file": path.name, "bytes": path.stat().st_size, "sha256": "", "samples": count})
        start += count
    np.save(folder / "map-train.samples.npy", np.concatenate(parts))
    manifest = {"format": 1, "name": "map", "split": "train", "num_samples": start, "shards": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_our_tables_are_used_while_they_are_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ours(tmp_path / "set")
    scanned: list[Path] = []
    scan = tables._scan
    monkeypatch.setattr(tables, "_scan", lambda path: scanned.append(path) or scan(path))
    whole = ShardSet(folder)
    assert isinstance(whole.table, np.memmap)
    assert len(whole) == 7
    assert whole.table.dtype == SAMPLE
    part = ShardSet([folder / "map-train-0001.tar"])
    assert part.table["shard"].tolist() == [0, 0, 0]
    assert [part.key(i) for i in range(3)] == ["k4", "k5", "k6"]
    swapped = ShardSet([folder / "map-train-0001.tar", folder / "map-train-0000.tar"])
    assert swapped.key(0) == "k4"
    assert swapped.read(3) == whole.read(0)
    assert not scanned
    write_tar(folder / "map-train-0001.tar", sample("other", image(1), 1))  # the manifest no longer describes it
    mixed = ShardSet(folder)
    assert scanned == [folder / "map-train-0001.tar"]
    assert [mixed.key(i) for i in range(len(mixed))] == ["k0", "k1", "k2", "k3", "other"]
    assert mixed.fingerprint != whole.fingerprint


@pytest.mark.parametrize("damaged", DAMAGED_TABLES)
def test_a_damaged_table_of_ours_is_made_again(tmp_path: Path, damaged: Callable[[bytes], bytes]) -> None:
    folder = ours(tmp_path / "set")
    whole = ShardSet(folder).table.copy()
    for pattern in ("map-train.samples.npy", "map-train-*.samples.npy"):  # the set's, then the shards' as well
        for path in folder.glob(pattern):
            path.write_bytes(damaged(path.read_bytes()))
        assert np.array_equal(ShardSet(folder).table, whole)


@pytest.mark.parametrize(
    "manifest",
    [b"", b'{"a":' * 100_000, b'{"format": 1, "name": "map", "split": "train", "num_samples": 7, "shards": []}'],
    ids=["empty", "deep", "no shards"],
)
def test_a_damaged_manifest_costs_a_scan(tmp_path: Path, manifest: bytes) -> None:
    folder = ours(tmp_path / "set")
    (folder / "manifest.json").write_bytes(manifest)
    assert [ShardSet(folder).key(i) for i in range(7)] == [f"k{i}" for i in range(7)]


def test_a_second_split_must_be_named(tmp_path: Path) -> None:
    folder = ours(tmp_path / "set")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "validation.manifest.json").write_text(json.dumps({**manifest, "split": "validation"}))
    with pytest.raises(ShardError, match="train, validation"):
        ShardSet(folder)


def test_a_shard_missing_from_our_set_is_named(tmp_path: Path) -> None:
    folder = ours(tmp_path / "set")
    (folder / "map-train-0001.tar").unlink()
    with pytest.raises(ShardError, match=r"map-train-0001\.tar is missing"):
        ShardSet(folder)
    assert len(ShardSet([folder / "map-train-0000.tar"])) == 4


def test_the_fingerprint_is_the_sets_not_the_places(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "here", 6, 2)
    moved = tmp_path / "there"
    shutil.copytree(folder, moved)
    assert ShardSet(folder).fingerprint == ShardSet(moved).fingerprint
    write_tar(moved / "map-0001.tar", sample("one", image(1), 1))
    assert ShardSet(folder).fingerprint != ShardSet(moved).fingerprint


def test_fourteen_million_images_cost_their_table_on_disk_only(tmp_path: Path) -> None:
    """A sparse set of 1,024 empty tars: the table is mapped, opening it reads next to nothing of it."""
    n, count = 14_000_000, 1024
    ends = np.linspace(0, n, count + 1).astype(np.int64)
    entries = []
    for k in range(count):
        path = tmp_path / f"big-train-{k:04d}.tar"
        path.touch()
        os.truncate(path, 1 << 20)
        entries.append({"file": path.name, "bytes": 1 << 20, "samples": int(ends[k + 1] - ends[k])})
    table = np.lib.format.open_memmap(tmp_path / "big-train.samples.npy", "w+", SAMPLE, (n,))
    for k in range(count):
        table["shard"][ends[k] : ends[k + 1]] = k
    table.flush()
    del table
    manifest = {"format": 1, "name": "big", "split": "train", "num_samples": n, "shards": entries}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    block_positions(0, 0, 0, 1, np.array([0, 1]))  # compiled before memory is counted
    Loader(write_set(tmp_path / "small", 8, 1), still_recipe(), 8)._prepare.positions(0, 0, 8)
    before = anonymous()
    found = ShardSet(tmp_path)
    assert len(found) == n
    assert np.array_equal(found.first, ends)
    source = Loader(found, still_recipe(), 256, rank=5, world_size=8)
    assert len(source) == n // 2048
    for order in (source._prepare.positions(7, n - 256, n), block_positions(0, 7, n - 256, n, found.first)):
        assert len(set(order.tolist())) == 256
    assert anonymous() - before < 20 << 20


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_a_split_is_named_behind_its_folder(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set: a", 6, 3)
    names = [path.name for path in sorted(folder.glob("*.tar"))]
    splits = {"train": {"filenames": names[:2]}, "val": {"filenames": names[2:]}, "test": {}}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    assert ShardSet(f"{folder}:train").fingerprint == ShardSet(folder, "train").fingerprint
    assert ShardSet(f"{folder}:val").paths == [folder / names[2]]
    for split, sentence in {"none": "has no split 'none': it holds train, val, test", "test": "does not say"}.items():
        with pytest.raises(ShardError, match=sentence):
            ShardSet(f"{folder}:{split}")
    with pytest.raises(ShardError, match=f"holds the splits train, val, test: name one, {folder}:train or"):
        ShardSet(folder)
