"""Pretraining and evaluation of LOCA and VICRegL: command-line programs, and the functions `train` and `load`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from trainer.folder import Result

if sys.argv[0] == "-m":  # ``python -m trainer.PROGRAM`` imports this package first, before torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see run.main for the reason


def train(
    method: str | None = None, shards: str | Path | None = None, out: str | Path | None = None, **settings: Any
) -> "Result":
    """Run the same training as ``run.py --method METHOD --shards SHARDS --out OUT ...``. The settings have equal names.

    Pass a nested setting by its dotted name or as a mapping: ``**{"optim.lr": 1e-3}`` or ``optim={"lr": 1e-3}``.
    ``config`` names a preset or a file. Like the command, it writes to OUT, resumes from the last checkpoint there, and
    handles SIGTERM, SIGINT and SIGUSR1 while it trains. Call it from the main thread. Raises
    trainer.config.UsageError where the command would exit with code 2, and RunError where it would exit with code 1.
    """
    import signal

    from trainer import config, run
    from trainer.interrupt import SIGNALS

    named = {"method": method, "shards": shards, "out": out}
    for key, value in named.items():
        if value is not None and not isinstance(value, str | os.PathLike):
            raise config.UsageError(f"{key} is {value!r}: it must be text or a path")
    options = config.flat(settings) | {key: str(value) for key, value in named.items() if value is not None}
    config.check_paths(options)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        return run.start(config.resolve(options))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def load(run_or_checkpoint: str | Path) -> "nn.Module":
    """Return the trained backbone from a run's folder or a checkpoint file, in evaluation mode.

    A method with an EMA teacher yields the teacher's backbone. The input is f32 (B, 3, H, W), normalised as
    `pipeline.View.tensor` does by default; the output is patch features (B, N, D), after a CLS token if the backbone
    has one. A backbone fine-tuned from ``timm:NAME`` is timm's own module, with timm's output. Raises ValueError if
    there is no readable checkpoint.
    """
    from trainer import checkpoint  # imported here because torch takes seconds to load

    return checkpoint.restore(checkpoint.load(Path(run_or_checkpoint))).backbone().eval()
