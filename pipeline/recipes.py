"""What to cut: the views of a method, with the numbers that steer their crops and colours.

A recipe says everything about the views and nothing about files, devices or batches. Two fidelities: ``"paper"`` is
what the authors intended, ``"released"`` is what their published code does; each recipe lists the differences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import inf
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .windows import unflipped

Fidelity = Literal["paper", "released"]
Rule = Literal["torchvision", "tensorflow"]
Sampler = Literal["torchvision", "tensorflow", "centre"]
Windows = Mapping[str, NDArray[np.float32]]  # by kind: f32 (B, V, 4)
Targets = Callable[[Windows], dict[str, NDArray[Any]]]

STRENGTHS = ("brightness", "contrast", "saturation", "hue")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Colour:
    """Photometric operations of one view, in the order in which they act: jitter, gray, blur, solarize.

    Each of the first number in a pair below is a probability; a factor range is drawn uniformly. A range (1, 1) or a
    probability 0 switches the operation off.
    """

    jitter: float = 0.0  # probability of the four jitter operations, applied in a drawn order
    brightness: float = 0.4  # factor in [1-b, 1+b] ("torchvision"), shift in [-b, b] of the unit range ("tensorflow")
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # shift in [-h, h] of the hue circle = 1
    rule: Rule = "torchvision"  # whose formulas the four operations follow
    gray: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)  # of the Gaussian, in pixels of the view
    solarize: float = 0.0


@dataclass(frozen=True)
class Cut:
    """All views of one kind: how many, how large, and from which windows."""

    kind: str
    count: int  # V
    size: int  # S, pixels
    grid: int  # patches per side, for the correspondences
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    sampler: Sampler = "torchvision"  # "centre": the central square of the
    # short side times scale[1]; no randomness: for evaluation
    flip: float = 0.5  # probability of the horizontal mirror
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    colours: tuple[Colour, ...] = (Colour(),)  # view v takes colours[v % len(colours)]

    def __post_init__(self) -> None:
        """Raises ValueError for a cut that cannot be made, naming it and the number."""

        def demand(good: bool, what: str) -> None:
            if not good:
                raise ValueError(f"cut {self.kind!r}: {what}")

        for name in ("count", "size", "grid"):
            number = getattr(self, name)
            demand(isinstance(number, int) and number > 0, f"{name} {number} must be a positive whole number")
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            demand(isinstance(pair, Sequence) and len(pair) == 2, f"{name} {pair} must be a pair of numbers")
        demand(self.sampler in get_args(Sampler), f"sampler {self.sampler!r} is none of {get_args(Sampler)}")
        demand(0 < self.scale[0] <= self.scale[1] <= 1, f"scale {self.scale} must be ordered within (0, 1]")
        demand(0 < self.ratio[0] <= self.ratio[1] < inf, f"ratio {self.ratio} must be ordered and positive")
        demand(0 <= self.flip <= 1, f"flip {self.flip} is no probability")
        known = self.interpolation in ("bilinear", "bicubic")
        demand(known, f"interpolation {self.interpolation!r} is neither bilinear nor bicubic")
        demand(self.antialias or self.interpolation == "bilinear", f"{self.interpolation} needs antialias=True")
        demand(_all_are(Colour, self.colours), f"colours must be a tuple of at least one Colour, not {self.colours}")
        demand(len({c.rule for c in self.colours}) <= 1, "the colours of one cut must follow one rule")
        for c in self.colours:
            demand(c.rule in get_args(Rule), f"rule {c.rule!r} is none of {get_args(Rule)}")
            for name in ("jitter", "gray", "blur", "solarize"):
                demand(0 <= getattr(c, name) <= 1, f"{name} {getattr(c, name)} is no probability")
            for name in ("brightness", "contrast", "saturation"):
                demand(0 <= getattr(c, name) < inf, f"{name} {getattr(c, name)} must not be negative")
            demand(0 <= c.hue <= 0.5, f"hue {c.hue} must lie within [0, 0.5]")
            demand(0 < c.sigma[0] <= c.sigma[1] < inf, f"sigma {c.sigma} must be ordered and positive")


@dataclass(frozen=True)
class Recipe:
    """The views of a batch and the correspondences between them.

    `targets` turns the windows of a batch into named arrays, on the host, while the pixels are being decoded.
    """

    name: str
    fidelity: Fidelity
    cuts: tuple[Cut, ...]
    targets: Targets | None = field(default=None, compare=False)
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of the unit range; for whoever normalises the pixels
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        """Raises ValueError for cuts that no batch can hold."""
        if not _all_are(Cut, self.cuts):
            raise ValueError(f"recipe {self.name!r}: cuts must be a tuple of at least one Cut, not {self.cuts}")
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


def loca(
    fidelity: Fidelity = "paper",
    *,
    queries: int = 9,
    patch: int = 16,
    size: int = 224,
    focal_size: int = 96,
    scale: tuple[float, float] = (0.32, 1.0),
    focal_scale: tuple[float, float] = (0.05, 0.32),
    flip: float = 0.5,
    jitter: float = 0.8,
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
    gray: float = 0.2,
    blur: tuple[float, float, float] | None = None,
    sigma: tuple[float, float] = (0.1, 2.0),
    solarize: float = 0.2,
    rule: Literal["released", "overlap"] = "released",
) -> Recipe:
    """LOCA (Caron, Houlsby, Schmid, 2022): a reference, a query as large, and small "focal" queries to place in it.

    Kinds: ``reference`` (1 view), ``query`` (1), ``focal`` (`queries`; none if 0); grids of size // `patch`.
    Targets: each query patch's reference patch, -1 outside: ``query`` i32 (B, 1, N), ``focal`` i32 (B, queries, n).

    Args:
        scale, focal_scale: shares of the image's area; the numbers of the released code, as the paper states none.
        flip, jitter, gray, solarize: probabilities; only the random query is solarized.
        strength: the jitter's ranges of brightness, contrast, saturation and hue.
        blur: probabilities for reference, query and focal; None: as the fidelity says.
        sigma: range of the blur's, in pixels of the view.
        rule: of `patch_targets`. The paper (sec. 3.1) describes the greatest overlap; the released code samples one
            point near the patch's centre, which is another patch for 6 to 7 % of those inside.

    Raises ValueError when a size is no multiple of the patch, and for what no `Cut` can be.

    What differs between the fidelities (paper / released code, ``projects/loca`` of google-research/scenic):
        - crop: torchvision's RandomResizedCrop, as BYOL's descendants use / TensorFlow's distorted box: side and aspect
          uniform instead of area and log-aspect, aspect to 1.33, whole image after 100 attempts
        - resize: antialiased / not
        - flip of the reference: p = 0.5, the paper lists flips for both views / never
        - blur: p = 1.0, 0.1 and 0.5 for reference, query and focal, as the released configuration intends / none: there
          the probability lands in the image height, and the kernel has one tap
        - jitter: brightness a factor, contrast about the mean gray, saturation towards gray (BYOL, torchvision) /
          brightness added, contrast about each channel's mean, HSV saturation (TensorFlow)
    Differs from both: where the blur needs pixels beyond the edge, the edge goes on (the released op pads with black).
    """
    paper = _is_paper(fidelity)
    if blur is None:
        blur = (1.0, 0.1, 0.5) if paper else (0.0, 0.0, 0.0)
    blurs = _named("blur", blur, ("reference", "query", "focal"))
    jittered = _named("strength", strength, STRENGTHS)

    def cut(kind: str, count: int, side: int, area: tuple[float, float]) -> Cut:
        look = Colour(
            jitter=jitter,
            **jittered,
            rule="torchvision" if paper else "tensorflow",
            gray=gray,
            blur=blurs[kind],
            sigma=sigma,
            solarize=solarize if kind == "query" else 0.0,
        )
        return Cut(
            kind=kind,
            count=count,
            size=side,
            grid=_grid(side, patch),
            scale=area,
            ratio=(3 / 4, 4 / 3) if paper else (0.75, 1.33),
            sampler="torchvision" if paper else "tensorflow",
            flip=flip if paper or kind != "reference" else 0.0,
            antialias=paper,
            colours=(look,),
        )

    cuts = [cut("reference", 1, size, scale), cut("query", 1, size, scale)]
    if queries:
        cuts.append(cut("focal", queries, focal_size, focal_scale))
    grids = {c.kind: (c.grid, c.size) for c in cuts}
    return Recipe("loca", fidelity, tuple(cuts), targets=partial(_patch_targets, grids=grids, rule=rule))


def vicregl(
    fidelity: Fidelity = "paper",
    *,
    large: int = 2,
    small: int = 6,
    large_size: int = 224,
    small_size: int = 96,
    large_grid: int = 7,
    small_grid: int = 3,
    large_scale: tuple[float, float] = (0.4, 1.0),
    small_scale: tuple[float, float] = (0.08, 0.4),
    flip: float = 0.5,
    jitter: float = 0.8,
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
    gray: float = 0.2,
    blur: tuple[float, float] = (1.0, 0.1),
    sigma: tuple[float, float] = (0.1, 2.0),
    solarize: float = 0.2,
    gamma: tuple[int, int] | None = (20, 4),
    flip_aware: bool | None = None,
    matches: bool = True,
) -> Recipe:
    """VICRegL (Bardes, Ponce, LeCun, 2022) with multi-crop, as for its ConvNeXts: large views and small ones.

    Kinds: ``large`` (`large` views), ``small`` (`small`; none if 0). Bicubic, antialiased. Colours alternate within a
    kind: even views are always blurred, odd ones seldom and solarized at times.
    Targets: ``matches`` i32 (B, M, 2), the location matches of all ordered pairs: see `correspondence.pair_matches`.

    Args:
        large_scale, small_scale: shares of the image's area (defaults of the released command line).
        flip, jitter, gray, solarize: probabilities; only odd views are solarized.
        strength: the jitter's ranges of brightness, contrast, saturation and hue.
        blur: probabilities for even and odd views.
        sigma: range of the blur's, in pixels of the view.
        gamma: matches kept from a pair's first view to its second and back (paper, sec. 4.1: 20 and 4); None keeps all.
        flip_aware: whether a mirrored view's cells run backwards; None: as the fidelity says.
        matches: False leaves the targets out.

    Raises ValueError for what no `Cut` can be.

    What differs between the fidelities (paper / released code, facebookresearch/VICRegL):
        - flips in the location grids: followed, "account for the transformation" / ignored by default, so that only
          pairs of two upright views are matched where they lie
        - standard deviation of the red channel: 0.229 / 0.228
    Differs from both: a true Gaussian; Pillow's, which the released code uses, is three box passes. Colours are not
    rounded between the jitter's operations.
    """
    paper = _is_paper(fidelity)
    blurs = _named("blur", blur, ("even", "odd"))
    even = Colour(jitter=jitter, **_named("strength", strength, STRENGTHS), gray=gray, blur=blurs["even"], sigma=sigma)
    colours = (even, replace(even, blur=blurs["odd"], solarize=solarize))

    def cut(kind: str, count: int, size: int, grid: int, scale: tuple[float, float]) -> Cut:
        return Cut(kind, count, size, grid, scale, flip=flip, interpolation="bicubic", colours=colours)

    cuts = [cut("large", large, large_size, large_grid, large_scale)]
    if small:
        cuts.append(cut("small", small, small_size, small_grid, small_scale))
    targets = partial(
        _pair_matches,
        large_grid=large_grid,
        small_grid=small_grid,
        gamma=gamma,
        flip_aware=paper if flip_aware is None else flip_aware,
    )
    return Recipe(
        "vicregl",
        fidelity,
        tuple(cuts),
        targets=targets if matches else None,
        std=IMAGENET_STD if paper else (0.228, 0.224, 0.225),
    )


def vicregl_resnet50(
    fidelity: Fidelity = "paper",
    *,
    large_scale: tuple[float, float] = (0.08, 1.0),
    gamma: tuple[int, int] | None = (20, 4),
    **others: Any,
) -> Recipe:
    """VICRegL as for its ResNet-50: two large views of 8 to 100 % of the image, no small ones.

    Takes what `vicregl` takes; fidelities differ as there.
    """
    recipe = vicregl(fidelity, **{"small": 0, "large_scale": large_scale, "gamma": gamma, **others})
    return replace(recipe, name="vicregl_resnet50")


def plain(
    fidelity: Fidelity = "paper", *, size: int = 224, scale: tuple[float, float] = (0.08, 1.0), patch: int = 16
) -> Recipe:
    """One random resized crop with flips, for classification: kind ``image`` (1 view), torchvision's usual numbers.

    There is nothing in which the fidelities could differ.
    """
    _is_paper(fidelity)
    return Recipe("plain", fidelity, (Cut("image", 1, size, _grid(size, patch), scale),))


def evaluation(
    *,
    size: int = 224,
    resize: int = 256,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    patch: int = 16,
) -> Recipe:
    """The central square that is left of an image whose short side is resized to `resize`: kind ``image`` (1 view).

    The square is cut first and resized once; its edges are whole pixels of the stored image, so it lies within half a
    stored pixel of the resized image's central crop.
    """
    if not 0 < size <= resize:
        raise ValueError(f"resize is {resize}: it must be at least the size of the view, {size}")
    share = size / resize
    cut = Cut(
        "image",
        1,
        size,
        _grid(size, patch),
        (share, share),
        sampler="centre",
        flip=0.0,
        interpolation=interpolation,
    )
    return Recipe("evaluation", "paper", (cut,))


def _is_paper(fidelity: str) -> bool:
    if fidelity not in ("paper", "released"):
        raise ValueError(f"fidelity is {fidelity!r}: it must be 'paper' or 'released'")
    return fidelity == "paper"


def _named(name: str, values: Sequence[float], parts: tuple[str, ...]) -> dict[str, Any]:
    if len(values) != len(parts):
        raise ValueError(f"{name} is {tuple(values)}: it must hold {len(parts)} numbers, for {', '.join(parts)}")
    return dict(zip(parts, values, strict=True))


def _grid(size: int, patch: int) -> int:
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
