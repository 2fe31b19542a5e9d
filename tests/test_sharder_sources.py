"""Every layout in which ImageNet is distributed, in miniature, and sources that must be refused or tolerated."""

import errno
import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import sharder_sources as make
from scipy.io import savemat
from sharding import SourceError, labels, plan, sources

VAL = {f"ILSVRC2012_val_{number:08d}.JPEG": make.encode(100 + number) for number in range(1, 7)}
# The devkit's ids are not the sorted order of the synsets: a tool that takes them for labels is wrong everywhere.
DEVKIT_ID = {"n01440764": 3, "n01443537": 1, "n02105855": 2}
VAL_WNID = [make.WNIDS[place] for place in (0, 0, 1, 2, 1, 2)]


@pytest.fixture(scope="module")
def photos():
    return make.photographs(6)


@pytest.fixture(scope="module")
def wanted(photos, tmp_path_factory):
    """The shards of a plain tree: the form all others are compared with."""
    folder = tmp_path_factory.mktemp("wanted")
    assert make.run(make.tree(folder / "tree", photos), folder / "out", "--name", "tiny", "--shards", 2) == 0
    return make.shards(folder / "out")


def train_sources(folder, photos):
    below = {f"imagenet/{name}": content for name, content in photos.items()}
    inner = make.class_tars(photos)
    kaggle = {f"ILSVRC/Data/CLS-LOC/train/{name}": content for name, content in photos.items()}
    mapping = "".join(f"{wnid} some words, more words\n" for wnid in make.WNIDS).encode()
    return {
        "tree with a train folder": lambda: make.tree(folder, {f"train/{name}": one for name, one in photos.items()}),
        "deeper tree": lambda: make.tree(folder, {name.replace("/", "/deep/er/"): one for name, one in photos.items()}),
        "tree with rubbish": lambda: make.tree(
            folder,
            photos | {"n01440764/.DS_Store": b"x", "n01440764/._n01440764_0.JPEG": b"x", "n01443537/Thumbs.db": b""},
        ),
        "kaggle": lambda: make.tree(folder, kaggle | {"LOC_synset_mapping.txt": mapping}),
        "folder of class tars": lambda: make.tree(folder, inner),
        "tar of class tars": lambda: make.file(folder / "ILSVRC2012_img_train.tar", make.tar_of(inner)),
        "its folder": lambda: make.file(folder / "ILSVRC2012_img_train.tar", make.tar_of(inner)).parent,
        "PAX tar of class tars": lambda: make.file(folder / "x.tar", make.tar_of(inner, tarfile.PAX_FORMAT)),
        "gzipped tar of class tars": lambda: make.file(
            folder / "winter21_whole.tar.gz", make.tar_of(inner, mode="w:gz")
        ),
        "tar of class folders": lambda: make.file(folder / "x.tar", make.tar_of(below, tarfile.USTAR_FORMAT)),
        "gzipped tar of class folders": lambda: make.file(folder / "x.tgz", make.tar_of(below, mode="w:gz")),
        "tar in another order": lambda: make.file(folder / "x.tar", make.tar_of(dict(reversed(below.items())))),
    }


@pytest.mark.parametrize("form", train_sources(None, {}))
def test_every_form_of_a_training_set_gives_the_same_bytes(form, photos, wanted, tmp_path):
    source = train_sources(tmp_path / "in", photos)[form]()
    assert make.run(source, tmp_path / "out", "--name", "tiny", "--shards", 2) == 0
    assert make.shards(tmp_path / "out") == wanted
    assert make.run("--check", tmp_path / "out") == 0


def devkit():
    rows = [(number, wnid, 0) for wnid, number in DEVKIT_ID.items()] + [(1001, "n00001740", 3)]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{DEVKIT_ID[wnid]}\n" for wnid in VAL_WNID).encode()
    return {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}


def val_sources(folder):
    data = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in devkit().items()}
    answers = zip((name.removesuffix(".JPEG") for name in VAL), VAL_WNID, strict=True)
    solution = "ImageId,PredictionString\r\n" + "".join(f"{name},{wnid} 1 2 3 4 \r\n" for name, wnid in answers)
    flat = make.tree(folder / "flat", VAL)
    lines = "".join(f"{name} {make.WNIDS.index(wnid)}\n" for name, wnid in zip(VAL, VAL_WNID, strict=True))
    kit = make.tree(folder / "kit", data)
    classes = make.file(folder / "classes.txt", "\ufeffn01440764\r\nn01443537\r\nn02105855\r\n".encode())
    return {
        "flat folder and devkit folder": lambda: (flat, "--labels", kit),
        "flat folder and ground truth": lambda: (
            flat,
            "--labels",
            kit / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
        ),
        "flat folder and lines": lambda: (
            flat,
            "--labels",
            make.file(folder / "v.txt", lines.encode()),
            "--classes",
            classes,
        ),
        "tar and csv": lambda: (
            make.file(folder / "ILSVRC2012_img_val.tar", make.tar_of(VAL)),
            "--labels",
            make.file(folder / "LOC_val_solution.csv", solution.encode()),
        ),
        "downloads in one folder": lambda: (
            make.tree(
                folder / "download",
                {
                    "ILSVRC2012_img_val.tar": make.tar_of(VAL),
                    "ILSVRC2012_devkit_t12.tar.gz": make.tar_of(data, mode="w:gz"),
                },
            ),
        ),
        "tar with a folder around and csv": lambda: (
            make.file(folder / "around.tar", make.tar_of({f"val/{name}": content for name, content in VAL.items()})),
            "--labels",
            make.file(folder / "LOC_val_solution.csv", solution.encode()),
        ),
        "kaggle": lambda: (
            make.tree(
                folder / "kaggle",
                {f"ILSVRC/Data/CLS-LOC/val/{name}": content for name, content in VAL.items()}
                | {"LOC_val_solution.csv": solution.encode()},
            ),
        ),
        "class folders": lambda: (
            make.tree(
                folder / "folders",
                {f"val/{wnid}/{name}": VAL[name] for name, wnid in zip(VAL, VAL_WNID, strict=True)},
            ),
        ),
    }


@pytest.fixture(scope="module")
def val_forms(tmp_path_factory):
    return val_sources(tmp_path_factory.mktemp("val"))


@pytest.mark.parametrize(
    "form",
    ["kaggle", "downloads in one folder", "tar and csv", "tar with a folder around and csv", "class folders"]
    + [f"flat folder and {what}" for what in ("devkit folder", "ground truth", "lines")],
)
def test_every_form_of_a_validation_set_gives_the_right_labels(form, val_forms, tmp_path):
    source, *options = val_forms[form]()
    assert make.run(source, tmp_path, "--split", "val", "--name", "tiny", *options) == 0
    assert len(list(tmp_path.glob("tiny-val-*.tar"))) == 1
    found = {key: int(parts["cls"]) for key, parts in make.samples(tmp_path).items()}
    names = (name.removesuffix(".JPEG") for name in VAL)
    assert found == {name: make.WNIDS.index(wnid) for name, wnid in zip(names, VAL_WNID, strict=True)}
    assert (tmp_path / "synsets.txt").read_text().split() == list(make.WNIDS)


@pytest.mark.parametrize(("names", "options"), [(("a.jpg", "b.jpg"), ()), (("x/a.jpg", "y/b.jpg"), ("--unlabelled",))])
def test_a_folder_without_labels(names, options, tmp_path):
    source = make.tree(tmp_path / "in", {name: make.encode(place) for place, name in enumerate(names)})
    assert make.run(source, tmp_path / "out", *options) == 0
    assert [parts["cls"] for parts in make.samples(tmp_path / "out").values()] == [b"-1", b"-1"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["num_classes"] == 0
    assert make.run("--check", tmp_path / "out") == 0


@pytest.mark.parametrize("folder", ["one", "val"])
def test_one_folder_in_a_tar_is_a_class_unless_it_names_a_split(folder, tmp_path):
    source = make.file(tmp_path / "x.tar", make.tar_of({f"{folder}/a.jpg": make.encode(1)}))
    assert make.run(source, tmp_path / "out") == 0
    (parts,) = make.samples(tmp_path / "out").values()
    assert parts["cls"] == (b"0" if folder == "one" else b"-1")


def test_a_class_list_chooses_and_numbers_the_classes(photos, tmp_path):
    source = make.tree(tmp_path / "in", photos)
    chosen = make.file(tmp_path / "list.txt", b"n02105855 griffon, a dog\r\nn01440764\r\n")
    assert make.run(source, tmp_path / "out", "--classes", chosen) == 0
    found = {(key.partition("_")[0], parts["cls"]) for key, parts in make.samples(tmp_path / "out").items()}
    assert found == {("n02105855", b"0"), ("n01440764", b"1")}
    assert (tmp_path / "out" / "synsets.txt").read_text() == "n02105855\nn01440764\n"


def test_a_subset_is_random_exact_and_part_of_every_larger_one(photos, tmp_path):
    source = make.tree(tmp_path / "in", photos)
    found = {}
    for size, seed in ((5, 0), (11, 0), (5, 1)):
        out = tmp_path / f"{size}-{seed}"
        assert make.run(source, out, "--subset", size, "--seed", seed) == 0
        found[size, seed] = set(make.samples(out))
        assert len(found[size, seed]) == size
    assert found[5, 0] < found[11, 0]
    assert found[5, 0] != found[5, 1]


def test_labels_that_begin_at_one_are_seen(val_forms, tmp_path, capsys):
    source = make.tree(tmp_path / "in", VAL)
    lines = make.file(
        tmp_path / "labels.txt", "".join(f"{name} {1 + place % 3}\n" for place, name in enumerate(VAL)).encode()
    )
    assert make.run(source, tmp_path / "out", "--labels", lines) == 2
    assert "--label-offset -1" in capsys.readouterr().err
    assert make.run(source, tmp_path / "out", "--labels", lines, "--label-offset", -1) == 0
    assert {parts["cls"] for parts in make.samples(tmp_path / "out").values()} == {b"0", b"1", b"2"}


@pytest.mark.parametrize(
    ("labels", "options", "sentence"),
    [
        ("a.jpg 0\n\nb.jpg O1\nc.jpg 1\n", (), "line 3: O1"),
        ("a.jpg cat\nb.jpg dog\nc.jpg 10\n", (), "line 3: 10"),
        ("a.jpg 0\nb.jpg 99999999999999999999\nc.jpg 1\n", (), "line 2: 9999999999"),
        ("a.jpg 0\nb.jpg 3000000000\nc.jpg 1\n", (), "label 3000000000"),
        ("a.jpg 0\nb.jpg 20000000\nc.jpg 1\n", (), "label 20000000"),
        ("a.jpg 0\nb.jpg " + "9" * 5000 + "\nc.jpg 1\n", (), "line 2: 99999"),
        ("a.jpg 0\nb.jpg 1\nc.jpg 1\n", ("--label-offset", 10**9), "label 1000000"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(labels, options, sentence, tmp_path, capsys):
    source = make.tree(tmp_path / "in", dict.fromkeys(("a.jpg", "b.jpg", "c.jpg"), b"x"))
    listed = make.file(tmp_path / "labels.txt", labels.encode())
    assert make.run(source, tmp_path / "out", "--labels", listed, *options) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert len(said) < 400
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("solution", "code"),
    [
        ("\nImageId,PredictionString\n{}", 0),
        ("ImageId,PredictionString\n\n{}", 0),
        ("ImageId,PredictionString\n{}" + "x" * 200_000, 2),
    ],
)
def test_kaggles_answers_with_blank_lines_or_huge_fields(solution, code, tmp_path, capsys):
    answers = "".join(f"{name},{wnid} 1 2 3 4\n" for name, wnid in zip("abc", make.WNIDS, strict=True))
    source = make.tree(tmp_path / "in", {f"{name}.jpg": make.encode(1) for name in "abc"})
    listed = make.file(tmp_path / "LOC_val_solution.csv", solution.format(answers).encode())
    assert make.run(source, tmp_path / "out", "--labels", listed) == code
    assert code == 0 or "LOC_val_solution.csv" in capsys.readouterr().err


def test_releases_are_told_by_their_number_of_classes(tmp_path):
    for count, word in ((1000, "1k"), (10450, "21k-P"), (19167, "winter21"), (21841, "fall11")):
        assert word in labels.release([f"n{number:08d}" for number in range(count)])[0]
    assert labels.release([f"n{number:08d}" for number in range(999)]) is None
    assert labels.release([f"class{number}" for number in range(1000)]) is None


def test_an_almost_complete_imagenet_names_what_it_lacks():
    full = labels.missing_from_1k
    from importlib.util import find_spec
    from pathlib import Path

    known = Path(find_spec("timm").submodule_search_locations[0], "data/_info/imagenet_synsets.txt").read_text().split()
    assert full(sorted(set(known) - {"n02105855"})) == ["n02105855"]
    assert full(known) == full(known[:100]) == full([f"x{name}" for name in known[1:]]) == []


@pytest.mark.parametrize(("classes", "fatal"), [(3, True), (1001, False)])
def test_a_class_without_images_stops_1k_and_is_told_of_21k(classes, fatal, tmp_path):
    listing = sources.Listing(tmp_path, "made up", print, classes={f"n{k:08d}": k for k in range(classes)})
    for number in range(1, classes):
        listing.add(f"n{number:08d}/n{number:08d}_1.JPEG", 10, number)
    request = sources.Request(tmp_path)
    if fatal:
        with pytest.raises(SourceError, match="n00000000"):
            plan.build(listing, request)
    else:
        assert len(plan.build(listing, request).rows) == classes - 1
        assert any("n00000000" in note for note in listing.notes)


@pytest.mark.parametrize("place", ["", "cat"])
def test_a_link_to_itself_does_not_stop_the_listing(place, tmp_path):
    source = make.tree(tmp_path / "in", {"cat/1.jpg": make.encode(1), "dog/2.jpg": make.encode(2)})
    for name in ("loop", "loop.jpg"):
        (source / place / name).symlink_to(name)
    assert make.run(source, tmp_path / "out") == 0
    assert len(make.samples(tmp_path / "out")) == 2
    (line,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert line["source"] == str(Path(place, "loop.jpg"))


def test_an_unreadable_source_is_named_itself(photos, tmp_path, monkeypatch, capsys):
    source, stat = make.tree(tmp_path / "in", photos), os.stat

    def refuse(path, *args, **options):
        if str(path).startswith(f"{source}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert make.run(source, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"cannot read {source}: Permission denied" in said


def test_what_is_something_else_is_refused(tmp_path):
    make.tree(tmp_path / "set" / "train", make.photographs(1))
    with pytest.raises(SourceError, match="holds train, but no val"):
        sources.read(sources.Request(tmp_path / "set", "val"), print)
    assert make.run(tmp_path / "set", tmp_path / "out") == 0
    with pytest.raises(SourceError, match="finished shards"):
        sources.read(sources.Request(tmp_path / "out"), print)


@pytest.mark.parametrize(
    ("files", "options", "word"),
    [
        (None, (), "does not exist"),
        ({"readme.txt": b"x"}, (), "holds no image"),
        ({"a/x.txt": b"x", "b/y.jpg": b"x"}, (), "a"),
        ({"x.jpg": b"x", "a/y.jpg": b"x"}, (), "--unlabelled"),
        ({"ILSVRC2012_val_00000001.JPEG": b"x"}, (), "--labels"),
        ({"a/x.jpg": b"x"}, ("--subset", "2"), "only 1 images"),
        ({"a/x.jpg": b"x"}, ("--shards", "2"), "only 1 images"),
        ({"a/x.jpg": b"x"}, ("--classes", "/nonexistent/list"), "cannot read"),
        ({"x.jpg": b"x"}, ("--labels", "/nonexistent/list"), "does not exist"),
        ({"x.tar": b"<html>not found</html>" * 99}, (), "no tar"),
        ({"x.jpg": b"not an image"}, (), "no image"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(files, options, word, tmp_path, capsys):
    source = make.tree(tmp_path / "in", files) if files is not None else tmp_path / "in"
    assert make.run(source, tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert word in said
    assert len(said.splitlines()) == 1
    assert not list((tmp_path / "out").glob("*.tar")) if (tmp_path / "out").exists() else True


def test_an_unwritable_target_is_one_sentence(photos, tmp_path, capsys):
    source = make.tree(tmp_path / "in", photos)
    make.file(tmp_path / "out", b"a file")
    assert make.run(source, tmp_path / "out") == 2
    assert "cannot write to" in capsys.readouterr().err
