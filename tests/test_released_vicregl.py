"""VICRegL's released weights, imitated with their own names, give the same features here as in the released code."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_released import converted, fails

from trainer import released
from trainer.backbones import stride
from trainer.methods import vicregl
from trainer.segmentation import frozen


def convnext_file() -> released.Weights:
    """A ConvNeXt-T under the names of the released code."""
    torch.manual_seed(0)
    depths, dims = (3, 3, 9, 3), (96, 192, 384, 768)
    w: released.Weights = {}

    def layer(name: str, *shape: int) -> None:
        w[f"{name}.weight"] = torch.randn(shape) * (0.02 if len(shape) > 1 else 0.1) + (len(shape) == 1)
        w[f"{name}.bias"] = torch.randn(shape[0]) * 0.1

    layer("downsample_layers.0.0", 96, 3, 4, 4)
    layer("downsample_layers.0.1", 96)
    for i in range(1, 4):
        layer(f"downsample_layers.{i}.0", dims[i - 1])
        layer(f"downsample_layers.{i}.1", dims[i], dims[i - 1], 2, 2)
    for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        for j in range(depth):
            layer(f"stages.{i}.{j}.dwconv", dim, 1, 7, 7)
            layer(f"stages.{i}.{j}.norm", dim)
            layer(f"stages.{i}.{j}.pwconv1", 4 * dim, dim)
            layer(f"stages.{i}.{j}.pwconv2", dim, 4 * dim)
    layer("norm", 768)
    return w


def convnext(w: released.Weights, x: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) -> (B, N, D)."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    for i, depth in enumerate((3, 3, 9, 3)):
        for j, layer in enumerate(("conv", "norm") if i == 0 else ("norm", "conv")):
            name = f"downsample_layers.{i}.{j}"
            if layer == "conv":
                x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=4 if i == 0 else 2)
            else:
                x = norm(name, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for j in range(depth):
            name, channels = f"stages.{i}.{j}", x.shape[1]
            y = F.conv2d(x, w[f"{name}.dwconv.weight"], w[f"{name}.dwconv.bias"], padding=3, groups=channels)
            y = norm(f"{name}.norm", y.permute(0, 2, 3, 1))
            y = F.gelu(F.linear(y, w[f"{name}.pwconv1.weight"], w[f"{name}.pwconv1.bias"]))
            x = x + F.linear(y, w[f"{name}.pwconv2.weight"], w[f"{name}.pwconv2.bias"]).permute(0, 3, 1, 2)
    return norm("norm", x.flatten(2).mT)


def resnet_file() -> released.Weights:
    """A ResNet-50 under the names of the released code."""
    torch.manual_seed(0)
    w: released.Weights = {}

    def layer(conv: str, norm: str, fan_out: int, fan_in: int, side: int) -> None:
        w[f"{conv}.weight"] = torch.randn(fan_out, fan_in, side, side) * (2 / (fan_in * side**2)) ** 0.5
        w[f"{norm}.weight"], w[f"{norm}.bias"] = 0.5 + torch.rand(fan_out), 0.1 * torch.randn(fan_out)
        w[f"{norm}.running_mean"], w[f"{norm}.running_var"] = 0.1 * torch.randn(fan_out), 0.5 + torch.rand(fan_out)
        w[f"{norm}.num_batches_tracked"] = torch.tensor(17)

    layer("conv1", "bn1", 64, 3, 7)
    fan_in = 64
    for i, depth in enumerate((3, 4, 6, 3), 1):
        width = 32 * 2**i
        for j in range(depth):
            name = f"layer{i}.{j}"
            for k, (a, b, side) in enumerate(((width, fan_in, 1), (width, width, 3), (4 * width, width, 1)), 1):
                layer(f"{name}.conv{k}", f"{name}.bn{k}", a, b, side)
            if j == 0:
                layer(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, fan_in, 1)
            fan_in = 4 * width
    return w


def resnet(w: released.Weights, x: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) -> (B, N, D), by running statistics."""

    def layer(conv: str, norm: str, x: torch.Tensor, stride: int = 1, padding: int = 0) -> torch.Tensor:
        x = F.conv2d(x, w[f"{conv}.weight"], stride=stride, padding=padding)
        mean, var, gain, bias = (w[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, gain, bias, eps=1e-5)

    x = F.max_pool2d(layer("conv1", "bn1", x, 2, 3).relu(), 3, 2, 1)
    for i, depth in enumerate((3, 4, 6, 3), 1):
        for j in range(depth):
            name, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            y = layer(f"{name}.conv1", f"{name}.bn1", x).relu()
            y = layer(f"{name}.conv2", f"{name}.bn2", y, stride, 1).relu()
            y = layer(f"{name}.conv3", f"{name}.bn3", y)
            x = (y + (layer(f"{name}.downsample.0", f"{name}.downsample.1", x, stride) if j == 0 else x)).relu()
    return x.flatten(2).mT


def head_file(width: int, *, batch_norm: bool, hidden: int = 12) -> released.Weights:
    """Linear, norm, ReLU, Linear, norm, ReLU, Linear without a bias."""
    w = {"0.weight": torch.randn(hidden, width), "3.weight": torch.randn(hidden, hidden)}
    w |= {"6.weight": torch.randn(hidden, hidden)}
    for i in (0, 1, 3, 4):
        w[f"{i}.bias"] = torch.randn(hidden)
    for i in (1, 4):
        w[f"{i}.weight"] = torch.randn(hidden)
        if batch_norm:
            w |= {f"{i}.running_mean": torch.randn(hidden), f"{i}.running_var": torch.rand(hidden) + 1}
            w[f"{i}.num_batches_tracked"] = torch.tensor(17)
    return w


def full_file(folder: Path, backbone: released.Weights, **heads: released.Weights) -> None:
    """A training checkpoint of the released code, as DDP names its weights."""
    parts = {"backbone": backbone, **heads, "classifier": {"weight": torch.ones(9, 7), "bias": torch.ones(9)}}
    model = {f"module.{part}.{name}": value for part, weights in parts.items() for name, value in weights.items()}
    optimizers = ModuleType("optimizers")  # LARS's groups refer to a function of the released code
    exec("def exclude_bias_and_norm(p):\n    raise SystemExit('called')", optimizers.__dict__)
    sys.modules["optimizers"] = optimizers
    groups = [{"lr": 1.6, "weight_decay_filter": optimizers.exclude_bias_and_norm}]
    torch.save({"epoch": 300, "model": model, "optimizer": {"state": {}, "param_groups": groups}}, folder / "released")
    del sys.modules["optimizers"]


def features(method: Any, theirs: Callable[[torch.Tensor], torch.Tensor]) -> None:
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(method.backbone()(images), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


def test_vicregl_convnext(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = convnext_file()
    full_file(
        tmp_path,
        backbone,
        projector=(one := head_file(768, batch_norm=False)),
        maps_projector=(two := head_file(768, batch_norm=False, hidden=5)),
    )
    method = converted(tmp_path, (tmp_path / "released").read_bytes(), "--method", "vicregl")
    assert capsys.readouterr().out.endswith("convnext_tiny: encoder, expander, projector\n")
    features(method, lambda x: convnext(backbone, x))
    for head, w in ((method.expander, one), (method.projector, two)):
        assert {name: value.tolist() for name, value in head.state_dict().items()} == {
            k: v.tolist() for k, v in w.items()
        }


def test_vicregl_resnet_without_a_local_projector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As published: the full checkpoint of a ResNet-50 has an expander with batch norm, and nothing else."""
    backbone = resnet_file()
    full_file(tmp_path, backbone, projector=(expander := head_file(2048, batch_norm=True)))
    method = converted(tmp_path, (tmp_path / "released").read_bytes(), "--method", "vicregl")
    assert capsys.readouterr().out.endswith("resnet50: encoder, expander; initialised at random: projector\n")
    features(method, lambda x: resnet(backbone, x))
    assert torch.equal(method.expander[4].running_var, expander["4.running_var"])
    assert method.cfg.views.small == 0 and method.cfg.views.large_scale == (0.08, 1.0)


def test_vicregl_backbone_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Small(vicregl.Config):
        expander: tuple[int, ...] = (8, 8, 8)  # 8192 wide, they take seconds to draw
        projector: tuple[int, ...] = (8, 8, 8)

    monkeypatch.setattr(vicregl, "Config", Small)
    backbone = resnet_file()
    torch.save(backbone, tmp_path / "released")
    payload, message = released.convert(tmp_path / "released", "vicregl", False)
    assert message == "resnet50: encoder; initialised at random: expander, projector"
    assert torch.equal(payload["model"]["encoder.layer4.2.conv3.weight"], backbone["layer4.2.conv3.weight"])
    dense = frozen.load(f"released:{tmp_path / 'released'}").backbone  # at output stride 8
    assert stride(dense) == 8 and torch.equal(dense.layer4[2].conv3.weight, backbone["layer4.2.conv3.weight"])


@pytest.mark.parametrize("harm", ["missing", "shape", "extra"])
def test_vicregl_weights_that_do_not_fit(tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = convnext_file()
    head = head_file(768, batch_norm=False)
    if harm == "missing":
        del backbone["stages.2.4.pwconv1.bias"]
        sentence = "module.backbone.stages.2.4.pwconv1.bias is missing: shape (1536,) was expected"
    elif harm == "shape":
        head["4.weight"] = torch.ones(3)
        sentence = "module.projector.4.weight has shape (3,): (12,) was expected"
    else:
        backbone["stages.0.0.gamma"] = torch.ones(96)
        sentence = "module.backbone.stages.0.0.gamma of shape (96,) has no place here"
    full_file(tmp_path, backbone, projector=head, maps_projector=head_file(768, batch_norm=False))
    assert sentence in fails(tmp_path, capsys, "vicregl")
