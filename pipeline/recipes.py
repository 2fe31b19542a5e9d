"""The published views: LOCA's, VICRegL's, and those for classification, evaluation and segmentation.

A recipe has one of two fidelities. ``"paper"`` follows the authors' intention, ``"released"`` follows their published
code. Each recipe lists the differences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .cuts import (  # noqa: F401 - re-exported
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    Cut,
    Fidelity,
    Interpolation,
    Recipe,
    Windows,
    describe,
)
from .windows import unflipped

TargetRule = Literal["released", "overlap"]
STRENGTHS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Loca:
    """LOCA (Caron, Houlsby, Schmid, 2022): a reference view, a query of the same size, and small "focal" queries.

    Kinds: ``reference`` (1 view), ``query`` (1), ``focal`` (`focal_views`; none if 0); grids of size // patch.
    Targets: each query patch's reference patch, -1 outside: ``query`` i32 (B, 1, N), ``focal`` i32 (B, focal_views, n).

    The default fidelity is "released": that code gave the published 46.2 mIoU on ADE20k, and the paper leaves most
    numbers of its views open. Differences (paper / released code, ``projects/loca`` of google-research/scenic):

    - crop: torchvision's RandomResizedCrop, as in BYOL's successors / TensorFlow's distorted box: side and aspect
      uniform instead of area and log-aspect, aspect to 1.33, whole image after 100 attempts
    - resize: antialiased / not antialiased
    - flip of the reference: probability `flip`, since the paper lists flips for both views / never
    - blur: p = 1.0, 0.1 and 0.5 for reference, query and focal, as the released configuration intends / none, since
      that code passes the probability as the image height, and its kernel has one tap
    - jitter: brightness is a factor, contrast is about the mean gray, saturation is towards gray (BYOL, torchvision) /
      brightness is added, contrast is about each channel's mean, saturation is HSV (TensorFlow)

    One difference from both: the blur repeats edge pixels outwards (the released op pads with black).
    """

    fidelity: Fidelity = "released"
    focal_views: int = 9
    """number of focal queries, in addition to the random query: 10 queries in all (Table 6d: 10, 5, 2, 1)"""
    patch: int | None = None
    """pixels per side of a patch; null: the backbone's, or 16 without a backbone"""
    size: int = 224
    """side of the reference and of the random query, in pixels"""
    focal_size: int = 96
    """side of the focal queries, in pixels; must be a multiple of the patch: 98 for patch 14"""
    scale: tuple[float, float] = (0.32, 1.0)
    """share of the image's area that the reference and the random query show (released code; the paper states none)"""
    focal_scale: tuple[float, float] = (0.05, 0.32)
    """share of the image's area that a focal query shows"""
    flip: float = 0.5
    """probability of the horizontal flip"""
    jitter: float = 0.8
    """probability of the colour jitter"""
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """strength of the jitter: ranges of brightness, contrast, saturation and hue"""
    gray: float = 0.2
    """probability of grayscale"""
    blur: tuple[float, float, float] | None = None
    """probability of the blur for reference, random query and focal queries; null: set by the fidelity"""
    sigma: tuple[float, float] = (0.1, 2.0)
    """range of the blur's standard deviation, in pixels of the view"""
    solarize: float = 0.2
    """probability of solarizing the random query; other views are never solarized"""
    rule: TargetRule = "released"
    """which reference patch is a query patch's target: "overlap", the one of greatest overlap (paper, sec. 3.1);
    "released", the one at a point near the query patch's centre, which differs for 6 to 7 % of the patches inside"""

    def recipe(self) -> Recipe:
        """Return the views to cut. Raises ValueError for invalid fields or a size that is no multiple of the patch."""
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
    """VICRegL (Bardes, Ponce, LeCun, 2022) with multi-crop, as for its ConvNeXts: large and small views.

    Kinds: ``large`` (`large` views), ``small`` (`small`; none if 0); grids of size // stride. Bicubic, antialiased.
    Augmentations alternate within a kind. By default, even views are always blurred; odd views are seldom blurred and
    sometimes solarized.
    Targets: ``matches`` i32 (B, M, 2), the location matches of all ordered pairs: see `correspondence.pair_matches`.

    The default fidelity is "paper", since the released code's default contradicts the paper. Differences (paper /
    released code, facebookresearch/VICRegL):

    - flips in the location grids: followed, "account for the transformation" / ignored by default, so that only pairs
      of two unflipped views are matched at their true locations
    - standard deviation of the red channel: 0.229 / 0.228

    Two differences from both: the blur is a true Gaussian, while the released code uses Pillow's three box passes; and
    colours are not rounded between the jitter's operations.
    """

    _name: ClassVar[str] = "vicregl"
    fidelity: Fidelity = "paper"
    large: int = 2
    """number of large views; each is paired with every other view"""
    small: int = 6
    """number of small views"""
    size: int = 224
    """side of the large views, in pixels"""
    small_size: int = 96
    """side of the small views, in pixels"""
    stride: int | None = None
    """pixels per side of a cell of the feature map; null: the backbone's, or 32 without a backbone"""
    large_scale: tuple[float, float] = (0.4, 1.0)
    """share of the image's area that a large view shows (released command line)"""
    small_scale: tuple[float, float] = (0.08, 0.4)
    """share of the image's area that a small view shows (released command line)"""
    flip: float = 0.5
    """probability of the horizontal flip"""
    jitter: float = 0.8
    """probability of the colour jitter"""
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """strength of the jitter: ranges of brightness, contrast, saturation and hue"""
    gray: float = 0.2
    """probability of grayscale"""
    blur: tuple[float, float] = (1.0, 0.1)
    """probability of the blur for even and odd views"""
    sigma: tuple[float, float] = (0.1, 2.0)
    """range of the blur's standard deviation, in pixels of the view"""
    solarize: float = 0.2
    """probability of solarizing odd views; even views are never solarized"""
    gamma: tuple[int, int] | None = (20, 4)
    """number of location matches kept from a pair's first view to its second, and from its second to its first (paper,
    sec. 4.1); null keeps one for each cell"""
    flip_aware: bool | None = None
    """whether the location grid of a flipped view is mirrored; null: set by the fidelity"""

    def recipe(self) -> Recipe:
        """Return the views to cut. Raises ValueError for invalid fields or a size that is no multiple of the stride."""
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
    """VICRegL as for its ResNet-50: two large views of 8 to 100 % of the image, no small views."""

    _name: ClassVar[str] = "vicregl_resnet50"
    small: int = 0
    large_scale: tuple[float, float] = (0.08, 1.0)


@dataclass(frozen=True)
class Plain:
    """One random resized crop with flips, for classification: kind ``image`` (1 view), torchvision's default numbers.

    Both fidelities give the same views.
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
    """The central square of `size` pixels of an image whose short side is resized to `resize`: kind ``image`` (1 view).

    The square is cut first and resized once. Its edges are whole pixels of the stored image, within half a stored pixel
    of the central crop of the resized image.
    """

    size: int = 224
    resize: int = 256
    interpolation: Interpolation = "bilinear"
    patch: int = 16

    def recipe(self) -> Recipe:
        """Return the views to cut. Raises ValueError if `resize` is less than `size`."""
        if not 0 < self.size <= self.resize:
            raise ValueError(f"size is {self.size}: it must be positive and at most resize, {self.resize}")
        share, grid = self.size / self.resize, _grid(self.size, self.patch)
        look: dict[str, Any] = {"sampler": "centre", "flip": 0.0, "interpolation": self.interpolation}
        return Recipe("evaluation", "paper", (Cut("image", 1, self.size, grid, (share, share), **look),))


@dataclass(frozen=True)
class Segmentation:
    """One crop of a resized image with its label map, to train segmentation: kind ``image`` (1 view).

    This is mmsegmentation's training pipeline, as Segmenter and VICRegL use it. The image is resized so that its short
    side is `short_side` times a draw from `scale`. A crop is drawn again, up to ten crops in all, while one class has
    the share `most` or more of its labelled pixels. It is flipped, its colours are jittered, and it is padded if the
    image is smaller than the crop. Differences:

    - The window is cut first and resized once. Its edges are whole pixels of the stored image, so a drawn scale is met
      within half a stored pixel of the window's side.
    - Very long images (over 4:1) are not shrunk further.
    - Colours are not rounded between operations.
    - The padding is ImageNet's mean in whole levels, instead of an exact 0 after normalising.
    """

    size: int = 512
    """side of the crop, in pixels"""
    short_side: int = 512
    """short side of the image at scale 1, in pixels; Cityscapes: 1024"""
    scale: tuple[float, float] = (0.5, 2.0)
    """range of the factor on `short_side`"""
    most: float = 0.75
    """a crop with this share or more of one class is drawn again, up to ten crops in all; 1: no limit"""
    flip: float = 0.5
    """probability of the horizontal flip"""
    jitter: float = 0.5
    """probability of each of the four jitter operations"""
    strength: tuple[float, float, float, float] = (32 / 255, 0.5, 0.5, 0.1)
    """ranges of brightness (a shift in [0, 1] units), contrast, saturation (factors) and hue (share of the circle)"""
    antialias: bool = False
    """whether to antialias when shrinking; OpenCV's bilinear resize, which mmsegmentation uses, does not"""

    def recipe(self) -> Recipe:
        """Return the views to cut. Raises ValueError for invalid fields."""
        cut = Cut(
            kind="image",
            count=1,
            size=self.size,
            grid=1,  # unused: there are no correspondences
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
    """Return ``Loca(fidelity, **fields).recipe()``. The functions below do the same for their classes."""
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
    from .correspondence import patch_targets  # lazy: imports numba

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
