"""Draws the pipeline's output for one image: its windows, its views, and the patches that correspond.

    python tools/show_views.py --shards SPEC --recipe loca --out views.png
    python tools/show_views.py --shards SPEC --recipe vicregl --seed 3 --fidelity released --out views.png

LOCA: each query patch with a target has a dot, and so has its target in the reference. The colour encodes the location
in the reference; lines join a few of the pairs. VICRegL: for each ordered pair of views, lines are the kept location
matches, coloured from the first view to the second, and white from the second to the first (VICRegL paper, fig. 3).
"""

import argparse
import base64
import colorsys
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline import Loader, Recipe, ShardSet, recipes
from pipeline.specs import parse_args

WIDTH, MARGIN, GAP, LABEL, BETWEEN = 1640, 28, 14, 22, 46  # of the page, in pixels
FINE = 2  # supersampling factor: drawn larger, then shrunk, for smooth lines
BACKGROUND, TEXT, MUTED = (250, 249, 246), (38, 38, 42), (120, 120, 126)
LINES = 14  # lines between a pair of LOCA's views

RGB = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Shown:
    """One view: its name, pixels u8 (S, S, 3), window, patches per side and the colour of its frame."""

    name: str
    pixels: NDArray[np.uint8]
    window: NDArray[np.float32]
    grid: int
    colour: RGB

    @property
    def title(self) -> str:
        return f"{self.name}, mirrored" if self.window[3] < self.window[1] else self.name


class Page:
    """A canvas in pixels of the finished picture; `done` crops it to the used height."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH * FINE, height * FINE), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, at: Point, text: str, colour: RGB = TEXT, size: int = 14) -> None:
        font = ImageFont.load_default(size * FINE)
        self.draw.text((at[0] * FINE, at[1] * FINE), text, fill=colour, font=font)

    def picture(self, pixels: NDArray[np.uint8], x: float, y: float, width: float, height: float) -> None:
        size = (round(width * FINE), round(height * FINE))
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        self.image.paste(picture, (round(x * FINE), round(y * FINE)))

    def frame(self, x0: float, y0: float, x1: float, y1: float, colour: RGB, width: float, out: float = 0.0) -> None:
        """Draw a rectangle with its line inside; `out` moves the line outwards, in pixels."""
        box = [round(v * FINE) for v in (min(x0, x1) - out, y0 - out, max(x0, x1) + out, y1 + out)]
        self.draw.rectangle(box, outline=colour, width=round(width * FINE))

    def line(self, a: Point, b: Point, colour: RGB, width: float) -> None:
        self.draw.line([v * FINE for v in (*a, *b)], fill=colour, width=round(width * FINE))

    def dot(self, at: Point, radius: float, colour: RGB, rim: RGB = (20, 20, 20)) -> None:
        for r, fill in ((radius + 0.9, rim), (radius, colour)):
            self.draw.ellipse([(v + s * r) * FINE for s in (-1, 1) for v in at], fill=fill)

    def done(self, height: float) -> Image.Image:
        size = (WIDTH, round(height))
        return self.image.crop((0, 0, WIDTH * FINE, size[1] * FINE)).resize(size, Image.Resampling.LANCZOS)


def place_colour(row: float, column: float) -> RGB:
    """Return a colour for a location in the unit square: hue by column, lightness by row."""
    r, g, b = colorsys.hls_to_rgb(0.85 * column, 0.72 - 0.36 * row, 0.95)
    return round(255 * r), round(255 * g), round(255 * b)


def cell_colour(cell: int, grid: int) -> RGB:
    return place_colour((cell // grid + 0.5) / grid, (cell % grid + 0.5) / grid)


def render(
    image: NDArray[np.uint8],
    views: dict[str, tuple[NDArray[np.uint8], NDArray[np.float32]]],
    targets: dict[str, NDArray[Any]],
    recipe: Recipe,
    title: str,
) -> Image.Image:
    """Draw the page of an image u8 (H, W, 3). `views` has pixels u8 (V, S, S, 3) and windows f32 (V, 4) by kind."""
    shown: list[Shown] = []
    total = sum(cut.count for cut in recipe.cuts)
    for cut in recipe.cuts:
        pixels, windows = views[cut.kind]
        for v in range(cut.count):
            r, g, b = colorsys.hls_to_rgb((0.09 + len(shown) / total) % 1, 0.55, 0.9)
            name = cut.kind if cut.count == 1 else f"{cut.kind} {v + 1}"
            colour = (round(255 * r), round(255 * g), round(255 * b))
            shown.append(Shown(name, pixels[v], windows[v], cut.grid, colour))
    if "matches" in targets:
        pairs = list(location_pairs(shown, recipe, targets["matches"]))
    else:
        pairs = list(patch_pairs(shown, recipe, targets))
    column = (WIDTH - 2 * MARGIN + 2 * GAP) / 3
    row = (column - 2 * GAP - BETWEEN) / 2 + LABEL + GAP
    rows = -(-len(pairs) // 3)
    page = Page(round(900 + rows * row))
    page.text((MARGIN, MARGIN), title, size=20)
    top = overview(page, image, shown, MARGIN + 40)
    for k, (left, right, lines, marks) in enumerate(pairs):
        at = (MARGIN + (k % 3) * column, top + (k // 3) * row)
        pair(page, at, (row - LABEL - GAP), (left, right), lines, marks)
    return page.done(top + rows * row + MARGIN - GAP)


def overview(page: Page, image: NDArray[np.uint8], shown: list[Shown], y: float) -> float:
    """Draw the stored image with all windows, and the views to its right. Return where the next row may start."""
    height, width = image.shape[:2]
    scale = min(760 / width, 560 / height)
    page.picture(image, MARGIN, y, width * scale, height * scale)
    for view in shown:  # a bright line on a dark one is visible on any photograph
        y0, x0, y1, x1 = (float(v) * scale for v in view.window)
        box = (MARGIN + x0, y + y0, MARGIN + x1, y + y1)
        page.frame(*box, (15, 15, 15), 3.6, 0.7)
        page.frame(*box, view.colour, 2.2)
    x0 = MARGIN + width * scale + 2 * GAP

    def side_of(columns: int) -> float:
        return min((WIDTH - MARGIN - x0 + GAP) / columns - GAP, 560 / -(-len(shown) // columns) - LABEL - GAP)

    columns = max(range(2, 9), key=side_of)
    side = side_of(columns)
    bottom = y + height * scale
    for k, view in enumerate(shown):
        x, top = x0 + (k % columns) * (side + GAP), y + (k // columns) * (side + LABEL + GAP)
        page.picture(view.pixels, x, top, side, side)
        page.frame(x - 2, top - 2, x + side + 1, top + side + 1, view.colour, 3)
        page.text((x, top + side + 3), f"{view.title} ({view.pixels.shape[0]})", size=13)
        bottom = max(bottom, top + side + LABEL)
    return bottom + 2 * GAP


Line = tuple[int, int, RGB, float]  # cell of the left view, cell of the right view, colour, width
Mark = tuple[int, int, RGB]  # view (0 or 1), cell, colour
Pair = tuple[Shown, Shown, list[Line], list[Mark]]


def pair(page: Page, at: Point, side: float, views: tuple[Shown, Shown], lines: list[Line], marks: list[Mark]) -> None:
    """Draw two views side by side with the lines and marks of their correspondences."""
    y, left = at[1], (at[0], at[0] + side + BETWEEN)
    for view, x in zip(views, left, strict=True):
        page.picture(view.pixels, x, y, side, side)
        page.frame(x - 2, y - 2, x + side + 1, y + side + 1, view.colour, 3)
        page.text((x, y + side + 3), view.title, MUTED, size=13)

    def centre(which: int, cell: int) -> Point:
        row, column = divmod(cell, views[which].grid)
        step = side / views[which].grid
        return left[which] + (column + 0.5) * step, y + (row + 0.5) * step

    for a, b, colour, thick in lines:
        page.line(centre(0, a), centre(1, b), (25, 25, 25), thick + 1.2)
        page.line(centre(0, a), centre(1, b), colour, thick)
    for which, cell, colour in marks:
        page.dot(centre(which, cell), min(3.6, 0.16 * side / views[which].grid), colour)


def patch_pairs(shown: list[Shown], recipe: Recipe, targets: dict[str, NDArray[Any]]) -> Iterator[Pair]:
    """Yield LOCA's pairs: the reference and each query view."""
    reference, queries = shown[0], iter(shown[1:])
    for cut in recipe.cuts[1:]:
        for target in targets.get(cut.kind, ()):
            valid = np.flatnonzero(target >= 0)
            picked = valid[np.unique(np.linspace(0, max(len(valid) - 1, 0), LINES).round().astype(int))[: len(valid)]]
            grid = reference.grid
            lines = [(int(target[k]), int(k), cell_colour(int(target[k]), grid), 1.4) for k in picked]
            marks = [(0, int(cell), cell_colour(int(cell), grid)) for cell in np.unique(target[valid])]
            marks += [(1, int(k), cell_colour(int(target[k]), grid)) for k in valid]
            yield reference, next(queries), lines, marks


def location_pairs(shown: list[Shown], recipe: Recipe, matches: NDArray[np.int32]) -> Iterator[Pair]:
    """Yield VICRegL's pairs: each ordered pair of a large and another view, with the matches in both directions."""
    first = np.cumsum([0] + [view.grid**2 for view in shown])
    seen = np.searchsorted(first, matches, side="right") - 1
    cells = matches - first[seen]
    # Within one direction of one pair the querying cells ascend. A step down, or other views, begins the next one.
    turn = (np.diff(seen, axis=0) != 0).any(1) | (np.diff(cells[:, 0]) <= 0)
    starts = [0, *(np.flatnonzero(turn) + 1), len(matches)]
    runs = [slice(a, b) for a, b in pairwise(starts)]
    white = (255, 255, 255)
    for there, back in zip(runs[::2], runs[1::2], strict=True):
        i, j = seen[there][0]
        lines = [(int(a), int(b), cell_colour(int(a), shown[i].grid), 1.4) for a, b in cells[there]]
        lines += [(int(b), int(a), white, 1.4) for a, b in cells[back]]
        marks = [mark for a, b, colour, _ in lines for mark in ((0, a, colour), (1, b, colour))]
        yield shown[i], shown[j], lines, marks


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shards", required=True, help="a directory, a brace pattern or a tar")
    parser.add_argument("--recipe", default="loca", choices=["loca", "vicregl", "vicregl_resnet50", "plain"])
    parser.add_argument("--fidelity", choices=["paper", "released"], help="default: the recipe's default")
    parser.add_argument("--seed", type=int, default=0, help="another seed shows another image and other draws")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="a picture, or an .html with it embedded")
    args = parse_args(parser, argv)
    try:
        writable = {ending for ending, form in Image.registered_extensions().items() if form in Image.SAVE}
        if args.out.suffix.lower() not in {".html", *writable}:
            raise ValueError(f"--out {args.out}: name a picture such as views.png or views.jpg, or an .html file")
        page = page_of(args.shards, args.recipe, args.fidelity, args.seed)
        save(page, args.out)
    except (ValueError, OSError) as error:
        print(f"show_views.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{args.out}: {page.width} x {page.height}")
    return 0


def save(page: Image.Image, path: Path) -> None:
    """Write the page as a picture, or as an HTML file that embeds it."""
    if path.suffix.lower() != ".html":
        page.save(path)
        return
    png = io.BytesIO()
    page.save(png, "PNG")
    path.write_text(f'<img alt="views" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">\n')


def page_of(spec: str, recipe_name: str, fidelity: str | None, seed: int) -> Image.Image:
    """Return the page of the first image of an epoch. Raises ValueError for unusable shards."""
    shards = ShardSet(spec)
    recipe = getattr(recipes, recipe_name)(**({"fidelity": fidelity} if fidelity else {}))
    batch = next(iter(Loader(shards, recipe, 1, seed=seed, num_threads=1)))
    index = int(batch.index[0])
    image = np.asarray(Image.open(io.BytesIO(shards.read(index))).convert("RGB"))
    views = {kind: (view.pixels[0].numpy(), view.window[0].numpy()) for kind, view in batch.views.items()}
    targets = {name: target[0].numpy() for name, target in batch.targets.items()}
    title = f"{recipe.name}, {recipe.fidelity}, seed {seed}: {shards.key(index)}, {image.shape[1]} x {image.shape[0]}"
    return render(image, views, targets, recipe, title)


if __name__ == "__main__":
    sys.exit(main())
