"""Reference implementations of the pixel operations: slow and plain, in float64, without rounding.

Images here are float arrays (H, W, 3) in levels, 0 to 255.
"""

import colorsys
from itertools import permutations

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])
OPERATIONS = list(permutations(("brightness", "contrast", "saturation", "hue")))


def triangle(x):
    return max(1 - abs(x), 0.0)


def cubic(x):
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    if x < 2:
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return 0.0


def resize_matrix(length, size, interpolation, antialias):
    """(size, length): each output pixel's weights over the input's."""
    kernel, reach = (triangle, 1) if interpolation == "bilinear" else (cubic, 2)
    scale = length / size
    widening = max(scale, 1.0) if antialias else 1.0
    matrix = np.zeros((size, length))
    for i in range(size):
        centre = (i + 0.5) * scale
        if antialias:  # what lies beyond the window does not exist
            for k in range(length):
                if abs(k + 0.5 - centre) < reach * widening:
                    matrix[i, k] = kernel((k + 0.5 - centre) / widening)
            matrix[i] /= matrix[i].sum()
        else:  # what lies beyond the window is its edge
            low = int(np.floor(centre - 0.5))
            for k in (low, low + 1):
                matrix[i, min(max(k, 0), length - 1)] += kernel(k + 0.5 - centre)
    return matrix


def cut(image, window, size, interpolation="bilinear", antialias=True):
    """The view of a window (y0, x0, y1, x1), mirrored where x1 < x0."""
    y0, x0, y1, x1 = (int(v) for v in window)
    box = np.asarray(image, dtype=np.float64)[y0:y1, min(x0, x1) : max(x0, x1)]
    rows = resize_matrix(box.shape[0], size, interpolation, antialias)
    columns = resize_matrix(box.shape[1], size, interpolation, antialias)
    view = np.clip(np.einsum("ij,jkc->ikc", rows, box), 0, 255)  # bytes pass from rows to columns, as in Pillow
    view = np.clip(np.einsum("lk,ikc->ilc", columns, view), 0, 255)
    if x1 < x0:
        view = view[:, ::-1]
    return view


def gray(view):
    return np.repeat((view @ LUMA)[..., None], 3, axis=-1)


def _through_hsv(view, change):
    out = np.empty_like(view)
    for at in np.ndindex(view.shape[:2]):
        out[at] = np.array(colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*(view[at] / 255))))) * 255
    return out


def turn_hue(view, shift):
    return _through_hsv(view, lambda h, s, v: ((h + shift) % 1.0, s, v))


def torchvision_step(view, operation, factor):
    if operation == "brightness":
        return np.clip(view * factor, 0, 255)
    if operation == "contrast":
        return np.clip(factor * view + (1 - factor) * gray(view).mean(), 0, 255)
    if operation == "saturation":
        return np.clip(factor * view + (1 - factor) * gray(view), 0, 255)
    return turn_hue(view, factor)


def tensorflow_step(view, operation, factor):
    if operation == "brightness":
        return np.clip(view + 255 * factor, 0, 255)
    if operation == "contrast":
        mean = view.mean(axis=(0, 1))
        return np.clip((view - mean) * factor + mean, 0, 255)
    if operation == "saturation":
        return _through_hsv(view, lambda h, s, v: (h, min(s * factor, 1.0), v))
    return turn_hue(view, factor)


def mmseg_step(view, operation, factor):
    return np.clip(view * factor, 0, 255) if operation == "contrast" else tensorflow_step(view, operation, factor)


def jitter(view, order, factors, rule="torchvision"):
    step = {"torchvision": torchvision_step, "tensorflow": tensorflow_step, "mmseg": mmseg_step}[rule]
    for operation in OPERATIONS[order]:
        view = step(view, operation, factors[operation])
    return view


def blur(view, sigma):
    """A Gaussian of whole-pixel samples out to five sigmas; the edge goes on beyond the edge."""
    radius = int(np.ceil(5 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(view, padding, mode="edge")
        size = view.shape[axis]
        view = sum(w * np.take(padded, np.arange(k, k + size), axis) for k, w in enumerate(weights))
    return view


def solarize(view):
    return np.where(view < 127.5, view, 255 - view)


def view(image, window, size, interpolation="bilinear", antialias=True, **p):
    """The whole chain. `p`: order, brightness, contrast, saturation, hue, gray, sigma, solarize, rule; all optional."""
    out = cut(image, window, size, interpolation, antialias)
    if p.get("order", -1) >= 0:
        out = jitter(out, p["order"], p, p.get("rule", "torchvision"))
    if p.get("gray"):
        out = gray(out)
    if p.get("sigma"):
        out = blur(out, p["sigma"])
    if p.get("solarize"):
        out = solarize(out)
    return out
