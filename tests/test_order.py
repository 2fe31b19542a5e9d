"""The order of an epoch: a permutation of all samples, different in each epoch, computed without storage."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import order

numbers = st.integers(1, 3000)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 2**31)


@given(numbers, seeds, epochs)
@settings(max_examples=60, deadline=None)
def test_every_sample_once(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(order.positions(seed, epoch, 0, n, n)), np.arange(n))


@given(numbers, seeds, st.data())
@settings(max_examples=40, deadline=None)
def test_a_stretch_is_a_stretch_of_the_whole(n: int, seed: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    assert np.array_equal(order.positions(seed, 3, start, stop, n), order.positions(seed, 3, 0, n, n)[start:stop])


def test_epochs_and_seeds_differ() -> None:
    orders = [order.positions(seed, epoch, 0, 500, 500) for seed in (0, 1, 2**62) for epoch in (0, 1, 2**31)]
    for k, one in enumerate(orders):
        for other in orders[:k]:
            assert (one == other).mean() < 0.03  # two random permutations agree in one place of 500 on average


def test_every_place_takes_every_value_alike() -> None:
    """Chi-square over the 24 x 24 table of (position, sample): 529 degrees of freedom, 99.99 % below 660."""
    n, draws = 24, 6000
    table = np.zeros((n, n))
    for epoch in range(draws):
        table[np.arange(n), order.positions(5, epoch, 0, n, n)] += 1
    assert ((table - draws / n) ** 2 / (draws / n)).sum() * (n - 1) / n < 660


def test_neighbours_are_independent() -> None:
    n = 1001
    first = np.concatenate([order.positions(seed, 0, 0, 40, n) for seed in range(200)])
    gap = np.diff(first.reshape(200, 40), axis=1) % n
    counts = np.histogram(gap, bins=20, range=(0, n))[0]
    mean = gap.size / 20
    assert ((counts - mean) ** 2 / mean).sum() < 50  # 19 degrees of freedom: 99.99 % below 50


@given(st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(any), seeds, epochs, st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_block_order_is_a_permutation_too(sizes: list[int], seed: int, epoch: int, window: int) -> None:
    first = np.concatenate([[0], np.cumsum(sizes)])
    n = int(first[-1])
    whole = order.block_positions(seed, epoch, 0, n, first, window)
    assert np.array_equal(np.sort(whole), np.arange(n))
    middle = n // 3
    assert np.array_equal(order.block_positions(seed, epoch, middle, n, first, window), whole[middle:])


def test_block_order_stays_within_its_window() -> None:
    first = np.arange(0, 1001, 50)  # 20 shards of 50
    shard = order.block_positions(1, 0, 0, 1000, first, 4) // 50
    windows = [set(part) for part in shard.reshape(5, 200)]
    assert all(len(window) == 4 for window in windows)
    assert len(set.union(*windows)) == 20
    assert max(np.abs(np.diff(shard.reshape(5, 200)[0]))) > 0  # mixed inside
    assert set(shard[:200]) != set(order.block_positions(1, 1, 0, 200, first, 4) // 50)


def test_memory_and_time_do_not_grow_with_the_set() -> None:
    order.positions(0, 0, 0, 8, 2**40)
    tracemalloc.start()
    stretch = order.positions(0, 0, 2**39, 2**39 + 1000, 2**40)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(stretch.tolist())) == 1000
    assert 0 <= stretch.min() <= stretch.max() < 2**40
    assert peak < 100_000


def test_the_measure_of_shuffling_knows_good_from_bad() -> None:
    n, first = 64_000, np.arange(0, 64_001, 500)
    good = order.shuffle_quality(order.positions(0, 0, 0, n, n), first, n)
    block = order.shuffle_quality(order.block_positions(0, 0, 0, n, first, 16), first, n)
    stored = order.shuffle_quality(np.arange(n), first, n)
    assert good["spread"] == pytest.approx(1, abs=0.02)
    assert good["shards"] == pytest.approx(1, abs=0.02)
    assert 0.1 < block["shards"] < 0.3  # 16 shards where a uniform draw of 256 out of 128 meets 111
    assert stored["shards"] < 0.03
    assert stored["spread"] < 0.001


def test_replacements_are_fixed_and_differ() -> None:
    first = [order.replacement(0, 0, 17, attempt, 1000) for attempt in range(1, 50)]
    assert first == [order.replacement(0, 0, 17, attempt, 1000) for attempt in range(1, 50)]
    assert len(set(first)) > 40
    assert all(0 <= i < 1000 for i in first)
    assert first != [order.replacement(0, 1, 17, attempt, 1000) for attempt in range(1, 50)]
    assert first != [order.replacement(0, 0, 18, attempt, 1000) for attempt in range(1, 50)]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((-1, 0, 0, 1, 1), "seed"), ((0, -1, 0, 1, 1), "epoch"), ((0, 0, 2, 1, 3), "start"), ((0, 0, 0, 4, 3), "stop")],
)
def test_bad_numbers_are_named(arguments: tuple[int, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        order.positions(*arguments)


def test_a_window_of_no_shards_is_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        order.block_positions(0, 0, 0, 1, np.array([0, 1]), 0)
