"""Learning rates as functions of the step."""

import math
from collections.abc import Callable
from functools import partial

from trainer.config import Optim


def of(cfg: Optim, batch_size: int, steps_per_epoch: float, total: int) -> Callable[[int], float]:
    """Return the function from step to learning rate for a run of `total` steps."""
    peak, warmup = cfg.lr * batch_size / cfg.lr_batch, round(cfg.warmup_epochs * steps_per_epoch)
    shape = partial(warmup_poly, power=cfg.power) if cfg.schedule == "poly" else warmup_cosine
    return partial(shape, total=total, warmup=warmup, peak=peak, final=cfg.final_lr * peak)


def warmup_cosine(step: int, *, total: int, warmup: int, peak: float, final: float) -> float:
    """Return the learning rate at `step`: linear from 0 to `peak` over `warmup` steps, then half a cosine to `final`.

    The cosine ends at `total`; later steps get `final`. Both published runs use this schedule: LOCA with final = 0.01
    peak (released code), VICRegL with final = 0.001 peak.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warmup) / max(1, total - warmup))))
    return (final + (peak - final) * cosine) * (min(1.0, step / warmup) if warmup else 1.0)


def warmup_poly(step: int, *, total: int, warmup: int, peak: float, final: float, power: float) -> float:
    """Return the learning rate at `step`: linear warm-up to `peak`, then ``final + (peak - final) * (1 - t)**power``.

    Segmentation uses it: power 0.9 without warm-up in Segmenter, power 1 with 1,500 warm-up steps in VICRegL's heads.
    """
    left = 1 - min(1.0, max(0, step - warmup) / max(1, total - warmup))
    return (final + (peak - final) * left**power) * (min(1.0, step / warmup) if warmup else 1.0)
