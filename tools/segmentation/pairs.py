"""Layouts of data sets as downloaded: where images and masks are, which of them form a split, how masks are coded.

A pattern is a path below SOURCE: `{split}` is the split's folder, `{key}` the sample's name, `{path}` a name that may
contain folders, `*` any one folder, and a final `.*` the extension of any image. The fixed folders before the first of
these may be in SOURCE itself or up to two folders deeper, so SOURCE can be the folder that an archive was unpacked to.
"""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from PIL import Image
from sharding import SourceError
from sharding.plan import clean_key
from sharding.sources import IMAGES

from .masks import Encoding

T = TypeVar("T")
Box = tuple[int, int, int, int]  # y0, x0, y1, x1


def every_key(split: str, key: str) -> bool:
    return True


def same_key(split: str, key: str) -> str:
    return key


_WILD = {"{key}": "([^/]+)", "{path}": "(.+)", "*": "[^/]+", ".*": r"\.[^./]+"}


@dataclass(frozen=True)
class Layout:
    """A data set as downloaded."""

    classes: tuple[str, ...]
    images: tuple[str, ...]
    masks: Mapping[str, Encoding]  # pattern -> coding of these masks; the first existing mask of a sample counts
    splits: Mapping[str, tuple[str, int | None]]  # name -> value of `{split}`, and published number of samples
    lists: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)  # split -> see `_listed`
    member: Callable[[str, str], bool] = every_key  # (split, key) -> membership, for splits without folder or list
    partner: Callable[[str, str], str | None] = same_key  # (split, mask's key) -> image's key; None: in another split
    patch: tuple[int, int] | None = None  # side and stride of the patches that large images are cut into
    red_green: Mapping[str, tuple[int, int]] | None = None  # split -> channels R and G; images become R, G, (R+G)/2
    oversized: bool = False  # a mask larger than its image is cropped at the right and at the bottom
    as_stored: bool = True  # masks match the pixels as stored, before any EXIF rotation; False: unknown
    hint: str = ""  # how to get missing masks

    def encoding(self, pair: "Pair") -> Encoding:
        return list(self.masks.values())[pair.encoding]


@dataclass(frozen=True)
class Pair:
    """One sample: an image and its mask, or the same patch of both."""

    name: str  # of the image in its data set, including folders
    image: str  # path below the source
    mask: str  # path below the source
    encoding: int  # index into the layout's masks
    box: Box | None = None

    @property
    def image_key(self) -> str:
        return clean_key(f"{self.name}.png", "path")

    @property
    def key(self) -> str:
        return f"{self.image_key}_{self.box[0]}_{self.box[1]}" if self.box else self.image_key


def pairs(layout: Layout, source: Path, split: str, names: Path | None = None) -> list[Pair]:
    """Return the samples of a split, ordered by name. `names` is a list file that replaces the layout's own list.

    Raises SourceError if an image has no mask, a mask has no image, or the split is unknown.
    """
    if split not in layout.splits:
        raise SourceError(f"--split {split}: this layout has {', '.join(layout.splits)}")
    folder = layout.splits[split][0]
    hint = f" ({layout.hint})" if layout.hint else ""
    masks = _collect(layout.masks, source, folder)
    images = _collect(layout.images, source, folder) if masks else {}
    for what, found, patterns in (("mask", masks, layout.masks), ("image", images, layout.images)):
        if not found:
            wanted = " or ".join(patterns).replace("{split}", folder)
            raise SourceError(f"{source} holds no {what} of split {split}: this layout keeps them as {wanted}{hint}")
    masks = {key: found for name, found in masks.items() if (key := _ask(layout.partner, split, name, found))}
    listed = _names(names, images) if names else _listed(layout, source, split, images)
    if listed is None:
        if spare := sorted(masks.keys() - images.keys()):
            raise SourceError(f"{source / masks[spare[0]][0]} is a mask without an image{_more(spare)}")
        images = {key: found for key, found in images.items() if _ask(layout.member, split, key, found)}
    elif missing := sorted(set(listed) - images.keys()):
        raise SourceError(f"{source} holds no image {missing[0]}, which is listed for split {split}{_more(missing)}")
    else:
        images = {key: images[key] for key in listed}
    if not images:
        raise SourceError(f"{names} lists no image" if names else f"{source} holds no image of split {split}")
    if lacking := sorted(images.keys() - masks.keys()):
        raise SourceError(f"{source / images[lacking[0]][0]} is an image without a mask{_more(lacking)}{hint}")
    whole = [Pair(key, images[key][0], *masks[key]) for key in sorted(images)]
    return [part for pair in whole for part in _patches(pair, source, *layout.patch)] if layout.patch else whole


def _collect(patterns: Iterable[str], source: Path, split: str) -> dict[str, tuple[str, int]]:
    """Return {key: (path below the source, number of its pattern)}. The first pattern that finds a key counts."""
    found: dict[str, tuple[str, int]] = {}
    for number, pattern in enumerate(one.replace("{split}", split) for one in patterns):
        fixed = re.split(r"[{*]", pattern)[0].rpartition("/")[0]
        folder = _below(source, fixed)
        if folder is None:
            continue
        parts = re.split(r"(\{key\}|\{path\}|\.?\*)", pattern.removeprefix(f"{fixed}/"))
        shape = re.compile("".join(_WILD.get(part, re.escape(part)) for part in parts))
        mine: dict[str, tuple[str, int]] = {}
        for path in sorted(folder.rglob("*")):
            match = shape.fullmatch(path.relative_to(folder).as_posix())
            if not match or path.name.startswith(".") or not path.is_file():
                continue
            if parts[-2] == ".*" and path.suffix.lower() not in IMAGES:
                continue
            if match[1] in mine:
                raise SourceError(f"{path} and {source / mine[match[1]][0]} have one name: remove one of them")
            mine[match[1]] = (path.relative_to(source).as_posix(), number)
        found = mine | found
    return found


def _below(source: Path, name: str) -> Path | None:
    """Return the file or folder `name` in the source or up to two folders deeper, or None."""
    for depth in ("", "*/", "*/*/"):
        found = sorted(source.glob(depth + name))
        if len(found) > 1:
            raise SourceError(f"{source} holds {name} twice, in {found[0]} and {found[1]}: name the folder you mean")
        if found:
            return found[0]
    return None


def _listed(layout: Layout, source: Path, split: str, images: Container[str]) -> list[str] | None:
    """Return the names in the layout's own lists, or None without lists.

    The first complete group of list files counts. Its names are joined; those of a file with a minus are removed.
    """
    for group in layout.lists.get(split, ()):
        files = {file: path for file in group if (path := _below(source, file.lstrip("-") + ".txt"))}
        if len(files) == len(group):
            names: set[str] = set()
            for file, path in files.items():
                mine = set(_names(path, images))
                names = names - mine if file.startswith("-") else names | mine
            return sorted(names)
    if split in layout.lists:
        wanted = " or ".join(f"{group[0]}.txt" for group in layout.lists[split])
        raise SourceError(f"{source} lacks the list of split {split}, {wanted}; or give one with --list")
    return None


def _names(path: Path, images: Container[str]) -> list[str]:
    """Read one name per line. A line may also be a path to an image or mask; text after a blank is ignored."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the list {path}: {error}") from None
    return [line if line in images else Path(line.split()[0]).stem for line in lines]


def _ask(rule: Callable[[str, str], T], split: str, key: str, found: tuple[str, int]) -> T:
    try:
        return rule(split, key)
    except ValueError:  # the rule expects a number in the name
        raise SourceError(f"{found[0]} is no file of this data set: move it away") from None


def _patches(pair: Pair, source: Path, side: int, stride: int) -> Iterator[Pair]:
    """Yield square patches row by row; the last of each row and column ends at the image's edge."""
    with Image.open(source / pair.image) as image:
        width, height = image.size
    for y in _starts(height, side, stride):
        for x in _starts(width, side, stride):
            yield replace(pair, box=(y, x, min(y + side, height), min(x + side, width)))


def _starts(length: int, side: int, stride: int) -> list[int]:
    last = max(0, length - side)
    return [*range(0, last, stride), last]


def _more(keys: Sequence[str]) -> str:
    return f" (one of {len(keys)})" if len(keys) > 1 else ""
