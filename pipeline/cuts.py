"""The settings of views: their crops and colour augmentations. `recipes` has the published settings.

Nothing here depends on files, devices or batches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import inf
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Fidelity = Literal["paper", "released"]
ColourRule = Literal["torchvision", "tensorflow", "mmseg"]
Interpolation = Literal["bilinear", "bicubic"]
Sampler = Literal["torchvision", "tensorflow", "centre", "scaled"]
Windows = Mapping[str, NDArray[np.float32]]  # by kind: f32 (B, V, 4)
Targets = Callable[[Windows], dict[str, NDArray[Any]]]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Augmentation:
    """The colour augmentation of one view, in order of application: jitter, gray, blur, solarize.

    The operations are torchvision's ColorJitter, RandomGrayscale, GaussianBlur and RandomSolarize, each with its
    probability. Probability 0 switches an operation off. Draws from a range are uniform.
    """

    jitter: float = 0.0  # probability of all four jitter operations, in a drawn order; for "mmseg", of each separately
    brightness: float = 0.4  # factor in [1-b, 1+b] ("torchvision"), or shift in [-b, b] of pixels in [0, 1] (others)
    contrast: float = 0.4  # factor in [1-c, 1+c]
    saturation: float = 0.2  # factor in [1-s, 1+s]
    hue: float = 0.1  # shift in [-h, h], where 1 is the whole hue circle
    rule: ColourRule = "torchvision"  # the library whose formulas the four operations follow
    gray: float = 0.0  # probability
    blur: float = 0.0  # probability
    sigma: tuple[float, float] = (0.1, 2.0)  # range of the Gaussian's standard deviation, in pixels of the view
    solarize: float = 0.0  # probability


@dataclass(frozen=True)
class Cut:
    """The settings for all views of one kind, each a RandomResizedCrop with a flip.

    A "scaled" cut resizes the image so that its short side is `short_side` times a uniform draw from `scale`. It then
    crops a square. If the image is smaller, PADDING fills the view below and to the right; the mask is 255 there.
    """

    kind: str  # the name of these views
    count: int  # V, number of views
    size: int  # S, side in pixels
    grid: int  # patches per side, for the correspondences
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area; for "scaled": factor on short_side
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of width / height
    sampler: Sampler = "torchvision"  # "centre" (evaluation): the central square of scale[1] times the short side
    short_side: int = 0  # for "scaled": the image's short side at scale 1, in pixels
    most: float = 1.0  # for "scaled": a window with this share or more of one class is drawn again, ten draws at most
    flip: float = 0.5  # probability of the horizontal flip
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    augmentations: tuple[Augmentation, ...] = (Augmentation(),)  # assigned to the views in turn, cyclically

    @property
    def by_view(self) -> list[Augmentation]:
        """The augmentation of each of the `count` views."""
        return [self.augmentations[view % len(self.augmentations)] for view in range(self.count)]

    @property
    def padded(self) -> bool:
        """Whether views may extend beyond the image."""
        return self.sampler == "scaled"

    def __post_init__(self) -> None:
        """Raise ValueError for an invalid field; the message names the cut, the field and its value."""

        def demand(good: bool, what: str) -> None:
            if not good:
                raise ValueError(f"cut {self.kind!r}: {what}")

        given, known = self.augmentations, get_args(Interpolation)
        demand(_all_are(Augmentation, given), f"augmentations must be a tuple of Augmentation, not {given}")
        for name in ("count", "size", "grid"):
            number = getattr(self, name)
            demand(isinstance(number, int) and number > 0, f"{name} {number!r} must be a positive whole number")
        for name, pair in (("scale", self.scale), ("ratio", self.ratio), *(("sigma", a.sigma) for a in given)):
            numbers = isinstance(pair, Sequence) and all(isinstance(number, int | float) for number in pair)
            demand(numbers and len(pair) == 2, f"{name} {pair} must be a pair of numbers")
        factors = ("jitter", "brightness", "contrast", "saturation", "hue", "gray", "blur", "solarize")
        for holder, names in ((self, ("most", "flip")), *((a, factors) for a in given)):
            for name in names:
                number = getattr(holder, name)
                demand(isinstance(number, int | float), f"{name} {number!r} must be a number")
        demand(self.sampler in get_args(Sampler), f"sampler {self.sampler!r} is none of {get_args(Sampler)}")
        scaled = self.padded
        bounds = "and positive" if scaled else "within (0, 1]"
        low, high = self.scale
        ordered = 0 < low <= high <= 1 or (scaled and 0 < low <= high < inf)
        demand(ordered, f"scale {self.scale} must be ordered {bounds}")
        whole = isinstance(self.short_side, int) and self.short_side > 0
        demand(whole or not scaled, f"short_side {self.short_side!r} must be a positive whole number")
        demand(0 < self.most <= 1 and (scaled or self.most == 1), f"most {self.most} is no share of a scaled cut")
        demand(0 < self.ratio[0] <= self.ratio[1] < inf, f"ratio {self.ratio} must be ordered and positive")
        demand(0 <= self.flip <= 1, f"flip {self.flip} is no probability")
        demand(self.interpolation in known, f"interpolation {self.interpolation!r} is none of {known}")
        demand(self.antialias or self.interpolation == "bilinear", f"{self.interpolation} needs antialias=True")
        demand(len({a.rule for a in given}) == 1, "the augmentations of one cut must follow one rule")
        demand(given[0].rule in get_args(ColourRule), f"rule {given[0].rule!r} is none of {get_args(ColourRule)}")
        for a in given:
            for name in ("jitter", "gray", "blur", "solarize"):
                demand(0 <= getattr(a, name) <= 1, f"{name} {getattr(a, name)} is no probability")
            for name in ("brightness", "contrast", "saturation"):
                demand(0 <= getattr(a, name) <= 2, f"{name} {getattr(a, name)} must lie within [0, 2]")
            demand(0 <= a.hue <= 0.5, f"hue {a.hue} must lie within [0, 0.5]")
            demand(0 < a.sigma[0] <= a.sigma[1] < inf, f"sigma {a.sigma} must be ordered and positive")


@dataclass(frozen=True)
class Recipe:
    """The views of a batch and the correspondences between them.

    `targets` computes named arrays from the windows of a batch, on the host, while the pixels are being decoded.
    """

    name: str
    fidelity: Fidelity
    cuts: tuple[Cut, ...]
    targets: Targets | None = field(default=None, compare=False)
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of pixels in [0, 1], for normalising
    std: tuple[float, float, float] = IMAGENET_STD
    masks: bool = False  # whether to cut each image's label map, KEY.seg.png, as well: see `View.mask`

    def __post_init__(self) -> None:
        """Raise ValueError for invalid cuts or targets, and for two cuts of one kind."""
        if not _all_are(Cut, self.cuts):
            raise ValueError(f"recipe {self.name!r}: cuts must be a tuple of Cut, not {self.cuts}")
        if not (self.targets is None or callable(self.targets)):
            raise ValueError(f"recipe {self.name!r}: targets must be a function or None, not {self.targets}")
        kinds = [cut.kind for cut in self.cuts]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice is not None:
            raise ValueError(f"recipe {self.name!r} has two cuts of the kind {twice!r}: give each a name of its own")


def _all_are(kind: type, values: object) -> bool:
    return isinstance(values, tuple) and bool(values) and all(isinstance(value, kind) for value in values)


def describe(recipe: Recipe) -> dict[str, Any]:
    """Return all settings of a recipe as JSON types. Recipes with equal descriptions give equal views and targets."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, as recipes.loca() makes one, not {recipe!r:.60}")
    described = asdict(recipe)
    targets = described.pop("targets")
    if isinstance(targets, partial):
        targets = {"function": targets.func.__qualname__, **targets.keywords}
    elif targets is not None:
        targets = {"function": getattr(targets, "__qualname__", type(targets).__qualname__)}
    return _plain({**described, "targets": targets})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
