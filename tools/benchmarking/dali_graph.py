"""A multi-crop loader of DALI's own CPU operators, combined as in DALI's manual.

DALI has no operator for two augmentations: grayscale is a saturation of 0, solarize is arithmetic. Its ``color_twist``
rotates the hue in YIQ and centres the contrast at 128, in one fixed order: less work than the recipes require.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types

from pipeline.recipes import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Cut

from .stages import Task

_FILTERS = {"bilinear": types.DALIInterpType.INTERP_LINEAR, "bicubic": types.DALIInterpType.INTERP_CUBIC}


def batches(task: Task) -> Iterator[int]:
    """Yield the number of images of each batch, after its views became torch tensors of the task's type."""
    shards, recipe, rng = task.shards, task.recipe, np.random.default_rng(0)
    assert recipe is not None

    def stored() -> list[Any]:
        chosen = rng.integers(len(shards), size=task.batch_size).tolist()
        return [np.frombuffer(shards.read(i), np.uint8) for i in chosen]

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple[Any, ...]:
        image = fn.external_source(source=stored, batch=True, dtype=types.DALIDataType.UINT8, ndim=1)
        image = fn.decoders.image(image, output_type=types.DALIImageType.RGB, adjust_orientation=False)
        outputs = []
        for cut in recipe.cuts:
            for colour in cut.by_view:
                view = _view(image, cut, colour)
                outputs.append(view if task.dtype == torch.uint8 else _normalised(view))
        return tuple(outputs)

    pipe = graph(batch_size=task.batch_size, num_threads=task.num_threads, device_id=None, prefetch_queue_depth=2)
    while True:
        # torch converts: DALI's own float16 takes several times as long as float32, and DALI has no bfloat16.
        views = [torch.from_dlpack(output.as_tensor()).to(task.dtype) for output in pipe.run()]
        yield len(views[0])


def _normalised(view: Any) -> Any:
    mean, std = ([255 * number for number in numbers] for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return fn.crop_mirror_normalize(view, mean=mean, std=std, dtype=types.DALIDataType.FLOAT, output_layout="CHW")


def _view(image: Any, cut: Cut, colour: Augmentation) -> Any:
    view = fn.random_resized_crop(
        image,
        size=(cut.size, cut.size),
        random_area=cut.scale,
        random_aspect_ratio=cut.ratio,
        interp_type=_FILTERS[cut.interpolation],
        antialias=cut.antialias,
    )
    view = fn.flip(view, horizontal=fn.random.coin_flip(probability=cut.flip))
    if colour.jitter > 0 and fn.random.coin_flip(probability=colour.jitter, dtype=types.DALIDataType.BOOL):
        view = fn.color_twist(
            view,
            brightness=fn.random.uniform(range=(1 - colour.brightness, 1 + colour.brightness)),
            contrast=fn.random.uniform(range=(1 - colour.contrast, 1 + colour.contrast)),
            saturation=fn.random.uniform(range=(1 - colour.saturation, 1 + colour.saturation)),
            hue=fn.random.uniform(range=(-360 * colour.hue, 360 * colour.hue)),
        )
    if colour.gray > 0 and fn.random.coin_flip(probability=colour.gray, dtype=types.DALIDataType.BOOL):
        view = fn.hsv(view, saturation=0.0)
    if colour.blur > 0 and fn.random.coin_flip(probability=colour.blur, dtype=types.DALIDataType.BOOL):
        view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=colour.sigma))
    if colour.solarize > 0 and fn.random.coin_flip(probability=colour.solarize, dtype=types.DALIDataType.BOOL):
        view = fn.cast(math.min(view, 255 - view), dtype=types.DALIDataType.UINT8)
    return view
