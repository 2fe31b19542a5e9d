"""A source at an address gives the same bytes as on a disk; a finished set at an address is checked to the byte."""

import concurrent.futures
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sharder_sources as make
from servers import SECRET, Bucket, web

from pipeline import remote

pytestmark = pytest.mark.usefixtures("credentials")
IMAGES = make.photographs(2)
BROKEN = {**IMAGES, "n01440764/n01440764_broken.JPEG": IMAGES["n01440764/n01440764_1.JPEG"][:-200]}
VAL = {f"ILSVRC2012_val_0000000{k}.JPEG": make.encode(k) for k in (1, 2, 3)}
SOLUTION = "ImageId,PredictionString\n" + "".join(
    f"{name.removesuffix('.JPEG')},{make.WNIDS[k]} 1 2 3 4\n" for k, name in enumerate(VAL)
)
KAGGLE = {f"ILSVRC/Data/CLS-LOC/val/{name}": content for name, content in VAL.items()} | {
    "LOC_val_solution.csv": SOLUTION.encode(),
    "LOC_synset_mapping.txt": "".join(f"{wnid} a thing, another\n" for wnid in make.WNIDS).encode(),
}
SOURCES: dict[str, tuple[dict[str, bytes], str, tuple[str, ...]]] = {  # files, SOURCE among them, options
    "class folders": (BROKEN, "", ()),
    "class folders, the split below": ({f"train/{name}": data for name, data in BROKEN.items()}, "", ()),
    "odd names": ({f"a class/b {k}%20+ü.jpg": make.encode(k) for k in range(3)}, "", ()),
    "class tars": (make.class_tars(BROKEN), "", ()),
    "a tar of class tars": ({"ILSVRC2012_img_train.tar": make.tar_of(make.class_tars(BROKEN))}, "", ()),
    "a gzipped tar": ({"set.tar.gz": make.tar_of(make.class_tars(BROKEN), mode="w:gz")}, "/set.tar.gz", ()),
    "a val tar and its labels": (
        {"ILSVRC2012_img_val.tar": make.tar_of(VAL), "LOC_val_solution.csv": SOLUTION.encode()},
        "/ILSVRC2012_img_val.tar",
        ("--split", "val"),
    ),
    "Kaggle's layout": (KAGGLE, "", ("--split", "val")),
    "images without labels": ({**VAL, "below/x.jpg": make.encode(9), "notes.txt": b"no image"}, "", ("--unlabelled",)),
}


def put(bucket: Bucket, prefix: str, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        bucket.client.put_object(Bucket=bucket.name, Key=f"{prefix}/{name}", Body=content)
    return f"s3://{bucket.name}/{prefix}"


@pytest.mark.parametrize("form", SOURCES)
def test_a_bucket_is_a_source_like_a_disk(form: str, bucket: Bucket, tmp_path: Path) -> None:
    files, below, options = SOURCES[form]
    here = make.tree(tmp_path / "set", files)
    there = put(bucket, f"{form.replace(' ', '-')}/set", files)
    options = (*options, "--shards", "2")
    assert make.run(f"{here}{below}", tmp_path / "local", *options) == 0
    assert make.run(f"{there}{below}", tmp_path / "remote", *options) == 0
    local, found = make.contents(tmp_path / "local"), make.contents(tmp_path / "remote")
    named = "quarantine.jsonl"  # it says where an image lies: of one in a tar, the tar
    assert found.pop(named).replace(there.encode(), str(here).encode()) == local.pop(named)
    assert found == local
    assert {name for name in found if name.endswith(".tar")}


def test_parts_larger_than_a_request(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and contents across the borders of parts, and tars whose members are longer than a part."""
    files = make.class_tars(IMAGES)
    here = make.tree(tmp_path / "set", {"set.tar": make.tar_of(files)})
    there = put(bucket, "borders", {"set.tar": make.tar_of(files)})
    assert make.run(here / "set.tar", tmp_path / "local", "--shards", "2") == 0
    for part in (700, 9000):
        monkeypatch.setattr(remote, "PART", part)
        out = tmp_path / f"remote-{part}"
        assert make.run(f"{there}/set.tar", out, "--shards", "2") == 0
        assert make.contents(out) == make.contents(tmp_path / "local")


def test_a_web_server_gives_tars(tmp_path: Path) -> None:
    here = make.tree(tmp_path / "web", {"set.tar": make.tar_of(make.class_tars(IMAGES))})
    assert make.run(here / "set.tar", tmp_path / "local", "--shards", "2") == 0
    with web(here) as site:
        assert make.run(f"{site.url}/set.tar", tmp_path / "remote", "--shards", "2") == 0
    assert make.contents(tmp_path / "remote") == make.contents(tmp_path / "local")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("s3://bucket/nothing", "s3://bucket/nothing does not exist: SOURCE is a folder or a tar"),
        ("s3://nobody/set", "s3://nobody"),
        ("http://127.0.0.1:1/set?key=" + SECRET, "is not read, since logs would show it"),
        ("s3://bucket/cut/set.tar", "s3://bucket/cut/set.tar: cut short"),
        ("s3://bucket/finished", "holds finished shards"),
    ],
)
def test_what_a_source_lacks_is_one_sentence(
    bucket: Bucket, source: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(bucket, "cut", {"set.tar": make.tar_of(IMAGES)[:-10240]})
    put(bucket, "finished", {"manifest.json": b"{}", "x.tar": b""})
    assert make.run(source, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and SECRET not in said


def test_a_folder_on_a_web_server_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with web(make.tree(tmp_path / "web", {"set/a/x.jpg": make.encode(1)})) as site:
        assert make.run(f"{site.url}/set", tmp_path / "out") == 2
    assert "a web server does not say what a folder holds: copy it to a disk or a bucket" in capsys.readouterr().err


def test_out_inside_the_source_is_refused(bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    there = put(bucket, "inside", IMAGES)
    assert make.run(there, f"{there}/shards") == 2
    assert f"{there}/shards lies inside {there}: choose an OUT beside it" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["gone", "longer"])
def test_an_image_that_changes_meanwhile_stops_the_run(
    bucket: Bucket, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there, victim = put(bucket, change, IMAGES), "n01443537/n01443537_1.JPEG"
    program = sys.modules["sharding.plan"]
    build: Callable = program.build

    def between(*arguments: object) -> object:
        if change == "gone":
            bucket.client.delete_object(Bucket=bucket.name, Key=f"{change}/{victim}")
        else:
            put(bucket, change, {victim: IMAGES[victim] + b"x"})
        return build(*arguments)

    monkeypatch.setattr(program, "build", between)
    assert make.run(there, tmp_path / "out", "--shards", "2") == 1
    said = capsys.readouterr().err
    assert f"{there}/{victim} {'is missing' if change == 'gone' else 'has changed'}" in said
    assert "run the same command again to resume" in said
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("where", ["bucket", "web"])
def test_check_sees_damage_at_an_address(
    where: str, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.check.ProcessPoolExecutor", concurrent.futures.ThreadPoolExecutor)
    monkeypatch.setattr("sharding.check.get_context", lambda _: "")  # a thread pool takes a name prefix there
    out = tmp_path / "out"
    for split in ("train", "val"):
        assert make.run(make.tree(tmp_path / "tiny", IMAGES), out, "--shards", "2", "--split", split) == 0
    with web(tmp_path) as site:
        address = bucket.upload(out, f"checked-{where}") if where == "bucket" else f"{site.url}/out"
        assert make.run("--check", address) == 0
        tar = out / "tiny-val-0001.tar"
        tar.chmod(0o644)
        tar.write_bytes(tar.read_bytes()[:700] + b"x" + tar.read_bytes()[701:])
        (out / "tiny-train-0001.idx").unlink()
        (out / "val.quarantine.jsonl").write_text("junk\n")
        (out / "other.tar").write_bytes(b"")
        if where == "bucket":
            bucket.upload(out, "checked-bucket")
            bucket.client.delete_object(Bucket=bucket.name, Key="checked-bucket/tiny-train-0001.idx")
        capsys.readouterr()
        assert make.run("--check", address) == 1
    said = capsys.readouterr().out.splitlines()
    wanted = ["tiny-train-0001.idx: missing", "tiny-val-0001.tar: sha256 differs from the manifest's"]
    wanted += ["val.quarantine.jsonl: missing, or not what was written"]
    wanted += ["other.tar: in no manifest"] if where == "bucket" else []
    assert set(wanted) <= set(said)
    assert said[-1] == f"{address}: {len(said) - 1} difference(s)"


def test_check_names_an_address_without_a_set(bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    put(bucket, "half", {".tiny-train.work/spec.json": b"{}"})
    for address, says in {
        "s3://bucket/half": "holds no manifest.json: the run that writes it is unfinished",
        "s3://bucket/empty": "holds no manifest.json: this tool has not finished a set there",
        "s3://nobody/x": "s3://nobody/x is missing: check the address",
    }.items():
        assert make.run("--check", address) == 2
        assert says in capsys.readouterr().err
