"""Linear heads by SGD: several at once train as each alone does, on a frozen backbone; both programs score them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mapimages import encode, sample, write_tar
from PIL import Image
from runs import assert_same, assert_same_run, final, lines
from scenes import pair, write_pairs
from test_finetune import loca_run

from pipeline import ShardSet, recipes
from trainer import config, evaluate, optim, segment
from trainer import heads as program
from trainer.cost import synthetic
from trainer.methods import heads, linear
from trainer.segmentation import sliding

QUICK = "--steps 5 --batch_size 8 --log.every 1 --log.tensorboard false --log.keep_last 9 --data.num_threads 1".split()
DENSE = "--heads.views.size 32 --heads.views.short_side 40 --heads.stride 16".split()


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pairs")
    train, val = ([pair(seed, 48, 64) for seed in range(*part)] for part in ((0, 16), (50, 54)))
    return write_pairs(folder / "train", train), write_pairs(folder / "val", val)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> str:
    """32 images of four classes, each of a colour."""
    g = np.random.default_rng(0)
    colours = [[220, 30, 30], [30, 220, 30], [30, 30, 220], [200, 200, 40]]
    images = [np.uint8(np.clip(g.normal(colours[k % 4], 20, (40, 50, 3)), 0, 255)) for k in range(32)]
    members = [m for k, image in enumerate(images) for m in sample(f"i{k:02d}", encode(image, "JPEG"), k % 4)]
    return str(write_tar(tmp_path_factory.mktemp("coloured") / "x.tar", members))


def call(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main([*argv]) == code
    printed = capsys.readouterr()
    return json.loads(printed.out.splitlines()[-1]) if code == 0 else printed.err


@pytest.mark.slow
def test_segmentation_with_two_learning_rates(
    sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = loca_run(tmp_path / "run").teacher.backbone.state_dict()
    argv = [str(tmp_path / "run"), "--train", sets[0], "--val", sets[1], "--head", "sgd", *QUICK, *DENSE]
    argv += ["--log.checkpoint_every", "2"]
    found = call(segment.main, capsys, *argv, "--lr", "1e-3", "3e-2", "--out", str(tmp_path / "both"))
    out = tmp_path / "both" / "heads_dinov3"
    assert found["heads"].keys() == {"0.001", "0.03"} and found["chosen_on"] == "val"
    assert found["miou"] == max(one["miou"] for one in found["heads"].values()) == found["heads"][found["best"]]["miou"]
    assert json.loads((out / "result.json").read_text()) == found
    assert not list(tmp_path.glob("**/*.start.pt"))
    model = final(out)["model"]
    assert_same({k: model[f"encoder.{k}"] for k in teacher}, teacher)  # frozen
    log = lines(out)
    assert {"loss_1", "loss_30"} <= log[0].keys()
    assert log[0]["loss"] == pytest.approx(log[0]["loss_1"] + log[0]["loss_30"])

    for step in (4, 5):  # in mid-epoch it goes on, bit for bit
        (out / "checkpoints" / f"step_{step:09d}.pt").unlink()
    whole = tmp_path / "whole"
    (tmp_path / "both").rename(whole)
    call(segment.main, capsys, *argv, "--lr", "1e-3", "3e-2", "--out", str(tmp_path / "both"))
    assert call(segment.main, capsys, *argv, "--lr", "1e-3", "3e-2", "--out", str(whole)) == found
    assert_same_run(whole / "heads_dinov3", out)


def test_heads_beside_each_other_do_not_feel_one_another() -> None:
    cfg = heads.Config(
        "vit_pico_patch8", classes=3, size=32, dropout=0.0, scales=[1.0, 10.0],
        stride=None, views=recipes.Segmentation(size=32, short_side=32),
    )  # fmt: skip
    torch.manual_seed(0)
    both = heads.Method(cfg)
    alone = heads.Method(replace(cfg, scales=[10.0]))
    alone.encoder.load_state_dict(both.encoder.state_dict())
    alone.heads[0].load_state_dict(both.heads[1].state_dict())
    batch = synthetic(heads.views(cfg), 4, "cpu")
    for method in (both, alone):
        optimizer = torch.optim.AdamW(method.parameter_groups(0.1), lr=0.0)
        for _ in range(4):
            optim.set_lr(optimizer, 1e-3)
            optimizer.zero_grad()
            method(batch, torch.zeros(()))[0].backward()
            optimizer.step()
    assert_same(both.heads[1].state_dict(), alone.heads[0].state_dict())
    assert not torch.equal(both.heads[0].linear.weight, both.heads[1].linear.weight)
    assert all(p.grad is None for p in both.encoder.parameters())


def test_the_backbone_stays_in_evaluation_mode_and_the_heads_do_not() -> None:
    crop = recipes.Segmentation(size=64, short_side=64)
    method = heads.Method(heads.Config("resnet50", classes=2, stride=None, views=crop)).train()
    assert not method.encoder.training and not any(m.training for m in method.encoder.modules())
    assert method.heads[0].norm.training
    before = method.encoder.state_dict()["bn1.running_mean"].clone()
    method(synthetic(heads.views(method.cfg), 2, "cpu"), torch.zeros(()))
    assert torch.equal(method.encoder.state_dict()["bn1.running_mean"], before)
    assert not method.eval().heads[0].norm.training


@pytest.mark.parametrize("first", [True, False])
def test_a_head_is_batch_norm_dropout_and_a_layer_in_the_recipes_order(first: bool) -> None:
    torch.manual_seed(0)
    head = heads.Head(6, heads.Config(classes=3, dropout=0.5, dropout_first=first))
    x = torch.randn(4, 6, 5, 5)
    torch.manual_seed(1)
    found = head(x)
    torch.manual_seed(1)
    drop = torch.nn.functional.dropout2d(torch.ones_like(x), 0.5)  # whole channels
    y = x * drop if first else x
    y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    y = y if first else y * drop
    wanted = torch.einsum("cd,bdyx->bcyx", head.linear.weight[:, :, 0, 0], y) + head.linear.bias[:, None, None]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.4) and not head.linear.bias.any()


def test_vicregls_features_are_four_stages_at_stride_4_without_the_final_norm() -> None:
    cfg = config.resolve({"config": "heads_vicregl", "shards": "x", "heads.backbone": "convnext_tiny"}).method
    method = heads.Method(cfg)
    assert method.heads[0].linear.weight.shape[1] == 96 + 192 + 384 + 768
    with torch.no_grad():
        method.encoder.head.norm.weight.fill_(7)
        found = method.features(torch.randn(1, 3, 64, 64))
    assert found.shape == (1, 1440, 16, 16)
    assert found[:, 672:].abs().mean() < 5  # the norm's gain of 7 is not felt


def test_without_windows_the_picture_is_seen_whole() -> None:
    crop = recipes.Segmentation(size=64, short_side=64)
    method = heads.Method(heads.Config("resnet50", classes=2, whole=True, stride=None, views=crop)).eval()
    image = Image.fromarray(pair(3, 50, 75)[0])
    found = sliding.logits(method, image)
    assert found.shape == (2, 64, 96)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    x = (x - torch.tensor(method.mean)[:, None, None]) / torch.tensor(method.std)[:, None, None]
    x = torch.nn.functional.interpolate(x, (64, 96), mode="bilinear")
    with torch.no_grad():
        wanted = torch.nn.functional.interpolate(method.logits(x), (64, 96), mode="bilinear")[0]
    torch.testing.assert_close(found, wanted)


def test_classification_by_all_heads_at_once(coloured: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loca_run(tmp_path / "run")
    argv = [str(tmp_path / "run"), "--train", coloured, "--val", coloured, "--head", "sgd", "--size", "32", *QUICK]
    argv += ["--lr", "0.1", "1", "--wd", "0", "0.5", "--out", str(tmp_path / "out"), "--steps", "20"]
    found = call(evaluate.main, capsys, *argv)
    assert list(found["heads"]) == ["lr 0.1, wd 0", "lr 0.1, wd 0.5", "lr 1, wd 0", "lr 1, wd 0.5"]
    assert found["top1"] == max(one["top1"] for one in found["heads"].values()) > 60  # a guess: 25
    assert found["heads"]["lr 1, wd 0"]["top5"] == 100  # of four classes
    assert found["classes"] == 4 and found["images"] == 32
    weights = {k: v for k, v in final(tmp_path / "out")["model"].items() if k.endswith("weight") and "heads" in k}
    assert weights["heads.3.weight"].norm() < weights["heads.2.weight"].norm() / 2  # a weight decay of its own


@pytest.mark.slow
def test_a_part_of_the_images_by_name(coloured: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loca_run(tmp_path / "run")
    names = tmp_path / "ten_percent.txt"
    names.write_text("".join(f"i{k:02d}.JPEG\n" for k in range(8)))
    argv = [str(tmp_path / "run"), "--train", coloured, "--val", coloured, "--head", "sgd", "--size", "32", *QUICK]
    call(evaluate.main, capsys, *argv, "--out", str(tmp_path / "out"), "--only", str(names))
    assert [line["epoch"] for line in lines(tmp_path / "out")] == [0, 1, 2, 3, 4]  # 8 images are a batch


def test_accuracies_are_those_of_each_image(coloured: str) -> None:
    method = linear.Method(linear.Config("vit_pico_patch8", classes=9, size=32, views=recipes.Plain(size=32)))
    val = ShardSet(coloured)

    class Told:
        """The first head knows odd classes; the second puts the true class third."""

        heads = (None, None)

        def to(self, device: object) -> "Told":
            return self

        eval = lambda self: self  # noqa: E731

        def __init__(self) -> None:
            self.done = 0

        def logits(self, pixels: torch.Tensor) -> list[torch.Tensor]:
            truth = torch.arange(self.done, self.done + len(pixels)) % 4
            self.done += len(pixels)
            first = torch.nn.functional.one_hot(torch.where(truth % 2 == 1, truth, 8), 9).float()
            third = torch.nn.functional.one_hot(truth, 9) + torch.arange(9) / 100 + (torch.arange(9) > 6) * 2.0
            return [first, third]

    found = program.accuracies(Told(), val, 32, torch.device("cpu"), batch_size=5)
    assert found[0, 0] == 0.5 and found[1].tolist() == [0.0, 1.0]
    assert program.accuracies(method, val, 32, torch.device("cpu")).shape == (1, 2)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--head", "sgd", "--recipe", "vicregl"], "for ConvNeXts and ResNets, not for vit_pico_patch8"),
        (["--head", "sgd", "--lr", "0"], "learning rates are positive"),
        (["--lrr", "1"], "unknown option '--lrr'"),
        (["--head", "sgd", "--heads.stride", "600"], "stride is 600"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(
    sets: tuple[str, str], tmp_path: Path, more: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loca_run(tmp_path / "run")
    argv = [str(tmp_path / "run"), "--train", sets[0], "--val", sets[1], *more]
    error = call(segment.main, capsys, *argv, code=2)
    assert reason in error and error.count("\n") == 1


@pytest.mark.slow
def test_other_weights_need_another_folder(
    sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loca_run(tmp_path / "run")
    argv = [str(tmp_path / "run"), "--train", sets[0], "--val", sets[1], "--head", "sgd", *QUICK, *DENSE]
    argv += ["--out", str(tmp_path / "out"), "--steps", "1"]
    call(segment.main, capsys, *argv)
    assert "began with other weights" in call(segment.main, capsys, *argv, "--untrained", "0", code=2)
