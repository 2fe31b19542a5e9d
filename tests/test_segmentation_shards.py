"""The tars of labelled images: their contents, that other libraries read them, reproducibility, and --check."""

import concurrent.futures
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import segmentation_sources as make
import sharder_sources as photos
from PIL import Image
from segmentation.statistics import look
from sharding import check

from pipeline import ShardSet

CLASSES = ("sky", "road", "car", "tree")
VOID = make.VOID


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check by threads, which starts at once; nothing here asks what a power cut would leave."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr("sharding.check.ProcessPoolExecutor", concurrent.futures.ThreadPoolExecutor)
    monkeypatch.setattr("sharding.check.get_context", lambda _: "")  # a thread pool takes a name prefix there


def source_of(root: Path, count: int = 12, size: tuple[int, int] = (20, 28)) -> tuple[Path, make.Truth]:
    """`folders` with a PNG among its JPEGs and a class that no mask has."""
    truth = {f"image-{n}": make.labels(n, 3, *size) for n in range(count)}
    make.put(root, {"classes.txt": "\n".join(CLASSES)})
    for n, (key, mask) in enumerate(truth.items()):
        kind = "PNG" if n == 1 else "JPEG"
        make.put(root, {f"images/val/{key}.{kind.lower()}": make.photo(n, mask, kind)})
        make.put(root, {f"masks/val/{key}.png": make.saved(mask)})
    return root, truth


OPTIONS = ("--layout", "folders", "--split", "val", "--name", "mine", "--shards", 3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, make.Truth]:
    return source_of(tmp_path_factory.mktemp("labelled") / "data")


@pytest.fixture(scope="module")
def out(source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    assert make.run(source[0], folder, *OPTIONS) == 0
    return folder


def test_each_sample_is_its_image_and_its_mask(source, out: Path) -> None:
    root, truth = source
    found = make.masks(out, "val")
    assert found.keys() == truth.keys()
    for key, members in make.stored(out, "val").items():
        np.testing.assert_array_equal(found[key], truth[key])
        file = next(root.glob(f"images/val/{key}.*"))
        metadata = {"filename": file.relative_to(root).as_posix(), "label": -1, "height": 20, "width": 28}
        if file.suffix == ".jpeg":
            assert members["jpg"] == file.read_bytes()
        else:
            metadata["repaired"] = ["PNG to JPEG"]
            image = Image.open(io.BytesIO(members["jpg"]))
            assert image.layer[0][1:3] == (1, 1)  # 4:4:4: small coloured things are classes
            want = np.asarray(Image.open(file)).astype(int)
            assert np.abs(np.asarray(image) - want).mean() < 2
        assert members["cls"] == b"-1"
        assert json.loads(members["json"]) == metadata
    assert (out / "classes.txt").read_text().splitlines() == list(CLASSES)


def test_the_manifest_counts_classes_and_void(source, out: Path) -> None:
    pixels = np.bincount(np.concatenate([mask.ravel() for mask in source[1].values()]), minlength=256)
    images = [sum((mask == label).any() for mask in source[1].values()) for label in range(256)]
    manifest = json.loads((out / "manifest.json").read_text())
    rows = [*manifest["classes"].values(), manifest["void"]]
    labels = [*range(4), VOID]
    assert list(manifest["classes"]) == list(CLASSES)
    assert [row["pixels"] for row in rows] == pixels[labels].tolist()
    assert [row["images"] for row in rows] == [images[label] for label in labels]
    shares = [*(pixels[:4] / pixels[:4].sum()), pixels[VOID] / pixels.sum()]
    assert [row["share"] for row in rows] == pytest.approx([100 * share for share in shares], abs=1e-4)
    assert manifest["classes"]["tree"] == {"pixels": 0, "share": 0.0, "images": 0}
    assert manifest["num_samples"] == 12
    assert manifest["counts"] == {"PNG to JPEG": 1}


def test_the_loaders_shard_set_reads_images_and_masks(source, out: Path) -> None:
    shards = ShardSet(out)
    assert len(shards) == 12
    for i in range(12):
        mask = shards.read_mask(i)
        assert mask is not None
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(mask))), source[1][shards.key(i)])
        assert Image.open(io.BytesIO(shards.read(i))).size == (28, 20)


def test_webdataset_reads_image_and_mask_of_each_key(source, out: Path) -> None:
    wds = pytest.importorskip("webdataset")
    paths = sorted(str(path) for path in out.glob("*.tar"))
    read = {one["__key__"]: one for one in wds.WebDataset(paths, shardshuffle=False).decode("rgb8")}
    assert read.keys() == source[1].keys()
    for key, one in read.items():
        assert one["jpg"].shape == (20, 28, 3)
        mask = np.asarray(Image.open(io.BytesIO(make.stored(out, "val")[key]["seg.png"])))
        np.testing.assert_array_equal(mask, source[1][key])
        assert "seg.png" in one


def test_timms_reader_reads_it_by_its_info(out: Path) -> None:
    readers = pytest.importorskip("timm.data.readers")
    reader = readers.create_reader("wds/", root=str(out), split="val", is_training=False, batch_size=1)
    read = [(image.size, label) for image, label in reader]
    assert read == [((28, 20), -1)] * 12


def test_the_seed_shuffles(source, out: Path, tmp_path: Path) -> None:
    assert make.run(source[0], tmp_path, *OPTIONS, "--seed", 1) == 0
    orders = [list(make.stored(folder, "val")) for folder in (out, tmp_path)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) != orders[0]


def command(*words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(make.TOOL), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_workers_and_kills_change_no_byte(tmp_path: Path) -> None:
    """Killed once a shard has its record, the second run resumes, with two workers; large masks make the work last."""
    root, _ = source_of(tmp_path / "data", 18, (500, 700))
    options = (*OPTIONS[:-1], 9)
    assert make.run(root, tmp_path / "wanted", *options) == 0
    wanted = photos.contents(tmp_path / "wanted")
    process = command(root, tmp_path / "out", *options, "--workers", 1)
    while len(list((tmp_path / "out").glob("*.tar"))) < 2 and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    made = list((tmp_path / "out").glob("*.tar"))
    assert 2 <= len(made) < 9
    for path in made:
        assert path.read_bytes() == wanted[path.name]
    process = command(root, tmp_path / "out", *options, "--workers", 2)
    said = process.communicate()
    assert process.returncode == 0, said
    assert "resuming: " in said[0]
    assert photos.contents(tmp_path / "out") == wanted
    process = command("--check", tmp_path / "out", "--workers", 2)
    assert process.communicate() == (f"{tmp_path}/out: no difference\n", "")


def test_a_refusal_of_a_worker_is_the_commands(tmp_path: Path) -> None:
    root, _ = source_of(tmp_path / "data", 4)
    (root / "masks/val/image-2.png").write_bytes(make.palette(make.labels(1, 3)))
    process = command(root, tmp_path / "out", *OPTIONS, "--workers", 2)
    _, said = process.communicate()
    assert process.returncode == 2
    assert said == (
        f"shard_segmentation: {root}/masks/val/image-2.png is a palette PNG instead of class indices: "
        "save its indices as a gray PNG\n"
    )


def test_parts_make_the_same_set(source, out: Path, tmp_path: Path) -> None:
    for part in ("1/2", "0/2"):
        assert not (tmp_path / "manifest.json").exists()
        assert make.run(source[0], tmp_path, *OPTIONS, "--part", part) == 0
    assert photos.contents(tmp_path) == photos.contents(out)


def test_splits_share_a_folder_and_its_classes(source, out: Path, tmp_path: Path, capsys) -> None:
    root, _ = source_of(tmp_path / "data", 3)
    (root / "images/val").rename(root / "images/train")
    (root / "masks/val").rename(root / "masks/train")
    assert make.run(source[0], tmp_path / "out", *OPTIONS) == 0
    assert make.run(root, tmp_path / "out", "--layout", "folders", "--name", "mine") == 0
    assert make.run("--check", tmp_path / "out") == 0
    assert set(json.loads((tmp_path / "out/train.manifest.json").read_text())["classes"]) == set(CLASSES)
    (root / "classes.txt").write_text("road\nsky\ncar\ntree\n")
    assert make.run(root, tmp_path / "out", "--layout", "folders", "--name", "mine") == 2
    capsys.readouterr()


def test_a_changed_mask_is_another_set(source, tmp_path: Path, capsys) -> None:
    root, truth = source_of(tmp_path / "data", 3)
    assert make.run(root, tmp_path / "out", *OPTIONS) == 0
    (root / "masks/val/image-0.png").write_bytes(make.saved(np.zeros_like(truth["image-0"])))
    assert make.run(root, tmp_path / "out", *OPTIONS) == 2
    assert "is of another set: source." in capsys.readouterr().err


def test_a_damaged_image_is_quarantined_with_its_mask(tmp_path: Path, capsys) -> None:
    root, truth = source_of(tmp_path / "data", 4)
    file = root / "images/val/image-0.jpeg"
    file.write_bytes(file.read_bytes()[:-40])
    assert make.run(root, tmp_path / "out", *OPTIONS) == 0
    assert make.masks(tmp_path / "out", "val").keys() == truth.keys() - {"image-0"}
    (line,) = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    assert line["key"] == "image-0"
    assert line["source"] == "images/val/image-0.jpeg"
    assert "does not decode" in line["reason"]
    assert make.run("--check", tmp_path / "out") == 0
    assert make.run(root, tmp_path / "strict", *OPTIONS, "--strict") == 1
    capsys.readouterr()


def test_a_dry_run_writes_nothing(source, tmp_path: Path, capsys) -> None:
    assert make.run(source[0], tmp_path / "out", *OPTIONS, "--dry-run") == 0
    assert "12 samples, 4 classes" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# --- the check -------------------------------------------------------------------------------------------------------


def damaged(out: Path, folder: Path, change) -> Path:
    for name, content in photos.contents(out).items():
        (folder / name).write_bytes(content)
    manifest = json.loads((out / "manifest.json").read_text())
    change(folder, manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def flip(folder: Path, manifest: dict) -> None:
    path = folder / "mine-val-0001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": (flip, "mine-val-0001.tar: sha256 differs"),
    "another count": (lambda folder, manifest: manifest["classes"]["car"].update(pixels=7), "car: the masks of split"),
    "another share of void": (lambda folder, manifest: manifest["void"].update(share=99.0), "void: the masks of split"),
    "no statistics": (lambda folder, manifest: manifest.pop("classes"), "classes.txt: its classes are not those"),
    "no void": (lambda folder, manifest: manifest.pop("void"), "void: the masks of split"),
    "classes in another order": (
        lambda folder, manifest: (folder / "classes.txt").write_text("road\nsky\ncar\ntree\n"),
        "classes.txt: its classes are not those",
    ),
    "fewer classes": (
        lambda folder, manifest: (folder / "classes.txt").write_text("sky\nroad\n"),
        "seg.png holds 2: there are 2 classes",
    ),
    "no class list": (lambda folder, manifest: (folder / "classes.txt").unlink(), "classes.txt: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_sees(damage: str, out: Path, tmp_path: Path, capsys) -> None:
    change, message = DAMAGES[damage]
    assert make.run("--check", damaged(out, tmp_path, lambda folder, manifest: None)) == 0
    assert make.run("--check", damaged(out, tmp_path, change)) == 1
    assert message in capsys.readouterr().out


def test_check_names_the_tool_that_made_a_folder(out: Path, tmp_path: Path, capsys) -> None:
    assert photos.run("--check", out) == 2
    said = capsys.readouterr().err
    assert "lists samples of ['jpg', 'seg.png', 'cls', 'json']: check them with tools/shard_segmentation.py\n" in said
    assert photos.run(photos.tree(tmp_path / "tiny", photos.photographs(1)), tmp_path / "out") == 0
    assert make.run("--check", tmp_path / "out") == 2
    assert "check them with tools/shard_imagenet.py\n" in capsys.readouterr().err


MEMBERS = {
    "jpg": make.photo(1, np.zeros((20, 28))),
    "seg.png": make.saved(make.labels(1, 3)),
    "cls": b"-1",
    "json": json.dumps({"width": 28, "height": 20, "label": -1}).encode(),
}
ODD_MEMBERS = {
    "a palette": ({"seg.png": make.palette(make.labels(1, 3))}, "k.seg.png is a PNG of mode P"),
    "another size": ({"seg.png": make.saved(make.labels(1, 3, 20, 27))}, "27 x 20: not one channel of 28 x 20 pixels"),
    "a class too many": ({"seg.png": make.saved(make.labels(1, 4))}, "k.seg.png holds 3: there are 3 classes"),
    "a cut mask": ({"seg.png": MEMBERS["seg.png"][:60]}, "k cannot be read"),
    "a label": ({"cls": b"1"}, "k: its json and cls say width, height, label, class = [28, 20, -1, 1]"),
    "another image": ({"jpg": make.photo(1, np.zeros((21, 28)))}, "28 x 20: not one channel of 28 x 21"),
    "no JSON": ({"json": b"{"}, "k cannot be read"),
}


@pytest.mark.parametrize("what", ODD_MEMBERS)
def test_check_looks_into_a_sample(what: str) -> None:
    assert look("k", MEMBERS.__getitem__, list("abc")) == check.Found(20, 28, -1, (), look_sums())
    change, message = ODD_MEMBERS[what]
    found = look("k", (MEMBERS | change).__getitem__, list("abc"))
    assert message in found.differences[0]


def look_sums() -> dict[str, int]:
    pixels = np.bincount(make.labels(1, 3).ravel(), minlength=256)
    return {f"pixels {n}": int(pixels[n]) for n in pixels.nonzero()[0]} | {
        f"images {n}": 1 for n in pixels.nonzero()[0]
    }
