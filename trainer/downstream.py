"""Shared code of the programs that train on top of a trained backbone: `finetune`, and `--head sgd` of `segment` and
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
    """Parse run.py's settings in `rest`. Raises UsageError for settings in `decided` and others that programs set."""
    found = config.options(rest)
    for name in ("method", "shards", "init", *decided):
        if name in found:
            raise config.UsageError(f"--{name}: this program decides it; leave it out")
    return found


def settings(method: str, what: str) -> dict[str, Any]:
    """Return the settings of `method` that follow from the backbone, such as its name and mean, by dotted name.

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
    """Write a checkpoint for step 0: the backbone's weights, and heads initialised with the run's seed.

    If `size` is given, a ViT's position grid is resized once to images of that side. If the seed `untrained` is given,
    the backbone has random weights. Raises ValueError.
    """
    name = resolved.run.method
    torch.manual_seed(resolved.run.seed)
    method: Any = methods.load(name).Method(resolved.method)
    method.encoder.load_state_dict(frozen.load(what, untrained=untrained, size=size).backbone.state_dict())
    payload = {"step": 0, "method": name, "config": resolved.text, "model": method.state_dict()}
    checkpoint.write(path, payload)


def origin(what: str, untrained: int | None = None) -> dict[str, Any]:
    """Return what identifies the initial weights of a training: names, and a fingerprint. Raises ValueError."""
    random = what.startswith("random:")
    weights = None if random else fingerprint(frozen.load(what, untrained=untrained).backbone)
    return {"what": what, "untrained": untrained, "weights": weights}


def train(given: dict[str, Any], begin: dict[str, Any], first: Path, *, size: int | None = None) -> Any:
    """Train the method that the settings `given` describe, from the weights of `begin` (see `origin`), and return it.

    Every rank gets the method. A call resumes an earlier one that was stopped. `first` is the file for the initial
    weights. Raises ValueError if the folder holds a training from other initial weights; also Stopped, UsageError and
    RunError.
    """
    begins, out = begin["weights"] is not None, Path(given["out"])
    with ranks(), parallel.agreed():  # other ranks wait until rank 0 has written
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
    with ranks(), parallel.agreed():  # a barrier: rank 0 has written its last checkpoint
        pass
    return checkpoint.restore(checkpoint.load(out))


def table(results: dict[str, dict[str, Any]], figures: Sequence[str]) -> str:
    """Format a table with a line for each training or head and a column for each of `figures`."""
    width = max(map(len, results))
    lines = [f"{'':{width}}" + "".join(f" {name:>18}" for name in figures)]
    for name, found in results.items():
        lines.append(f"{name:{width}}" + "".join(f" {found[figure]:18.2f}" for figure in figures))
    return "\n".join(lines)


@contextmanager
def ranks() -> Iterator[torch.device]:
    """Yield the device of this process, connected to the other ranks. The block must contain a collective."""
    device = parallel.connect()
    try:
        yield device
    finally:
        parallel.disconnect()


def rank() -> int:
    """Return the rank of this process, even without a connection."""
    return int(os.environ.get("RANK", "0"))
