"""The picture of a LOCA run: discs and squares are drawn on their patches, for any grid."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import Batch, View, recipes
from trainer.methods import loca
from trainer.visualise import CAPTION, GAP, SIDE


@pytest.mark.parametrize(("patch", "size"), [(16, 224), (14, 224), (8, 224), (16, 448), (8, 64)])
def test_places_of_any_grid(tmp_path: Path, patch: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = loca.Method(
        loca.Config(f"vit_pico_patch{patch}", views=recipes.Loca(size=size, focal_views=0), hidden=8, prototypes=4)
    )
    grid = size // patch
    truth, guess, seen = (1, 2), (grid - 1, grid - 3), [(grid - 2, 1), (0, 0)]  # row, column
    target = torch.full((1, 1, grid**2), -1)
    target[0, 0, 5] = truth[0] * grid + truth[1]
    guesses = torch.zeros_like(target)
    guesses[0, 0, 5] = guess[0] * grid + guess[1]
    visible = torch.tensor([[row * grid + column for row, column in seen]])
    window = torch.tensor([[[0.0, 0.0, 100.0, 100.0]]])
    views = {
        kind: View(torch.full((1, 1, size, size, 3), level, dtype=torch.uint8), window)
        for kind, level in (("reference", 100), ("query", 50))
    }
    monkeypatch.setattr(method, "place", lambda batch: ({"query": guesses}, visible))
    batch = Batch(views, {"query": target}, torch.full((1,), -1), torch.arange(1))
    assert method.picture(batch, tmp_path / "picture.png")

    panel = np.asarray(Image.open(tmp_path / "picture.png"))[GAP + CAPTION :, GAP + 2 * (SIDE + GAP) :][:SIDE, :SIDE]
    gray = (panel == panel[..., :1]).all(-1)
    step = SIDE / grid

    def middle(where: np.ndarray) -> tuple[float, float]:
        rows, columns = np.nonzero(where)
        return (rows.min() + rows.max()) / 2 / step - 0.5, (columns.min() + columns.max()) / 2 / step - 0.5

    white = (panel == 255).all(-1)
    assert middle(white) == pytest.approx(truth, abs=2 / step)  # the square, where the patch is
    row, column = (round((x + 0.5) * step) for x in guess)  # the disc, where the model places it
    disc = ~gray
    disc[: row - 5], disc[row + 6 :], disc[:, : column - 5], disc[:, column + 6 :] = False, False, False, False
    assert middle(disc) == pytest.approx(guess, abs=2 / step) and disc.sum() > 40
    bright = np.zeros((grid, grid), bool)
    for r, c in np.ndindex(grid, grid):  # away from the middle, where the disc and the square lie; lines are coloured
        y, x = round((r + 0.2) * step), round((c + 0.1) * step)
        bright[r, c] = gray[y, x] and panel[y, x, 0] > 50
    bright &= [[(r, c) not in (truth, guess) for c in range(grid)] for r in range(grid)]
    assert sorted(zip(*np.nonzero(bright), strict=True)) == sorted(seen)
