"""The evaluation's probes against plain reference code, and the program on real shards."""

import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mapimages import encode, sample, smooth_image, write_tar
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline import Batch, Loader, ShardSet, View, recipes
from trainer import checkpoint, config, evaluate
from trainer.backbones import VisionTransformer
from trainer.evaluate import PENALTIES, Probe, features, knn_accuracy, ridge_accuracy, shots, stored
from trainer.methods import loca, vicregl
from trainer.stored import arrays

Set = tuple[Tensor, Tensor]


def blobs(n: int, seed: int, spread: float = 1.5) -> Set:
    """Three classes around three fixed points of an 8-dimensional space."""
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(3, 8, generator=torch.Generator().manual_seed(99))
    y = torch.randint(3, (n,), generator=g)
    return middle[y] + spread * torch.randn(n, 8, generator=g) + 3, y


def test_knn_against_loops() -> None:
    train, val = blobs(60, 0), blobs(40, 1)
    right = 0
    for query, truth in zip(*val, strict=True):
        cosines = [
            (float((query @ x) / (query.norm() * x.norm())), int(label)) for x, label in zip(*train, strict=True)
        ]
        votes = [0.0, 0.0, 0.0]
        for cosine, label in sorted(cosines, reverse=True)[:7]:
            votes[label] += math.exp(cosine / 0.2)
        right += votes.index(max(votes)) == int(truth)
    assert 12 < right < 40
    assert knn_accuracy(train, val, k=7, temperature=0.2) == pytest.approx(right / 40)
    assert knn_accuracy(train, train, k=1) == 1.0
    assert 0 < knn_accuracy(train, val, k=1000) <= 1  # more neighbours than there are


def fit(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Ridge with a free intercept, by its normal equations."""
    target = torch.nn.functional.one_hot(y, 3).double()
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    shrink = penalty * torch.eye(ones.shape[1], dtype=torch.float64)
    shrink[-1, -1] = 0
    return torch.linalg.solve(ones.T @ ones + shrink, ones.T @ target), target


def test_ridge_leaves_one_out() -> None:
    train, val = blobs(20, 2), blobs(60, 3)
    mean, std = train[0].mean(0), train[0].std(0) + 1e-5
    x, queries = ((part - mean).double() / std for part in (train[0], val[0]))
    errors = {}
    for penalty in PENALTIES:
        errors[penalty] = 0.0
        for i in range(len(x)):
            others = [j for j in range(len(x)) if j != i]
            weight, _ = fit(x[others], train[1][others], penalty)
            truth = torch.nn.functional.one_hot(train[1][i], 3)
            errors[penalty] += float((torch.cat([x[i], torch.ones(1)]) @ weight - truth).square().sum())
    best = min(errors, key=errors.__getitem__)
    assert PENALTIES[0] < best < PENALTIES[-1]
    weight, _ = fit(x, train[1], best)
    guess = (torch.cat([queries, torch.ones(len(queries), 1)], 1) @ weight).argmax(1)
    assert ridge_accuracy(train, val) == pytest.approx((guess == val[1]).float().mean().item())


def test_ridge_with_more_dimensions_than_images() -> None:
    x, y = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    x[torch.arange(20), y] += 20
    assert ridge_accuracy((x, y), (x + 0.1, y)) == 1.0


def closed_form(train: Set, val: Set) -> float:
    """The same ridge by a singular value decomposition of all rows at once."""
    (x, y), (queries, truth) = train, val
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, queries = ((part - mean).double() / std for part in (x, queries))
    onehot = torch.nn.functional.one_hot(y).double()
    target = onehot - onehot.mean(0)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    projected = u.T @ target
    found = []
    for penalty in PENALTIES:
        shrink = s.square() / (s.square() + penalty)
        leverage = u.square() @ shrink + 1 / len(x)
        residual = (target - u @ (shrink[:, None] * projected)) / (1 - leverage)[:, None]
        weight = vt.T @ ((shrink / s.clamp(min=1e-12))[:, None] * projected)
        found.append((residual.square().sum().item(), weight))
    _, weight = min(found, key=lambda pair: pair[0])
    return ((queries @ weight + onehot.mean(0)).argmax(1) == truth).float().mean().item()


@pytest.mark.parametrize("spread", [0.5, 1.5, 4.0])
@pytest.mark.parametrize("count", [6, 9, 40, 500])
def test_ridge_by_sums_is_ridge_by_rows(count: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "ROWS", 64)
    for seed in range(5):
        train, val = blobs(count, seed, spread), blobs(300, seed + 50, spread)
        train[1][:3] = torch.arange(3)
        assert ridge_accuracy(train, val) == pytest.approx(closed_form(train, val), abs=1e-6)  # of 300 images


def test_the_penalty_may_be_chosen_on_some(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = blobs(500, 2), blobs(300, 3)
    every = ridge_accuracy(train, val)
    monkeypatch.setattr(evaluate, "LEFT_OUT", 50)
    assert ridge_accuracy(train, val) == pytest.approx(every, abs=0.02)


@pytest.mark.parametrize("probe", [knn_accuracy, ridge_accuracy])
def test_no_tensor_grows_with_the_set(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet has 50,000 x 1,281,167 similarities. Memory-mapped halves give what floats in memory give."""
    train, val = blobs(3000, 4), blobs(2000, 5)
    expected = probe(train, val)
    largest = [0]

    class Sizes(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype != torch.int64:
                largest[0] = max(largest[0], out.untyped_storage().nbytes())
            return out

    monkeypatch.setattr(evaluate, "ROWS", 128, raising=False)
    monkeypatch.setattr(evaluate, "QUERIES", 64, raising=False)
    monkeypatch.setattr(evaluate, "LEFT_OUT", 1000, raising=False)
    with Sizes():
        assert probe((train[0].half(), train[1]), (val[0].half(), val[1])) == pytest.approx(expected, abs=0.002)
    assert 0 < largest[0] <= max(128 * 64 * 4, train[0].nbytes // 2)  # a block, or the halves themselves


def test_ten_images_of_every_class() -> None:
    y = torch.randint(4, (200,), generator=torch.Generator().manual_seed(0))
    y[y == 2] = 1
    y[7] = 2  # a class of one image
    few = shots(y, 10)
    assert torch.bincount(y[few]).tolist() == [10, 10, 1, 10] and len(set(few.tolist())) == 31
    assert torch.equal(few, shots(y, 10)) and not torch.equal(few, shots(y, 10, seed=1))


def test_few_shot_regression_as_scenic_has_it() -> None:
    """Targets of -1 and 1 and a constant of 100 beside the features say what a free intercept and one-hot ones say."""
    train, val = blobs(30, 6), blobs(300, 7)
    mean, std = train[0].mean(0), train[0].std(0) + 1e-5
    x, queries = ((part - mean).double() / std for part in (train[0], val[0]))
    right = set()
    for penalty in PENALTIES:
        ours, _ = fit(x, train[1], penalty)
        a = torch.cat([x, torch.full((30, 1), 100.0)], 1)
        target = 2 * torch.nn.functional.one_hot(train[1], 3).double() - 1
        theirs = torch.linalg.solve(a.T @ a + penalty * torch.eye(9, dtype=torch.float64), a.T @ target)
        guesses = [
            (torch.cat([queries, torch.full((300, 1), constant)], 1) @ weight).argmax(1)
            for constant, weight in ((1.0, ours), (100.0, theirs))
        ]
        assert (guesses[0] == guesses[1]).float().mean() > 0.99
        right.add((guesses[0] == val[1]).float().mean().item())
    assert any(ridge_accuracy(train, val) == pytest.approx(accuracy) for accuracy in right)


def test_extraction_goes_on_where_it_was_broken_off(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    backbone, images = VisionTransformer(16, 1, 2, patch=8, size=32), ShardSet(str(shards))
    options: dict[str, Any] = {"size": 32, "batch_size": 5, "device": "cpu"}
    whole = stored(backbone, images, **options)
    calls = []

    def broken_off(*args: Any, **kwargs: Any) -> Set:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return features(*args, **kwargs)

    monkeypatch.setattr(evaluate, "features", broken_off)
    with pytest.raises(KeyboardInterrupt):
        stored(backbone, images, folder=tmp_path, **options)
    again = stored(backbone, images, folder=tmp_path, **(options | {"batch_size": 4}))  # after three batches of five
    assert len(calls) == 4 + 3
    third = stored(backbone, images, folder=tmp_path, **options)
    assert len(calls) == 7  # nothing is left to do
    for a, b, c in zip(whole, again, third, strict=True):
        assert a.dtype == b.dtype and torch.equal(b, c)
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)  # the same, but for batches of another size
    assert whole[0].dtype == torch.float16 and len(list(tmp_path.iterdir())) == 1
    backbone.norm.weight.data += 1  # other weights: other features
    assert not torch.equal(stored(backbone, images, folder=tmp_path, **options)[0], whole[0])


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "missing", "of other images"])
def test_damaged_features_are_one_sentence(tmp_path: Path, damage: str) -> None:
    layout = {"x": (np.float16, (8, 4)), "filled": (np.int64, (1,))}
    arrays(tmp_path / "kept", layout)
    file = tmp_path / "kept" / "x.npy"
    if damage == "of other images":
        np.save(file, np.zeros((9, 4), np.float16))
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "truncated": file.read_bytes()[:-8], "text": b"<html>" * 40}[damage])
    with pytest.raises((ValueError, OSError), match="kept") as error:
        arrays(tmp_path / "kept", layout)
    assert "\n" not in str(error.value)


def test_features_that_half_precision_cannot_hold(shards: Path) -> None:
    backbone = VisionTransformer(16, 1, 2, patch=8, size=32)
    backbone.norm.weight.data.fill_(1e6)
    with pytest.raises(ValueError, match="not finite in half precision"):
        stored(backbone, ShardSet(str(shards)), size=32, batch_size=5, device="cpu")


def test_features_are_the_mean_of_the_patches() -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(16, 2, 2, patch=8, size=32, drop_path=0.9, cls_token=True).train()
    pixels = torch.randint(256, (5, 1, 32, 32, 3), dtype=torch.uint8)
    label = torch.arange(5)
    batches = [
        Batch({"image": View(pixels[part], torch.zeros(len(pixels[part]), 1, 4))}, {}, label[part], label[part])
        for part in (slice(0, 3), slice(3, 5))
    ]
    x, y = features(backbone, batches)
    image = (pixels[4, 0] / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert backbone.training and all(block.training for block in backbone.blocks)  # as it was
    expected = backbone.eval()(image.permute(2, 0, 1)[None])[0, 1:].mean(0)  # no drop-path, no CLS token
    torch.testing.assert_close(x[4], expected.detach())
    assert y.tolist() == [0, 1, 2, 3, 4] and not x.requires_grad


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of 3 classes: their own hue, and noise of their own."""
    folder = tmp_path_factory.mktemp("labelled")
    members = []
    for i in range(24):
        picture = smooth_image(i, 64, 80) // 4
        picture[..., i % 3] += 150
        members += sample(f"{i:03d}", encode(picture, "JPEG"), i % 3)
    write_tar(folder / "labelled-000000.tar", members)
    return folder


def test_program(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    views = recipes.Loca(size=64, focal_size=32, focal_views=1)
    cfg = loca.Config("vit_nano_patch16", views=views, hidden=8, prototypes=4)
    torch.manual_seed(5)
    method: nn.Module = loca.Method(cfg)
    text = f"method: loca\nloca: {json.dumps(asdict(cfg))}\n"
    saved = {"step": 1, "method": "loca", "config": text, "model": method.state_dict()}
    checkpoint.save(tmp_path / "checkpoints", saved, keep_last=1, keep_every=None)
    arguments = [str(tmp_path), "--train", str(shards), "--val", str(shards), "--device", "cpu"]

    assert evaluate.main(arguments) == 0
    printed = capsys.readouterr()
    trained = json.loads(printed.out.splitlines()[-1])
    assert "the same images: the scores are meaningless" in printed.err and "random weights: k-NN" in printed.out
    assert json.loads((tmp_path / "evaluate.json").read_text()) == trained
    assert trained["size"] == 64  # as it was trained
    random = trained.pop("untrained")
    assert (trained["train_images"], trained["val_images"], trained["classes"]) == (24, 24, 3)
    loader = Loader(ShardSet(str(shards)), recipes.evaluation(size=64, resize=73), 10, shuffle=False, drop_last=False)
    both = features(method.teacher.backbone, loader)
    loader.close()
    assert len(both[1]) == 24
    few = shots(both[1], 10)
    few = both[0][few], both[1][few]
    assert trained["ten_shot"] == pytest.approx(ridge_accuracy(few, both))
    assert trained["ridge"] == pytest.approx(ridge_accuracy(both, both)) and trained["ridge"] > 0.9
    assert trained["knn"] == pytest.approx(knn_accuracy(both, both))

    seen = []

    def recording(backbone: nn.Module, *args: Any, **kwargs: Any) -> Set:
        seen.append(backbone.pos_embed)
        return features(backbone, *args, **kwargs)

    monkeypatch.setattr(evaluate, "features", recording)
    for seed in (5, 6):
        assert evaluate.main([*arguments, "--untrained", str(seed)]) == 0
    start = method.teacher.backbone.pos_embed  # drawn from seed 5: its features are there already
    assert len(seen) == 1 and not torch.equal(seen[0], start)
    assert evaluate.main([*arguments, "--untrained", "0"]) == 0 and len(seen) == 1  # it stood beside the trained one
    untrained = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert untrained[0] == trained and untrained[1].keys() == trained.keys()
    assert {key: untrained[2][key] for key in random} == random


def test_images_are_normalised_as_the_method_was_trained(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = recipes.VICRegL("released", size=32, small=0, gamma=None)
    cfg = vicregl.Config("vit_pico_patch16", views=views, feature_gamma=None, expander=(8,), projector=(8,))
    saved = {"step": 1, "method": "vicregl", "config": json.dumps({"vicregl": asdict(cfg)})}
    checkpoint.write(tmp_path / "run.pt", saved | {"model": vicregl.Method(cfg).state_dict()})
    stds = []

    def recording(*args: Any, std: tuple[float, ...], **kwargs: Any) -> Set:
        stds.append(std)
        return features(*args, std=std, **kwargs)

    monkeypatch.setattr(evaluate, "features", recording)
    sets = ["--train", str(shards), "--val", str(shards), "--size", "32", "--device", "cpu"]
    assert evaluate.main([str(tmp_path / "run.pt"), *sets]) == 0
    probe = Probe(config.Probe(train=str(shards), val=str(shards)), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "cpu")
    assert 0 < probe(vicregl.Method(cfg).backbone()) <= 1
    assert set(stds) == {(0.228, 0.224, 0.225), (0.25, 0.25, 0.25)}


def test_images_without_a_class(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "bare-000000.tar", sample("a", encode(smooth_image(0, 64, 64), "JPEG")))
    model = loca.Method(loca.Config("vit_pico_patch16", hidden=8)).state_dict()
    checkpoint.save(
        tmp_path / "checkpoints",
        {"step": 1, "method": "loca", "config": "loca: {backbone: vit_pico_patch16, hidden: 8}", "model": model},
        keep_last=1,
        keep_every=None,
    )
    bare = ["--train", str(tmp_path / "bare-000000.tar"), "--val", str(shards)]
    # Labels 0 to 2 of both sets, which are not the same classes.
    shift = ["--train", str(tmp_path / "one"), "--val", str(tmp_path / "other")]
    for path, names in zip(shift[1::2], ("ant\nbass\ncup\n", "bass\ncup\ndog\n"), strict=True):
        (Path(shutil.copytree(shards, path)) / "synsets.txt").write_text(names)
    for argv, sentence in (
        ([str(tmp_path), *bare, "--untrained", "0"], r"bare.*without a class"),
        ([str(tmp_path / "nowhere"), "--train", "x", "--val", "y"], r"nowhere: not a readable checkpoint"),
        ([str(tmp_path), *bare, "b.tar"], r"'b.tar' is not an option: .* put it in quotes"),
        ([str(tmp_path), *bare, "--seed", "1"], r"--seed.: settings of run.py belong to --head sgd"),
        ([str(tmp_path), *bare, "--lr", "0.1"], r"--lr belongs to --head sgd"),
        (["timm:test_vit", *bare], r"timm:test_vit: name a run's folder or a checkpoint"),
        ([str(tmp_path), *bare, "--device", "tpu"], r"--device tpu: .*tpu"),
        ([str(tmp_path), *bare, "--untrained", "-1"], r"--untrained -1: a seed"),
        ([str(tmp_path), "--train", str(shards), "--val", str(shards), "--size", "0"], r"size"),
        ([str(tmp_path), *shift], r"synsets.txt differ, .* --classes"),
        ([str(tmp_path), *shift, "--head", "sgd"], r"synsets.txt differ"),
        ([str(tmp_path), "--train", str(shards), "--val", str(shards), "--batch-size", "0"], r"batch_size"),
    ):
        assert evaluate.main(argv) == 2
        said = capsys.readouterr().err
        assert re.search(sentence, said) and said.count("\n") == 1
