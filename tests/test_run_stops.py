"""A run that stops or is stopped resumes exactly; a run that cannot resume leaves its folder unchanged."""

import itertools
import json
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mapimages import write_set
from runs import TINY, VICREGL, assert_same_run, command, final, lines

from pipeline import Batch, Loader, ShardError, ShardSet, host, samples
from trainer import checkpoint, evaluate, feed, interrupt
from trainer.config import RunError, UsageError


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([2, 3], id="edge of an epoch, then again"),
        pytest.param([4], id="later", marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed_is_uninterrupted(
    run: Callable[..., int], tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    for stop in stops:
        done = len(lines(tmp_path / "parts")) if (tmp_path / "parts").exists() else 0
        calls = iter(range(done + 1, 7))
        monkeypatch.setattr(interrupt.Interrupt, "stop", lambda self, calls=calls, stop=stop: next(calls) == stop)
        assert run("--out", str(tmp_path / "parts")) == 75
        assert final(tmp_path / "parts")["step"] == stop
    monkeypatch.setattr(interrupt.Interrupt, "stop", lambda self: False)
    assert run("--out", str(tmp_path / "parts")) == 0
    assert_same_run(tmp_path / "parts", whole)


@pytest.mark.filterwarnings("ignore:no checkpoint at step")
def test_time_limit_and_full_disk(
    run: Callable[..., int],
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Out of time after a step: 75 and a checkpoint. Without room for another: warnings, the run goes on, and fails."""
    assert run("--out", str(tmp_path / "out"), "--stop-after", "0") == 75
    assert [line["step"] for line in lines(tmp_path / "out")] == [final(tmp_path / "out")["step"]] == [1]
    assert status(tmp_path / "out") == {"state": "stopped", "step": 1, "of": 6}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(checkpoint, "_PAUSES", (0.0,))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # a file of a megabyte is too large for this disk
    try:
        with (
            pytest.warns(UserWarning, match="no checkpoint at step 4.*too large; the ones before it are kept"),
            pytest.raises(RunError, match="the last steps are not kept"),
        ):
            run("--out", str(tmp_path / "out"), "--log.checkpoint_every", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status(tmp_path / "out") == {"state": "failed", "step": 6, "of": 6}
    assert final(tmp_path / "out")["step"] == 1
    assert [line["loss"] for line in lines(tmp_path / "out")] == [line["loss"] for line in lines(whole)]
    assert run("--out", str(tmp_path / "out")) == 0
    assert_same_run(tmp_path / "out", whole)


def test_a_clean_stop_is_no_failure_to_torchrun(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would start the run again that was just stopped."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert run("--out", str(tmp_path), "--stop-after", "0") == 0
    assert status(tmp_path)["state"] == "stopped" and "stopped: step 1 of 6" in (tmp_path / "report.html").read_text()
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"  torchrun --nproc_per_node=1 trainer/run.py --out {tmp_path}"


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param([signal.SIGTERM, signal.SIGTERM, signal.SIGINT], id="SIGTERM, as SLURM and torchrun send it"),
        pytest.param([signal.SIGUSR1, signal.SIGINT, signal.SIGINT], id="SIGUSR1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_a_checkpoint(tmp_path: Path, shards: Path, numbers: list[signal.Signals]) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.replace("steps: 6", "steps: 100000"))
    out = tmp_path / "out"
    process = subprocess.Popen(command("--config", str(config), "--shards", str(shards), "--out", str(out)))
    try:
        deadline = time.monotonic() + 60
        while not (out / "log.jsonl").exists() or not lines(out):
            assert time.monotonic() < deadline, "no step within a minute"
            assert process.poll() is None
            time.sleep(0.1)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.01)
        assert process.wait(timeout=30) == 75
    finally:
        process.kill()
    assert final(out)["step"] == lines(out)[-1]["step"]


def test_ctrl_c_again_some_seconds_later_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now, ends = [100.0], []
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(interrupt.os, "_exit", ends.append)
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    try:
        asked = interrupt.Interrupt(None)
        assert not asked.stop()
        for at, number in ((100, signal.SIGTERM), (110, signal.SIGINT), (111, signal.SIGINT), (120, signal.SIGTERM)):
            now[0] = at
            signal.raise_signal(number)
            assert asked.stop() and not ends
        signal.raise_signal(signal.SIGINT)
        assert ends == [130]
        assert capfd.readouterr().err.count("stopping after this step, with a checkpoint") == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_outage_of_the_storage_stops_a_run_with_a_checkpoint(
    run: Callable[..., int],
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 48 reads those after the 30th fail: what could be read is trained on, and nothing is lost."""
    reads, read = itertools.count(), ShardSet.read

    def failing(shards: ShardSet, i: int) -> bytes:
        if next(reads) >= 30:
            raise OSError(116, "Stale file handle")
        return read(shards, i)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(samples, "_PAUSES", ())
        patch.setattr(ShardSet, "read", failing)
        # Two threads read: of 30 reads, 14 at most are of batches that are not whole, so that two batches are.
        assert run("--out", str(out), "--data.prefetch", "1") == 75
    assert "cat.tar cannot be read (Stale file handle" in capsys.readouterr().err
    assert 1 <= final(out)["step"] == status(out)["step"] <= 3 and status(out)["state"] == "stopped"
    assert run("--out", str(out)) == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize(
    "ends", ["storage answers again", *(pytest.param(end, marks=pytest.mark.slow) for end in ("a signal", "patience"))]
)
def test_an_outage_is_waited_for(
    run: Callable[..., int],
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ends: str,
) -> None:
    """Reads fail from the 21st on, until three pauses have passed."""
    reads, read, pauses = itertools.count(), ShardSet.read, list[float]()

    def failing(shards: ShardSet, i: int) -> bytes:
        if next(reads) >= 20 and len(pauses) < 3:
            raise OSError(116, "Stale file handle")
        return read(shards, i)

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if ends == "a signal" and len(pauses) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(samples, "_PAUSES", ())
    monkeypatch.setattr(ShardSet, "read", failing)
    monkeypatch.setattr(feed, "time", SimpleNamespace(sleep=pause, monotonic=lambda: 50.0 * len(pauses)))
    out = tmp_path / "out"
    words = ["--out", str(out), "--data.prefetch", "1", "--patience", "1" if ends == "patience" else "10"]
    code = run(*words)
    said = [line for line in capsys.readouterr().err.splitlines() if "waiting for up to" in line]
    assert len(said) == 1 and "cat.tar cannot be read (Stale file handle" in said[0]
    if ends == "storage answers again":
        assert code == 0 and pauses == [10.0] * 3
    else:
        assert code == 75 and len(pauses) == 2
        assert 1 <= final(out)["step"] < 6 and status(out)["state"] == "stopped"
        monkeypatch.setattr(ShardSet, "read", read)
        assert run("--out", str(out)) == 0
    assert_same_run(out, whole)


def test_a_probe_whose_shards_cannot_be_read_stops_a_run_with_a_checkpoint(
    run: Callable[..., int],
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labelled, read = str(write_set(tmp_path / "labelled", 12, 1)), ShardSet.read

    def failing(shards: ShardSet, i: int) -> bytes:
        if "labelled" in str(shards.shard_of(i)):
            raise OSError(116, "Stale file handle")
        return read(shards, i)

    argv = ["--out", str(tmp_path / "out"), "--probe.train", labelled, "--probe.val", labelled, "--probe.every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(samples, "_PAUSES", ())
        patch.setattr(ShardSet, "read", failing)
        assert run(*argv) == 75
    assert "cannot be read (Stale file handle" in capsys.readouterr().err
    assert status(tmp_path / "out") == {"state": "stopped", "step": 3, "of": 6} and final(tmp_path / "out")["step"] == 3
    assert run(*argv) == 0
    assert [line["step"] for line in lines(tmp_path / "out") if "knn" in line] == [4, 6]
    assert_same_run(tmp_path / "out", whole)


def test_a_probe_that_fails_costs_a_score(
    run: Callable[..., int],
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not the run, nor its weights: the backbone goes back to training, whatever happens."""
    labelled = str(write_set(tmp_path / "labelled", 12, 1))

    def full(*_: object) -> None:
        raise RuntimeError("out of memory\nwhile trying")

    monkeypatch.setattr(evaluate, "normalise", full)
    assert run("--out", str(tmp_path / "out"), "--probe.train", labelled, "--probe.val", labelled) == 0
    assert "run.py: no score at step 6: out of memory while trying\n" in capsys.readouterr().err
    assert_same_run(tmp_path / "out", whole)


def test_too_many_bad_samples_fail_a_run_with_a_checkpoint(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forever(loader: Loader) -> Iterator[Batch]:
        yield from loader
        raise ShardError("33 of 20 samples are bad")

    monkeypatch.setattr(Loader, "forever", forever)
    with pytest.raises(RunError, match=r"^33 of 20 samples are bad$"):
        run("--out", str(tmp_path))
    assert status(tmp_path) == {"state": "failed", "step": 2, "of": 6} and final(tmp_path)["step"] == 2


def test_one_run_at_a_time_writes_to_a_folder(run: Callable[..., int], tmp_path: Path, whole: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "out", symlinks=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with host.lock(out / "lock"), pytest.raises(UsageError, match="another run is writing there"):
        run("--out", str(out), "--steps", "9")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_change_of_settings_is_printed(
    run: Callable[..., int], tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole, tmp_path / "out", symlinks=True)
    assert (
        run("--out", str(out), "--steps", "7", "--optim.lr", "2e-3", "--loca.me_max", "0.5", "--stop-after", "9") == 0
    )
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("this run has ")]
    assert printed == [
        "this run has steps=6, you ask for 7",
        "this run has optim.lr=0.001, you ask for 0.002",
        "this run has loca.me_max=1.0, you ask for 0.5",
    ]
    assert "steps: 7\n" in (out / "config.yaml").read_text()
    assert run("--out", str(out), "--steps", "3") == 0  # it has more: nothing is left to do
    assert len(lines(out)) == final(out)["step"] == 7


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--seed", "9"], "this run has seed=0, you ask for 9"),
        (["--optim.name", "lars"], "this run has optim.name=adamw, you ask for lars"),
        (["--loca.backbone", "vit_pico_patch16"], "loca.backbone=vit_nano_patch16"),
        (["--loca.views.focal_views", "3"], "loca.views.focal_views=1, you ask for 3"),
        (["--config", "VICREGL"], "this run has method=loca, you ask for vicregl"),
        (["--shards", "OTHER"], r"this run has shards=.*cat_shards\d+, you ask for .*other"),
    ],
)
def test_a_refused_run_leaves_the_folder_as_it_was(
    run: Callable[..., int], tmp_path: Path, whole: Path, change: list[str], sentence: str
) -> None:
    out = shutil.copytree(whole, tmp_path / "out", symlinks=True)
    if "OTHER" in change:
        change = ["--shards", str(write_set(tmp_path / "other", 12, 1))]
    if "VICREGL" in change:
        (tmp_path / "vicregl.yaml").write_text(VICREGL)
        change = ["--config", str(tmp_path / "vicregl.yaml")]
    before = (out / "config.yaml").read_text()
    with pytest.raises(UsageError, match=f"cannot resume.*{sentence}.*name another folder"):
        run("--out", str(out), *change)
    assert (out / "config.yaml").read_text() == before
    assert status(out)["state"] == "done"


@pytest.mark.filterwarnings("ignore:.*trying the one before it")
@pytest.mark.parametrize(
    "lie", [{"model": None}, {"model": {}}, {"optimizer": {"state": {}, "param_groups": []}}, {"step": "6"}]
)
def test_a_checkpoint_that_lies_does_not_begin_a_new_run(
    run: Callable[..., int], tmp_path: Path, whole: Path, lie: dict
) -> None:
    out = tmp_path / "out"
    checkpoint.write(out / "checkpoints" / "step_000000006.pt", final(whole) | lie)
    with pytest.raises(UsageError, match="checkpoint"):
        run("--out", str(out), "--steps", "8")
    assert not (out / "log.jsonl").exists()
