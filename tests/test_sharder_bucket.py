"""Shards written to a bucket: the same bytes as a local run, even after processes are killed."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import sharder_sources as make
from servers import Bucket
from test_sharder_runs import KILLER

from pipeline import ShardSet

pytestmark = pytest.mark.usefixtures("credentials")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = make.photographs(6)
    files["n01440764/n01440764_broken.JPEG"] = files["n01440764/n01440764_1.JPEG"][:-200]
    return make.tree(tmp_path_factory.mktemp("bucket") / "tiny", files)


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("wanted")
    assert make.run(source, out, "--shards", 6) == 0
    return make.contents(out)


def contents(bucket: Bucket, prefix: str) -> dict[str, bytes]:
    listed = bucket.client.list_objects_v2(Bucket=bucket.name, Prefix=f"{prefix}/").get("Contents", [])
    return {
        found["Key"].removeprefix(f"{prefix}/"): bucket.client.get_object(Bucket=bucket.name, Key=found["Key"])[
            "Body"
        ].read()
        for found in listed
    }


def left_here() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"sharding-{os.getpid()}-*"))


def test_a_bucket_gets_the_bytes_of_a_folder(bucket: Bucket, source: Path, wanted: dict[str, bytes], capsys) -> None:
    address = "s3://bucket/whole"
    assert make.run(source, address, "--shards", 6) == 0
    assert contents(bucket, "whole") == wanted
    assert f"-> {address}" in capsys.readouterr().out
    assert len(ShardSet(address)) == 18
    assert make.run(source, address, "--shards", 6) == 0
    assert f"{address} is complete: 18 samples" in capsys.readouterr().out
    assert left_here() == []


def test_a_lost_shard_is_made_again(bucket: Bucket, source: Path, wanted: dict[str, bytes], capsys) -> None:
    assert make.run(source, "s3://bucket/lost", "--shards", 6) == 0
    lost = next(name for name in wanted if name.endswith("-0003.tar"))
    bucket.client.delete_object(Bucket=bucket.name, Key=f"lost/{lost}")
    assert make.run(source, "s3://bucket/lost", "--shards", 6) == 0
    assert "1 lost shards made again" in capsys.readouterr().out
    assert contents(bucket, "lost") == wanted
    for name in ("synsets.txt", next(name for name in wanted if name.endswith("-train.samples.npy"))):
        bucket.client.delete_object(Bucket=bucket.name, Key=f"lost/{name}")
        assert make.run(source, "s3://bucket/lost", "--shards", 6) == 0
        assert contents(bucket, "lost") == wanted


def test_another_set_is_refused(bucket: Bucket, source: Path, wanted: dict[str, bytes], capsys) -> None:
    assert make.run(source, "s3://bucket/other", "--shards", 6, "--part", "0/2") == 0
    before = contents(bucket, "other")
    assert make.run(source, "s3://bucket/other", "--shards", 6, "--seed", 1) == 2
    said = capsys.readouterr().err
    assert "s3://bucket/other" in said and "seed = 0 there, 1 here" in said and "/sharding-" not in said
    assert contents(bucket, "other") == before


@pytest.mark.parametrize(
    ("out", "says"),
    [("http://127.0.0.1:1/x", "a web server takes no shards"), ("s3://nobody/x", "s3://nobody/x is missing")],
)
def test_what_an_address_lacks_is_one_sentence(source: Path, out: str, says: str, capsys) -> None:
    assert make.run(source, out, "--shards", 6) == 2
    assert says in capsys.readouterr().err
    assert left_here() == []


def test_a_part_that_is_done_helps_a_part_that_died(
    bucket: Bucket, source: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """Two machines, from bucket to bucket: one is killed in the middle of a shard, the other completes the set."""
    address = "s3://bucket/parts"
    for name, content in make.contents(source).items():
        bucket.client.put_object(Bucket=bucket.name, Key=f"source/tiny/{name}", Body=content)
    killer = tmp_path / "killer"
    killer.mkdir()
    counter = str(killer / "counter")
    (killer / "sitecustomize.py").write_text(KILLER.format(counter=counter, place=9, end="os.killpg"))
    path = f"{killer}:{os.environ.get('PYTHONPATH', '')}"
    words = ("s3://bucket/source/tiny", address, "--shards", 6, "--workers", 2)
    first = make.command(*words, env={"PYTHONPATH": path, "RANK": "0", "WORLD_SIZE": "2"})
    said = first.communicate()
    assert first.returncode == -signal.SIGKILL, said
    begun = contents(bucket, "parts")
    assert "manifest.json" not in begun and any(".work/" in name for name in begun)
    second = make.command(*words, env={"RANK": "1", "WORLD_SIZE": "2"})
    said = second.communicate()
    assert second.returncode == 0, said
    assert contents(bucket, "parts") == wanted
    assert "helping with" in said[0]
    check = make.command("--check", address, "--workers", 2)
    assert f"{address}: no difference" in check.communicate()[0]


@pytest.mark.slow
def test_two_machines_at_a_time(bucket: Bucket, source: Path, wanted: dict[str, bytes]) -> None:
    words = (source, "s3://bucket/two", "--shards", 6)
    both = [make.command(*words, env={"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)]
    for each in both:
        said = each.communicate()
        assert each.returncode == 0, said
    end = time.monotonic() + 1
    while contents(bucket, "two") != wanted and time.monotonic() < end:
        time.sleep(0.05)
    assert contents(bucket, "two") == wanted
