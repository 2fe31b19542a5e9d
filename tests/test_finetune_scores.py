"""Scoring a fine-tuned network: sliding windows and figures against plain oracles."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scenes import pair, small_network, write_pairs
from torch import Tensor

from trainer.methods import finetune
from trainer.segmentation import sliding
from trainer.segmentation.labelled import VOID, Labelled
from trainer.segmentation.metric import Confusion, average_precision, localised


@pytest.mark.parametrize(
    ("length", "size", "stride", "wanted"),
    [
        (512, 512, 512, [0]),
        (683, 512, 512, [0, 171]),
        (2048, 768, 512, [0, 512, 1024, 1280]),
        (1024, 512, 512, [0, 512]),
    ],
)
def test_the_last_window_is_flush(length: int, size: int, stride: int, wanted: list[int]) -> None:
    assert sliding.starts(length, size, stride) == wanted


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(pair(7, height, width)[0])


def test_one_window_is_the_network_itself() -> None:
    torch.manual_seed(0)
    method = finetune.Method(small_network()).eval()
    image = picture(32, 32)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    x = (x - torch.tensor(method.mean)[:, None, None]) / torch.tensor(method.std)[:, None, None]
    with torch.no_grad():
        wanted = F.interpolate(method.logits(x), (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(sliding.logits(method, image), wanted)


@pytest.mark.parametrize("size", [(32, 77), (100, 64), (20, 24)])
def test_windows_are_averaged_where_they_overlap(size: tuple[int, int]) -> None:
    """Each pixel: the mean over all windows that hold it, written without slices. Small images are enlarged first."""
    torch.manual_seed(0)
    method = finetune.Method(small_network(antialias=True)).eval()
    image = picture(*size)
    found = sliding.logits(method, image)
    scale = 32 / min(size)
    height, width = (round(side * scale) for side in size)
    assert found.shape == (3, height, width) and min(height, width) == 32
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    x = (x - torch.tensor(method.mean)[:, None, None]) / torch.tensor(method.std)[:, None, None]
    x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)
    windows: dict[tuple[int, int], Tensor] = {}
    tops, lefts = ({min(k * 16, length - 32) for k in range(length)} for length in (height, width))
    with torch.no_grad():
        for top in tops:
            for left in lefts:
                crop = x[:, :, top : top + 32, left : left + 32]
                windows[top, left] = F.interpolate(method.logits(crop), (32, 32), mode="bilinear")[0]
    for y in range(0, height, 5):
        for c in range(0, width, 3):
            seen = [w[:, y - t, c - l] for (t, l), w in windows.items() if 0 <= y - t < 32 and 0 <= c - l < 32]
            torch.testing.assert_close(found[:, y, c], torch.stack(seen).mean(0), rtol=1e-4, atol=1e-5)


# ---- figures ---------------------------------------------------------------------------------------------------------


def oracle_names(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Each predicted mask named after the true one with which its IoU is the best, mask by mask."""
    labelled, named = truth != VOID, predicted.copy()
    for p in range(classes):
        mine = (predicted == p) & labelled
        if mine.any():
            ious = [
                (mine & (truth == t)).sum() / max((mine | ((truth == t) & labelled)).sum(), 1) for t in range(classes)
            ]
            named[predicted == p] = int(np.argmax(ious))
    return named


def test_a_set_without_labels_has_no_score(tmp_path: Path) -> None:
    picture, mask = pair(0)
    data = Labelled(write_pairs(tmp_path / "void", [(picture, np.full_like(mask, VOID))]))
    with pytest.raises(ValueError, match="void: no pixel has a label"):
        sliding.score(finetune.Method(small_network()), data, torch.device("cpu"))


def test_localisation_is_what_an_oracle_of_names_leaves() -> None:
    rng = np.random.default_rng(0)
    mine, wanted = Confusion(5), Confusion(5)
    for _ in range(20):
        truth = rng.integers(0, 5, (4, 5)).repeat(5, 0).repeat(4, 1)
        predicted = np.where(rng.random(truth.shape) < 0.4, rng.integers(0, 5, truth.shape), (truth + 2) % 5)
        truth[rng.random(truth.shape) < 0.1] = VOID
        one = Confusion(5)
        one.add(torch.from_numpy(predicted), torch.from_numpy(truth))
        mine.matrix += localised(one.matrix)
        wanted.add(torch.from_numpy(oracle_names(predicted, truth, 5)), torch.from_numpy(truth))
    assert torch.equal(mine.matrix, wanted.matrix)
    assert 0.2 < mine.miou < 0.9


def test_right_shapes_of_permuted_classes_are_all_right() -> None:
    rng = np.random.default_rng(1)
    total, plain = Confusion(6), Confusion(6)
    for _ in range(8):
        truth = torch.from_numpy(rng.integers(0, 6, (9, 9)))
        one = Confusion(6)
        one.add(torch.from_numpy(rng.permutation(6))[truth], truth)
        total.matrix += localised(one.matrix)
        plain.matrix += one.matrix
    assert total.miou == 1.0 and plain.miou < 0.5


def by_thresholds(score: list[float], truth: list[bool]) -> float:
    """For each threshold, from all images above it."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        above = [t for s, t in zip(score, truth, strict=True) if s >= threshold]
        recall = sum(above) / sum(truth)
        total += (recall - before) * sum(above) / len(above)
        before = recall
    return total


def test_average_precision() -> None:
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 12, (40, 6)) / 12  # with ties
    present = rng.random((40, 6)) < [0.5, 0.2, 0.9, 0.05, 0.0, 1.0]
    wanted = [by_thresholds(scores[:, c].tolist(), present[:, c].tolist()) for c in (0, 1, 2, 3, 5)]
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(present))
    assert found[[0, 1, 2, 3, 5]].tolist() == pytest.approx(wanted) and found[4].isnan()  # no image has the class
    perfect = torch.from_numpy(present)
    assert average_precision(perfect.float(), perfect)[[0, 1, 2, 3, 5]].tolist() == [1.0] * 5


def test_a_class_is_present_as_surely_as_in_its_surest_pixel() -> None:
    figures = sliding.Figures(2, 3, torch.device("cpu"))
    scores = torch.zeros(3, 4, 4)
    scores[1, 2, 3], scores[2] = 9.0, -9.0
    truth = torch.full((8, 8), VOID, dtype=torch.uint8)
    truth[0, 0], truth[7, 7] = 0, 2
    figures.add(1, scores, truth)
    assert figures.present.tolist() == [[0, 0, 0], [1, 0, 1]]
    assert figures.scores[1].tolist() == pytest.approx([0.5, 0.99988, 0.00006], abs=1e-4)
    assert figures.segmentation.matrix.sum() == 2
