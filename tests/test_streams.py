"""Shards that can only be read from their start, and webdataset's own pipeline on our shards."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset
from mapimages import SIZES, encode, map_image, sample, still_recipe, write_set, write_tar
from servers import web

from pipeline import Loader, ReadError, ShardError, ShardSet, Stream, streams
from pipeline.batch import Batch

COUNT = 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set", COUNT, 3)


@pytest.fixture(autouse=True)
def as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    before = webdataset.utils.enforce_security
    yield
    webdataset.utils.enforce_security = before


def pipes(shards: Path) -> str:
    return f"pipe:cat {shards}/map-{{0000..0002}}.tar"


def loader(stream: Stream, batch_size: int = 5, **options: object) -> Loader:
    return Loader(stream, still_recipe(), batch_size, num_threads=1, **options)  # type: ignore[arg-type]


def epoch(source: Loader) -> list[Batch]:
    return list(source)


def indices(batches: list[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.index.tolist()]


def test_a_stream_gives_the_pixels_of_its_shards(shards: Path) -> None:
    """Stored order, so that sample i of the stream is sample i of the set, whose windows and pixels are known."""
    here = Loader(ShardSet(shards), still_recipe(), 5, num_threads=1, shuffle=False, drop_last=False)
    there = loader(Stream(pipes(shards)), shuffle=False, drop_last=False)
    for _ in range(2):
        for expected, found in zip(epoch(here), epoch(there), strict=True):
            assert found.index.tolist() == expected.index.tolist() and found.label.tolist() == expected.label.tolist()
            for kind, view in expected.views.items():
                assert np.array_equal(found.views[kind].window, view.window)
                assert np.array_equal(found.views[kind].pixels, view.pixels)
    assert there.epoch == 2


def test_an_epoch_has_each_sample_once_and_the_next_another_order(shards: Path) -> None:
    source = loader(Stream(pipes(shards), buffer=8), 4)
    orders = [indices(epoch(source)) for _ in range(3)]
    assert all(sorted(order) == list(range(COUNT)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [indices(epoch(loader(Stream(pipes(shards), buffer=8), 4)))] == orders[:1]
    assert [indices(epoch(loader(Stream(pipes(shards), buffer=8), 4, seed=1)))] != orders[:1]


def test_ranks_take_disjoint_parts_and_the_rest_is_dropped(shards: Path) -> None:
    parts = [epoch(loader(Stream(pipes(shards), buffer=8), 5, rank=r, world_size=2)) for r in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    both = indices(parts[0]) + indices(parts[1])
    assert len(set(both)) == len(both) == 20
    alone = epoch(loader(Stream(pipes(shards), buffer=8), 10))
    for k, batch in enumerate(alone):
        assert indices([parts[0][k]]) + indices([parts[1][k]]) == batch.index.tolist()
    rest = epoch(loader(Stream(pipes(shards), buffer=8), 5, rank=1, world_size=2, drop_last=False))
    assert [len(batch.index) for batch in rest] == [5, 5, 2]


def test_it_has_no_length_and_goes_on_at_an_epoch_only(shards: Path) -> None:
    source = loader(Stream(pipes(shards)), 4)
    with pytest.raises(TypeError, match="a stream has no length"):
        len(source)
    with pytest.raises(TypeError, match="order of a stream is unknown"):
        source.shuffle_quality()
    next(iter(source))
    state = source.state_dict()
    with pytest.raises(ValueError, match="4 samples into an epoch: a stream resumes only at the start of an epoch"):
        loader(Stream(pipes(shards)), 4).load_state_dict(state)
    rest = indices(epoch(source))
    assert len(rest) == 20
    again = loader(Stream(pipes(shards)), 4)
    again.load_state_dict(source.state_dict())
    assert again.epoch == 1
    assert indices(epoch(again)) == indices(epoch(source))


def test_a_server_without_sizes_or_ranges(shards: Path) -> None:
    with web(shards) as site:
        site.ranges, site.chunked = False, True
        source = loader(Stream(f"{site.url}/map-{{0000..0002}}.tar"), 4)
        assert sorted(indices(epoch(source))) == list(range(COUNT))
        with pytest.raises(ReadError, match=r"none.tar could not be read: the server answers 404"):
            epoch(loader(Stream(f"{site.url}/none.tar")))


def test_a_stream_that_breaks_off_is_waited_for(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A command's tar is a tenth longer with each try, so it is cut in headers, contents and between members; then one
    whose trouble outlasts patience.
    """
    pauses: list[float] = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=lambda: 1 + 2 * len(pauses))
    monkeypatch.setattr(streams, "time", clock)
    whole = shards / "map-0001.tar"
    cuts = 512 * np.linspace(1, whole.stat().st_size // 512 - 20, 15).astype(int) - [0, 300, 0] * 5
    (tmp_path / "cuts").write_text("".join(f"{size}\n" for size in [*cuts, whole.stat().st_size]))
    take = f"head -c $(head -n 1 {tmp_path}/cuts) {whole}; sed -i '1{{$!d}}' {tmp_path}/cuts\n"
    (tmp_path / "take").write_text(take)  # the last one again and again: the next epoch is begun ahead
    spec = [f"pipe:cat {shards}/map-0000.tar", f"pipe:sh {tmp_path}/take", f"pipe:cat {shards}/map-0002.tar"]
    source = loader(Stream(spec, patience=1), shuffle=False, drop_last=False)
    here = Loader(ShardSet(shards), still_recipe(), 5, num_threads=1, shuffle=False, drop_last=False)
    for expected, found in zip(epoch(here), epoch(source), strict=True):
        assert found.index.tolist() == expected.index.tolist()
        assert np.array_equal(found.views["reference"].pixels, expected.views["reference"].pixels)
    assert len(pauses) == 15 and "trying again for up to 1 minutes" in caplog.text
    clock.monotonic = lambda: 1 + 25 * len(pauses)
    pauses.clear()
    with pytest.raises(ReadError, match="ended with exit code 7"):
        epoch(loader(Stream("pipe:exit 7", patience=1)))
    assert pauses == [10.0] * 3
    with pytest.raises(ShardError, match="patience -1 must not be negative"):
        Stream("-", patience=-1)


def test_standard_input_is_read_once(shards: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests'); from mapimages import still_recipe\n"
        "from pipeline import Loader, Stream, ReadError\n"
        "source = Loader(Stream('-'), still_recipe(), 4, num_threads=1)\n"
        "print(sum(len(batch.index) for batch in source))\n"
        "try: next(iter(source))\n"
        "except ReadError as error: print(error)\n"
    )
    data = (shards / "map-0000.tar").read_bytes()
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, cwd=root, check=False)
    assert done.stdout.decode() == "8\nstandard input has ended: give the shards as files to read them once more\n", (
        done
    )
    with pytest.raises(ValueError, match="standard input feeds one process only"):
        loader(Stream("-"), rank=0, world_size=2)


def test_bad_samples_are_left_out_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [encode(map_image(k, *SIZES[0])) for k in range(10)]
    images[2] = b"no image"
    images[5] = images[5][:40]
    middle = len(images[7]) // 2
    images[7] = images[7][:middle] + bytes(50) + images[7][middle + 50 :]  # only a decoder sees it
    members = [m for k, image in enumerate(images) for m in sample(f"k{k}", image, k, "png")]
    path = write_tar(tmp_path / "x.tar", [*members, ("z.txt", b"no image at all")])
    source = loader(Stream(str(path)), 4, shuffle=False, drop_last=False)
    for _ in range(2):
        batches = epoch(source)
        assert len(indices(batches)) == 8
        assert set(indices(batches)) == {0, 1, 3, 4, 6, 8, 9}
    assert sorted(source.bad) == [2, 5, 7]
    assert all(sum(f"k{k}:" in line or f"number {k}" in line for line in caplog.messages) == 1 for k in (2, 5, 7))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("pipe:exit 3", "'pipe:exit 3' ended with exit code 3"),
        ("pipe:head -c 3000 {0}; exit 1", "ended with exit code 1"),
        ("pipe:head -c 3000 {0}", "is no tar, or one that is damaged or breaks off"),
        ("pipe:cat {0}; exit 7", "ended with exit code 7"),
        ("pipe:echo nothing", "is no tar, or one that"),
        ("pipe:true", "is no tar, or one that"),
        ("/nowhere/x.tar", "/nowhere/x.tar could not be read: No such file"),
        ("s3://bucket/x.tar", "is no stream: a ShardSet reads it"),
    ],
)
def test_what_a_stream_lacks_is_one_sentence(shards: Path, spec: str, says: str) -> None:
    with pytest.raises((ReadError, ShardError), match=says) as caught:
        epoch(loader(Stream(spec.format(shards / "map-0000.tar")), 4, shuffle=False, drop_last=False))
    assert "\n" not in str(caught.value)


def test_too_few_and_too_many_bad_samples_are_said(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="24 samples, which do not fill a batch of 25"):
        epoch(loader(Stream(pipes(shards)), 25))
    path = write_tar(tmp_path / "bad.tar", [(f"k{k}.jpg", b"no") for k in range(50)])
    with pytest.raises(ShardError, match="33 samples of the stream are bad, the last is k32: no JPEG"):
        epoch(loader(Stream(str(path)), 4))


def test_a_broken_off_loop_goes_on_and_leaves_no_command_behind(shards: Path) -> None:
    source = loader(Stream(pipes(shards)), 4)
    first = [next(iter(source)), next(iter(source))]
    assert sorted(indices(first) + indices(epoch(source))) == list(range(COUNT))
    source.close()
    assert len(indices(epoch(source))) == COUNT


def test_shards_as_a_webdataset_pipeline(shards: Path) -> None:
    found = ShardSet(shards)
    samples = list(found.webdataset())
    assert [s["__key__"] for s in samples] == [found.key(i) for i in range(COUNT)]
    assert [s["png"] for s in samples] == [found.read(i) for i in range(COUNT)]
    pictures = list(found.webdataset(shardshuffle=3, seed=1).decode("rgb8").to_tuple("png", "cls"))
    assert sorted(label for _, label in pictures) == sorted(k % 7 for k in range(COUNT))
    assert np.array_equal(pictures[0][0][..., 2], np.full_like(pictures[0][0][..., 2], pictures[0][0][0, 0, 2]))
    with pytest.raises(ShardError, match="leave cache_dir"):
        found.webdataset(cache_dir=str(shards))


def test_webdataset_is_in_its_secure_mode(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(
        tmp_path / "evil.tar", [*sample("k", encode(map_image(1, 20, 30)), 1, "png"), ("k.pyd", b"cos\nsystem\n.")]
    )
    with pytest.raises(webdataset.autodecode.DecodingError):  # where it would have run a command
        list(ShardSet(path).webdataset().decode())
    with pytest.raises(ValueError, match="cannot open pipe URLs"):
        sys.modules["webdataset.gopen"].gopen("pipe:true")
    webdataset.utils.enforce_security = False
    monkeypatch.setenv("WDS_SECURE", "0")
    list(ShardSet(shards).webdataset())
    assert not webdataset.utils.enforce_security


def test_a_remote_set_as_a_webdataset_pipeline(shards: Path) -> None:
    with web(shards) as site:
        found = ShardSet(f"{site.url}/map-{{0000..0002}}.tar", cache_size=0)
        assert [s["png"] for s in found.webdataset()] == [found.read(i) for i in range(COUNT)]
        with found.open(1) as file:
            assert file.read() == (shards / "map-0001.tar").read_bytes()
