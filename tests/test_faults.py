"""Bad samples and bad shards: the run continues; each bad sample is replaced by rule, counted, and logged once."""

import io
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from mapimages import encode, sample, smooth_image, still_recipe, write_set, write_tar
from PIL import Image

from pipeline import Batch, Loader, ReadError, ShardError, ShardSet, draws, headers, order, samples
from pipeline.graph import Graph

N = 40
RECIPE = still_recipe(size=32, queries=2)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def photo(number: int = 0) -> bytes:
    return encode(smooth_image(number, 120, 150), "JPEG")


def damaged_codes() -> bytes:
    """A JPEG that looks whole, with a bit flipped in its Huffman table: no quick check sees it, the decoder does."""
    data = bytearray(photo())
    data[data.index(b"\xff\xc4") + 10] ^= 0x10
    return bytes(data)


BAD = {
    1: photo()[: len(photo()) // 2],
    4: b"",
    6: b"not an image, but text under an image's name\n" * 20,
    9: photo()[:300],
    13: damaged_codes(),
    14: damaged_codes(),
    22: encode(smooth_image(0, 90, 90), "PNG")[:2000],
    30: encode(Image.new("P", (90, 90)), "GIF"),
    39: photo()[:2],
}
REASONS = {
    1: "decoded",
    4: "no bytes",
    6: "no JPEG",
    9: "decoded",
    13: "decoded",
    22: "decoded",
    30: "no JPEG",
    39: "no JPEG",
}
ODD_BUT_SOUND = {
    2: encode(Image.fromarray(smooth_image(0, 70, 90)), "JPEG", progressive=True),
    3: encode(Image.fromarray(smooth_image(0, 70, 90)).convert("CMYK"), "JPEG"),
    5: encode(Image.fromarray(smooth_image(0, 70, 90)).convert("L"), "JPEG"),
    7: encode(Image.fromarray(smooth_image(0, 70, 90)), "JPEG", subsampling="4:1:1"),
    8: photo(),  # a JPEG under a PNG's name
    10: photo() + b"trailing bytes" * 100,
    11: encode(Image.fromarray(smooth_image(0, 70, 90)).convert("RGBA"), "WEBP"),
}


@pytest.fixture
def faulty(tmp_path: Path) -> ShardSet:
    return ShardSet(write_set(tmp_path / "set", N, 4, changed={**BAD, **ODD_BUT_SOUND}))


def loader(shards: ShardSet, batch_size: int = 4, **options: object) -> Loader:
    return Loader(shards, RECIPE, batch_size, **{"seed": 2, "num_threads": 1, **options})  # type: ignore[arg-type]


def indices(batches: Iterable[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.index.tolist()]


def replaced(wanted: int, epoch: int) -> int:
    """Who stands in for a sample, by the rule."""
    taken, attempt = wanted, 0
    while taken in BAD:
        attempt += 1
        taken = order.replacement(2, epoch, wanted, attempt, N)
    return taken


@pytest.mark.parametrize("form", ["fused", "operators"])
def test_the_run_goes_on_by_rule(faulty: ShardSet, caplog: pytest.LogCaptureFixture, form: str) -> None:
    source = loader(faulty, form=form)
    for epoch in range(3):
        batches = list(source)
        wanted = [replaced(int(i), epoch) for i in order.positions(2, epoch, 0, N, N)]
        assert indices(batches) == wanted
        for batch in batches:
            sizes = np.stack([faulty.table["height"], faulty.table["width"]], -1)[batch.index]
            windows = draws.draw(draws.distributions(RECIPE), 2, epoch, batch.index.numpy(), sizes)[0]
            assert np.array_equal(np.concatenate([v.window.numpy() for v in batch.views.values()], axis=1), windows)
            assert batch.label.tolist() == [i % 7 for i in batch.index.tolist()]
            for b, i in enumerate(batch.index.tolist()):
                if i not in ODD_BUT_SOUND:
                    assert (batch.views["focal"].pixels[b, ..., 2] == i).all()
    assert set(source.bad) == set(BAD)
    for i, reason in REASONS.items():
        assert reason in source.bad[i]
    named = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "bad sample" in r.getMessage()]
    assert len(named) == len(BAD)
    for i in BAD:
        (line,) = [line for line in named if faulty.key(i) in line]
        assert faulty.shard_of(i).name in line
        assert source.bad[i] in line
        assert "0x" not in line


def test_ranks_batches_and_resumed_runs_replace_alike(faulty: ShardSet) -> None:
    wanted = indices(loader(faulty, 8))
    ranks = [list(loader(faulty, 2, rank=r, world_size=4)) for r in range(4)]
    assert [i for k in range(5) for batches in ranks for i in batches[k].index.tolist()] == wanted
    for step in range(10):
        source = loader(faulty)
        for _ in range(step):
            next(iter(source))
        resumed = loader(faulty)
        resumed.load_state_dict(source.state_dict())
        assert indices(resumed) == wanted[4 * step :]


def test_a_fault_costs_nothing_later(faulty: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the epoch that meets them, bad samples are neither read nor decoded, and no batch is made twice."""
    tried, fed, read, full = [], [], [], []
    single, submit, reader, decode = Graph.decode_one, Graph.submit, ShardSet.read, samples.why_undecodable
    monkeypatch.setattr(Graph, "decode_one", lambda g, image: tried.append(1) or single(g, image))
    monkeypatch.setattr(
        Graph, "submit", lambda g, images, *rest: fed.append([len(i) for i in images]) or submit(g, images, *rest)
    )
    monkeypatch.setattr(ShardSet, "read", lambda s, i: read.append(i) or reader(s, i))
    monkeypatch.setattr(samples, "why_undecodable", lambda image: full.append(1) or decode(image))
    source = loader(faulty)
    list(source)
    assert tried
    assert min(min(sizes) for sizes in fed) > 0  # never a zero-length image to the decoder
    list(source)
    source.close()
    for spied in (tried, fed, read, full):
        spied.clear()
    list(source)
    steps = len(fed)
    assert 10 <= steps <= 12  # an epoch's, and what was started ahead
    assert not tried
    assert not full  # the one with trailing bytes was vouched for
    assert not set(read) & set(BAD)


def test_too_many_bad_samples_stop_the_run(faulty: ShardSet) -> None:
    source = loader(faulty, max_bad=0.1)  # four of forty
    with pytest.raises(ShardError, match="max_bad allows 4") as caught:
        for _ in range(3):
            list(source)
    for i in source.bad:
        assert faulty.key(i) in str(caught.value)
    with pytest.raises(ShardError):  # and again, rather than hanging
        next(iter(source))
    list(loader(faulty, max_bad=0.9))
    with pytest.raises(ShardError, match="max_bad allows 0"):
        list(loader(faulty, max_bad=0.0))


def test_what_other_processes_found_counts_too(faulty: ShardSet) -> None:
    source = loader(faulty, max_bad=0.1)
    source.add_bad({4: "no bytes", 6: "text", 9: "torn"})
    source.add_bad({4: "said again", 30: "a GIF"})
    assert source.bad == {4: "no bytes", 6: "text", 9: "torn", 30: "a GIF"}
    with pytest.raises(ShardError, match="5 of 40 samples are bad, but max_bad allows 4"):
        source.add_bad({39: "torn"})


def test_a_set_of_nothing_but_bad_samples_stops(tmp_path: Path) -> None:
    members = [m for k in range(12) for m in sample(f"k{k}", b"<html>no</html>", k)]
    with pytest.raises(ShardError, match="12 of 12 samples are bad"):
        list(loader(ShardSet(write_tar(tmp_path / "x.tar", members))))


def test_a_member_too_large_for_an_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {3: photo() + bytes(50_000)}
    shards = ShardSet(write_set(tmp_path / "set", 12, 2, changed=content))
    read: list[int] = []
    reader = ShardSet.read
    monkeypatch.setattr(ShardSet, "read", lambda s, i: read.append(i) or reader(s, i))
    monkeypatch.setattr(headers, "MAX_BYTES", 50_000)
    source = loader(shards)
    assert 3 not in indices(source)
    assert source.bad == {3: "too large: more than 50000 bytes"}
    assert 3 not in read


def test_a_shard_cut_off_while_running(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = ShardSet(write_set(tmp_path / "set", N, 4))
    source = loader(shards)
    list(source)
    os.truncate(shards.paths[2], int(shards.table["offset"][23]) + 5)
    seen = indices(source) + indices(source)
    lost = set(range(23, 30))
    assert lost >= set(source.bad) >= lost - {23}
    assert len(seen) == 2 * N
    assert not lost & set(seen[N:])
    assert "map-0002.tar" in caplog.text


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts to read, which are not waited for."""
    made: list[float] = []
    monkeypatch.setattr("time.sleep", made.append)
    return made


def test_a_shard_removed_while_running_stops_the_run_and_loses_nothing(tmp_path: Path, pauses: list[float]) -> None:
    """Its samples are not bad: which ones replace them would depend on when the file system fails."""
    shards = ShardSet(write_set(tmp_path / "set", N, 4))
    wanted = indices(loader(shards))
    shards = ShardSet(tmp_path / "set")  # no file is open
    away = shards.paths[1].rename(tmp_path / "away")
    source, seen = loader(shards), []
    with pytest.raises(ReadError, match=r"map-0001.tar cannot be read \(No such file.*run it again"):
        for batch in source:
            seen += indices([batch])
    assert set(pauses) == set(samples._PAUSES)
    assert 10 < sum(samples._PAUSES) < 60  # seconds: a file system's bad moment
    assert not source.bad
    state = source.state_dict()
    with pytest.raises(ReadError):
        next(iter(source))
    assert source.state_dict() == state
    away.rename(shards.paths[1])
    assert seen + indices(source) == wanted  # by the same loader, as by a new one:
    resumed = loader(ShardSet(tmp_path / "set"))
    resumed.load_state_dict(state)
    assert seen + indices(resumed) == wanted


def test_open_shards_stay_readable(tmp_path: Path) -> None:
    shards = ShardSet(write_set(tmp_path / "set", N, 4))
    source = loader(shards)
    list(source)
    for path in shards.paths:
        path.unlink()
    list(source)
    assert not source.bad


def test_a_shard_overwritten_while_running(tmp_path: Path) -> None:
    """Other images at the old places: no batch shows pixels that its index and windows don't describe."""
    shards = ShardSet(write_set(tmp_path / "set", N, 4))
    source = loader(shards)
    list(source)
    size = shards.paths[0].stat().st_size
    with shards.paths[0].open("r+b") as file:
        file.write(b"\0" * size)
    list(source)
    assert indices(source)
    assert set(source.bad) == set(range(10))


def test_a_bit_flipped_shard_loses_what_it_must(tmp_path: Path) -> None:
    """One flipped bit in each of many places, the set scanned again: the loader always gets through."""
    folder = write_set(tmp_path / "set", 8, 1, make=smooth_image, form="JPEG")
    content = (folder / "map-0000.tar").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(12):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (folder / "map-0000.tar").write_bytes(damaged)
        shards = ShardSet(folder)
        assert 7 <= len(shards) <= 8
        source = loader(shards, 1)
        assert len(indices(source)) == len(shards)
        assert len(source.bad) <= 1


def test_a_disk_that_fails_once_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    shards = ShardSet(write_set(tmp_path / "set", 12, 2))
    read, failed = ShardSet.read, set()

    def flaky(self: ShardSet, i: int) -> bytes:
        if i == broken or i not in failed:
            failed.add(i)
            raise OSError(5, "Input/output error")
        return read(self, i)

    monkeypatch.setattr(ShardSet, "read", flaky)
    broken = -1
    source = loader(shards)
    assert len(indices(source)) == len(pauses) == 12
    assert not source.bad
    broken = 5
    with pytest.raises(ReadError, match=r"map-0000.tar cannot be read \(Input/output error"):
        indices(loader(shards))


def test_a_stale_handle_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    """As after a file server's restart: the open file fails for ever, the name leads to a good one."""
    shards = ShardSet(write_set(tmp_path / "set", 12, 1))
    source = loader(shards)
    next(iter(source))
    source.close()
    pread = os.pread
    (stale,) = shards._files._open.values()

    def failing(fd: int, size: int, offset: int) -> bytes:
        if shards._files._open.get(0) in (None, stale):
            raise OSError(116, "Stale file handle")
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert len(indices(source)) == 8
    assert not source.bad


def test_a_fault_of_ours_is_not_blamed_on_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = loader(ShardSet(write_set(tmp_path / "set", 12, 2)), form="operators")
    submit = Graph.submit
    monkeypatch.setattr(Graph, "submit", lambda g, images, w, *rest: submit(g, images, w + 1000, *rest))
    with pytest.raises(RuntimeError, match=r"each of its images can be decoded.* out of bounds"):
        next(iter(source))
    assert not source.bad


def test_a_sample_without_an_image_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [m for k in range(8) for m in sample(f"k{k}", photo(k), k) if not (k == 3 and m[0].endswith("jpg"))]
    shards = ShardSet(write_tar(tmp_path / "x.tar", members))
    assert len(shards) == 7
    assert sorted(indices(loader(shards, 1))) == list(range(7))
    assert "'k3'" in caplog.text


def test_pillow_never_opens_what_is_none_of_ours() -> None:
    """Exotic formats have exotic readers: a doubtful file is decoded as JPEG, PNG or WebP, or not at all."""
    tiff = io.BytesIO()
    Image.new("RGB", (8, 8)).save(tiff, "TIFF")
    assert samples.why_undecodable(np.frombuffer(tiff.getvalue(), np.uint8)) is not None
    assert samples.why_undecodable(np.frombuffer(photo(), np.uint8)) is None
