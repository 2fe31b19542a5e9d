"""Conversion between windows and boxes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.windows import from_boxes, to_boxes, unflipped

box = st.tuples(st.integers(0, 9000), st.integers(0, 9000), st.integers(1, 9000), st.integers(1, 9000), st.booleans())


def test_a_mirrored_window_runs_backwards():
    windows = from_boxes(np.array([[10, 20, 30, 40], [10, 20, 30, 40]]), np.array([False, True]))
    assert windows.dtype == np.float32
    assert windows.tolist() == [[10, 20, 40, 60], [10, 60, 40, 20]]


@given(st.lists(box, min_size=1, max_size=8))
def test_boxes_come_back_exactly(drawn):
    boxes, flip = np.array([d[:4] for d in drawn]), np.array([d[4] for d in drawn])
    again, mirrored = to_boxes(from_boxes(boxes, flip))
    assert (again == boxes).all()
    assert (mirrored == flip).all()


@given(st.lists(box, min_size=1, max_size=8))
def test_unflipped_is_the_window_of_the_same_box_without_mirror(drawn):
    boxes, flip = np.array([d[:4] for d in drawn]), np.array([d[4] for d in drawn])
    plain = from_boxes(boxes, np.zeros_like(flip))
    assert (unflipped(from_boxes(boxes, flip)) == plain).all()
    assert (unflipped(plain) == plain).all()


def test_leading_axes_are_kept():
    boxes = np.arange(24).reshape(2, 3, 4) + 1
    flip = np.array([[True, False, True], [False, True, False]])
    windows = from_boxes(boxes, flip)
    assert windows.shape == (2, 3, 4)
    again, mirrored = to_boxes(windows)
    assert (again == boxes).all()
    assert (mirrored == flip).all()
