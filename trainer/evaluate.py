"""How good a backbone's frozen features are: nearest neighbours, and ridge regression to the classes.

    python -m trainer.evaluate runs/loca --train DIR --val DIR             a run's folder, or one of its checkpoints
    python -m trainer.evaluate runs/loca --train DIR --val DIR --untrained 0   the same network with random weights

An image's feature is the mean of its patch features, of the central square. Both probes are fitted on the training set
and have nothing to tune: the penalty is chosen by leave-one-out on the training set. The last line is a JSON object.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import Batch, Loader, ShardSet, recipes
from trainer import checkpoint, config
from trainer.backbones import normalise

PENALTIES = tuple(10.0**e for e in range(-3, 7))


@torch.no_grad()
def features(
    backbone: nn.Module,
    batches: Iterable[Batch],
    *,
    mean: tuple[float, ...] = recipes.IMAGENET_MEAN,
    std: tuple[float, ...] = recipes.IMAGENET_STD,
) -> tuple[Tensor, Tensor]:
    """The mean patch feature and the class of every image: f32 (n, D) and i64 (n,), on the CPU.

    The batches have views of kind ``image``. `backbone` runs in evaluation mode and is left in the mode it was in; a
    CLS token does not count.
    """
    training = backbone.training
    backbone.eval()
    device = next(backbone.parameters()).device
    prefix = getattr(backbone, "num_prefix_tokens", 0)
    x, y = [], []
    for batch in batches:
        tokens = backbone(normalise(batch.views["image"].pixels.to(device), mean, std))
        x.append(tokens[:, prefix:].float().mean(1).cpu())
        y.append(batch.label.cpu())
    backbone.train(training)
    return torch.cat(x), torch.cat(y)


def labelled(spec: str) -> ShardSet:
    """The shards. Raises ValueError if an image has no class."""
    shards = ShardSet(spec)
    if (shards.table["label"] < 0).any():
        raise ValueError(f"{spec}: holds images without a class; a probe needs one for each")
    return shards


def stored(
    backbone: Any, shards: ShardSet, *, size: int, batch_size: int, device: str, images: int | None = None
) -> tuple[Tensor, Tensor]:
    """`features` of a set's central squares at side `size`; with `images`, at most so many, the same ones always."""
    recipe = recipes.evaluation(size=size, resize=size * 256 // 224, patch=backbone.patch)
    loader = Loader(shards, recipe, batch_size, device=device, shuffle=images is not None, drop_last=False)
    batches = islice(loader, None if images is None else -(-images // batch_size))
    x, y = features(backbone, batches, mean=recipe.mean, std=recipe.std)
    loader.close()
    return x[:images], y[:images]


class Probe:
    """k-NN while a run is under way, on images as large as those it trains on. Nothing of the run's state moves.

    Raises ValueError, at once, for shards that cannot be read or have images without a class.
    """

    def __init__(self, cfg: config.Probe, device: str) -> None:
        self._sets = [labelled(spec) for spec in (cfg.train, cfg.val) if spec]
        self._images, self._device = cfg.images, device

    def __call__(self, backbone: Any) -> float:
        """`knn_accuracy` of the backbone."""
        size = getattr(backbone, "grid", 224 // backbone.patch) * backbone.patch
        train, val = (
            stored(backbone, shards, size=size, batch_size=64, device=self._device, images=self._images)
            for shards in self._sets
        )
        return knn_accuracy(train, val)


def knn_accuracy(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], *, k: int = 20, temperature: float = 0.07
) -> float:
    """The share of `val` whose class the `k` nearest of `train` vote for, by cosine s with weight exp(s / temperature).

    `train` and `val` are features (n, D) and classes (n,). k and temperature are DINO's.
    """
    (x, y), (queries, truth) = train, val
    similarity = F.normalize(queries, dim=1) @ F.normalize(x, dim=1).T
    nearest, index = similarity.topk(min(k, len(x)), dim=1)
    votes = torch.zeros(len(queries), int(y.max()) + 1).scatter_add_(1, y[index], (nearest / temperature).exp())
    return (votes.argmax(1) == truth).float().mean().item()


def ridge_accuracy(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> float:
    """The share of `val` that ridge regression from standardised features to one-hot classes puts right.

    Of PENALTIES, the one with the least squared error is taken when each training image is left out in turn, in closed
    form.
    """
    (x, y), (queries, truth) = train, val
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, queries = ((part - mean).double() / std for part in (x, queries))
    onehot = F.one_hot(y).double()
    target = onehot - onehot.mean(0)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    projected = u.T @ target
    best, weight = float("inf"), torch.empty(0)
    for penalty in PENALTIES:
        shrink = s.square() / (s.square() + penalty)
        leverage = u.square() @ shrink + 1 / len(x)  # the mean is fitted too
        residual = (target - u @ (shrink[:, None] * projected)) / (1 - leverage)[:, None]
        if (error := residual.square().sum().item()) < best:
            best, weight = error, vt.T @ ((shrink / s.clamp(min=1e-12))[:, None] * projected)
    return ((queries @ weight + onehot.mean(0)).argmax(1) == truth).float().mean().item()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a run's folder or a checkpoint")
    parser.add_argument("--train", required=True, help="labelled shards to fit on")
    parser.add_argument("--val", required=True, help="labelled shards to score")
    parser.add_argument("--untrained", type=int, metavar="SEED", help="random weights instead, for comparison")
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)

    method: Any = checkpoint.restore(checkpoint.load(options.checkpoint))
    if options.untrained is not None:
        torch.manual_seed(options.untrained)
        method = type(method)(method.cfg)
    backbone = method.backbone().to(options.device)
    train, val = (
        stored(backbone, shards, size=options.size, batch_size=options.batch_size, device=options.device)
        for shards in [labelled(spec) for spec in (options.train, options.val)]
    )
    result = {"knn": knn_accuracy(train, val), "ridge": ridge_accuracy(train, val)}
    result |= {"train_images": len(train[1]), "val_images": len(val[1]), "classes": int(train[1].max()) + 1}
    print(f"{len(val[1]):,} images: k-NN {result['knn']:.1%}, ridge {result['ridge']:.1%}")
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:  # a shard set's errors are among them
        print(f"evaluate: {error}", file=sys.stderr)
        raise SystemExit(2) from None
