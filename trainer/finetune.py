"""Fine-tune a backbone for semantic segmentation, end to end with one linear layer, and score it as in LOCA's tables.

    python -m trainer.finetune runs/loca --train SPEC --val SPEC --out DIR             a run's folder, or a checkpoint
    python -m trainer.finetune released:FILE --train SPEC --val SPEC --out DIR --config finetune_cityscapes
    python -m trainer.finetune timm:NAME ... --lr 8e-5 1e-4 3e-4 8e-4 --seeds 5        a sweep, then the best five times
    python -m trainer.finetune random:vit_small_patch16 ...                            from random weights
    python -m trainer.finetune runs/loca ... --fraction 1/32 --subset 0 1 2 3 4        few-shot, five subsets
    torchrun --nproc_per_node=8 -m trainer.finetune ...                                on eight GPUs

SPEC names shards of images with label maps (tools/shard_segmentation.py makes them). Each training is a run of the
method "finetune" in run.py's own loop, with its folder, log, checkpoints and exit codes. The same command resumes a
stopped training. All settings of run.py are accepted, such as --steps 1000 or --finetune.views.size 768. One training
writes to DIR, several write to subfolders. The last line is a JSON object. docs/finetune.md lists what the protocol
leaves open.

Of several learning rates, the best one on the --val images is reported, as in the papers. The last line says so.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import host
from trainer import config, downstream, parallel
from trainer.command import command
from trainer.segmentation import sliding
from trainer.segmentation.labelled import Labelled, class_names

FLOOR = 1e-5  # final learning rate, unless the peak is lower


@dataclass(frozen=True)
class Job:
    """One training of a sweep."""

    lr: float
    seed: int
    subset: int | None

    @property
    def name(self) -> str:
        subset = f"_subset_{self.subset}" if self.subset is not None else ""
        return f"lr_{self.lr:g}_seed_{self.seed}{subset}"


@command("trainer.finetune")
def main(argv: list[str]) -> None:
    options, rest = arguments(argv)
    more = downstream.options(rest, "finetune.classes", "optim.final_lr", "optim.lr_batch")
    train, val = Labelled(options.train), Labelled(options.val)
    names = class_names(train, val)
    settings = more | {"finetune.classes": len(names), "shards": options.train, "method": "finetune"}
    if options.config:
        settings["config"] = options.config
    settings |= downstream.settings("finetune", options.what)
    first, begin = config.resolve(settings), downstream.origin(options.what)
    lrs = options.lr or [first.run.optim.lr]
    subsets = (options.subset or [0]) if options.fraction else [None]
    every = list(product(subsets, range(first.run.seed, first.run.seed + options.seeds)))
    together = len(lrs) * len(every) > 1
    results: dict[str, dict[str, Any]] = {}

    def done(lr: float, subset: int | None, seed: int) -> dict[str, Any]:
        job = Job(lr, seed, subset)
        if job.name in results:
            return results[job.name]
        out = options.out / job.name if together else options.out
        own = settings | {"out": str(out), "seed": seed, "optim.lr": lr, "optim.final_lr": FLOOR / max(lr, FLOOR)}
        own["optim.lr_batch"] = first.run.batch_size
        if subset is not None:
            own["only"] = str(few(train, options.fraction, subset, options.out))
        results[job.name] = one(own, begin, val, names, options.out / f"start_{seed}.pt")
        return results[job.name]

    multilabel = first.method.objective == "multilabel"
    figures = ("multilabel_map",) if multilabel else ("miou", "localisation_miou", "multilabel_map")
    sweep = [done(lr, *every[0])[figures[0]] for lr in lrs]
    best = lrs[int(np.argmax(sweep))]
    repeated = [done(best, *some) for some in every]
    if downstream.rank() > 0:
        return
    for path in options.out.glob("start_*.pt"):
        path.unlink()
    if together:
        print(downstream.table(results, figures))
    spread = {f"{name}_std": float(np.std([r[name] for r in repeated], ddof=1)) for name in figures if len(every) > 1}
    summary: dict[str, Any] = {name: float(np.mean([r[name] for r in repeated])) for name in figures} | spread
    summary |= {"lr": best, "chosen_on": "val" if len(lrs) > 1 else None, "runs": len(every)}
    summary |= {"fraction": str(options.fraction) if options.fraction else None, "images": len(val)}
    summary |= {"per_class": repeated[0]["per_class"], "all": {name: r[figures[0]] for name, r in results.items()}}
    print(json.dumps(summary))


def one(
    settings: dict[str, Any], begin: dict[str, Any], val: Labelled, names: list[str], first: Path
) -> dict[str, Any]:
    """Train and score one job. Return its figures, which result.json in its folder keeps for later calls."""
    resolved, out = config.resolve(settings), Path(settings["out"])
    key = {"settings": resolved.text, "origin": begin, "val": val.shards.fingerprint}
    result = out / "result.json"
    if result.is_file() and (kept := json.loads(result.read_text(encoding="utf-8"))).items() >= key.items():
        return kept["figures"]
    method = downstream.train(settings, begin, first, size=resolved.method.views.size)
    with downstream.ranks() as device:
        show = f"scoring {out.name}" if parallel.rank() == 0 else None
        figures = sliding.score(method, val, device, show=show)[0].result(names)
        if parallel.rank() == 0:
            host.write_atomic(result, json.dumps({**key, "figures": figures}, indent=2).encode() + b"\n")
    return figures


def few(data: Labelled, fraction: Fraction, subset: int, out: Path) -> Path:
    """Write the image names of a subset, one per line, to a file in `out` and return its path.

    Subsets of the same number are nested: a smaller fraction is a part of every larger one.
    """
    order = np.random.default_rng(subset).permutation(len(data))
    count = int(len(data) * fraction)
    if not count:
        raise ValueError(f"--fraction {fraction}: this is less than one of the {len(data)} images")
    path = out / f"subset_{subset}_{fraction.numerator}_of_{fraction.denominator}.txt"
    if downstream.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        host.write_atomic(path, "".join(f"{data.shards.key(i)}\n" for i in order[:count].tolist()).encode())
    return path


def share(text: str) -> Fraction:
    """Parse the value of --fraction."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction, such as 1/32") from None


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.allow_abbrev = False  # --seed is run.py's
    parser.add_argument("what", help="a run's folder, a checkpoint, timm:NAME, released:FILE or random:NAME")
    parser.add_argument("--train", required=True, help="shards of images with label maps, to train on")
    parser.add_argument("--val", required=True, help="shards of images with label maps, to score")
    parser.add_argument("--out", required=True, type=Path, help="folder of the training; several get subfolders")
    parser.add_argument("--config", help="a preset (finetune_NAME for each of LOCA's data sets) or a YAML file")
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates to try (default: the preset's)")
    parser.add_argument("--seeds", type=int, default=1, help="number of trainings at the best lr (successive seeds)")
    parser.add_argument("--fraction", type=share, help="fraction of the training images to use, such as 1/32")
    parser.add_argument("--subset", type=int, nargs="+", metavar="SEED", help="seeds that choose them (default: 0)")
    options, rest = parser.parse_known_args(argv)
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: it must be positive")
    if odd := [lr for lr in options.lr or [] if not 0 < lr < 1]:
        raise ValueError(f"--lr {odd[0]:g}: it must lie between 0 and 1")
    if options.subset and not options.fraction:
        raise ValueError("--subset needs --fraction, the fraction of images to choose, such as 1/32")
    if min(options.subset or [0]) < 0:
        raise ValueError(f"--subset {min(options.subset)}: a seed must not be negative")
    if options.fraction is not None and not 0 < options.fraction <= 1:
        raise ValueError(f"--fraction {options.fraction}: it must lie in (0, 1]")
    return options, rest


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
