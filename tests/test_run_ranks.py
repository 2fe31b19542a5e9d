"""Several ranks: a run on them is the run of one, whoever dies and however many go on."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import skimage
import torch
from mapimages import sample, write_set, write_tar
from PIL import Image
from runs import TINY, VICREGL, assert_same_run, final, kill_rank, lines, on_two_ranks, start_two_ranks
from scenes import pair, write_pairs


def test_two_ranks_and_then_one(run: Callable[..., int], tmp_path: Path, shards: Path) -> None:
    """Interrupted on two ranks, a run goes on with one: same samples, same losses as one rank from the start."""
    config = tmp_path / "two.yaml"
    config.write_text(VICREGL)
    assert run("--config", str(config), "--out", str(tmp_path / "one")) == 0
    two = str(tmp_path / "two")
    printed = on_two_ranks(
        "--config", str(config), "--shards", str(shards), "--out", two, "--log.checkpoint_every", "3"
    )
    assert "2 ranks x 1 x 4" in printed
    (tmp_path / "two" / "checkpoints" / "step_000000006.pt").unlink()  # as if it had died after step 3
    assert run("--config", str(config), "--out", two) == 0
    alone, changed = ([line["loss"] for line in lines(tmp_path / out)] for out in ("one", "two"))
    assert len(changed) == 6
    assert changed == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_bad_samples_are_those_of_all_ranks(tmp_path: Path) -> None:
    """Each rank meets some; the log counts, and `max_bad` bounds, what they met together."""
    photograph = Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png")
    members = []
    for i in range(16):
        photograph.crop((10 * i, 0, 10 * i + 200, 150)).save(data := io.BytesIO(), "JPEG")
        members += sample(f"k{i:02d}", data.getvalue() if i % 4 else b"<html>", i)
    shards = str(write_tar(tmp_path / "x.tar", members))
    (config := tmp_path / "tiny.yaml").write_text(TINY)
    argv = ["--config", str(config), "--shards", shards, "--out"]
    on_two_ranks(*argv, str(tmp_path / "two"))
    assert [line["bad_samples"] for line in lines(tmp_path / "two")][-1] == 4
    process = start_two_ranks(*argv, str(tmp_path / "few"), "--data.max_bad", "0.2")  # three of 16; each rank met two
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1 and "run.py: 4 of 16 samples are bad, but max_bad allows 3" in errors
    assert final(tmp_path / "few")["step"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run(tmp_path: Path, shards: Path, rank: int) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "out"
    config.write_text(TINY.replace("steps: 6", "steps: 100000"))
    process = start_two_ranks("--config", str(config), "--shards", str(shards), "--out", str(out))
    try:
        kill_rank(rank, out, 3)
        _, errors = process.communicate(timeout=45)  # torchrun gives the other rank 30 s to end by itself
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Signal 9 (SIGKILL)" in errors and f"rank      : {rank}" in errors


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank(tmp_path: Path, shards: Path) -> None:
    """It goes on from its last checkpoint and ends with the weights of a run that lost none, and was probed besides."""
    config, labelled = tmp_path / "tiny.yaml", str(write_set(tmp_path / "labelled", 12, 1))
    config.write_text(TINY.replace("steps: 6", "steps: 24").replace("checkpoint_every: 100", "checkpoint_every: 5"))
    argv = ["--config", str(config), "--shards", str(shards), "--out"]
    pairs = write_pairs(tmp_path / "pairs", [pair(0), pair(1)])
    probes = {"train": labelled, "val": labelled, "segment_train": pairs, "segment_val": pairs, "every": "4"}
    words = [word for name, value in probes.items() for word in (f"--probe.{name}", value)]
    on_two_ranks(*argv, str(tmp_path / "whole"), *words)
    for score in ("knn", "segment_miou"):
        assert [line["step"] for line in lines(tmp_path / "whole") if score in line] == [8, 16, 24]
    process = start_two_ranks(*argv, str(tmp_path / "out"), restarts=1)
    try:
        kill_rank(1, tmp_path / "out", 8)
        printed, errors = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    assert "going on from step 5" in printed
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_fsdp_learns_what_ddp_learns(tmp_path: Path, shards: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    for kind in ("ddp", "fsdp"):
        out = str(tmp_path / kind)
        argv = ["--config", str(config), "--shards", str(shards), "--out", out, "--speed.parallel", kind]
        if kind == "fsdp":  # in two parts
            on_two_ranks(*argv, "--stop-after", "0")
            assert final(tmp_path / kind)["step"] == 1
        on_two_ranks(*argv)
    ddp, fsdp = ([line["loss"] for line in lines(tmp_path / kind)] for kind in ("ddp", "fsdp"))
    assert fsdp == pytest.approx(ddp, rel=1e-5)
    ddp, fsdp = (final(tmp_path / kind)["model"] for kind in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    for name, weight in ddp.items():
        torch.testing.assert_close(weight, fsdp[name], atol=1e-6, rtol=1e-5)
