"""Correspondences against painted index maps, exact rational geometry and brute force."""

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import correspondence
from pipeline.correspondence import feature_locations, location_matches, pair_matches, patch_targets
from pipeline.windows import from_boxes, to_boxes, unflipped

RNG_SEED = 7


def random_windows(rng, count, height, width, *, flip=0.5, smallest=8):
    """f32 (count, 4): whole-pixel windows inside a height x width image."""
    h, w = rng.integers(smallest, height + 1, count), rng.integers(smallest, width + 1, count)
    y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    return from_boxes(np.stack([y, x, h, w], -1), rng.random(count) < flip)


# --------------------------------------------------------------------------------------------------------- the oracles


def nearest_resize(image, height, width):
    """Half-pixel nearest resize of a 2-D map, the index computed in float32 as TensorFlow's kernel does."""

    def source(n_out, n_in):
        scale = np.float32(n_in) / np.float32(n_out)
        return [min(n_in - 1, int(np.floor((np.float32(i) + np.float32(0.5)) * scale))) for i in range(n_out)]

    return image[source(height, image.shape[0])][:, source(width, image.shape[1])]


def painted_targets(reference, query, image_size, reference_grid, query_grid, query_size):
    """The released procedure on a real canvas: paint the reference's patch numbers, cut, resize, resize, mirror."""
    ((ry, rx, rh, rw), r_flip), ((qy, qx, qh, qw), q_flip) = to_boxes(reference), to_boxes(query)
    ry, rx, rh, rw, qy, qx, qh, qw = (int(v) for v in (ry, rx, rh, rw, qy, qx, qh, qw))
    patches = np.arange(reference_grid**2).reshape(reference_grid, reference_grid)
    if r_flip:
        patches = patches[:, ::-1]
    canvas = np.full(image_size, -1)
    canvas[ry : ry + rh, rx : rx + rw] = nearest_resize(patches, rh, rw)
    view = nearest_resize(canvas[qy : qy + qh, qx : qx + qw], query_size, query_size)
    targets = nearest_resize(view, query_grid, query_grid)
    return (targets[:, ::-1] if q_flip else targets).reshape(-1)


def cells_of(window, grid):
    """Exact (y_low, y_high, x_low, x_high) of each cell, in the order in which the window is shown."""
    y0, x0, y1, x1 = (Fraction(float(v)) for v in window)
    for k in range(grid):
        for l in range(grid):
            xs = sorted((x0 + (x1 - x0) * l / grid, x0 + (x1 - x0) * (l + 1) / grid))
            yield y0 + (y1 - y0) * k / grid, y0 + (y1 - y0) * (k + 1) / grid, *xs


def greatest_overlap(reference, query, reference_grid, query_grid):
    targets = []
    for top, bottom, left, right in cells_of(query, query_grid):
        areas = [
            max(0, min(bottom, b) - max(top, t)) * max(0, min(right, r) - max(left, l))
            for t, b, l, r in cells_of(reference, reference_grid)
        ]
        targets.append(areas.index(max(areas)) if max(areas) > 0 else -1)
    return targets


def brute_matches(a, b, a_grid, b_grid, top):
    """All distances between exact centres; sorted by (distance, cell); the kept ones in ascending cell."""

    def centres(window, grid):
        return [((t + u) / 2, (l + r) / 2) for t, u, l, r in cells_of(window, grid)]

    pairs = []
    for p, (y, x) in enumerate(centres(a, a_grid)):
        distances = [(y - v) ** 2 + (x - u) ** 2 for v, u in centres(b, b_grid)]
        pairs.append((min(distances), p, distances.index(min(distances))))
    return sorted((p, nearest) for _, p, nearest in sorted(pairs)[:top])


# ------------------------------------------------------------------------------------------------------- patch_targets

WORKED = {"reference_grid": 14, "query_grid": 6, "query_size": 96}


def worked_example(*, query_flip=False, reference_flip=False):
    reference = from_boxes(np.array([[40, 60, 280, 280]]), np.array([reference_flip]))
    query = from_boxes(np.array([[[100, 200, 96, 192]]]), np.array([[query_flip]]))
    return patch_targets(reference, query, **WORKED).reshape(6, 6)


def test_worked_example_by_hand():
    targets = worked_example()
    assert targets.dtype == np.int32
    rows = [
        [49, 51, 53, 54],
        [63, 65, 67, 68],
        [77, 79, 81, 82],
        [77, 79, 81, 82],
        [91, 93, 95, 96],
        [105, 107, 109, 110],
    ]
    assert targets.tolist() == [[*row, -1, -1] for row in rows]
    assert (targets >= 0).sum() == 24
    assert worked_example(query_flip=True)[0].tolist() == [-1, -1, 54, 53, 51, 49]
    assert worked_example(reference_flip=True)[0].tolist() == [48, 46, 44, 43, -1, -1]


@pytest.mark.parametrize(("query_grid", "query_size"), [(14, 224), (6, 96), (7, 100)])
def test_released_rule_equals_painted_maps_bit_for_bit(query_grid, query_size):
    rng = np.random.default_rng(RNG_SEED + query_grid)
    for _ in range(200):
        height, width = rng.integers(60, 900, 2)
        reference = random_windows(rng, 1, height, width)
        queries = random_windows(rng, 2, height, width)[None]
        got = patch_targets(reference, queries, reference_grid=14, query_grid=query_grid, query_size=query_size)
        for v in range(2):
            expected = painted_targets(reference[0], queries[0, v], (height, width), 14, query_grid, query_size)
            assert (got[0, v] == expected).all(), (reference, queries[0, v])


def test_float32_rounding_decides_at_patch_borders():
    """Sizes whose patch borders fall on a sample: exact arithmetic gives another patch in a few rows."""
    differing = 0
    for size in (23, 83, 97, 99):
        window = from_boxes(np.array([[0, 0, size, size]]), np.array([False]))
        got = patch_targets(window, window[None], reference_grid=14, query_grid=size, query_size=size).reshape(
            size, size
        )
        assert (got.reshape(-1) == painted_targets(window[0], window[0], (size, size), 14, size, size)).all()
        exact = [min(13, ((2 * i + 1) * 14) // (2 * size)) for i in range(size)]
        differing += (got[:, 0] // 14 != exact).sum()
    assert differing > 0


def test_overlap_rule_equals_exact_areas():
    rng = np.random.default_rng(RNG_SEED)
    for case in range(60):
        reference = random_windows(rng, 1, 60, 80)
        query = random_windows(rng, 1, 60, 80)[None]
        if case % 3 == 0:  # fractions of a pixel
            reference, query = reference + np.float32(0.25), query * np.float32(0.625)
        got = patch_targets(reference, query, reference_grid=5, query_grid=3, query_size=48, rule="overlap")
        assert got[0, 0].tolist() == greatest_overlap(reference[0], query[0, 0], 5, 3)


def test_overlap_ties_go_to_the_lowest_patch_as_shown():
    """One query patch covers 3 x 3 whole reference patches of 20/3 pixels: rounding must not choose among equals."""
    reference = np.array([[0, 0, 20, 20]], np.float32)
    query = np.array([[[0, 0, 20, 20]]], np.float32)
    wanted = {"reference_grid": 3, "query_grid": 1, "query_size": 8, "rule": "overlap"}
    for mirrored in (reference, reference[:, [0, 3, 2, 1]]):
        assert patch_targets(mirrored, query, **wanted).item() == 0
        assert patch_targets(mirrored, query + np.float32(6), **wanted).item() == (4 if mirrored[0, 1] == 0 else 3)


def test_rules_agree_mostly_and_overlap_covers_more():
    rng = np.random.default_rng(RNG_SEED)
    reference = random_windows(rng, 200, 300, 400, smallest=250)
    queries = random_windows(rng, 800, 120, 150, smallest=60).reshape(200, 4, 4)
    queries += rng.integers(0, 200, (200, 4, 2)).astype(np.float32)[..., [0, 1, 0, 1]]
    released = patch_targets(reference, queries, **WORKED)
    overlap = patch_targets(reference, queries, **WORKED, rule="overlap")
    both = (released >= 0) & (overlap >= 0)
    assert (overlap[released >= 0] >= 0).mean() > 0.999
    assert 0.005 < (released[overlap >= 0] < 0).mean() < 0.15
    assert 0.88 < (released[both] == overlap[both]).mean() < 0.98


whole = st.integers(0, 300)
side = st.integers(12, 300)
window = st.builds(
    lambda y, x, h, w, f: from_boxes(np.array([[y, x, h, w]]), np.array([f])), whole, whole, side, side, st.booleans()
)


def mirror(windows):
    return windows[..., [0, 3, 2, 1]]


@settings(max_examples=100, deadline=None)
@given(window, window, st.sampled_from(["released", "overlap"]), whole, whole)
def test_targets_under_mirrors_and_shifts(reference, query, rule, dy, dx):
    def targets(r, q):
        return patch_targets(r, q[None], **WORKED, rule=rule).reshape(6, 6)

    plain = targets(reference, query)
    shift = np.array([dy, dx, dy, dx], np.float32)
    assert (targets(reference + shift, query + shift) == plain).all()
    if rule == "released":  # with overlap, equals tie towards the lowest as shown, so mirrors may differ there
        assert (targets(reference, mirror(query)) == plain[:, ::-1]).all()
        mirrored = np.where(plain < 0, -1, plain // 14 * 14 + 13 - plain % 14)
        assert (targets(mirror(reference), query) == mirrored).all()
    else:
        assert (targets(reference, mirror(query)) == plain[:, ::-1]).all()
        assert (targets(reference * np.float32(2), query * np.float32(2)) == plain).all()


@settings(max_examples=60, deadline=None)
@given(window, st.sampled_from(["released", "overlap"]))
def test_a_view_corresponds_to_itself(w, rule):
    got = patch_targets(w, w[None], reference_grid=3, query_grid=3, query_size=48, rule=rule)
    assert got.reshape(-1).tolist() == list(range(9))


def test_windows_with_fractions_of_a_pixel_stay_in_range():
    rng = np.random.default_rng(RNG_SEED)
    windows = np.sort(rng.uniform(0, 3, (500, 2, 2)), axis=1).astype(np.float32).reshape(500, 4)
    windows[:, 2:] += np.float32(1e-3)
    for rule in ("released", "overlap"):
        got = patch_targets(windows[:250], windows[250:, None], **WORKED, rule=rule)
        assert got.min() >= -1
        assert got.max() < 196
        assert (got >= 0).any()


# --------------------------------------------------------------------------------- feature_locations, location_matches


def test_locations_are_cell_centres():
    plain = feature_locations(np.array([10, 20, 16, 32], np.float32), 3)
    assert plain.dtype == np.float32
    assert plain.reshape(3, 3, 2)[:, 0, 0].tolist() == [11, 13, 15]
    assert plain.reshape(3, 3, 2)[0, :, 1].tolist() == [22, 26, 30]
    flipped = feature_locations(np.array([[[10, 32, 16, 20]]], np.float32), 3)
    assert flipped.shape == (1, 1, 9, 2)
    assert flipped.reshape(3, 3, 2)[0, :, 1].tolist() == [30, 26, 22]
    assert feature_locations(np.empty((0, 4), np.float32), 7).shape == (0, 49, 2)


@settings(max_examples=50, deadline=None)
@given(window, st.integers(1, 14))
def test_locations_equal_exact_centres(w, grid):
    expected = [[float((t + b) / 2), float((l + r) / 2)] for t, b, l, r in cells_of(w[0], grid)]
    assert (feature_locations(w, grid)[0] == np.array(expected, np.float32)).mean() > 0.98
    np.testing.assert_allclose(feature_locations(w, grid)[0], expected, rtol=2e-7)


@pytest.mark.parametrize(
    ("a_grid", "b_grid", "top"),
    [(7, 7, 20), (7, 3, 20), (3, 7, 4), pytest.param(7, 7, 49, marks=pytest.mark.slow), (3, 3, 1), (4, 1, 5)],
)
def test_matches_equal_brute_force_with_all_ties(a_grid, b_grid, top):
    rng = np.random.default_rng(RNG_SEED)
    a, b = random_windows(rng, 20, 80, 110), random_windows(rng, 20, 80, 110)
    b[:6] = a[:6]  # identical, mirrored and shifted windows: ties everywhere
    b[3:6] = mirror(b[3:6])
    b[6:9] = a[6:9] + np.float32(100)
    b[9:12] = a[9:12] * np.float32(2)
    a[12:15, 2:] = a[12:15, :2] + 84
    b[12:15] = a[12:15] + np.float32(42 // a_grid)  # centres of a on the borders of b's cells
    b[14] = mirror(b[14])
    a[15:18] *= np.float32(0.125)
    got = location_matches(a, b, a_grid=a_grid, b_grid=b_grid, top=top)
    assert got.dtype == np.int32
    for i in range(len(a)):
        assert got[i].tolist() == [list(p) for p in brute_matches(a[i], b[i], a_grid, b_grid, top)], (a[i], b[i])


def test_matches_agree_with_distances_between_locations():
    rng = np.random.default_rng(RNG_SEED)
    a, b = random_windows(rng, 300, 375, 500, smallest=100), random_windows(rng, 300, 375, 500, smallest=60)
    here, there = feature_locations(a, 7), feature_locations(b, 3)
    distance = np.linalg.norm(here[:, :, None].astype(np.float64) - there[:, None], axis=-1)
    matches = location_matches(a, b, a_grid=7, b_grid=3, top=20).astype(np.int64)
    kept = np.take_along_axis(distance.min(2), matches[..., 0], 1)
    np.testing.assert_allclose(
        distance[np.arange(300)[:, None], matches[..., 0], matches[..., 1]], kept, atol=1e-3, rtol=0
    )
    np.testing.assert_allclose(np.sort(kept, 1), np.sort(distance.min(2), 1)[:, :20], atol=1e-3, rtol=0)
    assert (np.diff(matches[..., 0], axis=1) > 0).all()


@settings(max_examples=100, deadline=None)
@given(window, window, whole, whole, st.sampled_from([0.5, 2.0, 3.0]))
def test_matches_under_shift_scale_and_mirror(a, b, dy, dx, scale):
    def matches(x, y):
        return location_matches(x, y, a_grid=7, b_grid=3, top=20)

    plain = matches(a, b)
    shift = np.array([dy, dx, dy, dx], np.float32)
    assert (matches(a + shift, b + shift) == plain).all()
    assert (matches(a * np.float32(scale), b * np.float32(scale)) == plain).all()
    # The stored image mirrored: every window keeps its shown order of cells, only its place turns round.
    turn = np.array([1, -1, 1, -1], np.float32)
    assert (matches(a * turn, b * turn) == plain).all()


def test_flip_aware_matches_show_the_same_place():
    """Matched centres are close in the image; those of the released grids, which ignore mirrors, are not."""
    rng = np.random.default_rng(RNG_SEED)
    a, b = (random_windows(rng, 400, 375, 500, smallest=240) for _ in range(2))
    here, there = feature_locations(a, 7), feature_locations(b, 7)

    def true_distance(matches):
        one = np.take_along_axis(here, matches[..., :1].astype(np.int64), 1)
        other = np.take_along_axis(there, matches[..., 1:].astype(np.int64), 1)
        return np.linalg.norm(one - other, axis=-1).mean()

    aware = true_distance(location_matches(a, b, a_grid=7, b_grid=7, top=20))
    ignoring = true_distance(location_matches(unflipped(a), unflipped(b), a_grid=7, b_grid=7, top=20))
    assert aware < 25
    assert ignoring > 4 * aware


# -------------------------------------------------------------------------------------------------------- pair_matches


@pytest.mark.parametrize("gamma", [(20, 4), None, (9, 1)])
def test_pairs_are_the_single_matches_in_the_stated_order(gamma):
    rng = np.random.default_rng(RNG_SEED)
    large, small = (
        random_windows(rng, 10, 375, 500).reshape(5, 2, 4),
        random_windows(rng, 15, 375, 500).reshape(5, 3, 4),
    )
    views = [(large[:, 0], 7), (large[:, 1], 7), *((small[:, v], 3) for v in range(3))]
    first_cell = np.cumsum([0, 49, 49, 9, 9])
    expected = []
    for i in range(2):
        for j in range(5):
            if i != j:
                for (q, o), top in zip([(i, j), (j, i)], gamma or (views[i][1] ** 2, views[j][1] ** 2), strict=True):
                    (query, query_grid), (other, other_grid) = views[q], views[o]
                    found = location_matches(query, other, a_grid=query_grid, b_grid=other_grid, top=top)
                    expected.append(found + np.array([first_cell[q], first_cell[o]]))
    got = pair_matches(large, small, gamma=gamma)
    assert got.dtype == np.int32
    assert (got == np.concatenate(expected, axis=1)).all()


def test_pairs_of_large_views_only():
    large = random_windows(np.random.default_rng(RNG_SEED), 8, 375, 500).reshape(4, 2, 4)
    got = pair_matches(large)
    assert got.shape == (4, 48, 2)
    assert (got == pair_matches(large, np.empty((4, 0, 4)))).all()
    assert (got[:, :20] // 49 == [0, 1]).all()
    assert (got[:, 20:24] // 49 == [1, 0]).all()
    assert {tuple(p) for p in got[0, 44:48]} <= {tuple(p) for p in got[0, :20]}  # 0 -> 1: the best 4 of the best 20


# ------------------------------------------------------------------------------------------------------------ bad input

GOOD = np.array([[0, 0, 10, 10]], np.float32)
NAN, INF = np.nan, np.inf
TWO = np.tile(GOOD, (2, 1, 1))


def matches(a=GOOD, b=GOOD, **grids):
    return location_matches(a, b, **({"a_grid": 3, "b_grid": 7, "top": 4} | grids))


def targets(reference=GOOD, queries=GOOD[None], **options):
    return patch_targets(reference, queries, **(WORKED | options))


BAD = {
    "reference has shape (4,)": lambda: targets(GOOD[0]),
    "queries has shape (1, 4)": lambda: targets(queries=GOOD),
    "queries has shape (1, 2, 5)": lambda: targets(queries=np.zeros((1, 2, 5))),
    "queries hold 2 images but reference holds 1": lambda: targets(queries=TWO),
    "queries[0, 1] = [0.0, 0.0, 0.0, 5.0] is empty": lambda: targets(queries=[[[0, 0, 5, 5], [0, 0, 0, 5]]]),
    "reference[0] = [0.0, 3.0, 5.0, 3.0] is empty": lambda: targets([[0, 3, 5, 3]]),
    "reference[0] = [9.0, 0.0, 5.0, 3.0] is empty": lambda: targets([[9, 0, 5, 3]]),
    "reference[0] = [0.0, 0.0, nan, 3.0] is not finite": lambda: targets([[0, 0, NAN, 3]]),
    "reference[0] = [0.0, 0.0, 4.0, inf] is not finite": lambda: targets([[0, 0, 4, INF]]),
    "reference_grid is 0": lambda: targets(reference_grid=0),
    "query_grid is -1": lambda: targets(query_grid=-1),
    "query_size is 0": lambda: targets(query_size=0),
    "query_grid is True": lambda: targets(query_grid=True),
    "rule is 'nearest'": lambda: targets(rule="nearest"),
    "windows has shape (3,)": lambda: feature_locations(np.zeros(3), 7),
    "windows has shape ()": lambda: feature_locations(3.0, 7),
    "grid is 0": lambda: feature_locations(GOOD, 0),
    "windows[0] = [0.0, 0.0, 0.0, 0.0] is empty": lambda: feature_locations(GOOD * 0, 7),
    "a has shape (1, 1, 4)": lambda: matches(GOOD[None]),
    "b[0] = [nan, nan, nan, nan] is not finite": lambda: matches(b=GOOD * NAN),
    "b holds 2 images but a holds 1": lambda: matches(b=GOOD[[0, 0]]),
    "top is 10; it must be between 1 and a_grid² = 9": lambda: matches(top=10),
    "top is 0": lambda: matches(top=0),
    "top is 2.5; it must be an integer": lambda: matches(top=2.5),
    "b_grid is 0": lambda: matches(b_grid=0),
    "large holds 1 views and small 0": lambda: pair_matches(GOOD[None]),
    "small holds 2 images but large holds 1": lambda: pair_matches(GOOD[None], TWO),
    "gamma[0] is 50; it must be between 1 and large_grid² = 49": lambda: pair_matches(TWO[None, :, 0], gamma=(50, 4)),
    "gamma[1] is 10; it must be between 1 and small_grid² = 9": lambda: pair_matches(
        GOOD[None], GOOD[None], gamma=(9, 10)
    ),
    "gamma is 20; it must be a pair": lambda: pair_matches(TWO[None, :, 0], gamma=20),
    "gamma is (20, 4, 1); it must be a pair": lambda: pair_matches(TWO[None, :, 0], gamma=(20, 4, 1)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError) as caught:
        BAD[message]()
    assert message in str(caught.value)


def test_narrow_integers_do_not_overflow():
    wide, narrow = {"reference_grid": 20, "query_grid": 20}, {"reference_grid": np.uint8(20), "query_grid": np.int8(20)}
    assert (targets(**narrow) == targets(**wide)).all()
    assert feature_locations(GOOD, np.int8(20)).shape == (1, 400, 2)
    narrow = location_matches(GOOD, GOOD, a_grid=np.int8(20), b_grid=np.uint8(20), top=np.int16(400))
    assert (narrow == location_matches(GOOD, GOOD, a_grid=20, b_grid=20, top=400)).all()
    pair = TWO[None, :, 0]
    narrow = pair_matches(pair, large_grid=np.int8(20), gamma=(np.int16(400), np.uint8(4)))
    assert (narrow == pair_matches(pair, large_grid=20, gamma=(400, 4))).all()


# ----------------------------------------------------------------------------------------------- the kernels themselves


def test_kernels_do_the_same_uncompiled(monkeypatch):
    rng = np.random.default_rng(RNG_SEED)
    large, small = random_windows(rng, 4, 99, 120).reshape(2, 2, 4), random_windows(rng, 4, 99, 120).reshape(2, 2, 4)
    calls = [
        lambda: patch_targets(large[:, 0], small, **WORKED),
        lambda: patch_targets(large[:, 0], small, **WORKED, rule="overlap"),
        lambda: location_matches(large[:, 0], large[:, 1], a_grid=7, b_grid=7, top=20),
        lambda: pair_matches(large, small),
    ]
    compiled = [call() for call in calls]
    kernels = {name: k.py_func for name, k in vars(correspondence).items() if hasattr(k, "py_func")}
    assert len(kernels) == 9
    for name, function in kernels.items():
        monkeypatch.setattr(correspondence, name, function)
    for call, expected in zip(calls, compiled, strict=True):
        assert (call() == expected).all()


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [5.0, 1.0, 1.0, 4.0, 1.0], list(range(40, 0, -1)), [0.0] * 30])
def test_selection_finds_every_rank(values):
    for k in range(1, len(values) + 1):
        assert correspondence._smallest(np.array(values, np.float64), len(values), k) == sorted(values)[k - 1]


def test_cost_grows_with_the_images_not_faster():
    rng = np.random.default_rng(RNG_SEED)
    large, small = (
        random_windows(rng, 1024, 375, 500).reshape(512, 2, 4),
        random_windows(rng, 3072, 375, 500).reshape(512, 6, 4),
    )

    def best(count):
        times = []
        for _ in range(9):
            start = time.thread_time()
            pair_matches(large[:count], small[:count])
            times.append(time.thread_time() - start)
        return min(times)

    best(8)
    assert best(512) < 3 * 8 * best(64)
