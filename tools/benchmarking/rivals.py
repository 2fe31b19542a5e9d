"""What a user would pick instead: a DataLoader whose workers cut all views of an image, one after the other.

Each reads the same tars and hands out u8 tensors of the same shapes, with the recipe's crops, filters, probabilities
and ranges. ``torchvision`` is the usual PIL multi-crop loader; ``opencv`` is an expert's, with Albumentations and
OpenCV, the fastest of the common ones: its views are not antialiased, its jitter works on bytes.
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
from pipeline.recipes import Augmentation, Cut

from .meter import Meter
from .stages import Task

NAMES = ("torchvision", "opencv")


def meter(name: str, task: Task) -> Meter:
    """The rival `name` with as many workers as the loader has threads. Raises ValueError where it is not installed."""
    if name not in NAMES:
        raise ValueError(f"--against knows {', '.join(NAMES)}, not {name!r}")
    missing = [package for package in ("cv2", "albumentations") if name == "opencv" and find_spec(package) is None]
    if missing:
        raise ValueError(f"--against opencv needs {' and '.join(missing)}: pip install -e '.[bench]'")
    return Meter(name, _sizes(task, _torchvision if name == "torchvision" else _opencv), settle=2)


def _sizes(task: Task, build: Callable[[Recipe], Callable[[bytes], Any]]) -> Iterator[int]:
    assert task.recipe is not None
    data = _Images(task.shards, task.recipe, build)
    loader = DataLoader(
        data,
        task.batch_size,
        sampler=RandomSampler(data, replacement=True, num_samples=1 << 30),
        num_workers=task.num_threads,
        persistent_workers=True,
    )
    for views in loader:
        yield len(views[0])


class _Images(Dataset[Any]):
    def __init__(self, shards: ShardSet, recipe: Recipe, build: Callable[[Recipe], Callable[[bytes], Any]]):
        self._shards, self._recipe, self._build = shards, recipe, build
        self._transform: Callable[[bytes], Any] | None = None

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, i: int) -> Any:
        if self._transform is None:  # in the worker
            torch.set_num_threads(1)
            self._transform = self._build(self._recipe)
        return self._transform(self._shards.read(i))


def _views(recipe: Recipe, one: Callable[[Cut, Augmentation], Callable[[Any], Any]]) -> list[Callable[[Any], Any]]:
    return [one(cut, cut.augmentations[v % len(cut.augmentations)]) for cut in recipe.cuts for v in range(cut.count)]


class _Blur:
    def __init__(self, sigma: tuple[float, float]):
        self._sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(*self._sigma).item()))


def _torchvision(recipe: Recipe) -> Callable[[bytes], Any]:
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
        return transforms.Compose([*steps, transforms.PILToTensor()])

    views = _views(recipe, one)

    def transform(stored: bytes) -> list[torch.Tensor]:
        with Image.open(io.BytesIO(stored)) as opened:
            image = opened.convert("RGB")
        return [view(image) for view in views]

    return transform


def _opencv(recipe: Recipe) -> Callable[[bytes], Any]:
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

    views = _views(recipe, one)

    def transform(stored: bytes) -> list[torch.Tensor]:
        decoded = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        assert decoded is not None
        image = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
        return [torch.from_numpy(view(image)) for view in views]

    return transform
