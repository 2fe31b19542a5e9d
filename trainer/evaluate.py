"""Evaluate a backbone's frozen features by classification: k-NN, and linear probes by ridge regression.

    python -m trainer.evaluate runs/loca --train DIR --val DIR             a run's folder, or one of its checkpoints
    python -m trainer.evaluate runs/loca ... --head sgd --lr 0.02 0.1 --wd 0 1e-6   linear heads by SGD, all at once

For comparison, the same network is evaluated with random weights (seed 0); ``--untrained SEED`` evaluates only these.
The feature of an image is the mean of the patch features of its central square. Features are computed once and stored
in half precision; an interrupted extraction resumes. The probes are fitted on the training set and have no parameter
to tune: leave-one-out on the training set chooses the ridge's penalty. "10-shot" is the same linear probe on ten images
of every class. The last line is a JSON object, also written to evaluate.json in a run's folder.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import Batch, Loader, ShardSet, host, recipes
from trainer import checkpoint, config, heads
from trainer.backbones import input_size, normalise
from trainer.command import check, command, warn_if_same
from trainer.console import counting
from trainer.stored import arrays, fingerprint, keep

PENALTIES = tuple(10.0**e for e in range(-3, 7))
FORMAT = 1  # version of stored features: increased when the same weights and images would yield different ones
ROWS, QUERIES, LEFT_OUT = 8192, 4096, 65_536  # bound the memory of the probes: 0.5 GB at 768 dimensions, 1,000 classes


@torch.no_grad()
def features(
    backbone: nn.Module,
    batches: Iterable[Batch],
    *,
    mean: tuple[float, ...] = recipes.IMAGENET_MEAN,
    std: tuple[float, ...] = recipes.IMAGENET_STD,
) -> tuple[Tensor, Tensor]:
    """Return the mean patch feature and the class of every image: f32 (n, D) and i64 (n,), on the CPU.

    The batches must have views of kind ``image``. `backbone` runs in evaluation mode, then its own mode is restored. A
    CLS token is not part of the mean.
    """
    training = backbone.training
    backbone.eval()
    device = next(backbone.parameters()).device
    prefix = getattr(backbone, "num_prefix_tokens", 0)
    x, y = [], []
    try:
        for batch in batches:
            tokens = backbone(normalise(batch.views["image"].pixels.to(device), mean, std))
            x.append(tokens[:, prefix:].float().mean(1).cpu())
            y.append(batch.label.cpu())
    finally:
        backbone.train(training)
    return torch.cat(x), torch.cat(y)


def labelled(*specs: str) -> list[ShardSet]:
    """Open the sets. Raises ValueError if an image has no class, or if the class lists beside the shards differ."""
    sets = [ShardSet(spec) for spec in specs]
    for spec, shards in zip(specs, sets, strict=True):
        if (shards.table["label"] < 0).any():
            raise ValueError(f"{spec}: holds images without a class; a probe needs one for each")
    if len({tuple(names) for shards in sets if (names := shards.listed("synsets.txt"))}) > 1:
        both = " and ".join(specs)
        raise ValueError(f"{both}: their synsets.txt differ, so do their labels; shard one with the other's --classes")
    return sets


def stored(
    backbone: Any,
    shards: ShardSet,
    *,
    size: int,
    batch_size: int,
    device: str,
    mean: tuple[float, ...] = recipes.IMAGENET_MEAN,
    std: tuple[float, ...] = recipes.IMAGENET_STD,
    images: int | None = None,
    folder: Path | None = None,
    title: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `features` of the images' central squares at side `size`: f16 (n, D) and i64 (n,).

    They are stored in a subfolder of `folder`, or in memory if that is None. `images` limits their number; the choice
    is always the same. `title` names a progress bar. Raises ValueError if features exceed half precision, and OSError
    if the disk cannot hold them.
    """
    recipe = recipes.evaluation(size=size, resize=size * 256 // 224, patch=backbone.patch)
    count = min(len(shards), images or len(shards))
    if folder is not None:
        folder /= fingerprint(backbone, FORMAT, shards.fingerprint, size, mean, std, images)
    layout = {"x": (np.float16, (count, backbone.width)), "y": (np.int64, (count,)), "filled": (np.int64, (1,))}
    found = arrays(folder, layout)
    if (start := int(found["filled"][0])) < count:
        loader = Loader(shards, recipe, batch_size, device=device, shuffle=images is not None, drop_last=False)
        loader.load_state_dict({**loader.state_dict(), "position": start})
        bar = counting(title, total=count, initial=start)
        try:
            for step, batch in enumerate(loader, 1):
                x, y = (part[: count - start] for part in features(backbone, [batch], mean=mean, std=std))
                rows = slice(start, start + len(y))
                found["x"][rows], found["y"][rows] = x.half(), y
                if not np.isfinite(found["x"][rows]).all():
                    raise ValueError("features are not finite in half precision: the weights have diverged")
                start += len(y)
                bar.update(len(y))
                if step % 32 == 0:
                    keep(found, start)
                if start == count:
                    break
        finally:
            keep(found, start)
            loader.close()
            bar.close()
    return torch.from_numpy(found["x"]), torch.from_numpy(found["y"])


def trained_size(method: Any) -> int:
    """Return the side of the large views that a method trains on, or else the backbone's `input_size`."""
    size = getattr(getattr(method.cfg, "views", None), "size", None)
    return size if isinstance(size, int) else input_size(method.backbone())


class Probe:
    """k-NN accuracy during a run, on images as large as those it trains on. It does not change the state of the run.

    The constructor raises ValueError for shards that cannot be read or that have images without a class.
    """

    def __init__(self, cfg: config.Probe, mean: tuple[float, ...], std: tuple[float, ...], device: str) -> None:
        self._sets = labelled(*(spec for spec in (cfg.train, cfg.val) if spec))
        self._options: dict[str, Any] = {"mean": mean, "std": std, "device": device, "images": cfg.images}

    def __call__(self, backbone: Any) -> float:
        """Return `knn_accuracy` of the backbone."""
        size = input_size(backbone)
        train, val = (stored(backbone, shards, size=size, batch_size=64, **self._options) for shards in self._sets)
        return knn_accuracy(train, val, device=self._options["device"])


Set = tuple[Tensor, Tensor]  # features (n, D) of any float type, possibly memory-mapped; classes (n,)


def knn_accuracy(train: Set, val: Set, *, k: int = 20, temperature: float = 0.07, device: str = "cpu") -> float:
    """Return the fraction of `val` that the `k` nearest neighbours in `train` classify correctly.

    A neighbour of cosine similarity s votes with weight exp(s / temperature). k and temperature are DINO's. `device`
    computes similarities in blocks of QUERIES x ROWS.
    """
    (x, y), (queries, truth) = train, val
    right = 0
    for some, classes in zip(queries.split(QUERIES), truth.split(QUERIES), strict=True):
        q = F.normalize(some.to(device).float(), dim=1)
        nearest, labels = q.new_empty(len(q), 0), y.new_empty(len(q), 0, device=device)
        for rows, their in zip(x.split(ROWS), y.split(ROWS), strict=True):
            similarity = q @ F.normalize(rows.to(device).float(), dim=1).T
            best, index = similarity.topk(min(k, len(rows)), dim=1)
            nearest, order = torch.cat([nearest, best], 1).topk(min(k, nearest.shape[1] + best.shape[1]), dim=1)
            labels = torch.cat([labels, their.to(device)[index]], 1).gather(1, order)
        votes = q.new_zeros(len(q), int(y.max()) + 1).scatter_add_(1, labels, (nearest / temperature).exp())
        right += int((votes.argmax(1).cpu() == classes).sum())
    return right / len(truth)


def ridge_accuracy(train: Set, val: Set, *, device: str = "cpu") -> float:
    """Return the accuracy on `val` of ridge regression of one-hot classes on standardised features.

    The penalty is the one of PENALTIES with the least squared leave-one-out error, which has a closed form. It is
    computed on at most LEFT_OUT evenly spread training images. Only sums over images, D x D and D x classes, are kept.
    """
    (x, y), (queries, truth) = train, val
    n, classes = len(x), int(y.max()) + 1
    mean = sum(rows.to(device).double().sum(0) for rows in x.split(ROWS)) / n
    square = mean.new_zeros(len(mean), len(mean))
    by_class = mean.new_zeros(classes, len(mean))
    for rows, their in zip(x.split(ROWS), y.split(ROWS), strict=True):
        centred = rows.to(device).double() - mean
        square.addmm_(centred.T, centred)
        by_class.index_add_(0, their.to(device), centred)
    std = (square.diagonal() / max(n - 1, 1)).sqrt() + 1e-5
    eigenvalues, vectors = torch.linalg.eigh(square / std.outer(std))
    eigenvalues = eigenvalues.clamp(min=0)
    projected = vectors.T @ (by_class / std).T
    prior = torch.bincount(y, minlength=classes).to(device) / n

    errors = dict.fromkeys(PENALTIES, 0.0)
    every = -(-n // LEFT_OUT)
    for rows, their in zip(x[::every].split(ROWS), y[::every].split(ROWS), strict=True):
        z = ((rows.to(device).double() - mean) / std) @ vectors
        target = F.one_hot(their.to(device), classes) - prior
        for penalty in PENALTIES:
            leverage = z.square() @ (1 / (eigenvalues + penalty)) + 1 / n  # 1 / n: the mean is fitted, too
            residual = target - z @ (projected / (eigenvalues + penalty)[:, None])
            errors[penalty] += (residual / (1 - leverage)[:, None]).square().sum().item()
    best = min(errors, key=errors.__getitem__)
    weight = vectors @ (projected / (eigenvalues + best)[:, None])
    right = 0
    for rows, their in zip(queries.split(ROWS), truth.split(ROWS), strict=True):
        scores = ((rows.to(device).double() - mean) / std) @ weight + prior
        right += int((scores.argmax(1).cpu() == their).sum())
    return right / len(truth)


def shots(y: Tensor, count: int, seed: int = 0) -> Tensor:
    """Draw at most `count` images of every class, given classes `y` (n,). Return their indices, i64 (m,), sorted."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    by_class = order[y[order].argsort(stable=True)]
    starts = torch.searchsorted(y[by_class].contiguous(), y[by_class].contiguous())
    return by_class[torch.arange(len(y)) - starts < count].sort().values


@command("trainer.evaluate")
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__.split("\n")[0])
    parser.allow_abbrev = False
    parser.add_argument("what", help="a run's folder or a checkpoint; for --head sgd also timm:NAME")
    parser.add_argument("--train", required=True, help="labelled shards to fit on")
    parser.add_argument("--val", required=True, help="labelled shards to score")
    parser.add_argument("--untrained", type=int, metavar="SEED", help="evaluate random weights of this seed only")
    parser.add_argument("--size", type=int, help="side of the images, in pixels (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--features", type=Path, help="folder for stored features (default: beside the checkpoint)")
    heads.add_arguments(parser)
    parser.add_argument("--wd", type=float, nargs="+", help="weight decays, one head per --lr and --wd (--head sgd)")
    parser.add_argument("--out", type=Path, help="folder of the run of --head sgd (default: beside the checkpoint)")
    args, rest = parser.parse_known_args(argv)

    check(args)
    path = Path(args.what)
    run = path if path.is_dir() else path.parent
    if args.head == "sgd":
        heads.classify(args, rest, args.out or run / "linear", *labelled(args.train, args.val))
        return
    heads.refuse(args, rest, "lr", "wd", "out")
    if args.what.startswith(("timm:", "released:", "random:")):
        raise ValueError(f"{args.what}: name a run's folder or a checkpoint; only --head sgd takes others")
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size {args.size}: it must be positive")
    method: Any = checkpoint.restore(checkpoint.load(path))
    size = trained_size(method) if args.size is None else args.size
    train, val = labelled(args.train, args.val)
    options = {"size": size, "batch_size": args.batch_size, "device": args.device}
    options |= {"folder": args.features or run / "features", "mean": method.mean, "std": method.std}
    result = {
        "size": size,
        "train_images": len(train),
        "val_images": len(val),
        "classes": int(train.table["label"].max()) + 1,
    }
    if args.untrained is None:
        result |= score(method.backbone(), train, val, "trained", options)
    torch.manual_seed(args.untrained or 0)
    random = score(type(method)(method.cfg).backbone(), train, val, "random weights", options)
    if args.untrained is None:
        result["untrained"] = random
        if path.is_dir():
            with suppress(OSError):  # the folder may not be writable; the result is printed anyway
                host.write_atomic(run / "evaluate.json", json.dumps(result).encode())
    warn_if_same("trainer.evaluate", train, val)
    print(json.dumps(result if args.untrained is None else result | random))


def score(backbone: Any, train: ShardSet, val: ShardSet, title: str, options: dict[str, Any]) -> dict[str, float]:
    """Return the three accuracies of a backbone, and print them with its title. `options` are those of `stored`."""
    device, sets = options["device"], ((train, "training images"), (val, "images to score"))
    backbone = backbone.to(device)
    x, y = (stored(backbone, shards, title=f"{title}: {what}", **options) for shards, what in sets)
    few = shots(x[1], 10)
    found = {
        "knn": knn_accuracy(x, y, device=device),
        "ridge": ridge_accuracy(x, y, device=device),
        "ten_shot": ridge_accuracy((x[0][few], x[1][few]), y, device=device),
    }
    text = f"k-NN {found['knn']:.1%}, linear probe (ridge) {found['ridge']:.1%}, 10-shot {found['ten_shot']:.1%}"
    print(f"{title}: {text} of {len(val):,} images", flush=True)
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
