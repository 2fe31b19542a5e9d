"""Tuning of the share of images that a GPU's JPEG engines decode, on the first batch."""

import logging
from collections.abc import Callable

SHARES = (0.65, 0.0, 0.25, 0.5, 0.8, 1.0)
"""The shares to try. The first is DALI's default, which is kept unless another takes less than `_WORTH` of its time."""
_WORTH = 0.97
_log = logging.getLogger(__name__)


def fastest_share(seconds: Callable[[float], float]) -> float:
    """Return the best of SHARES, where `seconds(share)` is the time that a batch takes."""
    taken = {share: seconds(share) for share in SHARES}
    best = min(taken, key=lambda share: taken[share])
    best = best if taken[best] < _WORTH * taken[SHARES[0]] else SHARES[0]
    table = ", ".join(f"{share:g}: {1e3 * s:.1f}" for share, s in sorted(taken.items()))
    _log.info("the JPEG engines decode a share of %g of the images; ms a batch by share: %s", best, table)
    return best
