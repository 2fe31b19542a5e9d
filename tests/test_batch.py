"""Batches: normalised tensors, and a readable summary of the contents."""

import pytest
import torch

from pipeline import Batch, View
from pipeline.recipes import IMAGENET_MEAN, IMAGENET_STD


def view(seed: int = 0) -> View:
    pixels = torch.randint(256, (2, 3, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return View(pixels, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalised_pixels_are_exact_to_one_rounding(dtype: torch.dtype) -> None:
    mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    exact = (view().pixels.permute(0, 1, 4, 2, 3).double() / 255 - mean) / std
    found = view().tensor(dtype=dtype)
    assert found.dtype == dtype and found.shape == (2, 3, 3, 8, 8) and found.is_contiguous()
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_normalising_leaves_the_pixels_as_they_are() -> None:
    v = view()
    before = v.pixels.clone()
    assert torch.equal(v.tensor((0.0,) * 3, (1.0,) * 3), before.permute(0, 1, 4, 2, 3) / 255)
    assert torch.equal(v.pixels, before)


def test_a_batch_says_what_is_in_it() -> None:
    text = repr(Batch({"focal": view()}, {"focal": torch.zeros(2, 3, 4, dtype=torch.int32)}, *[torch.zeros(2)] * 2))
    assert text.splitlines()[:3] == [
        "Batch of 2 images on cpu",
        "  views['focal']: pixels uint8 (2, 3, 8, 8, 3), window float32 (2, 3, 4)",
        "  targets['focal']: int32 (2, 3, 4)",
    ]
