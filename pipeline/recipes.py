"""What to cut: the views of a method, with the numbers of their crops and colour augmentations.

A recipe says everything about the views and nothing about files, devices or batches. Two fidelities: ``"paper"`` is
what the authors intended, ``"released"`` is what their published code does; each recipe lists the differences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import inf
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .windows import unflipped

Fidelity = Literal["paper", "released"]
ColourRule = Literal["torchvision", "tensorflow", "mmseg"]
TargetRule = Literal["released", "overlap"]
Interpolation = Literal["bilinear", "bicubic"]
Sampler = Literal["torchvision", "tensorflow", "centre", "scaled"]
Windows = Mapping[str, NDArray[np.float32]]  # by kind: f32 (B, V, 4)
Targets = Callable[[Windows], dict[str, NDArray[Any]]]

STRENGTHS = ("brightness", "contrast", "saturation", "hue")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Augmentation:
    """The colour augmentation of one view, in the order in which it acts: jitter, gray, blur, solarize.

    torchvision's ColorJitter, RandomGrayscale, GaussianBlur and RandomSolarize, each with its probability; 0 switches
    one off. What is drawn within a range is uniform.
    """

    jitter: float = 0.0  # probability of the four jitter operations, applied in a drawn order; of each ("mmseg")
    brightness: float = 0.4  # factor in [1-b, 1+b] ("torchvision"), shift in [-b, b] of the unit range (the others)
    contrast: float = 0.4  # factor in [1-c, 1+c]
    saturation: float = 0.2  # factor
    hue: float = 0.1  # shift in [-h, h] of the hue circle = 1
    rule: ColourRule = "torchvision"  # whose formulas the four operations follow
    gray: float = 0.0  # probability
    blur: float = 0.0  # probability
    sigma: tuple[float, float] = (0.1, 2.0)  # of the Gaussian, in pixels of the view
    solarize: float = 0.0  # probability


@dataclass(frozen=True)
class Cut:
    """All views of one kind, each a RandomResizedCrop with a flip: how many, how large, from which windows.

    A "scaled" cut resizes the image, so that its short side is `short_side` times a uniform draw from `scale`, and
    takes a square of it; where the image is smaller, the view shows PADDING below it and at its right, its mask 255.
    """

    kind: str
    count: int  # V
    size: int  # S, pixels
    grid: int  # patches per side, for the correspondences
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    sampler: Sampler = "torchvision"  # "centre", for evaluation: the central square of the short side times scale[1]
    short_side: int = 0  # of a "scaled" cut, in pixels
    most: float = 1.0  # of a "scaled" cut: a window with more of one class in its mask gives way, ten times at most
    flip: float = 0.5  # probability of the horizontal flip
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    augmentations: tuple[Augmentation, ...] = (Augmentation(),)  # view v takes number v % len(augmentations)

    @property
    def padded(self) -> bool:
        """Whether its views may show what lies outside the image."""
        return self.sampler == "scaled"

    def __post_init__(self) -> None:
        """Raises ValueError for a cut that cannot be made; the message names it and the value."""

        def demand(good: bool, what: str) -> None:
            if not good:
                raise ValueError(f"cut {self.kind!r}: {what}")

        given, known = self.augmentations, get_args(Interpolation)
        demand(_all_are(Augmentation, given), f"augmentations must be a tuple of Augmentation, not {given}")
        for name in ("count", "size", "grid"):
            number = getattr(self, name)
            demand(isinstance(number, int) and number > 0, f"{name} {number} must be a positive whole number")
        for name, pair in (("scale", self.scale), ("ratio", self.ratio), *(("sigma", a.sigma) for a in given)):
            numbers = isinstance(pair, Sequence) and all(isinstance(number, int | float) for number in pair)
            demand(numbers and len(pair) == 2, f"{name} {pair} must be a pair of numbers")
        demand(self.sampler in get_args(Sampler), f"sampler {self.sampler!r} is none of {get_args(Sampler)}")
        scaled = self.padded
        bounds = "and positive" if scaled else "within (0, 1]"
        low, high = self.scale
        ordered = 0 < low <= high <= 1 or (scaled and 0 < low <= high < inf)
        demand(ordered, f"scale {self.scale} must be ordered {bounds}")
        demand(self.short_side > 0 or not scaled, f"short_side {self.short_side} must be positive")
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

    `targets` turns the windows of a batch into named arrays, on the host, while the pixels are being decoded.
    """

    name: str
    fidelity: Fidelity
    cuts: tuple[Cut, ...]
    targets: Targets | None = field(default=None, compare=False)
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of the unit range, to normalise the pixels with
    std: tuple[float, float, float] = IMAGENET_STD
    masks: bool = False  # whether each image's label map, KEY.seg.png, is cut as well: see `View.mask`

    def __post_init__(self) -> None:
        """Raises ValueError for cuts that no batch can hold."""
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
    """All that makes the views and targets what they are, as JSON can hold it; two recipes of one description agree."""
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


@dataclass(frozen=True)
class Loca:
    """LOCA (Caron, Houlsby, Schmid, 2022): a reference, a query as large, and small "focal" queries to place in it.

    Kinds: ``reference`` (1 view), ``query`` (1), ``focal`` (`focal_views`; none if 0); grids of size // patch.
    Targets: each query patch's reference patch, -1 outside: ``query`` i32 (B, 1, N), ``focal`` i32 (B, focal_views, n).

    The default fidelity is "released": that code gave the published 46.2 mIoU on ADE20k, and the paper leaves most
    numbers of its views open. What differs (paper / released code, ``projects/loca`` of google-research/scenic):
        - crop: torchvision's RandomResizedCrop, as BYOL's descendants use / TensorFlow's distorted box: side and aspect
          uniform instead of area and log-aspect, aspect to 1.33, whole image after 100 attempts
        - resize: antialiased / not
        - flip of the reference: as `flip`, the paper lists flips for both views / never
        - blur: p = 1.0, 0.1 and 0.5 for reference, query and focal, as the released configuration intends / none: there
          the probability lands in the image height, and the kernel has one tap
        - jitter: brightness a factor, contrast about the mean gray, saturation towards gray (BYOL, torchvision) /
          brightness added, contrast about each channel's mean, HSV saturation (TensorFlow)
    Differs from both: the blur repeats edge pixels outwards (the released op pads with black).
    """

    fidelity: Fidelity = "released"
    focal_views: int = 9
    """focal queries beside the random one: 10 queries in all (Table 6d: 10, 5, 2, 1)"""
    patch: int | None = None
    """pixels per side of a patch; null: the backbone's, 16 on its own"""
    size: int = 224
    """side of the reference and of the random query, in pixels"""
    focal_size: int = 96
    """side of the focal queries; patch 14 needs a multiple of it, 98"""
    scale: tuple[float, float] = (0.32, 1.0)
    """share of the image's area that the reference and the random query show (released code; the paper states none)"""
    focal_scale: tuple[float, float] = (0.05, 0.32)
    """likewise of the focal queries"""
    flip: float = 0.5
    """probability of the horizontal flip"""
    jitter: float = 0.8
    """probability of the colour jitter"""
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """of the jitter: ranges of brightness, contrast, saturation and hue"""
    gray: float = 0.2
    """probability of grayscale"""
    blur: tuple[float, float, float] | None = None
    """probabilities for reference, random query and focal queries; null: as the fidelity says"""
    sigma: tuple[float, float] = (0.1, 2.0)
    """of the blur, in pixels of the view"""
    solarize: float = 0.2
    """probability for the random query; the others are never solarized"""
    rule: TargetRule = "released"
    """which reference patch belongs to a query patch: the paper (sec. 3.1) describes the one of greatest overlap; the
    released code samples one point near the patch's centre, which is another patch for 6 to 7 % of those inside"""

    def recipe(self) -> Recipe:
        """What to cut. Raises ValueError where a size is no multiple of the patch, and for what no `Cut` can be."""
        paper, patch = _is_paper(self.fidelity), 16 if self.patch is None else self.patch
        if self.rule not in get_args(TargetRule):
            raise ValueError(f"rule is {self.rule!r}: it must be one of {get_args(TargetRule)}")
        probabilities = self.blur if self.blur is not None else (1.0, 0.1, 0.5) if paper else (0.0, 0.0, 0.0)
        blur = _named("blur", probabilities, ("reference", "query", "focal"))

        def cut(kind: str, count: int, size: int, scale: tuple[float, float]) -> Cut:
            augmentation = Augmentation(
                jitter=self.jitter,
                **_named("strength", self.strength, STRENGTHS),
                rule="torchvision" if paper else "tensorflow",
                gray=self.gray,
                blur=blur[kind],
                sigma=self.sigma,
                solarize=self.solarize if kind == "query" else 0.0,
            )
            return Cut(
                kind=kind,
                count=count,
                size=size,
                grid=_grid(size, patch),
                scale=scale,
                ratio=(3 / 4, 4 / 3) if paper else (0.75, 1.33),
                sampler="torchvision" if paper else "tensorflow",
                flip=self.flip if paper or kind != "reference" else 0.0,
                antialias=paper,
                augmentations=(augmentation,),
            )

        cuts = [cut("reference", 1, self.size, self.scale), cut("query", 1, self.size, self.scale)]
        if self.focal_views:
            cuts.append(cut("focal", self.focal_views, self.focal_size, self.focal_scale))
        grids = {c.kind: (c.grid, c.size) for c in cuts}
        return Recipe("loca", self.fidelity, tuple(cuts), targets=partial(_patch_targets, grids=grids, rule=self.rule))


@dataclass(frozen=True)
class VICRegL:
    """VICRegL (Bardes, Ponce, LeCun, 2022) with multi-crop, as for its ConvNeXts: large views and small ones.

    Kinds: ``large`` (`large` views), ``small`` (`small`; none if 0); grids of size // stride. Bicubic, antialiased.
    Augmentations alternate within a kind: even views are always blurred, odd ones seldom and solarized at times.
    Targets: ``matches`` i32 (B, M, 2), the location matches of all ordered pairs: see `correspondence.pair_matches`.

    The default fidelity is "paper", since the released code's default goes against it. What differs (paper / released
    code, facebookresearch/VICRegL):
        - flips in the location grids: followed, "account for the transformation" / ignored by default, so that only
          pairs of two unflipped views are matched where they lie
        - standard deviation of the red channel: 0.229 / 0.228
    Differs from both: a true Gaussian; Pillow's, which the released code uses, is three box passes. Colours are not
    rounded between the jitter's operations.
    """

    _name: ClassVar[str] = "vicregl"
    fidelity: Fidelity = "paper"
    large: int = 2
    """large views; each is paired with every other view"""
    small: int = 6
    """small views"""
    size: int = 224
    """side of the large views, in pixels"""
    small_size: int = 96
    """side of the small views"""
    stride: int | None = None
    """pixels per side of a cell of the feature map; null: the backbone's, 32 on its own"""
    large_scale: tuple[float, float] = (0.4, 1.0)
    """share of the image's area that a large view shows (released command line, as the next)"""
    small_scale: tuple[float, float] = (0.08, 0.4)
    """likewise of the small views"""
    flip: float = 0.5
    """probability of the horizontal flip"""
    jitter: float = 0.8
    """probability of the colour jitter"""
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """of the jitter: ranges of brightness, contrast, saturation and hue"""
    gray: float = 0.2
    """probability of grayscale"""
    blur: tuple[float, float] = (1.0, 0.1)
    """probabilities for even and odd views"""
    sigma: tuple[float, float] = (0.1, 2.0)
    """of the blur, in pixels of the view"""
    solarize: float = 0.2
    """probability for odd views; even ones are never solarized"""
    gamma: tuple[int, int] | None = (20, 4)
    """location matches kept from a pair's first view to its second, and back (paper, sec. 4.1); null keeps one for
    each cell"""
    flip_aware: bool | None = None
    """whether a flipped view's cells run backwards; null: as the fidelity says"""

    def recipe(self) -> Recipe:
        """What to cut. Raises ValueError where a size is no multiple of the stride, and for what no `Cut` can be."""
        paper, stride = _is_paper(self.fidelity), 32 if self.stride is None else self.stride
        if self.gamma is not None:
            _named("gamma", self.gamma, ("first to second", "back"))
        blur = _named("blur", self.blur, ("even", "odd"))
        strength = _named("strength", self.strength, STRENGTHS)
        even = Augmentation(jitter=self.jitter, **strength, gray=self.gray, blur=blur["even"], sigma=self.sigma)
        augmentations = (even, replace(even, blur=blur["odd"], solarize=self.solarize))

        def cut(kind: str, count: int, size: int, scale: tuple[float, float]) -> Cut:
            look: dict[str, Any] = {"interpolation": "bicubic", "augmentations": augmentations}
            return Cut(kind, count, size, _grid(size, stride), scale, flip=self.flip, **look)

        cuts = [cut("large", self.large, self.size, self.large_scale)]
        if self.small:
            cuts.append(cut("small", self.small, self.small_size, self.small_scale))
        targets = partial(
            _pair_matches,
            large_grid=cuts[0].grid,
            small_grid=cuts[-1].grid,
            gamma=self.gamma,
            flip_aware=paper if self.flip_aware is None else self.flip_aware,
        )
        std = IMAGENET_STD if paper else (0.228, 0.224, 0.225)
        return Recipe(self._name, self.fidelity, tuple(cuts), targets=targets, std=std)


@dataclass(frozen=True)
class VICRegLResNet50(VICRegL):
    """VICRegL as for its ResNet-50: two large views of 8 to 100 % of the image, no small ones."""

    _name: ClassVar[str] = "vicregl_resnet50"
    small: int = 0
    large_scale: tuple[float, float] = (0.08, 1.0)


@dataclass(frozen=True)
class Plain:
    """One random resized crop with flips, for classification: kind ``image`` (1 view), torchvision's usual numbers.

    There is nothing in which the fidelities could differ.
    """

    fidelity: Fidelity = "paper"
    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    patch: int = 16

    def recipe(self) -> Recipe:
        _is_paper(self.fidelity)
        return Recipe("plain", self.fidelity, (Cut("image", 1, self.size, _grid(self.size, self.patch), self.scale),))


@dataclass(frozen=True)
class Evaluation:
    """The central square that is left of an image whose short side is resized to `resize`: kind ``image`` (1 view).

    The square is cut first and resized once; its edges are whole pixels of the stored image, so it lies within half a
    stored pixel of the resized image's central crop.
    """

    size: int = 224
    resize: int = 256
    interpolation: Interpolation = "bilinear"
    patch: int = 16

    def recipe(self) -> Recipe:
        """What to cut. Raises ValueError where `resize` is less than `size`."""
        if not 0 < self.size <= self.resize:
            raise ValueError(f"size is {self.size}: it must be positive and at most resize, {self.resize}")
        share, grid = self.size / self.resize, _grid(self.size, self.patch)
        look: dict[str, Any] = {"sampler": "centre", "flip": 0.0, "interpolation": self.interpolation}
        return Recipe("evaluation", "paper", (Cut("image", 1, self.size, grid, (share, share), **look),))


@dataclass(frozen=True)
class Segmentation:
    """One crop of a resized image with its label map, to train a segmentation on: kind ``image`` (1 view).

    mmsegmentation's training pipeline, as Segmenter and VICRegL use it: the image is resized so that its short side is
    `short_side` times a draw from `scale`, cropped where no class has more than `most` of the labelled pixels (the last
    of ten tries is kept), flipped, its colours changed, and padded where it is smaller than the crop. Differs: the
    window is cut first and resized once, and its edges are whole pixels of the stored image, so that a drawn scale is
    met within half a stored pixel of the window's side; very long images (over 4:1) are not shrunk further; colours are
    not rounded between operations; the padding is ImageNet's mean as whole levels, in place of an exact 0 after
    normalising.
    """

    size: int = 512
    """side of the crop, in pixels"""
    short_side: int = 512
    """short side of the image at scale 1, in pixels; Cityscapes: 1024"""
    scale: tuple[float, float] = (0.5, 2.0)
    """range of the scale"""
    most: float = 0.75
    """largest share of one class in a crop; 1: any"""
    flip: float = 0.5
    """probability of the horizontal flip"""
    jitter: float = 0.5
    """probability of each of the four changes of colour"""
    strength: tuple[float, float, float, float] = (32 / 255, 0.5, 0.5, 0.1)
    """ranges of brightness (a shift of the unit range), contrast, saturation (factors) and hue (of the circle)"""
    antialias: bool = False
    """whether shrinking averages; OpenCV's bilinear resize, which mmsegmentation uses, does not"""

    def recipe(self) -> Recipe:
        """What to cut. Raises ValueError for what no `Cut` can be."""
        cut = Cut(
            kind="image",
            count=1,
            size=self.size,
            grid=1,  # nothing corresponds
            scale=self.scale,
            sampler="scaled",
            short_side=self.short_side,
            most=self.most,
            flip=self.flip,
            antialias=self.antialias,
            augmentations=(
                Augmentation(jitter=self.jitter, **_named("strength", self.strength, STRENGTHS), rule="mmseg"),
            ),
        )
        return Recipe("segmentation", "released", (cut,), masks=True)


def loca(fidelity: Fidelity = Loca.fidelity, **fields: Any) -> Recipe:
    """Short for ``Loca(fidelity, **fields).recipe()``; likewise the functions below."""
    return Loca(fidelity, **fields).recipe()


def vicregl(fidelity: Fidelity = VICRegL.fidelity, **fields: Any) -> Recipe:
    return VICRegL(fidelity, **fields).recipe()


def vicregl_resnet50(fidelity: Fidelity = VICRegLResNet50.fidelity, **fields: Any) -> Recipe:
    return VICRegLResNet50(fidelity, **fields).recipe()


def plain(fidelity: Fidelity = Plain.fidelity, **fields: Any) -> Recipe:
    return Plain(fidelity, **fields).recipe()


def evaluation(**fields: Any) -> Recipe:
    return Evaluation(**fields).recipe()


def segmentation(**fields: Any) -> Recipe:
    return Segmentation(**fields).recipe()


def _is_paper(fidelity: str) -> bool:
    if fidelity not in ("paper", "released"):
        raise ValueError(f"fidelity is {fidelity!r}: it must be 'paper' or 'released'")
    return fidelity == "paper"


def _named(name: str, values: Sequence[float], parts: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(values, Sequence) or len(values) != len(parts):
        raise ValueError(f"{name} is {values}: it must hold {len(parts)} numbers, for {', '.join(parts)}")
    return dict(zip(parts, values, strict=True))


def _grid(size: int, patch: int) -> int:
    if not isinstance(size, int):
        raise ValueError(f"size {size} must be a whole number: views are square")
    if patch < 1 or size % patch:
        raise ValueError(f"a view of {size} pixels is no whole number of patches of {patch}")
    return size // patch


def _patch_targets(
    windows: Windows, *, grids: Mapping[str, tuple[int, int]], rule: Any
) -> dict[str, NDArray[np.int32]]:
    from .correspondence import patch_targets  # numba loads when views are cut, not when they are named

    return {
        kind: patch_targets(
            windows["reference"][:, 0],
            windows[kind],
            reference_grid=grids["reference"][0],
            query_grid=grid,
            query_size=size,
            rule=rule,
        )
        for kind, (grid, size) in grids.items()
        if kind != "reference"
    }


def _pair_matches(
    windows: Windows, *, large_grid: int, small_grid: int, gamma: tuple[int, int] | None, flip_aware: bool
) -> dict[str, NDArray[np.int32]]:
    from .correspondence import pair_matches

    seen = dict(windows) if flip_aware else {kind: unflipped(window) for kind, window in windows.items()}
    large, small = seen["large"], seen.get("small")
    return {"matches": pair_matches(large, small, large_grid=large_grid, small_grid=small_grid, gamma=gamma)}
