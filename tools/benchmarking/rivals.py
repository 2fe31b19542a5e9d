"""Loaders to compare with: DataLoaders whose workers cut all views of an image, and a graph of DALI's own operators.

Each of them reads the same tars and yields tensors of the same shapes and type as our loader, with the recipe's crops,
filters, probabilities and ranges. ``torchvision`` is the usual PIL multi-crop loader. ``opencv`` is Albumentations on
OpenCV, not antialiased. ``simplejpeg`` and ``simplejpeg-aa`` are hand-written loaders (`by_hand`), without and with
antialiasing. ``dali`` is a graph as in DALI's manual (`dali_graph`).
"""

import io
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from pipeline import Recipe, ShardSet
from pipeline.recipes import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Cut

from . import by_hand, dali_graph
from .meter import Meter
from .stages import Task

Transform = Callable[[bytes], list[torch.Tensor]]
Build = Callable[[Recipe, torch.dtype], Transform]


def chosen(names: str) -> list[str]:
    """The loaders that `--against` names; "all" names every one. Raises ValueError for an unknown name."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if wanted == ["all"]:
        return list(NAMES)
    unknown = next((name for name in wanted if name not in NAMES), None)
    if unknown is not None:
        raise ValueError(f"--against knows {', '.join(NAMES)} and all, not {unknown!r}")
    return wanted


def meter(name: str, task: Task) -> Meter:
    """A meter of loader `name`, with one worker per thread of ours. Raises ValueError if a package is missing."""
    packages, build = _RIVALS[name]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(f"--against {name} needs {' and '.join(missing)}: pip install 'dense-ssl[bench]'")
    return Meter(name, dali_graph.batches(task) if build is None else _sizes(task, name), settle=2)


def _sizes(task: Task, name: str) -> Iterator[int]:
    assert task.recipe is not None
    data = _Images(task.shards, task.recipe, task.dtype, name)
    loader = DataLoader(
        data,
        task.batch_size,
        sampler=RandomSampler(data, replacement=True, num_samples=1 << 30),
        num_workers=task.num_threads,
        persistent_workers=True,
        multiprocessing_context="spawn",  # after a fork, this process would copy every page that it writes to
    )
    for views in loader:
        yield len(views[0])


class _Images(Dataset[Any]):
    def __init__(self, shards: ShardSet, recipe: Recipe, dtype: torch.dtype, name: str):
        self._shards, self._recipe, self._dtype, self._name = shards, recipe, dtype, name
        self._transform: Transform | None = None

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, i: int) -> Any:
        if self._transform is None:  # in the worker
            torch.set_num_threads(1)
            build = _RIVALS[self._name][1]
            assert build is not None
            self._transform = build(self._recipe, self._dtype)
        return self._transform(self._shards.read(i))


def _views(recipe: Recipe, one: Callable[[Cut, Augmentation], Callable[[Any], Any]]) -> list[Callable[[Any], Any]]:
    return [one(cut, colour) for cut in recipe.cuts for colour in cut.by_view]


class _Blur:
    def __init__(self, sigma: tuple[float, float]):
        self._sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(*self._sigma).item()))


def _torchvision(recipe: Recipe, dtype: torch.dtype) -> Transform:
    normalised = [
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD, inplace=True),
        transforms.ConvertImageDtype(dtype),
    ]

    def one(cut: Cut, colour: Augmentation) -> Callable[[Any], Any]:
        modes = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
        steps: list[Any] = [
            transforms.RandomResizedCrop(cut.size, cut.scale, cut.ratio, modes[cut.interpolation]),
            transforms.RandomHorizontalFlip(cut.flip),
        ]
        if colour.jitter:
            factors = (colour.brightness, colour.contrast, colour.saturation, colour.hue)
            steps.append(transforms.RandomApply([transforms.ColorJitter(*factors)], colour.jitter))
        if colour.gray:
            steps.append(transforms.RandomGrayscale(colour.gray))
        if colour.blur:
            steps.append(transforms.RandomApply([_Blur(colour.sigma)], colour.blur))
        if colour.solarize:
            steps.append(transforms.RandomSolarize(128, colour.solarize))
        return transforms.Compose([*steps, *([transforms.PILToTensor()] if dtype == torch.uint8 else normalised)])

    views = _views(recipe, one)

    def transform(stored: bytes) -> list[torch.Tensor]:
        with Image.open(io.BytesIO(stored)) as opened:
            image = opened.convert("RGB")
        return [view(image) for view in views]

    return transform


def _opencv(recipe: Recipe, dtype: torch.dtype) -> Transform:
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)

    def one(cut: Cut, colour: Augmentation) -> Callable[[Any], Any]:
        filtering = cv2.INTER_CUBIC if cut.interpolation == "bicubic" else cv2.INTER_LINEAR
        side = (cut.size, cut.size)
        steps: list[Any] = [
            A.RandomResizedCrop(size=side, scale=cut.scale, ratio=cut.ratio, interpolation=filtering, p=1.0),
            A.HorizontalFlip(p=cut.flip),
        ]
        if colour.jitter:
            factors = [(1 - f, 1 + f) for f in (colour.brightness, colour.contrast, colour.saturation)]
            steps.append(A.ColorJitter(*factors, hue=(-colour.hue, colour.hue), p=colour.jitter))
        if colour.gray:
            steps.append(A.ToGray(p=colour.gray))
        if colour.blur:
            steps.append(A.GaussianBlur(blur_limit=0, sigma_limit=colour.sigma, p=colour.blur))
        if colour.solarize:
            steps.append(A.Solarize(threshold_range=(0.5, 0.5), p=colour.solarize))
        composed: Any = A.Compose(steps)
        return lambda image: composed(image=image)["image"]

    views, finish = _views(recipe, one), by_hand.finish(dtype)

    def transform(stored: bytes) -> list[torch.Tensor]:
        decoded = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        assert decoded is not None
        image = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
        return [finish(view(image)) for view in views]

    return transform


_RIVALS: dict[str, tuple[tuple[str, ...], Build | None]] = {  # packages needed, and factory of the worker's transform
    "torchvision": ((), _torchvision),
    "opencv": (("cv2", "albumentations"), _opencv),
    "simplejpeg": (("cv2", "simplejpeg"), by_hand.build(antialias=False)),
    "simplejpeg-aa": (("cv2", "simplejpeg"), by_hand.build(antialias=True)),
    "dali": ((), None),
}
NAMES = tuple(_RIVALS)
