"""Learning rates against the values of both published runs."""

import pytest

from trainer.schedules import warmup_cosine, warmup_poly


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 5.329e-8),
        (1251, 6.6667e-5),
        (18765, 1e-3),
        (30000, 9.72981e-4),
        (62550, 6.40463e-4),
        (100000, 1.39980e-4),
        (125099, 1.0e-5),
    ],
)
def test_loca_released_100_epochs(step: int, expected: float) -> None:
    lr = warmup_cosine(step, total=1251 * 100, warmup=1251 * 15, peak=1e-3, final=1e-5)
    assert lr == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (3127, 0.7998721), (6255, 1.6), (93835, 0.8440631), (187669, 0.0016)]
)
def test_vicregl_resnet50_300_epochs(step: int, expected: float) -> None:
    peak = 0.2 * 2048 / 256
    assert warmup_cosine(step, total=187_670, warmup=6255, peak=peak, final=1e-3 * peak) == pytest.approx(
        expected, rel=1e-6
    )


def test_it_stays_at_the_end() -> None:
    assert warmup_cosine(500, total=100, warmup=10, peak=1.0, final=0.1) == pytest.approx(0.1)


def test_no_warmup_starts_at_the_peak() -> None:
    assert warmup_cosine(0, total=10, warmup=0, peak=2.0, final=0.0) == 2.0


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1e-3), (1000, 9.888555e-4), (40_000, 5.405279e-4), (79_999, 1.003833e-5), (90_000, 1e-5)]
)
def test_poly_of_power_0_9_with_a_floor(step: int, expected: float) -> None:
    found = warmup_poly(step, total=80_000, warmup=0, peak=1e-3, final=1e-5, power=0.9)
    assert found == pytest.approx(expected, rel=1e-5)


def test_poly_warms_up_and_falls_in_a_line() -> None:
    found = [warmup_poly(t, total=11, warmup=1, peak=1.0, final=0.0, power=1.0) for t in range(12)]
    assert found == pytest.approx([0, *(1 - t / 10 for t in range(11))])
