"""Every layout in which ImageNet is handed out, in miniature, and the sources that must be refused or survived."""

import errno
import gzip
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

from pipeline import tar

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
        "tar of class tars": lambda: file(folder / "ILSVRC2012_img_train.tar", make.tar_of(inner)),
        "its folder": lambda: file(folder / "ILSVRC2012_img_train.tar", make.tar_of(inner)).parent,
        "PAX tar of class tars": lambda: file(folder / "x.tar", make.tar_of(inner, tarfile.PAX_FORMAT)),
        "gzipped tar of class tars": lambda: file(folder / "winter21_whole.tar.gz", make.tar_of(inner, mode="w:gz")),
        "tar of class folders": lambda: file(folder / "x.tar", make.tar_of(below, tarfile.USTAR_FORMAT)),
        "gzipped tar of class folders": lambda: file(folder / "x.tgz", make.tar_of(below, mode="w:gz")),
        "tar in another order": lambda: file(folder / "x.tar", make.tar_of(dict(reversed(below.items())))),
    }


def file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


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
    classes = file(folder / "classes.txt", "\ufeffn01440764\r\nn01443537\r\nn02105855\r\n".encode())
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
            file(folder / "v.txt", lines.encode()),
            "--classes",
            classes,
        ),
        "tar and csv": lambda: (
            file(folder / "ILSVRC2012_img_val.tar", make.tar_of(VAL)),
            "--labels",
            file(folder / "LOC_val_solution.csv", solution.encode()),
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
            file(folder / "around.tar", make.tar_of({f"val/{name}": content for name, content in VAL.items()})),
            "--labels",
            file(folder / "LOC_val_solution.csv", solution.encode()),
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
    source = file(tmp_path / "x.tar", make.tar_of({f"{folder}/a.jpg": make.encode(1)}))
    assert make.run(source, tmp_path / "out") == 0
    (parts,) = make.samples(tmp_path / "out").values()
    assert parts["cls"] == (b"0" if folder == "one" else b"-1")


def test_a_class_list_chooses_and_numbers_the_classes(photos, tmp_path):
    source = make.tree(tmp_path / "in", photos)
    chosen = file(tmp_path / "list.txt", b"n02105855 griffon, a dog\r\nn01440764\r\n")
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
    lines = file(
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
    listed = file(tmp_path / "labels.txt", labels.encode())
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
    listed = file(tmp_path / "LOC_val_solution.csv", solution.format(answers).encode())
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


# --- names -----------------------------------------------------------------------------------------------------------


def test_odd_names_become_clean_keys_and_are_kept_in_the_json(tmp_path):
    odd = ["with blank.jpg", "café.jpg", "two.dots.jpg", "x" * 180 + ".jpg", "日本.JPEG", os.fsdecode(b"raw\xff.jpg")]
    source = make.tree(tmp_path / "in", {f"one/{name}": make.encode(place) for place, name in enumerate(odd)})
    assert make.run(source, tmp_path / "out") == 0
    found = make.samples(tmp_path / "out")
    assert len(found) == len(odd)
    for key, parts in found.items():
        assert key.isascii()
        assert not set(key) & set(" ./\\")
        assert len(key) <= 95
        assert list(parts) == ["jpg", "cls", "json"]
    said = {json.loads(parts["json"])["filename"] for parts in found.values()}
    assert set(odd[:5]) < said
    assert make.run("--check", tmp_path / "out") == 0


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_tars_are_read(form, tmp_path):
    names = ["a/" + "y" * 150 + ".jpg", "a/üñí cøde.jpg", "a/" + "deep/" * 40 + "z.jpg"]
    source = file(tmp_path / "in.tar", make.tar_of({name: make.encode(i) for i, name in enumerate(names)}, form))
    listing = sources.read(sources.Request(source, unlabelled=True), print)
    assert [listing.name(row) for row in range(3)] == names
    assert make.run(source, tmp_path / "out", "--unlabelled") == 0
    assert len(make.samples(tmp_path / "out")) == 3


def test_duplicate_keys_name_both(tmp_path, capsys):
    source = make.tree(
        tmp_path / "in", {"a/1.jpg": make.encode(1), "b/1.jpg": make.encode(2), "b/2.jpg": make.encode(3)}
    )
    assert make.run(source, tmp_path / "out", "--key", "stem") == 2
    said = capsys.readouterr().err
    assert "a/1.jpg" in said
    assert "b/1.jpg" in said
    assert not (tmp_path / "out").exists()
    assert make.run(source, tmp_path / "out", "--key", "path") == 0
    assert set(make.samples(tmp_path / "out")) == {"a_1", "b_1", "b_2"}


def test_names_that_repeat_become_paths_but_in_a_release(tmp_path, capsys, monkeypatch):
    """As Caltech-101 has them. A release's names are unique: there it is one image that lies in two classes."""
    files = {f"n0000000{c}/{name}.jpg": make.encode(c) for c, names in ((1, "1"), (2, "12")) for name in names}
    source = make.tree(tmp_path / "in", files)
    assert make.run(source, tmp_path / "out") == 0
    assert set(make.samples(tmp_path / "out")) == {"n00000001_1", "n00000002_1", "n00000002_2"}
    assert "a sample's key is made of its path" in capsys.readouterr().out
    assert make.run(source, tmp_path / "out", "--key", "path") == 0  # the same set: nothing is made again
    assert make.run("--check", tmp_path / "out") == 0
    monkeypatch.setitem(labels.RELEASES, 2, ("two synsets", "two"))
    assert make.run(source, tmp_path / "other") == 2
    assert "1 duplicate key(s): '1'" in capsys.readouterr().err


def test_a_class_folder_with_a_latin1_name_is_kept_as_it_is(tmp_path):
    name = os.fsdecode("café".encode("latin-1"))
    files = {f"{name}/1.jpg": make.encode(1), "dog/2.jpg": make.encode(2)}
    for source in (make.tree(tmp_path / "in", files), file(tmp_path / "in.tar", make.tar_of(files))):
        out = tmp_path / f"out of {source.name}"
        assert make.run(source, out) == 0
        assert (out / "synsets.txt").read_bytes() == b"caf\xe9\ndog\n"
        assert make.run("--check", out) == 0
    again = ("--split", "val", "--classes", out / "synsets.txt")
    assert make.run(tmp_path / "in", tmp_path / "again", *again) == 0  # as a second split of the same classes is made


@pytest.mark.parametrize("name", ["two\nlines", "two\u2028lines", "two\rlines", "two\x85lines"])
def test_a_class_name_of_several_lines_is_refused(name, tmp_path, capsys):
    source = make.tree(tmp_path / "in", {f"{name}/1.jpg": make.encode(1), "dog/2.jpg": make.encode(2)})
    assert make.run(source, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert repr(name) in said
    assert len(said.splitlines()) == 1


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


# --- hostile and broken tars -----------------------------------------------------------------------------------------


def hostile_tar():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:

        def add(name, content=b"", **fields):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for field, value in fields.items():
                setattr(entry, field, value)
            tar.addfile(entry, io.BytesIO(content))

        add("cat/good.jpg", make.encode(1))
        add("../../cat/escaped.jpg", make.encode(2))
        add("/tmp/sharder-was-here.jpg", make.encode(3))
        add("cat/link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("cat/hard.jpg", type=tarfile.LNKTYPE, linkname="cat/good.jpg")
        add("cat/pipe.jpg", type=tarfile.FIFOTYPE)
        add("cat/disk.jpg", type=tarfile.BLKTYPE, devmajor=8)
        add("cat/tty.jpg", type=tarfile.CHRTYPE, devmajor=5)
        add("cat/evil.pkl", b"cos\nsystem\n(S'touch /tmp/sharder-was-here'\ntR.")
        add("dog/also good.jpg", make.encode(4))
    return out.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_hostile_entries_are_neither_followed_nor_created(packed, tmp_path):
    raw = hostile_tar()
    source = file(tmp_path / "in" / "x.tar", gzip.compress(raw) if packed else raw)
    before = set(tmp_path.rglob("*"))
    assert make.run(source, tmp_path / "out") == 0
    outside = {path for path in set(tmp_path.rglob("*")) - before if tmp_path / "out" not in (path, *path.parents)}
    assert not outside
    found = make.samples(tmp_path / "out")
    assert sorted(parts["jpg"] for parts in found.values()) == sorted([make.encode(1), make.encode(4)])
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["source"]: line["reason"] for line in lines}
    assert reasons["cat/link.jpg"] == "symbolic link in a tar"
    assert reasons["cat/pipe.jpg"] == "FIFO in a tar"
    assert "unsafe" in reasons["../../cat/escaped.jpg"]
    assert "unsafe" in reasons["/tmp/sharder-was-here.jpg"]
    assert len(reasons) == 7
    assert make.run("--check", tmp_path / "out") == 0


def test_what_is_something_else_is_refused(tmp_path):
    make.tree(tmp_path / "set" / "train", make.photographs(1))
    with pytest.raises(SourceError, match="holds train, but no val"):
        sources.read(sources.Request(tmp_path / "set", "val"), print)
    assert make.run(tmp_path / "set", tmp_path / "out") == 0
    with pytest.raises(SourceError, match="finished shards"):
        list_all(tmp_path / "out")


def test_a_tar_cut_anywhere_is_refused_before_work(photos, tmp_path):
    few = {name: content for name, content in photos.items() if name.endswith("_0.JPEG")}
    whole = make.tar_of(make.class_tars(few))
    end = len(whole.rstrip(b"\0"))
    for cut in [*range(0, end + 1024, 1536), end - 1, 511, 513]:
        path = file(tmp_path / "in.tar", whole[:cut])
        with pytest.raises(SourceError, match=r"cut short|no tar"):
            list_all(path)
    packed = gzip.compress(whole)
    for cut in (len(packed) // 2, len(packed) - 4):
        with pytest.raises(SourceError):
            list_all(file(tmp_path / "in.tar.gz", packed[:cut]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("members", [1, 2])
def test_what_follows_the_end_mark_is_noted(packed, members, photos, tmp_path, capsys):
    """Two tars in one file, and two gzip members in one file: a reader of tars sees the first alone."""
    names = list(photos)
    parts = [make.tar_of({name: photos[name]}) for name in (names[0], names[-1])[:members]]
    source = file(tmp_path / "x.tar", b"".join(gzip.compress(part) if packed else part for part in parts))
    assert make.run(source, tmp_path / "out") == 0
    assert len(make.samples(tmp_path / "out")) == 1
    said = capsys.readouterr().out
    assert ("follows the end mark" in said) == (members == 2)
    inner = file(tmp_path / "outer.tar", make.tar_of({"n01440764.tar": b"".join(parts)}))
    assert make.run(inner, tmp_path / "out of tars") == 0
    said = capsys.readouterr().out
    assert ("(n01440764.tar): what follows the end mark" in said) == (members == 2)


def list_all(path):
    sources.read(sources.Request(path), print)


def test_flipped_bits_never_lead_outside_or_hang(photos, tmp_path):
    """Whatever a damaged header says: a sentence, or members that lie within the file."""
    whole = bytearray(make.tar_of(make.class_tars(dict(list(photos.items())[:4])), tarfile.PAX_FORMAT))
    random = np.random.default_rng(0)
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    refused = [0, 0]
    for trial in range(400):
        broken, start = bytearray(whole), int(random.choice(headers))
        broken[start + int(random.integers(148 if trial % 2 else 512))] ^= 1 << int(random.integers(8))
        if trial % 2:  # a header that lies with its checksum right
            broken[start + 148 : start + 156] = b" " * 8
            broken[start + 148 : start + 156] = b"%06o\0 " % sum(broken[start : start + 512])
        path = file(tmp_path / "in.tar", bytes(broken))
        try:
            listing = sources.read(sources.Request(path, unlabelled=True), print)
        except SourceError:
            refused[trial % 2] += 1
            continue
        assert all(start + size <= len(whole) for start, size in listing.table[["offset", "size"]].tolist())
    assert refused[0] > 150, "a header has a checksum"
    assert 5 < refused[1] < 195


def test_sizes_beyond_octal_are_read_and_must_fit():
    header = bytearray(make.tar_of({"a": b""})[:512])
    header[124:136] = b"\x80" + (9 << 30).to_bytes(11, "big")
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)

    class Huge:
        path, size = "huge.tar", 10 << 30

        @staticmethod
        def read_at(offset, size):
            return bytes(header) if offset == 0 else bytes(size)

    (member,) = tar.Walk(Huge, strict=True)
    assert member.size == 9 << 30
    Huge.size = 1 << 30
    with pytest.raises(tar.TarError, match="cut short"):
        list(tar.Walk(Huge, strict=True))


# --- one sentence for what cannot be used ----------------------------------------------------------------------------


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
    file(tmp_path / "out", b"a file")
    assert make.run(source, tmp_path / "out") == 2
    assert "cannot write to" in capsys.readouterr().err
