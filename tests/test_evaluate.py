"""The probes against written-out ones, and the program on real shards."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mapimages import encode, sample, smooth_image, write_tar
from torch import Tensor, nn

from pipeline import Batch, Loader, ShardSet, View, recipes
from trainer import checkpoint, evaluate
from trainer.backbones import VisionTransformer
from trainer.evaluate import PENALTIES, features, knn_accuracy, ridge_accuracy
from trainer.methods import loca

Set = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More only wait for each other over tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    cfg = loca.Config("vit_nano_patch16", size=64, focal_size=32, queries=2, hidden=8, prototypes=4)
    torch.manual_seed(5)
    method: nn.Module = loca.Method(cfg)
    text = f"method: loca\nloca: {json.dumps(vars(cfg))}\n"
    saved = {"step": 1, "method": "loca", "config": text, "model": method.state_dict()}
    checkpoint.save(tmp_path / "checkpoints", saved, keep_last=1, keep_every=None)
    arguments = [str(tmp_path), "--train", str(shards), "--val", str(shards), "--size", "64", "--device", "cpu"]

    evaluate.main(arguments)
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (trained["train_images"], trained["val_images"], trained["classes"]) == (24, 24, 3)
    loader = Loader(ShardSet(str(shards)), recipes.evaluation(size=64, resize=73), 10, shuffle=False, drop_last=False)
    both = features(method.teacher.backbone, loader)
    loader.close()
    assert len(both[1]) == 24
    assert trained["ridge"] == pytest.approx(ridge_accuracy(both, both)) and trained["ridge"] > 0.9
    assert trained["knn"] == pytest.approx(knn_accuracy(both, both))

    seen = []

    def recording(backbone: nn.Module, *args: Any, **kwargs: Any) -> Set:
        seen.append(backbone.pos_embed)
        return features(backbone, *args, **kwargs)

    monkeypatch.setattr(evaluate, "features", recording)
    for seed in (5, 6):
        evaluate.main([*arguments, "--untrained", str(seed)])
    start = method.teacher.backbone.pos_embed  # drawn from seed 5
    assert torch.equal(seen[0], start) and not torch.equal(seen[2], start)


def test_images_without_a_class(tmp_path: Path, shards: Path) -> None:
    write_tar(tmp_path / "bare-000000.tar", sample("a", encode(smooth_image(0, 64, 64), "JPEG")))
    model = loca.Method(loca.Config("vit_pico_patch16", hidden=8)).state_dict()
    checkpoint.save(
        tmp_path / "checkpoints",
        {"step": 1, "method": "loca", "config": "loca: {backbone: vit_pico_patch16, hidden: 8}", "model": model},
        keep_last=1,
        keep_every=None,
    )
    with pytest.raises(ValueError, match=r"bare.*without a class"):
        evaluate.main(
            [str(tmp_path), "--train", str(tmp_path / "bare-000000.tar"), "--val", str(shards), "--untrained", "0"]
        )
    with pytest.raises(ValueError, match=r"nowhere: not a readable checkpoint"):
        evaluate.main([str(tmp_path / "nowhere"), "--train", "x", "--val", "y"])
