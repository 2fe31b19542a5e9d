"""mIoU against plain reference code, and the exact alignment of label maps, patch grids and images."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.segmentation.labelled import VOID, class_shares, fitted
from trainer.segmentation.metric import Confusion, label_map

G = torch.Generator().manual_seed(0)


def maps(count: int, height: int, width: int, classes: int, void: float = 0.1) -> Tensor:
    """Random label maps, some pixels void."""
    labels = torch.randint(classes, (count, height, width), generator=G)
    return labels.where(torch.rand(labels.shape, generator=G) >= void, VOID).to(torch.uint8)


def jaccard(predicted: Tensor, truth: Tensor, classes: int) -> list[float]:
    """Each class's IoU from sets of pixels; NaN where both are empty."""
    pairs = [(p, t) for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True) if t != VOID]
    found = []
    for c in range(classes):
        mine, theirs = {i for i, (p, _) in enumerate(pairs) if p == c}, {i for i, (_, t) in enumerate(pairs) if t == c}
        found.append(len(mine & theirs) / len(mine | theirs) if mine | theirs else math.nan)
    return found


def test_iou_is_that_of_sets_for_any_batches_and_ranks() -> None:
    truth, predicted = maps(6, 9, 7, 5), maps(6, 9, 7, 5, void=0)
    expected = jaccard(predicted, truth, 6)  # nothing is of class 5
    parts = []
    for sizes in ([6], [1, 5], [2, 2, 2]):
        confusion = Confusion(6)
        for p, t in zip(predicted.split(sizes), truth.split(sizes), strict=True):
            confusion.add(p, t)
            parts.append(confusion.matrix.clone())
        assert confusion.iou.tolist() == pytest.approx(expected, nan_ok=True)
        assert confusion.miou == pytest.approx(np.mean(expected[:5]))
        right = ((predicted == truth) & (truth != VOID)).sum() / (truth != VOID).sum()
        assert confusion.pixel_accuracy == pytest.approx(right.item())
    ranks = [Confusion(6), Confusion(6)]
    for i in range(6):
        ranks[i % 2].add(predicted[i], truth[i])
    ranks[0].matrix += ranks[1].matrix
    assert torch.equal(ranks[0].matrix, parts[0])


def test_a_class_that_is_only_predicted_counts_and_an_absent_one_does_not() -> None:
    confusion = Confusion(4)
    confusion.add(torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1]]))
    assert confusion.iou.tolist() == pytest.approx([1, 0.5, 0, math.nan], nan_ok=True)
    assert confusion.miou == pytest.approx(0.5)
    confusion.add(torch.tensor([[3, 3]]), torch.full((1, 2), VOID))  # over void: no prediction
    assert confusion.miou == pytest.approx(0.5)


def test_the_standard_error_is_the_spread_over_sets_of_images() -> None:
    """Many sets drawn afresh from one distribution: their mIoU spreads as the estimate from one set says."""

    def drawn(images: int) -> Confusion:
        confusion = Confusion(3)
        for skill in torch.rand(images, generator=G):  # images differ: pixels of one are not independent
            truth = torch.randint(3, (64,), generator=G)
            wrong = torch.rand(64, generator=G) > skill
            confusion.add(torch.where(wrong, torch.randint(3, (64,), generator=G), truth), truth)
        return confusion

    spread = np.std([drawn(40).miou for _ in range(300)])
    found = [drawn(40).standard_error() for _ in range(20)]
    assert np.mean(found) == pytest.approx(spread, rel=0.15)
    same = drawn(5)
    assert same.standard_error(seed=1) == same.standard_error(seed=1) != same.standard_error(seed=2)
    one = drawn(1)
    assert math.isnan(one.standard_error())


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width"), [(3, 5, 31, 64), (4, 4, 4, 9), (6, 3, 5, 3), (1, 1, 8, 8)]
)
@pytest.mark.parametrize("strip", [1, 500, 1 << 24])
def test_scores_are_interpolated_as_torch_does_it_in_any_strips(
    rows: int, columns: int, height: int, width: int, strip: int
) -> None:
    scores = torch.randn(7, rows, columns, generator=G)
    whole = F.interpolate(scores[None], (height, width), mode="bilinear", align_corners=False)[0]
    assert torch.equal(label_map(scores, height, width, strip), whole.argmax(0))


@pytest.mark.parametrize("patch", [4, 8])
def test_an_edge_between_patches_stays_there_to_the_pixel(patch: int) -> None:
    """Half a pixel of shift, corners aligned or a transposed grid: any of them would move it."""
    truth = torch.zeros(5 * patch, 7 * patch, dtype=torch.uint8)
    truth[:, 3 * patch :] = 1
    truth[2 * patch :, :] += 2
    shares = class_shares(truth, 5, 7, 4)
    assert set(shares.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(label_map(shares.mT.unflatten(1, (5, 7)), *truth.shape), truth.long())


def test_shares_count_pixels_and_leave_void_out() -> None:
    mask = maps(1, 30, 44, 3, void=0.4)[0]
    mask[:10, :11] = VOID
    shares = class_shares(mask, 3, 4, 3)
    for patch, share in enumerate(shares.tolist()):
        row, column = divmod(patch, 4)
        pixels = mask[row * 10 : row * 10 + 10, column * 11 : column * 11 + 11].flatten().tolist()
        assert share == pytest.approx([pixels.count(c) / 110 for c in range(3)])
    assert shares[0].tolist() == [0, 0, 0]
    mostly_void = torch.full((8, 8), VOID, dtype=torch.uint8)
    mostly_void[0, 0] = 2  # what is void never outvotes what is labelled
    assert class_shares(mostly_void, 1, 1, 3).tolist() == [[0, 0, 1 / 64]]


def test_shares_of_a_grid_that_does_not_divide_the_mask() -> None:
    mask = maps(1, 17, 22, 4, void=0)[0]
    shares = class_shares(mask, 5, 6, 4)
    torch.testing.assert_close(shares.sum(1), torch.ones(30))
    for row, column in ((0, 0), (4, 5), (2, 3)):
        inside = [
            int(mask[y, x])
            for y in range(17)
            for x in range(22)
            if int((y + 0.5) * 5 / 17) == row and int((x + 0.5) * 6 / 22) == column
        ]
        assert shares[row * 6 + column].tolist() == pytest.approx([inside.count(c) / len(inside) for c in range(4)])
    torch.testing.assert_close(class_shares(mask.flip(1), 5, 6, 4), shares.unflatten(0, (5, 6)).flip(1).flatten(0, 1))


def test_no_class_appears_between_two_others() -> None:
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[:, 7:] = 2
    assert not class_shares(mask, 5, 5, 3)[:, 1].any()


@pytest.mark.parametrize(
    ("image", "short_side", "stride", "expected"),
    [
        ((360, 480), 240, 16, (240, 320)),
        ((480, 360), 240, 16, (320, 240)),
        ((360, 480), None, 32, (352, 480)),
        ((500, 333), 224, 14, (336, 224)),
        ((20, 500), 16, 8, (16, 400)),
        ((5, 5), None, 32, (32, 32)),
    ],
)
def test_images_keep_their_ratio_and_fill_the_grid(
    image: tuple[int, int], short_side: int | None, stride: int, expected: tuple[int, int]
) -> None:
    assert fitted(*image, short_side, stride) == expected
