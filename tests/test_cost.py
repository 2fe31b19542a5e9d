"""The predicted cost of a training step, before anything is built."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import recipes
from trainer import cost
from trainer.backbones import vit
from trainer.method import Method


class Layers(Method):
    """Two products of 32 x 32 pixels' colours: sizes and operations can be computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3072, 512, bias=False), nn.Linear(512, 512, bias=False)
        self.frozen = nn.Linear(512, 512, bias=False).requires_grad_(False)

    def forward(self, batch: Any, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.views["image"].pixels.flatten(1).float()
        return self.frozen(self.second(self.first(x))).sum(), {}


RECIPE = recipes.plain(size=32)


def test_days_on_a_cpu_are_warned_of() -> None:
    (text,) = cost.too_long(cost.Estimate(1e12, 3e9), 1e8, 2, "take another")
    assert "6.0 GB of memory" in text and text.endswith("take another")
    hours = float(text.split(" hours")[0].split()[-1].replace(",", ""))
    assert 1e12 * 1e8 / 2 / 3600 / 1e14 < hours < 1e12 * 1e8 / 2 / 3600 / 1e8  # between 100 TFLOP/s and 0.1 GFLOP/s
    assert not cost.too_long(cost.Estimate(1e6, 3e9), 1e6, 1, "take another")


def test_operations_and_memory_are_those_of_the_layers() -> None:
    found = cost.estimate(Layers, RECIPE, 8, "cpu", states=2)
    forward, backward = 3072 * 512 + 2 * 512 * 512, 3072 * 512 + 2 * 512 * 512 + 512 * 512
    assert found.flops_per_image == 2 * (forward + backward)
    trained, frozen = 4 * (3072 * 512 + 512 * 512), 4 * 512 * 512
    activations = 8 * (3072 * 5 + 3 * 512 * 4)  # bytes and floats of the pixels, and what each layer gives
    assert 0.98 < found.memory / (4 * trained + frozen + activations) < 1.02
    assert found.memory - cost.estimate(Layers, RECIPE, 8, "cpu", states=1).memory == trained


class Attends(Layers):
    def forward(self, batch: Any, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self.first(batch.views["image"].pixels.flatten(1).float()).view(-1, 2, 16, 16)
        return nn.functional.scaled_dot_product_attention(rows, rows, rows).sum(), {}


def test_attentions_products_are_counted_once() -> None:
    """Two forward, four backward, of 2 heads x 16 x 16 x 16: torch counts none of the CPU's."""
    found = cost.estimate(Attends, RECIPE, 8, "cpu")
    assert found.flops_per_image == 2 * (2 * 3072 * 512 + 6 * 2 * 16**3)


class Network(Layers):
    def __init__(self) -> None:
        Method.__init__(self)
        self.encoder = vit("vit_nano_patch16", size=32, drop_path=0.0)

    def forward(self, batch: Any, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.encoder(batch.views["image"].pixels[:, 0].permute(0, 3, 1, 2).float()).sum(), {}


def test_activation_checkpointing_takes_less_memory_and_no_operation_of_the_methods() -> None:
    plain = cost.estimate(Network, RECIPE, 1024, "cpu")
    less = cost.estimate(Network, RECIPE, 1024, "cpu", checkpointing=True)
    assert less.flops_per_image == plain.flops_per_image and less.memory < 0.8 * plain.memory


def test_a_method_that_needs_contents_has_no_estimate() -> None:
    class Looks(Layers):
        def forward(self, batch: Any, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss, _ = super().forward(batch, progress)
            return loss * (2.0 if loss.item() > 0 else 1.0), {}

    with pytest.warns(UserWarning, match="the cost of a step is not known"):
        assert cost.estimate(Looks, RECIPE, 2, "cpu") == cost.Estimate(0.0, 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has one")
def test_a_cpu_has_no_known_peak() -> None:
    assert cost.peak_flops(torch.device("cpu")) is None
