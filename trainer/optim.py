"""The optimizers, and the record of steps that were skipped for a non-finite loss or gradient."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trainer.config import Optim, RunError
from trainer.method import Method

STATES = {"adamw": 2, "lars": 1, "sgd": 1}  # numbers of optimizer state per trainable parameter


def build(cfg: Optim, method: Method) -> torch.optim.Optimizer:
    """Build the optimizer over the method's parameter groups. The caller sets the learning rate before each step."""
    groups = method.parameter_groups(cfg.weight_decay)
    if cfg.name == "lars":
        from trainer.lars import LARS

        return LARS(groups, lr=0.0, momentum=cfg.betas[0])
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=cfg.betas[0], fused=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.betas, eps=1e-8, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups. A group's "lr_scale" multiplies it: the heads of a sweep have one each."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class Guard:
    """Counts skipped steps, writes their samples to skipped.jsonl, and fails the run after `limit` of them in a row."""

    def __init__(self, out: Path, limit: int) -> None:
        self.skipped = 0
        self._file, self._limit, self._in_a_row = out / "skipped.jsonl", limit, 0
        self._seen: list[tuple[Tensor, Tensor]] = []

    def add(self, finite: Tensor, index: Tensor) -> None:
        """Store a step's flag (0-d bool, on the device) and its samples (B,) without waiting for the device."""
        self._seen.append((finite, index))

    def check(self, step: int, key: Callable[[int], str]) -> None:
        """Read the flags stored up to `step`; waits for the device. Raises RunError at the limit."""
        flags = torch.stack([finite for finite, _ in self._seen]).tolist()
        for i, (finite, (_, index)) in enumerate(zip(flags, self._seen, strict=True)):
            self._in_a_row = 0 if finite else self._in_a_row + 1
            if not finite:
                self.skipped += 1
                try:
                    record = {"step": step - len(flags) + i + 1, "keys": [key(j) for j in index.tolist()]}
                    with self._file.open("a", encoding="utf-8") as file:  # every rank appends whole lines
                        file.write(json.dumps(record) + "\n")
                except OSError as error:
                    warnings.warn(f"{self._file}: {error}; the run continues", stacklevel=2)
            if self._in_a_row >= self._limit:
                raise RunError(f"{self._limit} steps in a row had a non-finite loss or gradient; see {self._file}")
        self._seen = []
