"""Pretraining and evaluation of LOCA and VICRegL: programs, and `train` and `load` for code of your own."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from trainer.folder import Result

if sys.argv[0] == "-m":  # of ``python -m trainer.PROGRAM``, before that is found: torch is not loaded yet
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # run.py says why


def train(
    method: str | None = None, shards: str | Path | None = None, out: str | Path | None = None, **settings: Any
) -> "Result":
    """What ``run.py --method METHOD --shards SHARDS --out OUT ...`` does, with the same settings by the same names.

    Nested ones by their dotted names, or as mappings: ``**{"optim.lr": 1e-3}`` or ``optim={"lr": 1e-3}``; ``config``
    names a preset or a file. Like the command it resumes, listens to SIGTERM, SIGINT and SIGUSR1 while it trains, and
    writes to OUT. Call it from the main thread. Raises trainer.config.UsageError where the command ends with 2, and
    RunError where it ends with 1.
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
    """The trained backbone of a run's folder or of a checkpoint, in evaluation mode; of an EMA teacher if there is one.

    It takes f32 (B, 3, H, W), normalised as `pipeline.View.tensor` does by default, and gives patch features (B, N, D).
    Raises ValueError for what is no checkpoint.
    """
    from trainer import checkpoint  # torch takes seconds to load: only where it is needed

    return checkpoint.restore(checkpoint.load(Path(run_or_checkpoint))).backbone().eval()
