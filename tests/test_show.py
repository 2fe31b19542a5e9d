"""show_views: the picture has the windows in the right place, and lines between corresponding cells."""

import base64
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from mapimages import encode, sample, smooth_image, write_tar
from PIL import Image

from pipeline import draws, recipes

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import show_views as show

HEIGHT, WIDTH = 180, 240


def drawn(recipe: recipes.Recipe):
    """A picture, its views cut crudely with Pillow from windows of the real draws, and the recipe's targets."""
    image = smooth_image(3, HEIGHT, WIDTH)
    sizes = np.array([[HEIGHT, WIDTH]], np.int32)
    windows, _ = draws.draw(draws.distributions(recipe), 0, 0, np.array([5]), sizes)
    views, by_kind, start = {}, {}, 0
    for cut in recipe.cuts:
        own = windows[:, start : start + cut.count]
        pixels = [
            np.asarray(Image.fromarray(image).transform((cut.size, cut.size), Image.Transform.EXTENT, (x0, y0, x1, y1)))
            for y0, x0, y1, x1 in own[0].tolist()
        ]
        views[cut.kind], by_kind[cut.kind] = (np.stack(pixels), own[0]), own
        start += cut.count
    targets = {k: v[0] for k, v in recipe.targets(by_kind).items()} if recipe.targets else {}
    return image, views, targets


def shown(recipe: recipes.Recipe, views) -> list[show.Shown]:
    return [
        show.Shown(f"{cut.kind} {v}", views[cut.kind][0][v], views[cut.kind][1][v], cut.grid, (v, 0, 0))
        for cut in recipe.cuts
        for v in range(cut.count)
    ]


def test_lines_join_locas_targets():
    recipe = recipes.loca(focal_views=3)
    _, views, targets = drawn(recipe)
    pairs = list(show.patch_pairs(shown(recipe, views), recipe, targets))
    assert [(a.name, b.name) for a, b, _, _ in pairs] == [
        ("reference 0", name) for name in ("query 0", "focal 0", "focal 1", "focal 2")
    ]
    for (_, _, lines, marks), target in zip(pairs, [*targets["query"], *targets["focal"]], strict=True):
        assert all(target[b] == a for a, b, _, _ in lines)
        assert len({b for _, b, _, _ in lines}) == len(lines) == min(show.LINES, (target >= 0).sum())
        assert {cell for view, cell, _ in marks if view == 1} == set(np.flatnonzero(target >= 0))
        assert all(colour == show.cell_colour(target[cell], 14) for view, cell, colour in marks if view == 1)


@pytest.mark.parametrize(
    "recipe", [recipes.vicregl(), recipes.vicregl_resnet50(), recipes.vicregl(small=1, gamma=None)]
)
def test_lines_join_vicregls_matches(recipe):
    _, views, targets = drawn(recipe)
    all_shown = shown(recipe, views)
    first = np.cumsum([0] + [view.grid**2 for view in all_shown])
    found = []
    pairs = list(show.location_pairs(all_shown, recipe, targets["matches"]))
    assert len(pairs) == 2 * (len(all_shown) - 1)
    for a, b, lines, _ in pairs:
        i, j = all_shown.index(a), all_shown.index(b)
        for left, right, colour, _ in lines:
            cells = [int(first[i]) + left, int(first[j]) + right]
            found.append(cells[::-1] if colour == (255, 255, 255) else cells)
    assert found == targets["matches"].tolist()


def test_windows_are_drawn_where_they_are():
    recipe = recipes.vicregl_resnet50()
    image, views, targets = drawn(recipe)
    page = np.asarray(show.render(image, views, targets, recipe, "title"))
    scale = min(760 / WIDTH, 560 / HEIGHT)
    y0, x0, y1, x1 = views["large"][1][1] * scale  # the last drawn lies on top
    top, left = show.MARGIN + 40, show.MARGIN
    right_border = page[round(top + (y0 + y1) / 2), round(left + max(x0, x1)) - 1]
    middle_of_frame = page[round(top + y1) - 1, round(left + (x0 + x1) / 2)]
    assert np.abs(right_border.astype(int) - middle_of_frame).max() < 60
    assert right_border.max() - right_border.min() > 120  # the view's colour, not the picture's


def test_every_recipe_makes_a_page():
    for recipe in (recipes.vicregl("released", small=2), recipes.plain()):
        page = show.render(*drawn(recipe), recipe, "title")
        assert page.width == show.WIDTH and page.height > 300
        assert len(np.unique(np.asarray(page)[::8, ::8].reshape(-1, 3), axis=0)) > 1000


def test_mirrored_views_are_called_so():
    view = show.Shown("small 1", np.zeros((8, 8, 3), np.uint8), np.float32([0, 5, 5, 0]), 3, (0, 0, 0))
    assert view.title == "small 1, mirrored"


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    members = [m for i in range(3) for m in sample(f"{i:05d}", encode(smooth_image(i, HEIGHT, WIDTH), "JPEG"))]
    tar = write_tar(tmp_path / "few.tar", members)
    out = tmp_path / "views.png"
    assert show.main(["--shards", str(tar), "--recipe", "vicregl_resnet50", "--out", str(out)]) == 0
    assert Image.open(out).width == show.WIDTH
    assert show.main(["--shards", str(tar), "--recipe", "vicregl_resnet50", "--out", str(tmp_path / "views.HTML")]) == 0
    inside = (tmp_path / "views.HTML").read_text().partition("base64,")[2].partition('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(inside))) == Image.open(out)
    capsys.readouterr()
    for arguments in (
        ["--shards", str(tmp_path / "no.tar")],
        ["--shards", str(tar), "--out", str(tmp_path / "no" / "x.png")],
        ["--shards", str(tar), "--out", "no.picture"],
        ["--shards", str(tar), "--out", "no.psd"],  # which Pillow reads and does not write
    ):
        assert show.main(["--recipe", "plain", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("show_views.py: ") and error.count("\n") == 1 and "no" in error
    with pytest.raises(SystemExit) as ended:
        show.main(["--shards", str(tar), "--recipe", "mae"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("words", "sentence"), [("a.tar b.tar c.tar", "'b.tar' and 1 more: .* in quotes"), ("a --x", "--x")]
)
def test_a_pattern_that_the_shell_has_expanded(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        show.main(["--shards", *words.split(), "--recipe", "plain"])
    assert ended.value.code == 2 and re.search(sentence, capsys.readouterr().err)
