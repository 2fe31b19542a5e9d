"""Linear heads on a frozen backbone by SGD, several at once: `--head sgd` of `trainer.segment` and `trainer.evaluate`.

Each is a run of the method `heads` or `linear` in run.py's own loop: it goes on where it was stopped, runs under
torchrun, and takes run.py's settings.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import Loader, ShardSet, host, recipes
from trainer import config, downstream, parallel
from trainer.segmentation import sliding
from trainer.segmentation.labelled import Labelled, class_names

WARMUP = 1500  # steps of both recipes for segmentation; a tenth of a run that is shorter than ten times that
LEARNING_RATES = (0.02, 0.1, 0.3, 1.0)  # of classification: VICRegL's for its ResNet-50 is 0.02, for its ConvNeXts 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", choices=("sgd",), help="linear heads by SGD, in a run; further options are run.py's")
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates, a head each (--head sgd)")


def refuse(options: argparse.Namespace, rest: list[str], *own: str) -> None:
    """Raises UsageError for options that mean nothing without ``--head sgd``: `own` ones, and run.py's in `rest`."""
    for name in own:
        if getattr(options, name) is not None:
            raise config.UsageError(f"--{name} belongs to --head sgd")
    for name in config.options(rest):
        raise config.UsageError(f"unknown option '--{name}': settings of run.py belong to --head sgd")


def segment(options: argparse.Namespace, rest: list[str], out: Path) -> None:
    """Trains the heads that `trainer.segment` is asked for, scores them, and prints a table and a line of JSON."""
    train, val = Labelled(options.train), Labelled(options.val)
    names = class_names(train, val)
    given = {"method": "heads", "shards": options.train, "out": str(out / f"heads_{options.recipe}")}
    given |= downstream.settings("heads", options.what)
    given |= {"heads.classes": len(names)} | _recipe(options.recipe, given["heads.backbone"])
    given |= downstream.options(rest, "heads.classes", "heads.scales", "optim.lr_batch")
    first = config.resolve(given)
    cfg = first.run
    lrs = _lrs(options.lr or [cfg.optim.lr])
    steps = cfg.steps or 1
    warmup = min(WARMUP, steps // 10) if cfg.optim.warmup_epochs else 0
    given |= {"optim.lr": lrs[0], "optim.lr_batch": cfg.batch_size, "heads.scales": [lr / lrs[0] for lr in lrs]}
    given["optim.warmup_epochs"] = warmup * cfg.batch_size / len(train)
    method = _trained(given, options)
    with downstream.ranks() as device:
        figures = sliding.score(method, val, device, show="scoring" if parallel.rank() == 0 else None)
        results = {f"{lr:g}": one.result(names) for lr, one in zip(lrs, figures, strict=True)}
    _report(out / f"heads_{options.recipe}", results, "miou", {"recipe": options.recipe, "images": len(val)})


def _recipe(recipe: str, backbone: str) -> dict[str, str]:
    """The preset of a recipe. Raises ValueError for a backbone that VICRegL's does not know."""
    if recipe == "dinov3":
        return {}
    if backbone.removeprefix("timm:").startswith("convnext"):
        return {"config": "heads_vicregl"}
    if backbone.removeprefix("timm:").startswith("resnet"):
        return {"config": "heads_vicregl_resnet50"}
    raise ValueError(f"--recipe vicregl is for ConvNeXts and ResNets, not for {backbone}: take dinov3")


def classify(options: argparse.Namespace, rest: list[str], out: Path) -> None:
    """Trains the heads that `trainer.evaluate` is asked for, scores them, and prints a table and a line of JSON."""
    train, val = ShardSet(options.train), ShardSet(options.val)
    if min(train.table["label"].min(), val.table["label"].min()) < 0:
        raise ValueError("--train or --val holds images without a class; a classification needs one for each")
    classes = int(max(train.table["label"].max(), val.table["label"].max())) + 1
    given = {"method": "linear", "shards": options.train, "out": str(out)}
    size = options.size or 224
    given |= {"linear.classes": classes, "linear.views.size": size}
    given |= downstream.settings("linear", options.what)
    given |= downstream.options(rest, "linear.classes", "linear.scales", "linear.decays", "optim.lr_batch")
    lrs = _lrs(options.lr or list(LEARNING_RATES))
    cfg = config.resolve(given).run
    decays = options.wd or [cfg.optim.weight_decay]
    if min(decays) < 0:
        raise ValueError(f"--wd {min(decays):g}: it must not be negative")
    given |= {"optim.lr": lrs[0], "optim.lr_batch": cfg.batch_size}
    given |= {"linear.scales": [lr / lrs[0] for lr in lrs], "linear.decays": decays}
    method = _trained(given, options)
    with downstream.ranks() as device:
        found = accuracies(method, val, size, device)
    names = [f"lr {lr:g}, wd {decay:g}" for lr, decay in product(lrs, decays)]
    results = {name: {"top1": 100 * a, "top5": 100 * b} for name, (a, b) in zip(names, found.tolist(), strict=True)}
    _report(out, results, "top1", {"images": len(val), "classes": classes})


@torch.no_grad()
def accuracies(method: Any, val: ShardSet, size: int, device: torch.device, batch_size: int = 64) -> Tensor:
    """f64 (K, 2): the share of all images whose class each head names first, and among its first five."""
    method = method.to(device).eval()
    recipe = recipes.evaluation(size=size, resize=size * 256 // 224, patch=1)
    sharing: dict[str, Any] = {"rank": parallel.rank(), "world_size": parallel.world_size(), "device": device}
    loader = Loader(val, recipe, batch_size, shuffle=False, drop_last=False, **sharing)
    right = torch.zeros(len(method.heads), 2, dtype=torch.float64, device=device)
    for batch in loader:
        if not len(batch.index):  # the ranks share the last batch
            continue
        label = batch.label.to(device)[:, None]
        for head, logits in enumerate(method.logits(batch.views["image"].pixels.to(device))):
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == label
            right[head] += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
    loader.close()
    return (parallel.sum_over_ranks_(right) / len(val)).cpu()


def _lrs(lrs: list[float]) -> list[float]:
    if min(lrs) <= 0 or len(set(lrs)) < len(lrs):
        raise ValueError(f"--lr {lrs}: learning rates are positive, and each is named once")
    return lrs


def _trained(given: dict[str, Any], options: argparse.Namespace) -> Any:
    begin = downstream.origin(options.what, options.untrained)
    first = Path(f"{given['out']}.start.pt")
    method = downstream.train(given, begin, first)
    if downstream.rank() == 0:
        first.unlink(missing_ok=True)
    return method


def _report(out: Path, results: dict[str, dict[str, Any]], figure: str, more: dict[str, Any]) -> None:
    """A line for each head, and the best one in front of all in the JSON object."""
    if downstream.rank() > 0:
        return
    numbers = [name for name, value in results[next(iter(results))].items() if isinstance(value, float)]
    print(downstream.table(results, numbers))
    best = max(results, key=lambda name: results[name][figure])
    summary = {"head": "sgd", figure: results[best][figure], "best": best}
    summary |= {"chosen_on": "val" if len(results) > 1 else None, **more, "heads": results}
    host.write_atomic(out / "result.json", json.dumps(summary, indent=2).encode() + b"\n")
    print(json.dumps(summary))
