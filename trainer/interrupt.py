"""Signals and time limits, agreed on by all ranks at the same step."""

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupt:
    """Asks once per step whether to stop. A first signal stops the run after a checkpoint, a second one at once.

    Ranks learn of a signal at different moments, so each step's answer is a small reduction on the host that travels
    while the device works and is read one step later: the ranks stop at the same step, and none of them waits.
    """

    def __init__(self, stop_after: float | None) -> None:
        self._deadline = time.monotonic() + 60 * stop_after if stop_after is not None else None
        self._asked = False
        self._vote: tuple[torch.Tensor, dist.Work] | None = None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True

    def stop(self) -> bool:
        """Whether to stop after this step: the same answer on every rank. To be called once per step."""
        asked = self._asked or (self._deadline is not None and time.monotonic() > self._deadline)
        if not dist.is_initialized():
            return asked
        agreed = False
        if self._vote:
            self._vote[1].wait()
            agreed = bool(self._vote[0].item())
        vote = torch.tensor(float(asked))
        self._vote = (vote, dist.all_reduce(vote, async_op=True))
        return agreed
