"""Which share of its images a GPU's JPEG engines should decode, found out on the first batch."""

import logging
from collections.abc import Callable

SHARES = (0.65, 0.0, 0.25, 0.5, 0.8, 1.0)
"""What is tried; the first is DALI's own, which stays unless another takes less than `_WORTH` of its time."""
_WORTH = 0.97
_log = logging.getLogger(__name__)


def fastest_share(seconds: Callable[[float], float]) -> float:
    """The best of SHARES by the `seconds` that a batch takes with one."""
    taken = {share: seconds(share) for share in SHARES}
    best = min(taken, key=lambda share: taken[share])
    best = best if taken[best] < _WORTH * taken[SHARES[0]] else SHARES[0]
    table = ", ".join(f"{share:g}: {1e3 * s:.1f}" for share, s in sorted(taken.items()))
    _log.info("the JPEG engines decode a share of %g of the images; ms a batch by share: %s", best, table)
    return best
