"""The sharder's output, and that other libraries read the same samples from it."""

import io
import json
import runpy
import tarfile

import numpy as np
import pytest
import sharder_sources as make
from PIL import Image


@pytest.fixture(scope="module")
def photos():
    return make.photographs()


@pytest.fixture(scope="module")
def out(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    assert make.run(make.tree(folder / "tiny", photos), folder / "out", "--shards", 3) == 0
    return folder / "out"


def test_every_image_is_there_byte_for_byte_with_its_label(out, photos):
    found = make.samples(out)
    assert len(found) == len(photos)
    for name, content in photos.items():
        wnid, _, base = name.partition("/")
        parts = found[base.removesuffix(".JPEG")]
        height, width = Image.open(io.BytesIO(content)).size[::-1]
        label = make.WNIDS.index(wnid)
        assert parts["jpg"] == content
        assert parts["cls"] == str(label).encode()
        assert json.loads(parts["json"]) == {
            "filename": base,
            "label": label,
            "synset": wnid,
            "height": height,
            "width": width,
        }
    assert (out / "synsets.txt").read_text().split() == list(make.WNIDS)


def test_the_tars_are_plain_ustar(out):
    for path in out.glob("*.tar"):
        raw = path.read_bytes()
        assert len(raw) % 512 == 0
        assert not any(raw[-1024:])
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert [member.name.partition(".")[2] for member in members] == ["jpg", "cls", "json"] * (len(members) // 3)
        for member in members:
            assert raw[member.offset + 257 : member.offset + 265] == b"ustar\x0000"
            assert member.offset_data == member.offset + 512, "a PAX or GNU extension"
            assert (member.mode, member.uid, member.gid, member.uname, member.gname) == (0o444, 0, 0, "", "")
            assert member.mtime == members[0].mtime


def test_the_index_is_the_one_dali_makes(out, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    for path in out.glob("*.tar"):
        with wds2idx.IndexCreator(str(path), str(tmp_path / "x.idx"), verbose=False) as creator:
            creator.create_index()
        assert path.with_suffix(".idx").read_bytes() == (tmp_path / "x.idx").read_bytes()


def test_the_tables_find_every_image(out, photos):
    from pipeline.shards import SAMPLE

    manifest = json.loads((out / "manifest.json").read_text())
    merged = np.load(out / "tiny-train.samples.npy")
    assert merged.dtype == SAMPLE
    assert len(merged) == manifest["num_samples"] == len(photos)
    of_shard = [np.load(out / entry["file"].replace(".tar", ".samples.npy")) for entry in manifest["shards"]]
    assert [len(table) for table in of_shard] == [entry["samples"] for entry in manifest["shards"]]
    for table in of_shard:
        assert not table["shard"].any()
    assert np.concatenate(of_shard)["offset"].tolist() == merged["offset"].tolist()
    found = set()
    for row in merged:
        raw = (out / manifest["shards"][row["shard"]]["file"]).read_bytes()
        image = raw[row["offset"] : row["offset"] + row["size"]]
        name = next(name for name, content in photos.items() if content == image)
        assert Image.open(io.BytesIO(image)).size == (row["width"], row["height"])
        assert make.WNIDS[row["label"]] == name.partition("/")[0]
        found.add(name)
    assert found == set(photos)


def test_the_loaders_shard_set_reads_it(out, photos):
    from pipeline import ShardSet

    shards = ShardSet(str(out))
    assert len(shards) == len(photos)
    for i in range(len(shards)):
        key = shards.key(i)
        assert shards.read(i) == photos[f"{key.partition('_')[0]}/{key}.JPEG"]


def test_dalis_reader_reads_it(out):
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    paths = sorted(str(path) for path in out.glob("*.tar"))

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph():
        index = [path.replace(".tar", ".idx") for path in paths]
        return tuple(fn.readers.webdataset(paths=paths, index_paths=index, ext=["jpg", "cls", "json"]))

    pipeline = graph()
    pipeline.build()
    expected = make.samples(out)
    for parts in expected.values():
        jpg, cls, said = (np.asarray(one.at(0)).tobytes() for one in pipeline.run())
        assert (jpg, cls, said) == (parts["jpg"], parts["cls"], parts["json"])


def test_webdataset_reads_it(out):
    wds = pytest.importorskip("webdataset")
    paths = sorted(str(path) for path in out.glob("*.tar"))
    read = list(wds.WebDataset(paths, shardshuffle=False))
    expected = make.samples(out)
    assert [one["__key__"] for one in read] == list(expected)
    for one in read:
        assert {part: one[part] for part in ("jpg", "cls", "json")} == expected[one["__key__"]]


def test_timms_reader_reads_it_by_its_info(out, photos):
    readers = pytest.importorskip("timm.data.readers")
    reader = readers.create_reader("wds/", root=str(out), split="train", is_training=False, batch_size=1)
    assert len(reader) == len(photos)
    by_pixels = {np.asarray(Image.open(io.BytesIO(content))).tobytes(): name for name, content in photos.items()}
    read = [(by_pixels[np.asarray(image).tobytes()], label) for image, label in reader]
    assert sorted(read) == sorted((name, make.WNIDS.index(name.partition("/")[0])) for name in photos)


def test_the_order_is_shuffled_by_the_seed_alone(photos, tmp_path):
    source = make.tree(tmp_path / "tiny", photos)
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert make.run(source, tmp_path / name, "--seed", seed) == 0
        orders.append(list(make.samples(tmp_path / name)))
    assert make.contents(tmp_path / "a") == make.contents(tmp_path / "b")
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    changes = sum(one[:9] != other[:9] for one, other in zip(orders[0], orders[0][1:], strict=False))
    assert changes > 8, "classes lie together: 24 images in class order change class twice, shuffled some 16 times"


def test_the_number_of_workers_changes_no_byte(photos, out, tmp_path):
    source = make.tree(tmp_path / "tiny", photos)
    run = make.command(source, tmp_path / "out", "--shards", 3, "--workers", 2)
    said = run.communicate()
    assert run.returncode == 0, said
    assert make.contents(tmp_path / "out") == make.contents(out)


def test_workers_are_as_many_as_the_container_has_cores(monkeypatch):
    monkeypatch.setattr("pipeline.host.cores", lambda: 3)
    assert runpy.run_path(str(make.TOOL))["arguments"](["source", "out"]).workers == 3


def test_two_splits_share_a_folder(photos, tmp_path):
    source = make.tree(tmp_path / "tiny" / "train", photos).parent
    make.tree(source / "val", {name.replace("_", "_9"): content for name, content in photos.items()})
    out = tmp_path / "out"
    assert make.run(source, out, "--split", "train", "--name", "tiny") == 0
    assert make.run(source, out, "--split", "val", "--name", "tiny") == 0
    assert json.loads((out / "manifest.json").read_text())["split"] == "train"
    assert json.loads((out / "val.manifest.json").read_text())["split"] == "val"
    assert set(json.loads((out / "_info.json").read_text())["splits"]) == {"train", "val"}
    assert make.run("--check", out) == 0
