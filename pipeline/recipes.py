"""What to cut: the views of a method, with the numbers that steer their crops and colours.

A recipe says everything about the views and nothing about files, devices or batches. Two fidelities: ``"paper"`` is what
the authors intended, ``"released"`` is what their published code does; each recipe lists the differences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Fidelity = Literal["paper", "released"]
Windows = Mapping[str, NDArray[np.float32]]  # by kind: f32 (B, V, 4)
Targets = Callable[[Windows], dict[str, NDArray[Any]]]

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
    rule: Literal["torchvision", "tensorflow"] = "torchvision"  # whose formulas the four operations follow
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
    sampler: Literal["torchvision", "tensorflow", "centre"] = "torchvision"  # "centre": the central square of the
    # short side times scale[1]; no randomness: for evaluation
    flip: float = 0.5  # probability of the horizontal mirror
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    colours: tuple[Colour, ...] = (Colour(),)  # view v takes colours[v % len(colours)]


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
