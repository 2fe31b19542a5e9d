"""A DataLoader worker as an expert would write it: simplejpeg decodes, OpenCV cuts, look-up tables augment colours.

Views of one kind share one array, so a sample has one tensor for each kind. Pixels are bytes between the steps; the hue
has OpenCV's 180 values. Antialiased views average areas (`INTER_AREA`), for which OpenCV has its fastest code.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import Recipe
from pipeline.recipes import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Cut

Pixels = NDArray[np.uint8]
_LEVELS = np.arange(256, dtype=np.float32)


def build(*, antialias: bool) -> Callable[[Recipe, torch.dtype], Callable[[bytes], list[torch.Tensor]]]:
    """Return a factory. A worker calls it once to get a function from stored bytes to one tensor per kind of view."""

    def prepare(recipe: Recipe, dtype: torch.dtype) -> Callable[[bytes], list[torch.Tensor]]:
        import cv2
        import simplejpeg

        cv2.setNumThreads(0)
        rng, done = np.random.default_rng(torch.initial_seed()), finish(dtype)

        def transform(stored: bytes) -> list[torch.Tensor]:
            image = simplejpeg.decode_jpeg(stored, strict=False)
            kinds = []
            for cut in recipe.cuts:
                views = []
                for colour in cut.by_view:
                    view = _crop(image, cut, antialias, rng, cv2)
                    views.append(done(_coloured(view, colour, rng, cv2)))
                kinds.append(torch.stack(views))
            return kinds

        return transform

    return prepare


def finish(dtype: torch.dtype) -> Callable[[Pixels], torch.Tensor]:
    """Return a function from u8 (S, S, 3) to a tensor: unchanged, or normalised (3, S, S) of `dtype` by look-up."""
    if dtype == torch.uint8:
        return torch.from_numpy
    import cv2

    tables = [((_LEVELS / 255 - m) / s).astype(np.float32) for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]

    def normalised(view: Pixels) -> torch.Tensor:
        out = np.empty((3, *view.shape[:2]), np.float32)
        for plane, channel, table in zip(out, cv2.split(view), tables, strict=True):
            cv2.LUT(channel, table, plane)
        return torch.from_numpy(out).to(dtype)

    return normalised


def _crop(image: Pixels, cut: Cut, antialias: bool, rng: np.random.Generator, cv2: Any) -> Pixels:
    """Return a RandomResizedCrop of `image` with a random flip."""
    height, width = image.shape[:2]
    h, w = height, width
    for _ in range(10):
        area = height * width * rng.uniform(*cut.scale)
        ratio = np.exp(rng.uniform(*np.log(cut.ratio)))
        wanted = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
        if 0 < wanted[0] <= height and 0 < wanted[1] <= width:
            h, w = wanted
            break
    y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
    shrinks = min(h, w) > cut.size
    usual = cv2.INTER_CUBIC if cut.interpolation == "bicubic" else cv2.INTER_LINEAR
    how = cv2.INTER_AREA if antialias and shrinks else usual
    view = cv2.resize(image[y : y + h, x : x + w], (cut.size, cut.size), interpolation=how)
    return cv2.flip(view, 1) if rng.random() < cut.flip else view


def _table(levels: NDArray[np.float32]) -> Pixels:
    return np.clip(levels + 0.5, 0, 255).astype(np.uint8)


def _coloured(view: Pixels, colour: Augmentation, rng: np.random.Generator, cv2: Any) -> Pixels:
    if rng.random() < colour.jitter:
        for step in rng.permutation(4):
            view = _jittered(view, int(step), colour, rng, cv2)
    if rng.random() < colour.gray:
        view = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if rng.random() < colour.blur:
        view = cv2.GaussianBlur(view, (0, 0), rng.uniform(*colour.sigma))
    if rng.random() < colour.solarize:
        view = cv2.LUT(view, _table(np.minimum(_LEVELS, 255 - _LEVELS)))
    return view


def _jittered(view: Pixels, step: int, colour: Augmentation, rng: np.random.Generator, cv2: Any) -> Pixels:
    if step == 0:
        return cv2.LUT(view, _table(_LEVELS * rng.uniform(1 - colour.brightness, 1 + colour.brightness)))
    if step == 1:
        factor = rng.uniform(1 - colour.contrast, 1 + colour.contrast)
        mean = cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0]
        return cv2.LUT(view, _table(_LEVELS * factor + (1 - factor) * mean))
    if step == 2:
        factor = rng.uniform(1 - colour.saturation, 1 + colour.saturation)
        gray = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return cv2.addWeighted(view, factor, gray, 1 - factor, 0)
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV)
    shift = 180 * rng.uniform(-colour.hue, colour.hue)
    turned = np.mod(_LEVELS[:180] + shift, 180).astype(np.uint8)
    hue, saturation, value = cv2.split(hsv)
    hue = cv2.LUT(hue, np.concatenate([turned, np.zeros(76, np.uint8)]))
    return cv2.cvtColor(cv2.merge((hue, saturation, value)), cv2.COLOR_HSV2RGB)
