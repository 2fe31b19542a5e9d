"""Evaluate a backbone's frozen patch features by semantic segmentation, with k-NN and logistic regression.

    python -m trainer.segment runs/loca --train SPEC --val SPEC                 a run's folder, or a checkpoint
    python -m trainer.segment runs/loca --train SPEC --val SPEC --untrained 0   the same network with random weights
    python -m trainer.segment timm:vit_small_patch14_dinov2 --train SPEC ...    any backbone that timm has
    python -m trainer.segment released:FILE --train SPEC --val SPEC             weights that LOCA or VICRegL published
    python -m trainer.segment runs/loca ... --head sgd --lr 3e-4 1e-3           linear heads trained by SGD instead

SPEC names shards of images with label maps (tools/shard_segmentation.py makes them). Features are computed once and
stored. The probes, and the floors to compare them with, are fitted on the training images. The penalty is chosen on
held-out training images. Scores of patches are interpolated to the size of the label map. mIoU is computed from one
confusion matrix over all images. The last line is a JSON object. docs/evaluation.md explains the figures.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.host import write_atomic
from trainer import heads
from trainer.command import check, command, warn_if_same
from trainer.segmentation import frozen, probes
from trainer.segmentation.features import Features, extract
from trainer.segmentation.labelled import Labelled, class_names
from trainer.segmentation.metric import Confusion, Scores, evaluate, label_map, percent
from trainer.segmentation.pictures import panels
from trainer.segmentation.presence import multilabel

PICTURES = 8
FLOORS = ("constant", "prior", "colour_position")


@command("trainer.segment")
def main(argv: list[str]) -> None:
    options, rest = arguments(argv)
    check(options)
    if options.head == "sgd":
        heads.segment(options, rest, options.out or folder(options.what))
        return
    heads.refuse(options, rest, "lr")
    if options.memory < 1 or (options.size is not None and options.size < 1):
        raise ValueError("--size and --memory must be positive")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU has the precision of the stored f16 features
    train, val = Labelled(options.train), Labelled(options.val)
    network = frozen.load(options.what, untrained=options.untrained)
    network = network._replace(layers=tuple(options.layers), norm=options.norm)
    network.backbone.to(options.device)
    names = class_names(train, val)
    count = len(names)
    out = options.out or folder(options.what)

    def features(data: Labelled, title: str) -> Features:
        return extract(network, data, count, short_side=options.size, cache=out / "features", show=title)

    seen, unseen = features(train, "training images"), features(val, "images to score")
    prior = probes.prior(train, count)
    linear, chosen = logistic(seen, train, count, options.device)
    presence = multilabel(seen, unseen)
    around = probes.Regression(probes.surroundings(seen), seen.shares)
    predictors = {
        "knn": probes.scores(probes.Neighbours(seen, options.memory, device=options.device), unseen, unseen.x),
        "logistic": probes.scores(linear, unseen, unseen.x),
        "constant": lambda j: prior.sum((1, 2), keepdim=True),
        "prior": lambda j: prior,
        "colour_position": probes.scores(around.probe(around.fit(1e-6)), unseen, probes.surroundings(unseen)),
        "ceiling": probes.scores(Tensor.float, unseen, unseen.shares),
    }
    found = evaluate(val, unseen.images, predictors, count, device=options.device, show="scoring")
    if not found["ceiling"].matrix.any():
        raise ValueError(f"{options.val}: no pixel has a label")
    figures = {name: figure(confusion, names) for name, confusion in found.items()}
    title = "trained" if options.untrained is None else f"untrained_{options.untrained}"
    draw(out / title, val, predictors["logistic"], names)
    warn_if_same("trainer.segment", train.shards, val.shards)
    print(table(figures, found["ceiling"], names))
    print(f"multi-label classification, by a linear layer on the mean patch: {presence['map']:.1f} mAP")
    grids = np.unique(unseen.grids, axis=0)
    result = {
        "knn": figures["knn"] | {"memory": options.memory},
        "logistic": figures["logistic"] | chosen,
        "floors": {floor: figures[floor]["miou"] for floor in FLOORS},
        "ceiling": figures["ceiling"]["miou"],
        "multilabel_map": presence["map"],
        "multilabel_penalty": presence["penalty"],
        "images": len(val),
        "train_images": len(train),
        "patches": [grids.min(0).tolist(), grids.max(0).tolist()],
        "channels": unseen.x.shape[1],
    } | {key: getattr(options, key) for key in "what train val size untrained layers norm device".split()}
    write_atomic(out / f"{title}.json", json.dumps(result, indent=2).encode() + b"\n")
    print(json.dumps(result))


def logistic(
    train: Features, data: Labelled, classes: int, device: str, seed: int = 0
) -> tuple[probes.Linear, dict[str, Any]]:
    """Fit the regression on all images. Choose the penalty on a tenth of them (at most 256), fitting the others.

    Penalties are tried from strong to weak, until one gains less than 0.1 mIoU. Raises ValueError for a single image.
    """
    order = np.random.default_rng(seed).permutation(len(train.images))
    held = np.sort(order[: min(256, max(1, len(order) // 10))])
    if len(held) == len(order):
        raise ValueError("one training image is too few: the penalty is chosen on images that are held out")
    train = probes.resident(train, device)
    without = torch.zeros(len(train.x), dtype=torch.bool)
    for j in held:
        without[train.rows(j)] = True
    regression = probes.Regression(train.x, train.shares, without=without, device=device)
    some = train._replace(start=train.start[held], grids=train.grids[held], images=train.images[held])
    tried: dict[str, float] = {}
    best, penalty, weight, start = -1.0, 0.0, None, None
    for candidate in probes.PENALTIES:
        weight = regression.fit(candidate, weight)
        predict = probes.scores(regression.probe(weight), some, train.x)
        miou = 100 * evaluate(data, some.images, {"": predict}, classes, device=device)[""].miou
        tried[f"{candidate:.0e}"] = miou
        print(f"penalty {candidate:.0e}: {miou:.2f} mIoU on {len(held)} held-out training images", flush=True)
        previous = best
        if miou > best:
            best, penalty, start = miou, candidate, weight
        if miou < previous + 0.1:
            break
    regression = probes.Regression(train.x, train.shares, device=device)
    return regression.probe(regression.fit(penalty, start)), {"penalty": penalty, "held_out": tried}


def figure(confusion: Confusion, names: list[str]) -> dict[str, Any]:
    """Return mIoU, its standard error over images, pixel accuracy and IoU per class, in percent; None if undefined."""
    return {
        "miou": 100 * confusion.miou,
        "miou_standard_error": percent(confusion.standard_error()),
        "pixel_accuracy": 100 * confusion.pixel_accuracy,
        "per_class": dict(zip(names, map(percent, confusion.iou.tolist()), strict=True)),
    }


def table(figures: dict[str, dict[str, Any]], truth: Confusion, names: list[str]) -> str:
    """Format all figures in percent: a line per class with its share of labelled pixels, mIoU, pixel accuracy."""
    width = max(map(len, (*names, "standard error")))
    lines = [
        f"{'IoU, %':{width}}   share" + "".join(f" {name.replace('_', '+'):>{max(9, len(name))}}" for name in figures)
    ]
    shares = 100 * truth.matrix.sum(1) / truth.matrix.sum()

    def line(title: str, share: str, values: list[float | None]) -> str:
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        return f"{title:{width}} {share:>7}" + "".join(
            f" {c:>{max(9, len(n))}}" for c, n in zip(cells, figures, strict=True)
        )

    for name, share in zip(names, shares.tolist(), strict=True):
        lines.append(line(name, f"{share:.1f}", [found["per_class"][name] for found in figures.values()]))
    rows = {"mIoU": "miou", "standard error": "miou_standard_error", "pixel accuracy": "pixel_accuracy"}
    for title, key in rows.items():
        lines.append(line(title, "", [found[key] for found in figures.values()]))
    return "\n".join(lines)


def draw(folder: Path, data: Labelled, predict: Scores, names: list[str]) -> None:
    """Write `panels` of up to PICTURES images, evenly spread over the set, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for j in np.linspace(0, len(data) - 1, min(PICTURES, len(data))).astype(int).tolist():
        truth = data.mask(j)
        predicted = label_map(predict(j), *truth.shape).cpu()
        path = folder / f"{data.shards.key(j).replace('/', '_')}.png"
        panels(data.image(j), truth, predicted, names).save(path)


def folder(what: str) -> Path:
    """Return the default of --out: a folder inside the run's folder, or one below ./segment."""
    return Path(what) / "segment" if Path(what).is_dir() else Path("segment") / Path(what.replace(":", "_")).name


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.segment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.allow_abbrev = False
    parser.add_argument("what", help="a run's folder, a checkpoint, timm:NAME or released:FILE")
    parser.add_argument("--train", required=True, help="shards of images with label maps, to fit on")
    parser.add_argument("--val", required=True, help="shards of images with label maps, to score")
    parser.add_argument("--size", type=int, help="short side in pixels (default: each image's own, at most 512)")
    parser.add_argument("--untrained", type=int, metavar="SEED", help="random weights instead, for comparison")
    parser.add_argument(
        "--out", type=Path, help="folder for results, pictures and features (default: segment/ in the run)"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[-1], help="blocks or stages whose maps are joined (default: the last)"
    )
    parser.add_argument(
        "--norm", action=argparse.BooleanOptionalAction, default=True, help="apply the final norm (default: yes)"
    )
    parser.add_argument("--memory", type=int, default=100_000, help="number of training patches for k-NN")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    heads.add_arguments(parser)
    parser.add_argument("--recipe", choices=("dinov3", "vicregl"), default="dinov3", help="heads' recipe (--head sgd)")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
