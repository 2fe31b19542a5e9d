"""Several ranks: a run gives the results of one rank, also after a rank dies or with another number of ranks."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import skimage
import torch
from mapimages import sample, write_set, write_tar
from PIL import Image
from runs import PATIENCE, TINY, VICREGL, assert_same_run, final, kill_rank, lines, on_ranks, start_ranks
from scenes import pair, write_pairs

from trainer import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * PATIENCE)]


def test_two_ranks_and_then_one(run: Callable[..., int], tmp_path: Path, shards: Path) -> None:
    """Interrupted on two ranks, a run goes on with one: same samples, same losses as one rank from the start."""
    config = tmp_path / "two.yaml"
    config.write_text(VICREGL)
    assert run("--config", str(config), "--out", str(tmp_path / "one")) == 0
    two = str(tmp_path / "two")
    printed = on_ranks("--config", str(config), "--shards", str(shards), "--out", two, "--log.checkpoint_every", "3")
    assert "2 ranks x 1 x 4" in printed
    (tmp_path / "two" / "checkpoints" / "step_000000006.pt").unlink()  # as if it had died after step 3
    assert run("--config", str(config), "--out", two) == 0
    alone, changed = ([line["loss"] for line in lines(tmp_path / out)] for out in ("one", "two"))
    assert len(changed) == 6
    assert changed == pytest.approx(alone, rel=1e-4)


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
    on_ranks(*argv, str(tmp_path / "two"))
    assert [line["bad_samples"] for line in lines(tmp_path / "two")][-1] == 4
    process = start_ranks(*argv, str(tmp_path / "few"), "--data.max_bad", "0.2")  # three of 16; each rank met two
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "run.py: 4 of 16 samples are bad, but max_bad allows 3" in errors
    assert final(tmp_path / "few")["step"] >= 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run(tmp_path: Path, shards: Path, rank: int) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "out"
    config.write_text(TINY.replace("steps: 6", "steps: 100000"))
    process = start_ranks("--config", str(config), "--shards", str(shards), "--out", str(out))
    try:
        kill_rank(rank, out, 3)
        _, errors = process.communicate(timeout=45)  # torchrun gives the other rank 30 s to end by itself
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Signal 9 (SIGKILL)" in errors and f"rank      : {rank}" in errors


def test_torchrun_restarts_a_run_that_lost_a_rank(tmp_path: Path, shards: Path) -> None:
    """It goes on from its last checkpoint and ends with the weights of a run that lost none, and was probed besides."""
    config, labelled = tmp_path / "tiny.yaml", str(write_set(tmp_path / "labelled", 12, 1))
    config.write_text(TINY.replace("steps: 6", "steps: 24").replace("checkpoint_every: 100", "checkpoint_every: 5"))
    argv = ["--config", str(config), "--shards", str(shards), "--out"]
    pairs = write_pairs(tmp_path / "pairs", [pair(0), pair(1)])
    probes = {"train": labelled, "val": labelled, "segment_train": pairs, "segment_val": pairs, "every": "4"}
    words = [word for name, value in probes.items() for word in (f"--probe.{name}", value)]
    on_ranks(*argv, str(tmp_path / "whole"), *words)
    for score in ("knn", "segment_miou"):
        assert [line["step"] for line in lines(tmp_path / "whole") if score in line] == [8, 16, 24]
    process = start_ranks(*argv, str(tmp_path / "out"), options=("--max-restarts=1",))
    try:
        kill_rank(1, tmp_path / "out", 8)
        printed, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    assert "resuming from step 5" in printed
    assert_same_run(tmp_path / "out", tmp_path / "whole")


KINDS = {
    "DDP": [],
    "FSDP": ["--speed.parallel", "fsdp"],
    "HSDP": ["--speed.parallel", "fsdp", "--speed.fsdp_copies", "2"],
    "FSDP, bf16": ["--speed.parallel", "fsdp", "--speed.fsdp_gather", "bf16", "--speed.precision", "bf16"],
}


def learned(saved: checkpoint.Payload) -> list[torch.Tensor]:
    """AdamW's means of the gradients, and the weights that they move, in one row each."""
    states = sorted(saved["optimizer"]["state"].items())
    rows = [state["exp_avg"] for _, state in states], [saved["model"][name] for name, _ in states]
    return [torch.cat([tensor.flatten() for tensor in row]) for row in rows]


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_learn_what_one_learns_and_go_on_as_more_and_fewer(
    run: Callable[..., int], tmp_path: Path, shards: Path, kind: str, compiled: str
) -> None:
    """A step on two ranks, one on four, and the rest on two, against the run of one: losses, gradients and weights."""
    config, parts, words = tmp_path / "vicregl.yaml", tmp_path / "parts", KINDS[kind]
    config.write_text(VICREGL)
    assert run("--config", str(config), "--out", str(tmp_path / "one"), *words) == 0  # nothing to share there
    argv = ["--config", str(config), "--shards", str(shards), "--out", str(parts), *words]
    argv += ["--speed.compile", compiled, "--data.num_threads", "1"]
    for step, ranks in ((1, 2), (2, 4)):
        on_ranks(*argv, "--stop-after", "0", ranks=ranks)
        assert final(parts)["step"] == step
    printed = on_ranks(*argv)
    assert "resuming from step 2" in printed and (compiled == "on") == ("not compiled" not in printed)
    alone, together = (lines(tmp_path / out) for out in ("one", "parts"))
    assert len(together) == 6
    narrow = "bf16" in words
    near = {"loss": 2e-3, "grad_norm": 0.15} if narrow else {"loss": 1e-4, "grad_norm": 1e-4}
    for name, tolerance in near.items():  # norms before clipping, which makes gradients of any scale equal
        assert [line[name] for line in together] == pytest.approx([line[name] for line in alone], rel=tolerance)
    start = checkpoint.load(parts / "checkpoints" / "step_000000001.pt")  # the first step's learning rate is 0
    one, many = (final(tmp_path / out) for out in ("one", "parts"))
    assert one["model"].keys() == many["model"].keys()
    (_, weights), (mean, mine), (others_mean, others) = (learned(saved) for saved in (start, one, many))
    assert (others_mean - mean).norm() < (0.2 if narrow else 1e-3) * mean.norm()
    # AdamW moves a weight as far for a small gradient, which rounding changes most, as for a large one.
    assert (others - mine).norm() < (0.2 if narrow else 1e-2) * (mine - weights).norm()


def test_copies_that_the_ranks_cannot_hold(tmp_path: Path, shards: Path) -> None:
    (config := tmp_path / "tiny.yaml").write_text(TINY)
    argv = ["--config", str(config), "--shards", str(shards), "--out", str(tmp_path / "out")]
    process = start_ranks(*argv, "--speed.parallel", "fsdp", "--speed.fsdp_copies", "3")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "run.py: speed.fsdp_copies: 2 ranks cannot hold 3 copies" in errors
