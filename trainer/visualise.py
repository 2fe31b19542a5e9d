"""Pictures of a run: the views of a batch and, for LOCA, the predicted places of the queries' patches."""

import colorsys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from pipeline import Batch

SIDE, GAP, CAPTION = 448, 12, 22  # pixels: side of a panel, space between panels, height of a caption


def views(batch: Batch, rows: int = 4, side: int = 96) -> NDArray[np.uint8]:
    """Draw the views of the first `rows` images of a batch, one image per row: u8 (H, W, 3)."""
    rows = min(rows, len(batch.index))
    strips = [view.pixels[:rows].cpu().numpy() for view in batch.views.values()]
    small = [
        [np.asarray(Image.fromarray(pixels).resize((side, side))) for strip in strips for pixels in strip[row]]
        for row in range(rows)
    ]
    return np.concatenate([np.concatenate(line, 1) for line in small])


def placements(
    path: Path, batch: Batch, predicted: dict[str, Tensor], visible: Tensor, *, grid: int, rows: int = 3
) -> None:
    """Write a PNG with a row for each of the first `rows` images of the batch, in three panels.

    The panels show the windows of all queries in the reference view, the queries, and lines from the predicted to the
    true place of each query patch. `predicted` has, by kind of query, the predicted reference patch of each query
    patch, i64 (B, V, n). `visible`, i64 (1 or B, m), are the reference patches that the model could see; they are
    brighter in the third panel. The reference has `grid` patches per side.
    """
    rows = min(rows, batch.label.shape[0])
    picture = Image.new("RGB", (3 * SIDE + 4 * GAP, rows * (SIDE + CAPTION + GAP) + GAP), "white")
    for row in range(rows):
        top = GAP + row * (SIDE + CAPTION + GAP)
        seen = visible[row if len(visible) > 1 else 0].tolist()
        for column, (caption, panel) in enumerate(_panels(batch, predicted, seen, grid, row)):
            left = GAP + column * (SIDE + GAP)
            ImageDraw.Draw(picture).text((left, top + 4), caption, fill="black", font_size=13)
            picture.paste(panel, (left, top + CAPTION))
    picture.save(path)


def _panels(
    batch: Batch, predicted: dict[str, Tensor], visible: list[int], grid: int, row: int
) -> list[tuple[str, Image.Image]]:
    reference = Image.fromarray(batch.views["reference"].pixels[row, 0].cpu().numpy()).resize((SIDE, SIDE))
    window = batch.views["reference"].window[row, 0].numpy()
    queries = [(kind, v) for kind in predicted for v in range(predicted[kind].shape[1])]
    colours = [
        tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / len(queries), 0.9, 0.95)) for i in range(len(queries))
    ]

    outlines, places = reference.copy(), reference.point(lambda level: round(0.3 * level))
    for patch in visible:
        box = _box(patch, grid)
        places.paste(reference.crop(box).point(lambda level: round(0.7 * level)), box)
    on_outlines, on_places = ImageDraw.Draw(outlines), ImageDraw.Draw(places)
    thumbnails = Image.new("RGB", (SIDE, SIDE), "white")
    across = int(np.ceil(np.sqrt(len(queries))))
    cell = SIDE // across
    right = valid = 0
    for i, (kind, v) in enumerate(queries):
        on_outlines.rectangle(
            _in_reference(window, batch.views[kind].window[row, v].numpy()), outline=colours[i], width=3
        )
        thumbnail = Image.fromarray(batch.views[kind].pixels[row, v].cpu().numpy()).resize((cell - 8, cell - 8))
        corner = (i % across * cell, i // across * cell)
        ImageDraw.Draw(thumbnails).rectangle((*corner, corner[0] + cell - 2, corner[1] + cell - 2), fill=colours[i])
        thumbnails.paste(thumbnail, (corner[0] + 3, corner[1] + 3))
        truth = batch.targets[kind][row, v].cpu().numpy()
        guess = predicted[kind][row, v].cpu().numpy()
        right += int(((guess == truth) & (truth >= 0)).sum())
        valid += int((truth >= 0).sum())
        for there, here in zip(guess[truth >= 0], truth[truth >= 0], strict=True):
            (ax, ay), (bx, by) = (
                np.reshape(_box(int(patch), grid), (2, 2)).mean(0).tolist() for patch in (there, here)
            )
            on_places.line((ax, ay, bx, by), fill=colours[i], width=1)
            on_places.ellipse((ax - 4, ay - 4, ax + 4, ay + 4), fill=colours[i])
            on_places.rectangle((bx - 2, by - 2, bx + 2, by + 2), outline="white")
    return [
        ("reference view, windows of the queries", outlines),
        ("the queries", thumbnails),
        (f"disc: where the model places a patch; square: where it is ({right} of {valid} right)", places),
    ]


def _in_reference(reference: NDArray[np.float32], window: NDArray[np.float32]) -> tuple[float, float, float, float]:
    """Return a window's rectangle in the panel of the reference view, mirrored if the reference is flipped."""
    ends = (window.reshape(2, 2) - reference[:2]) / (reference[2:] - reference[:2]) * SIDE
    (y0, x0), (y1, x1) = np.sort(ends, axis=0).tolist()
    return x0, y0, x1, y1


def _box(patch: int, grid: int) -> tuple[int, int, int, int]:
    """Return the box of a patch in the panel of the reference view: left, top, right, bottom."""
    row, column = divmod(patch, grid)
    left, top, right, bottom = (round(i * SIDE / grid) for i in (column, row, column + 1, row + 1))
    return left, top, right, bottom
