"""The order in which an epoch visits the samples: a true permutation, computed position by position.

The permutation is a Feistel network over the smallest power of two that holds `n` values. Cycle walking applies it
until the value is below `n` (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), less than twice on
average. Nothing is stored, and any range of any epoch costs the same, whatever `n` is. A run therefore resumes anywhere
from three numbers.

There are two orders. ``global`` permutes all samples. ``block`` permutes the shards, joins every `window` of them and
permutes the samples inside. Storage with slow random reads then serves only a few shards at a time.
"""

import numpy as np
from numpy.typing import NDArray

from .kernel import kernel

_ROUNDS = 8  # half of them already pass the tests of uniformity here; a round costs about 1 ns
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@kernel
def _mix(x):  # the finaliser of splitmix64 (Steele, Lea, Flood 2014)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def _key(seed, epoch, block):
    k = _mix(np.uint64(seed) + _GOLDEN)
    k = _mix(k ^ (np.uint64(epoch) + _GOLDEN))
    return _mix(k ^ (np.uint64(block) + _GOLDEN))


@kernel
def _bits(n):
    b = 2  # a Feistel network needs at least one bit in each half
    while (np.int64(1) << b) < n:
        b += 1
    return b


@kernel
def _permute(value, n, bits, key):
    """Return the image of `value` under the permutation of [0, n) with the given key."""
    low_bits = np.uint64(bits // 2)
    high_bits = np.uint64(bits) - low_bits
    x = np.uint64(value)
    while True:
        a, a_bits, b_bits = x >> low_bits, high_bits, low_bits
        b = x & ((np.uint64(1) << low_bits) - np.uint64(1))
        for r in range(_ROUNDS):
            f = _mix(b + key + np.uint64(r) * _GOLDEN)
            a, b = b, a ^ (f & ((np.uint64(1) << a_bits) - np.uint64(1)))
            a_bits, b_bits = b_bits, a_bits
        x = (a << b_bits) | b
        if x < np.uint64(n):
            return np.int64(x)


@kernel
def _permuted(seed, epoch, block, start, stop, n):
    """Return the images of start..stop-1 under the permutation of [0, n) with the key (seed, epoch, block)."""
    out = np.empty(stop - start, np.int64)
    key, bits = _key(seed, epoch, block), _bits(n)
    for k in range(stop - start):
        out[k] = _permute(start + k, n, bits, key)
    return out


@kernel
def _block(seed, epoch, start, stop, first, window):
    shards = first.size - 1
    drawn = _permuted(seed, epoch, 1, 0, shards, shards)
    ends = np.empty(shards + 1, np.int64)  # where each shard ends, in the order drawn
    ends[0] = 0
    for s in range(shards):
        ends[s + 1] = ends[s] + first[drawn[s] + 1] - first[drawn[s]]
    out = np.empty(stop - start, np.int64)
    left = right = bits = 0
    base = end = np.int64(0)
    for k in range(stop - start):
        p = start + k
        while p >= end:  # enter the window that holds p, skipping whole windows
            left = right
            right = min(left + window, shards)
            base, end = ends[left], ends[right]
            if p < end:
                bits = _bits(end - base)
        window_key = _key(seed, epoch, 2 + left)
        q = base + _permute(p - base, end - base, bits, window_key)
        s = np.searchsorted(ends[left : right + 1], q, side="right") - 1 + left
        out[k] = first[drawn[s]] + q - ends[s]
    return out


def _check(seed: int, epoch: int, start: int, stop: int, n: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), not {seed}")
    if epoch < 0:
        raise ValueError(f"epoch must not be negative, not {epoch}")
    if not 0 <= start <= stop <= n:
        raise ValueError(f"positions must obey 0 <= start <= stop <= n, not {start}, {stop}, {n}")


def positions(seed: int, epoch: int, start: int, stop: int, n: int) -> NDArray[np.int64]:
    """Return the samples at positions `start` to `stop` (exclusive) of an epoch of `n` samples: i64 (stop - start,).

    Positions 0 to n give a permutation of 0..n-1. Raises ValueError on a negative number or a range outside the epoch.
    """
    _check(seed, epoch, start, stop, n)
    return _permuted(seed, epoch, 0, start, stop, n)


def block_positions(
    seed: int, epoch: int, start: int, stop: int, first: NDArray[np.int64], window: int = 16
) -> NDArray[np.int64]:
    """Return the samples at positions `start` to `stop` (exclusive) in block order: i64 (stop - start,).

    `first` i64 (shards + 1,) holds each shard's first sample, then the number of samples. `window` shards are mixed at
    a time. Each call costs one pass over the shards. Raises ValueError as `positions` does, and if `window` < 1.
    """
    first = np.ascontiguousarray(first, dtype=np.int64)
    _check(seed, epoch, start, stop, int(first[-1]))
    if window < 1:
        raise ValueError(f"window must be at least one shard, not {window}")
    return _block(seed, epoch, start, stop, first, window)


def next_shards(
    seed: int, epoch: int, position: int, first: NDArray[np.int64], window: int = 16
) -> tuple[NDArray[np.int64], int]:
    """Return the shards (i64) in the order in which `block_positions` visits them, from the window of `position` to the
    end of the next epoch, and how many of them belong to that window and the next one. A shard may be listed twice.
    """
    first = np.ascontiguousarray(first, dtype=np.int64)
    shards = first.size - 1
    this, following = (_permuted(seed, e, 1, 0, shards, shards) for e in (epoch, epoch + 1))
    ends = np.cumsum(np.diff(first)[this])
    left = int(np.searchsorted(ends, position, side="right")) // window * window
    rest = this[left:]
    return np.concatenate([rest, following]), min(2 * window, rest.size if rest.size > window else rest.size + window)


@kernel
def _replacement(seed, epoch, index, attempt, n):
    return np.int64(_mix(_key(seed, epoch, index) ^ (np.uint64(attempt) * _GOLDEN)) % np.uint64(n))


def replacement(seed: int, epoch: int, index: int, attempt: int, n: int) -> int:
    """Return the sample that replaces the bad sample `index` in this epoch. `attempt` counts from 1; it increases if
    the replacement is bad as well.
    """
    return int(_replacement(seed, epoch, index, attempt, n))


def shuffle_quality(samples: NDArray[np.int64], first: NDArray[np.int64], n: int, batch: int = 256) -> dict[str, float]:
    """Measure how well the first `samples` of an epoch (i64, at least one `batch`) are mixed.

    ``spread``: mean distance of consecutive samples in the set, relative to a uniform permutation's; about 0 for the
    stored order. ``shards``: distinct shards in a batch, relative to a uniform draw; near 1 is as good as random.
    `first` is as in `block_positions`. Both are estimates; fewer samples make them noisier.
    """
    samples = np.asarray(samples, dtype=np.int64)
    spread = float(np.abs(np.diff(samples)).mean() / (n / 3)) if samples.size > 1 else 0.0
    shard = np.searchsorted(first, samples, side="right") - 1
    whole = shard[: shard.size // batch * batch].reshape(-1, batch)
    if whole.size == 0:
        raise ValueError(f"shuffle_quality needs at least one batch of {batch} samples, not {samples.size}")
    distinct = float(np.mean([np.unique(row).size for row in whole]))
    share = np.diff(first) / n
    return {"spread": spread, "shards": distinct / float((1 - (1 - share) ** batch).sum())}
