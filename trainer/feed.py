"""The batches of each training step. During a storage outage, all ranks wait and retry together."""

import itertools
import sys
import time
from collections.abc import Callable

from pipeline import Batch, Loader, ReadError, ShardError
from trainer import parallel

PAUSE = 10.0  # seconds between attempts; each attempt includes the reader's own retries
_CONTINUE, _WAIT, _STOP = range(3)


class Feed:
    """Returns `count` batches per call. `stop` tells whether this rank was asked to stop.

    In a storage outage, reading is retried for up to `patience` minutes. All ranks take part in every attempt, even
    those that have their batches. `failure` is the reason why there are no more batches: a longer outage, or too many
    bad samples.
    """

    def __init__(self, loader: Loader, count: int, patience: float, stop: Callable[[], bool]) -> None:
        self._loader, self._count, self._patience, self._stop = loader, count, 60 * patience, stop
        self._batches = loader.forever()
        self.failure: ReadError | ShardError | None = None

    def __call__(self, *, ends: bool, may_stop: bool) -> list[Batch]:
        """Return the next batches; [] on every rank if one of them gave up reading, has `ends`, or was asked to stop.

        A request to stop counts only if `may_stop`, or if the rank is waiting for its batches.
        """
        position, taken, end = self._loader.state_dict(), list[Batch](), 0.0
        while True:
            if not taken:
                try:
                    taken = list(itertools.islice(self._batches, self._count))
                    self.failure = None
                except (ReadError, ShardError) as error:
                    self._loader.load_state_dict(position)  # rewind: some of the batches may have been read
                    end = end if self.failure else self._announced(error)
                    self.failure = error
            ends |= (may_stop or not taken) and self._stop()
            ends |= not taken and time.monotonic() >= end
            state = parallel.largest(_STOP if ends else _CONTINUE if taken else _WAIT)
            if state != _WAIT:
                return taken if state == _CONTINUE else []
            time.sleep(PAUSE)

    def _announced(self, error: ReadError | ShardError) -> float:
        """Print the error if waiting may help. Return the time, by time.monotonic, at which to give up."""
        if not self._patience or isinstance(error, ShardError) or not error.passes:
            return 0.0
        print(f"run.py: {error}; waiting for up to {self._patience / 60:g} minutes", file=sys.stderr, flush=True)
        return time.monotonic() + self._patience
