"""Signals and time limits that ask a run to stop."""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE = 3.0  # seconds: an earlier second SIGINT is the same Ctrl-C, passed on by both terminal and launcher
MESSAGE = b"\nstopping after this step, with a checkpoint; Ctrl-C again, some seconds later, ends at once without one\n"


class Interrupt:
    """Records that a signal or the time limit `stop_after` (minutes) asks the run to stop after a checkpoint.

    Further signals are ignored, since schedulers and launchers send several. Only a SIGINT more than PATIENCE seconds
    after the first one ends the process at once, without a checkpoint.
    """

    def __init__(self, stop_after: float | None) -> None:
        self._deadline = time.monotonic() + 60 * stop_after if stop_after is not None else None
        self._asked = False
        self._ctrl_c: float | None = None  # time of the first SIGINT
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self._asked and os.environ.get("RANK", "0") == "0":
            os.write(2, MESSAGE)  # print may deadlock
        self._asked = True
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._ctrl_c is not None and now - self._ctrl_c > PATIENCE:
                os._exit(128 + number)
            if self._ctrl_c is None:
                self._ctrl_c = now

    def stop(self) -> bool:
        """Return whether this process should stop."""
        return self._asked or (self._deadline is not None and time.monotonic() > self._deadline)
