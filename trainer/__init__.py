"""Pretraining and evaluation of LOCA and VICRegL: `run.py`, the programs beside it, and `load` for code of your own."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load(run_or_checkpoint: str | Path) -> "nn.Module":
    """The trained backbone of a run's folder or of a checkpoint, in evaluation mode; of an EMA teacher if there is one.

    It takes f32 (B, 3, H, W), normalised as `pipeline.View.tensor` does by default, and gives patch features (B, N, D).
    Raises ValueError for what is no checkpoint.
    """
    from trainer import checkpoint  # torch takes seconds to load: only where it is needed

    return checkpoint.restore(checkpoint.load(Path(run_or_checkpoint))).backbone().eval()
