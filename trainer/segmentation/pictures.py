"""Pictures of a segmentation: image, truth, prediction and error side by side, with a legend."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from trainer.segmentation.labelled import VOID

RIGHT, WRONG, UNLABELLED = (225, 225, 225), (200, 30, 40), (0, 0, 0)


def palette(classes: int) -> NDArray[np.uint8]:
    """Return a colour for each class, u8 (256, 3). Successive classes differ clearly; void is black."""
    colours = np.zeros((256, 3), np.uint8)
    for label in range(classes):
        hue = label * 0.618034 % 1  # multiples of the golden ratio never repeat a hue
        colours[label] = np.array(colorsys.hsv_to_rgb(hue, (0.9, 0.55)[label % 2], (1.0, 0.75)[label // 2 % 2])) * 255
    return colours


def panels(image: Image.Image, truth: Tensor, predicted: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw one picture as wide as four images. `truth` and `predicted` are label maps (H, W) of one size."""
    height, width = truth.shape
    colours = palette(len(names))
    labelled, wrong = truth != VOID, predicted != truth
    error = np.full((height, width, 3), RIGHT, np.uint8)
    error[wrong] = WRONG
    error[~labelled] = UNLABELLED
    rows = [np.asarray(image.resize((width, height))), colours[truth], colours[predicted], error]
    titles = ["image", "truth", "prediction", f"error: {100 * wrong[labelled].float().mean():.0f} % of labelled pixels"]
    band = 18
    seen = torch.cat([truth[labelled], predicted.flatten()]).unique().tolist()
    legend = 1 + len(seen) * 130 // (4 * width)
    sheet = Image.new("RGB", (4 * width, height + band * (1 + legend)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (pixels, title) in enumerate(zip(rows, titles, strict=True)):
        sheet.paste(Image.fromarray(pixels), (column * width, band))
        draw.text((column * width + 4, 3), title, "black")
    x, y = 4, height + band + 3
    for label in seen:
        if x + 130 > 4 * width:
            x, y = 4, y + band
        draw.rectangle((x, y, x + 12, y + 12), tuple(colours[label].tolist()))
        draw.text((x + 17, y), names[label][:16], "black")
        x += 130
    return sheet
