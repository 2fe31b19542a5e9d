"""A backbone's patch features of all images of a set, and each patch's class shares, computed once.

In a folder they are stored as memory-mapped files in half precision. An interrupted extraction resumes. The folder's
name is a fingerprint of everything that determines the contents: weights, images and settings.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.host import cores
from trainer.backbones import stride
from trainer.console import counting
from trainer.segmentation.frozen import Frozen
from trainer.segmentation.labelled import Labelled, class_shares, fitted
from trainer.stored import arrays, fingerprint, keep

FORMAT = 1  # increased when the same inputs would yield different features
PIXELS = 1 << 20  # pixels per batch: enough to fill a GPU, and little compared with a CPU's memory


class Features(NamedTuple):
    """Features of the P patches of n images, one image after another, row by row."""

    x: Tensor  # f16 (P, D)
    shares: Tensor  # f16 (P, C): fraction of the patch's pixels of each class; a row sums to the labelled fraction
    colour: Tensor  # f16 (P, 6): mean and deviation of red, green and blue, in the unit range
    start: NDArray[np.int64]  # (n,): index of each image's first patch
    grids: NDArray[np.int64]  # (n, 2): rows and columns of each image's patch grid
    images: NDArray[np.int64]  # (n,): index of each image in the set

    def rows(self, j: int) -> slice:
        """Return the patches of the j-th image, as a slice."""
        return slice(int(self.start[j]), int(self.start[j] + self.grids[j].prod()))


def extract(
    frozen: Frozen,
    data: Labelled,
    classes: int,
    *,
    short_side: int | None,
    images: NDArray[np.int64] | None = None,
    cache: Path | None = None,
    show: str | None = None,
) -> Features:
    """Extract the features of `images` (default: all) of a set, in memory or to a subfolder of `cache`.

    `show` is the title of a progress bar. Raises ValueError for an invalid image or mask and for features that exceed
    half precision, and OSError if the disk is too small.
    """
    images = np.arange(len(data)) if images is None else images
    device, multiple = frozen.device, stride(frozen.backbone)
    try:
        tried = frozen(torch.zeros(1, 2 * multiple, 2 * multiple, 3, dtype=torch.uint8, device=device))
    except (AssertionError, IndexError) as error:  # raised by timm's models and by ours
        numbers = " ".join(map(str, frozen.layers))
        raise ValueError(f"--layers {numbers}: the backbone has not so many ({error})") from None
    cell = 2 * multiple // tried.shape[2]  # of several layers, that of the finest
    sides = np.array([fitted(*data.size(int(i)), short_side, multiple) for i in images])
    grids = sides // cell
    ends = grids.prod(1).cumsum()
    start, patches = ends - grids.prod(1), int(ends[-1])
    widths = {"x": tried.shape[1], "shares": classes, "colour": 6}
    if cache is not None:
        settings = [*frozen[1:], data.shards.fingerprint, classes, images.tolist(), short_side]
        cache /= fingerprint(frozen.backbone, FORMAT, *settings)
    layout = {name: (np.float16, (patches, width)) for name, width in widths.items()}
    found = arrays(cache, {**layout, "filled": (np.int64, (1,))})

    def load(j: int) -> tuple[Tensor, Tensor]:
        i = int(images[j])
        (height, width), (rows, columns) = sides[j].tolist(), grids[j].tolist()
        picture = data.image(i).resize((width, height), Image.Resampling.BICUBIC)  # antialiased, as timm evaluates
        return torch.from_numpy(np.array(picture)), class_shares(data.mask(i), rows, columns, classes)

    order = np.lexsort((sides[:, 1], sides[:, 0])).tolist()  # images of one size make a batch
    filled = int(found["filled"][0])
    with counting(show, total=len(order), initial=filled) as bar:
        try:
            for step, (batch, loaded) in enumerate(_ahead(load, _batches(order[filled:], sides)), 1):
                pixels = torch.stack([picture for picture, _ in loaded]).to(device)
                x = frozen(pixels).permute(0, 2, 3, 1).flatten(1, 2).half()
                if not torch.isfinite(x).all():
                    raise ValueError("features are not finite in half precision: the weights have diverged")
                for j, features, colour, (_, shares) in zip(
                    batch, x.cpu(), _colours(pixels, cell), loaded, strict=True
                ):
                    part = slice(start[j], ends[j])
                    found["x"][part], found["shares"][part], found["colour"][part] = features, shares, colour
                filled += len(batch)
                bar.update(len(batch))
                if step % 32 == 0:
                    keep(found, filled)
        finally:
            keep(found, filled)
    x, shares, colours = (torch.from_numpy(found[name]) for name in ("x", "shares", "colour"))
    return Features(x, shares, colours, start, grids, images)


def _batches(order: list[int], sides: NDArray[np.int64]) -> Iterator[list[int]]:
    """Yield batches of images of one size with up to PIXELS pixels in all."""
    for (height, width), group in groupby(order, key=lambda j: tuple(sides[j].tolist())):
        same, most = list(group), max(1, PIXELS // (height * width))
        yield from (same[first : first + most] for first in range(0, len(same), most))


def _ahead(load: Callable[[int], Any], batches: Iterator[list[int]]) -> Iterator[tuple[list[int], list[Any]]]:
    """Yield each batch with its images loaded by `load`. Threads load two batches ahead."""
    with ThreadPoolExecutor(cores()) as pool:
        waiting: deque[tuple[list[int], list[Future]]] = deque()
        for following in chain(batches, ([], [])):
            waiting.append((following, [pool.submit(load, j) for j in following]))
            if len(waiting) > 2:
                batch, futures = waiting.popleft()
                yield batch, [future.result() for future in futures]


def _colours(pixels: Tensor, cell: int) -> Tensor:
    """u8 (B, H, W, 3) -> f32 (B, cells, 6) on the CPU: each cell's mean and deviation of red, green and blue."""
    x = pixels.permute(0, 3, 1, 2).float() / 255
    mean, square = F.avg_pool2d(x, cell), F.avg_pool2d(x.square(), cell)
    return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt()], 1).flatten(2).mT.cpu()
