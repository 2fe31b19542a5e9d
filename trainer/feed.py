"""The batches of each step, waited for where the storage fails, on all ranks alike."""

import itertools
import sys
import time
from collections.abc import Callable

from pipeline import Batch, Loader, ReadError, ShardError
from trainer import parallel

PAUSE = 10.0  # seconds between tries; each lasts as long as reading repeats a request
_CONTINUE, _WAIT, _STOP = range(3)


class Feed:
    """`count` batches a call. `stop` says whether this rank was asked to stop. An outage of the storage is waited for
    `patience` minutes: on every rank, since a rank that has its batches meets the others at each try.

    `failure` is why there are no more batches: an outage that outlasts this, or too many bad samples.
    """

    def __init__(self, loader: Loader, count: int, patience: float, stop: Callable[[], bool]) -> None:
        self._loader, self._count, self._patience, self._stop = loader, count, 60 * patience, stop
        self._batches = loader.forever()
        self.failure: ReadError | ShardError | None = None

    def __call__(self, *, ends: bool, may_stop: bool) -> list[Batch]:
        """The next batches; none where a rank has none, `ends`, or was asked to stop and `may_stop`."""
        position, taken, end = self._loader.state_dict(), list[Batch](), 0.0
        while True:
            if not taken:
                try:
                    taken = list(itertools.islice(self._batches, self._count))
                    self.failure = None
                except (ReadError, ShardError) as error:
                    self._loader.load_state_dict(position)  # one of several batches may have come
                    end = end if self.failure else self._announced(error)
                    self.failure = error
            ends |= (may_stop or not taken) and self._stop()
            ends |= not taken and time.monotonic() >= end
            state = parallel.largest(_STOP if ends else _CONTINUE if taken else _WAIT)
            if state != _WAIT:
                return taken if state == _CONTINUE else []
            time.sleep(PAUSE)

    def _announced(self, error: ReadError | ShardError) -> float:
        """When to give up on an error, by time.monotonic."""
        if not self._patience or isinstance(error, ShardError) or not error.passes:
            return 0.0
        print(f"run.py: {error}; waiting for up to {self._patience / 60:g} minutes", file=sys.stderr, flush=True)
        return time.monotonic() + self._patience
