"""Correspondences: which patches of two views show the same part of the image, computed from the windows alone.

Cells and patches are numbered row by row in the view as displayed, so a flipped view is numbered from its own left
edge. All functions take and return NumPy arrays. They compute in compiled kernels that release the GIL.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .kernel import kernel

if TYPE_CHECKING:
    from .recipes import TargetRule

ONE, HALF = np.float32(1), np.float32(0.5)


def patch_targets(
    reference: ArrayLike,
    queries: ArrayLike,
    *,
    reference_grid: int,
    query_grid: int,
    query_size: int,
    rule: "TargetRule" = "released",
) -> NDArray[np.int32]:
    """Find for every query patch the reference patch that shows the same place (LOCA paper, sec. 3.1).

    Args:
        reference: f32 (B, 4), one window per image.
        queries: f32 (B, V, 4), the windows of the query views.
        reference_grid: G, patches per side of the reference view.
        query_grid: g, patches per side of the query views.
        query_size: side of the query views in pixels.
        rule: ``"released"`` follows the released LOCA code: an index map of the reference is resized to its window,
            cut by the query's window, resized to `query_size` and then to g, each time taking the nearest sample in
            float32. The result is the reference patch near the centre of the query patch. ``"overlap"`` takes the
            reference patch of greatest common area, the lowest of equals; it is exact for windows of whole pixels.

    Returns:
        i32 (B, V, g*g): ``row * G + column`` of the reference patch in the reference view as displayed, or -1 outside.

    Raises:
        ValueError: for a wrong shape, a window that is empty or not finite, a grid or size below 1, an unknown rule.
    """
    reference = _windows("reference", reference, 2)
    queries = _windows("queries", queries, 3)
    if len(reference) != len(queries):
        raise ValueError(f"queries hold {len(queries)} images but reference holds {len(reference)}; they must agree")
    grids = (_at_least_one("reference_grid", reference_grid), _at_least_one("query_grid", query_grid))
    size = _at_least_one("query_size", query_size)
    if rule not in ("released", "overlap"):
        raise ValueError(f"rule is {rule!r}; it must be 'released' or 'overlap'")
    out = np.empty((*queries.shape[:2], grids[1] ** 2), np.int32)
    _patch_targets(reference, queries, *grids, size, rule == "overlap", out)
    return out


def feature_locations(windows: ArrayLike, grid: int) -> NDArray[np.float32]:
    """Return the centre of every cell of the windows, in pixels of the stored image (VICRegL paper, sec. 3.2).

    Args:
        windows: f32 (..., 4).
        grid: cells per side.

    Returns:
        f32 (..., grid*grid, 2): (row, column); in a flipped window the columns run backwards.

    Raises:
        ValueError: for a wrong shape, a window that is empty or not finite, a grid below 1.
    """
    windows, grid = _windows("windows", windows, None), _at_least_one("grid", grid)
    cells = (np.arange(grid) + 0.5) / grid
    y0, x0, y1, x1 = (edge[..., None] for edge in np.moveaxis(windows.astype(np.float64), -1, 0))
    out = np.empty((*windows.shape[:-1], grid, grid, 2), np.float32)
    out[..., 0] = (y0 + cells * (y1 - y0))[..., :, None]
    out[..., 1] = (x0 + cells * (x1 - x0))[..., None, :]
    return out.reshape(*windows.shape[:-1], grid**2, 2)


def location_matches(a: ArrayLike, b: ArrayLike, *, a_grid: int, b_grid: int, top: int) -> NDArray[np.int32]:
    """Find the cells of `a` that are closest to a cell of `b` (VICRegL paper, sec. 3.2, eq. 3).

    Distances are Euclidean, between cell centres, in pixels of the stored image. Ties go to the lowest cell, both for
    the nearest cell and for the kept pairs. Ties are exact for windows of whole pixels.

    Args:
        a: f32 (B, 4), the windows whose cells are matched.
        b: f32 (B, 4), the windows to match them with; several cells of `a` may match the same cell of `b`.
        a_grid: cells per side of `a`.
        b_grid: cells per side of `b`.
        top: how many pairs to keep per image.

    Returns:
        i32 (B, top, 2): (cell of a, nearest cell of b), in ascending order of the cell of `a`.

    Raises:
        ValueError: for a wrong shape, a window that is empty or not finite, a grid below 1, `top` outside 1..a_grid².
    """
    a, b = _windows("a", a, 2), _windows("b", b, 2)
    if len(a) != len(b):
        raise ValueError(f"b holds {len(b)} images but a holds {len(a)}; they must agree")
    a_grid, b_grid = _at_least_one("a_grid", a_grid), _at_least_one("b_grid", b_grid)
    _check_top("top", top, "a_grid", a_grid)
    out = np.empty((len(a), top, 2), np.int32)
    _location_matches(a, b, a_grid, b_grid, out)
    return out


def pair_matches(
    large: ArrayLike,
    small: ArrayLike | None = None,
    *,
    large_grid: int = 7,
    small_grid: int = 3,
    gamma: tuple[int, int] | None = (20, 4),
) -> NDArray[np.int32]:
    """Return `location_matches` of all pairs of views that VICRegL compares, in both directions, in one array.

    The ordered pairs are (i, j) with i a large view and j any other view: (0, 1), (0, 2), ... (1, 0), (1, 2), ... Each
    pair gives the gamma[0] matches from i to j, then the gamma[1] matches from j to i, as in the released VICRegL code.
    Cells are numbered consecutively over all views, large views first.

    Args:
        large: f32 (B, L, 4), windows of the large views.
        small: f32 (B, S, 4), windows of the small views, or none.
        large_grid: cells per side of a large view.
        small_grid: cells per side of a small view.
        gamma: how many matches to keep in each direction; None keeps one for each cell.

    Returns:
        i32 (B, M, 2): (cell, nearest cell), with M matches in all: 336 for 2 large and 6 small views.

    Raises:
        ValueError: for a wrong shape, fewer than two views, a window that is empty or not finite, a grid below 1,
            a gamma larger than the number of cells that could match.
    """
    large = _windows("large", large, 3)
    if small is None:
        small = np.empty((len(large), 0, 4), np.float32)
    small = _windows("small", small, 3)
    if len(large) != len(small):
        raise ValueError(f"small holds {len(small)} images but large holds {len(large)}; they must agree")
    if large.shape[1] < 1 or large.shape[1] + small.shape[1] < 2:
        raise ValueError(
            f"large holds {large.shape[1]} views and small {small.shape[1]}; pairs need a large view and another one"
        )
    large_grid, small_grid = _at_least_one("large_grid", large_grid), _at_least_one("small_grid", small_grid)
    grids = np.repeat([large_grid, small_grid], [large.shape[1], small.shape[1]])
    if gamma is not None:
        if np.shape(gamma) != (2,):
            raise ValueError(f"gamma is {gamma}; it must be a pair of integers or None")
        _check_top("gamma[0]", gamma[0], "large_grid", large_grid)
        for name, grid, views in (
            ("large_grid", large_grid, large.shape[1] > 1),
            ("small_grid", small_grid, small.size),
        ):
            if views:
                _check_top("gamma[1]", gamma[1], name, grid)
    keep = np.array([[grid**2, grid**2] if gamma is None else gamma for grid in grids])  # (views, directions)
    first, second = np.nonzero(~np.eye(large.shape[1], len(grids), dtype=bool))
    tops = np.stack([keep[first, 0], keep[second, 1]], axis=1)
    out = np.empty((len(large), tops.sum(), 2), np.int32)
    _pair_matches(np.concatenate([large, small], axis=1), grids, np.stack([first, second], axis=1), tops, out)
    return out


def _windows(name: str, value: ArrayLike, ndim: int | None) -> NDArray[np.float32]:
    """Return `value` as float32 windows. Raises ValueError that names the first bad window."""
    windows = np.ascontiguousarray(value, dtype=np.float32)
    if np.ndim(value) == 0 or windows.shape[-1] != 4 or (ndim is not None and windows.ndim != ndim):
        wanted = {None: "(..., 4)", 2: "(B, 4)", 3: "(B, V, 4)"}[ndim]
        raise ValueError(f"{name} has shape {np.shape(value)}; windows (y0, x0, y1, x1) of shape {wanted} are needed")
    bad = _first_bad(windows.reshape(-1, 4))
    if bad >= 0:
        at = tuple(int(i) for i in np.unravel_index(bad, windows.shape[:-1]))
        window = windows.reshape(-1, 4)[bad].tolist()
        what = "is not finite" if not np.isfinite(window).all() else "is empty: y1 > y0 and x1 != x0 are needed"
        raise ValueError(f"{name}{list(at)} = {window} {what}")
    return windows


def _at_least_one(name: str, value: int) -> int:
    """Return `value` as a Python int, since NumPy's narrow integers overflow when squared."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is {value}; it must be an integer of at least 1")
    return int(value)


def _check_top(name: str, top: int, grid_name: str, grid: int) -> None:
    if not 1 <= _at_least_one(name, top) <= grid**2:
        raise ValueError(f"{name} is {top}; it must be between 1 and {grid_name}² = {grid**2}")


@kernel
def _first_bad(windows):
    for i in range(len(windows)):
        y0, x0, y1, x1 = windows[i]
        if not (np.isfinite(y0) and np.isfinite(x0) and np.isfinite(y1) and np.isfinite(x1) and y1 > y0 and x1 != x0):
            return i
    return -1


# ---------------------------------------------------------------------------------------------- LOCA's patch targets


@kernel
def _patch_targets(reference, queries, reference_grid, query_grid, query_size, overlap, out):
    rows = np.empty(query_grid, np.int32)
    columns = np.empty(query_grid, np.int32)
    for b in range(queries.shape[0]):
        ry0, rx0, ry1, rx1 = reference[b]
        for v in range(queries.shape[1]):
            qy0, qx0, qy1, qx1 = queries[b, v]
            if overlap:
                _overlap_axis(ry0, ry1, reference_grid, qy0, qy1, rows)
                _overlap_axis(rx0, rx1, reference_grid, qx0, qx1, columns)
            else:
                _released_axis(ry0, ry1, reference_grid, qy0, qy1, query_size, rows)
                _released_axis(rx0, rx1, reference_grid, qx0, qx1, query_size, columns)
            target = out[b, v]
            for k in range(query_grid):
                row = rows[k] * reference_grid
                for l in range(query_grid):
                    target[k * query_grid + l] = row + columns[l] if row >= 0 and columns[l] >= 0 else -1


@kernel
def _released_axis(r0, r1, reference_grid, q0, q1, query_size, cells):
    """Apply three nearest interpolations along one axis, all in float32: a different rounding would move a patch."""
    n = len(cells)
    flipped = q1 < q0
    start, length = min(q0, q1), abs(q1 - q0)
    reference_start, reference_length = min(r0, r1), abs(r1 - r0)
    to_view = np.float32(query_size) / np.float32(n)
    to_window = length / np.float32(query_size)
    to_grid = np.float32(reference_grid) / reference_length
    last_pixel, last_sample, last_cell = length - ONE, np.float32(query_size - 1), np.float32(reference_grid - 1)
    for k in range(n):
        pixel = min(last_sample, np.floor((np.float32(k) + HALF) * to_view))
        sample = min(last_pixel, np.floor((pixel + HALF) * to_window))
        offset = start + sample - reference_start
        cell = -1
        if offset >= 0 and offset < reference_length:
            cell = int(min(last_cell, np.floor((offset + HALF) * to_grid)))
            if r1 < r0:
                cell = reference_grid - 1 - cell
        cells[n - 1 - k if flipped else k] = cell


@kernel
def _overlap_axis(r0, r1, reference_grid, q0, q1, cells):
    """Find the reference patch with the longest overlap along one axis, or -1 if there is none.

    All lengths are multiplied by both grids. For windows of whole pixels they are then whole numbers: ties are exact.
    """
    n = len(cells)
    start = (np.float64(q0) - np.float64(r0)) * reference_grid * n
    query_step = (np.float64(q1) - np.float64(q0)) * reference_grid
    reference_step = (np.float64(r1) - np.float64(r0)) * n
    for k in range(n):
        a, b = start + k * query_step, start + (k + 1) * query_step
        low, high = min(a, b), max(a, b)
        longest, cells[k] = 0.0, -1
        for c in range(reference_grid):
            a, b = c * reference_step, (c + 1) * reference_step
            common = min(high, max(a, b)) - max(low, min(a, b))
            if common > longest:
                longest, cells[k] = common, c


# ------------------------------------------------------------------------------------------ VICRegL's location matches


@kernel
def _location_matches(a, b, a_grid, b_grid, out):
    nearest, gaps, squared = np.empty((2, a_grid), np.int32), np.empty((2, a_grid)), np.empty((2, a_grid**2))
    for i in range(len(a)):
        _match(a[i], a_grid, 0, b[i], b_grid, 0, nearest, gaps, squared, out[i])


@kernel
def _pair_matches(windows, grids, pairs, tops, out):
    grid = grids.max()
    nearest, gaps, squared = np.empty((2, grid), np.int32), np.empty((2, grid)), np.empty((2, grid**2))
    first_cell = np.cumsum(grids**2) - grids**2
    for b in range(len(windows)):
        slot = 0
        for p in range(len(pairs)):
            for direction in range(2):
                i, j = pairs[p, direction], pairs[p, 1 - direction]
                kept = out[b, slot : slot + tops[p, direction]]
                slot += tops[p, direction]
                _match(
                    windows[b, i], grids[i], first_cell[i], windows[b, j], grids[j], first_cell[j],
                    nearest, gaps, squared, kept,
                )  # fmt: skip


@kernel
def _match(a, a_grid, a_first, b, b_grid, b_first, nearest, gaps, squared, out):
    """Write the `len(out)` cells of `a` closest to a cell of `b`, with the latter; numbers start at `first`.

    The views are axis-aligned, so the nearest row and column are found separately. `nearest`, `gaps` and `squared` are
    scratch arrays.
    """
    _nearest_axis(a[0], a[2], a_grid, b[0], b[2], b_grid, nearest[0], gaps[0])
    _nearest_axis(a[1], a[3], a_grid, b[1], b[3], b_grid, nearest[1], gaps[1])
    count, top = a_grid**2, len(out)
    distance, order = squared[0], squared[1]
    for k in range(a_grid):
        for l in range(a_grid):
            distance[k * a_grid + l] = gaps[0, k] + gaps[1, l]
    order[:count] = distance[:count]
    limit = _smallest(order, count, top)
    ties = top
    for cell in range(count):
        ties -= distance[cell] < limit
    slot = 0
    for k in range(a_grid):
        for l in range(a_grid):
            far = distance[k * a_grid + l]
            if far < limit or (far == limit and ties > 0):
                ties -= far == limit
                out[slot, 0] = a_first + k * a_grid + l
                out[slot, 1] = b_first + nearest[0, k] * b_grid + nearest[1, l]
                slot += 1


@kernel
def _nearest_axis(a0, a1, a_grid, b0, b1, b_grid, nearest, gaps):
    """Find for every cell of `a` along one axis the nearest cell of `b`, the lower of two, and the squared distance.

    Lengths are multiplied by twice both grids. For windows of whole pixels they are then whole numbers, and ties are
    exact. All distances of a pair of views share that factor.
    """
    a_step = (np.float64(a1) - np.float64(a0)) * b_grid
    b_step = (np.float64(b1) - np.float64(b0)) * a_grid
    start = (np.float64(a0) - np.float64(b0)) * (2 * a_grid * b_grid)
    for k in range(a_grid):
        centre = start + (2 * k + 1) * a_step
        # A centre on the border of two cells is equally far from both; ceil - 1 takes the lower.
        cell = min(max(np.ceil(centre / (2 * b_step)) - 1, 0.0), b_grid - 1.0)
        gap = centre - (2 * cell + 1) * b_step
        nearest[k] = int(cell)
        gaps[k] = gap * gap


@kernel
def _smallest(values, count, k):
    """Return the k-th smallest of the first `count` values, k from 1, and reorder them (Hoare's selection)."""
    low, high = 0, count - 1
    while low < high:
        a, b, c = values[low], values[(low + high) // 2], values[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return values[k - 1]
