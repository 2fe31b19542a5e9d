"""What the programs share that train on top of a trained backbone: `finetune`, and the SGD heads of `segment` and
`evaluate`. Each training is a run of a method in run.py's own loop.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import trainer
from pipeline import host
from trainer import checkpoint, config, methods, parallel
from trainer.command import Stopped
from trainer.segmentation import frozen
from trainer.stored import fingerprint


def options(rest: list[str], *decided: str) -> dict[str, Any]:
    """The settings of run.py in `rest`. Raises UsageError for one that a program decides: also those of `decided`."""
    found = config.options(rest)
    for name in ("method", "shards", "init", *decided):
        if name in found:
            raise config.UsageError(f"--{name}: this program decides it; leave it out")
    return found


def settings(method: str, what: str) -> dict[str, Any]:
    """The settings of `method` that a backbone decides, by dotted name: what it is called, how its images are prepared.

    `what` is a run's folder, a checkpoint, ``released:FILE``, ``timm:NAME``, or ``random:NAME``. Raises ValueError.
    """
    kind, _, rest = what.partition(":")
    if kind == "random":
        found: dict[str, Any] = {"backbone": rest}
    elif kind == "timm":
        pretrained = frozen.load(what, untrained=0)
        found = {"backbone": what, "mean": pretrained.mean, "std": pretrained.std}
    else:
        trained: Any = frozen.trained(what)
        network = trained.backbone()
        found = {"backbone": trained.cfg.backbone, "mean": trained.mean, "std": trained.std}
        if not found["backbone"].startswith("timm:"):
            found["cls_token"] = bool(getattr(network, "num_prefix_tokens", 0))
        if method != "finetune" and hasattr(network, "grid"):
            found["size"] = network.grid * network.patch
    return {f"{method}.{name}": list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def write_start(
    path: Path, what: str, resolved: config.Settings, *, size: int | None, untrained: int | None = None
) -> None:
    """A checkpoint before the first step: the backbone's weights, and heads that the run's seed draws.

    The position grid of a ViT is resized once to images of side `size`, where that is given. With `untrained`, a seed,
    the backbone has random weights. Raises ValueError.
    """
    name = resolved.run.method
    torch.manual_seed(resolved.run.seed)
    method: Any = methods.load(name).Method(resolved.method)
    method.encoder.load_state_dict(frozen.load(what, untrained=untrained, size=size).backbone.state_dict())
    payload = {"step": 0, "method": name, "config": resolved.text, "model": method.state_dict()}
    checkpoint.write(path, payload)


def origin(what: str, untrained: int | None = None) -> dict[str, Any]:
    """What tells a training's beginning from others: the name and the weights. Raises ValueError."""
    random = what.startswith("random:")
    weights = None if random else fingerprint(frozen.load(what, untrained=untrained).backbone)
    return {"what": what, "untrained": untrained, "weights": weights}


def train(given: dict[str, Any], begin: dict[str, Any], first: Path, *, size: int | None = None) -> Any:
    """The method that the settings `given` describe, trained from an `origin`; every rank gets it.

    It goes on where an earlier call was stopped; `first` holds the first weights until then. Raises ValueError for a
    folder of a training that began elsewhere, Stopped, UsageError and RunError.
    """
    begins, out = begin["weights"] is not None, Path(given["out"])
    with ranks(), parallel.agreed():  # the others wait for what rank 0 writes
        if parallel.rank() == 0:
            path = out / "origin.json"
            if path.exists() and json.loads(path.read_text(encoding="utf-8")) != begin:
                raise ValueError(f"--out {out}: holds a training that began with other weights; name another folder")
            out.mkdir(parents=True, exist_ok=True)
            host.write_atomic(path, json.dumps(begin).encode() + b"\n")
            if begins and not first.exists():
                write_start(first, begin["what"], config.resolve(given), size=size, untrained=begin["untrained"])
    if trainer.train(**given, **({"init": str(first)} if begins else {})).state == "stopped":
        raise Stopped
    with ranks(), parallel.agreed():  # rank 0 has written its last checkpoint when it comes here
        pass
    return checkpoint.restore(checkpoint.load(out))


def table(results: dict[str, dict[str, Any]], figures: Sequence[str]) -> str:
    """A line for each training or head, with its figures."""
    width = max(map(len, results))
    lines = [f"{'':{width}}" + "".join(f" {name:>18}" for name in figures)]
    for name, found in results.items():
        lines.append(f"{name:{width}}" + "".join(f" {found[figure]:18.2f}" for figure in figures))
    return "\n".join(lines)


@contextmanager
def ranks() -> Iterator[torch.device]:
    """The device of this process, connected to the other ranks inside, where they meet at least once."""
    device = parallel.connect()
    try:
        yield device
    finally:
        parallel.disconnect()


def rank() -> int:
    """This process's rank, connected or not."""
    return int(os.environ.get("RANK", "0"))
