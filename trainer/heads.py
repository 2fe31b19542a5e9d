"""Linear heads, trained by SGD on a frozen backbone: `--head sgd` of `trainer.segment` and `trainer.evaluate`.

All heads are trained at once, in one run of the method `heads` or `linear` in run.py's own loop. It resumes after a
stop, works under torchrun, and takes run.py's settings.
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

WARMUP = 1500  # steps, in both segmentation recipes; at most a tenth of the run
LEARNING_RATES = (0.02, 0.1, 0.3, 1.0)  # for classification; VICRegL uses 0.02 for ResNet-50 and 0.3 for ConvNeXts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", choices=("sgd",), help="train linear heads by SGD; other options go to run.py")
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates, one head each (--head sgd)")


def refuse(options: argparse.Namespace, rest: list[str], *own: str) -> None:
    """Raise UsageError for options that require ``--head sgd``: those named in `own`, and run.py's in `rest`."""
    for name in own:
        if getattr(options, name) is not None:
            raise config.UsageError(f"--{name} belongs to --head sgd")
    for name in config.options(rest):
        raise config.UsageError(f"unknown option '--{name}': settings of run.py belong to --head sgd")


def segment(options: argparse.Namespace, rest: list[str], out: Path) -> None:
    """Train and score the heads of `trainer.segment --head sgd`. Print a table and a line of JSON."""
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
    """Return the preset of a recipe, as settings. Raises ValueError if VICRegL's recipe does not cover `backbone`."""
    if recipe == "dinov3":
        return {}
    if backbone.removeprefix("timm:").startswith("convnext"):
        return {"config": "heads_vicregl"}
    if backbone.removeprefix("timm:").startswith("resnet"):
        return {"config": "heads_vicregl_resnet50"}
    raise ValueError(f"--recipe vicregl is for ConvNeXts and ResNets, not for {backbone}: take dinov3")


def classify(options: argparse.Namespace, rest: list[str], out: Path, train: ShardSet, val: ShardSet) -> None:
    """Train and score the heads of `trainer.evaluate --head sgd`. Print a table and a line of JSON."""
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
    """Return f64 (K, 2): the top-1 and top-5 accuracy of each of K heads on all images, as fractions."""
    method = method.to(device).eval()
    recipe = recipes.evaluation(size=size, resize=size * 256 // 224, patch=1)
    sharing: dict[str, Any] = {"rank": parallel.rank(), "world_size": parallel.world_size(), "device": device}
    loader = Loader(val, recipe, batch_size, shuffle=False, drop_last=False, **sharing)
    right = torch.zeros(len(method.heads), 2, dtype=torch.float64, device=device)
    for batch in loader:
        if not len(batch.index):  # ranks share the last batch, so a rank's part may be empty
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
    """Print a table with a line per head, and the JSON object, which names the best head. Write the latter to `out`."""
    if downstream.rank() > 0:
        return
    numbers = [name for name, value in results[next(iter(results))].items() if isinstance(value, float)]
    print(downstream.table(results, numbers))
    best = max(results, key=lambda name: results[name][figure])
    summary = {"head": "sgd", figure: results[best][figure], "best": best}
    summary |= {"chosen_on": "val" if len(results) > 1 else None, **more, "heads": results}
    host.write_atomic(out / "result.json", json.dumps(summary, indent=2).encode() + b"\n")
    print(json.dumps(summary))
