"""Backbones: sizes, positions, token dropping, initialisation, and timm's names."""

import math
from copy import deepcopy

import pytest
import timm
import torch
from torch import Tensor

from trainer.backbones import (
    ConvNeXt,
    ResNet,
    VisionTransformer,
    checkpoint_activations_,
    feature_map,
    normalise,
    stride,
    take,
    timm_backbone,
    vit,
)

PIXELS = torch.Generator().manual_seed(0)


@pytest.fixture
def small() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(32, 2, 4, patch=8, size=32)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # of the published sizes, without heads
        ("vit_tiny_patch16", 5_524_032),
        ("vit_small_patch16", 21_664_896),
        ("vit_base_patch16", 85_054_464 + 741_120 + 1_536),  # blocks, patches and positions, final norm
        ("vit_large_patch16", 303_299_584),
        ("vit_huge_patch16", 630_915_840),
    ],
)
def test_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in vit(name).parameters()) == parameters


@pytest.mark.parametrize(("patch", "size", "grid"), [(16, 224, 14), (14, 224, 16), (8, 224, 28)])
def test_patch_sizes(patch: int, size: int, grid: int) -> None:
    with torch.device("meta"):
        model = vit(f"vit_tiny_patch{patch}", size=size)
        assert model.pos_embed.shape == (1, grid**2, 192)
        assert model(torch.empty(2, 3, size, size)).shape == (2, grid**2, 192)


@pytest.mark.parametrize("name", ["vit_base", "resnet", "vit_enormous_patch16"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        vit(name)


def test_sides_must_divide(small: VisionTransformer) -> None:
    with pytest.raises(ValueError, match=r"100.*16"):
        vit("vit_tiny_patch16", size=100)
    with pytest.raises(ValueError, match=r"30.*8"):
        small(torch.zeros(1, 3, 32, 30))


def test_timm_loads_the_weights_and_agrees() -> None:
    torch.manual_seed(1)
    ours = vit("vit_tiny_patch16", size=64).eval()
    with torch.no_grad():
        for p in ours.parameters():  # biases and scales too, which are 0 and 1 at the start
            p.add_(0.02 * torch.randn_like(p))
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        act_layer="gelu_tanh",
        num_classes=0,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=PIXELS)
    torch.testing.assert_close(ours(x), theirs.forward_features(x))


def perturbed(network: torch.nn.Module) -> torch.nn.Module:
    """In evaluation mode, with no weight and no running statistic where it started."""
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value) if "running" in name else 0.02 * torch.randn_like(value))
    return network.eval()


def test_maps_of_a_rectangle_are_those_of_timms_vit() -> None:
    torch.manual_seed(2)
    ours = perturbed(VisionTransformer(32, 3, 4, patch=8, size=32, cls_token=True))
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(48, 72),
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=4,
        no_embed_class=True,
        act_layer="gelu_tanh",
        num_classes=0,
    ).eval()
    theirs.load_state_dict({**ours.state_dict(), "pos_embed": ours.position_grid(6, 9)})
    x = torch.randn(2, 3, 48, 72, generator=PIXELS)
    for norm in (True, False):
        each = theirs.forward_intermediates(x, [0, 2], norm=norm, intermediates_only=True)
        assert each[0].shape == (2, 32, 6, 9)
        torch.testing.assert_close(feature_map(ours, x, (0, 2), norm=norm), torch.cat(each, 1))
        torch.testing.assert_close(feature_map(ours, x, norm=norm), each[1])
    torch.testing.assert_close(feature_map(ours, x), ours(x)[:, 1:].mT.unflatten(2, (6, 9)))


def test_positions_of_a_rectangle_are_not_transposed() -> None:
    model = VisionTransformer(2, 1, 1, patch=8, size=40)
    where = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij"), -1)
    with torch.no_grad():
        model.pos_embed.copy_(where.reshape(1, 25, 2))
    rows, columns = model.position_grid(5, 10)[0].unflatten(0, (5, 10)).unbind(-1)
    torch.testing.assert_close(rows, torch.arange(5.0)[:, None].expand(5, 10))
    assert (columns == columns[:1]).all() and (columns.diff(dim=1)[:, 1:-1] > 0.4).all()


def test_positions_are_resized_once_to_be_trained(small: VisionTransformer) -> None:
    x = torch.randn(1, 3, 48, 48, generator=PIXELS)
    before = small(x)
    small.set_input_size(48)
    assert small.grid == 6 and small.pos_embed.shape == (1, 36, 32)
    torch.testing.assert_close(small(x), before)
    small(x).square().sum().backward()
    assert (small.pos_embed.grad.abs().amax(2) > 0).all()
    with pytest.raises(ValueError, match=r"50.*8"):
        small.set_input_size(50)


def test_maps_of_a_convnext_are_timms_with_its_norm_on_every_cell() -> None:
    torch.manual_seed(3)
    depths, widths = (1, 1, 2, 1), (8, 16, 32, 64)
    ours = perturbed(ConvNeXt(depths, widths))
    theirs = timm.create_model("convnext_tiny", depths=depths, dims=widths, num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for name, value in theirs.named_parameters():
        if name.endswith("gamma"):  # the layer scale, which ours has not
            torch.nn.init.ones_(value)
    x = torch.randn(2, 3, 64, 96, generator=PIXELS)
    stages = theirs.forward_intermediates(x, intermediates_only=True)
    assert [tuple(stage.shape[1:]) for stage in stages] == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]
    for network in (ours, theirs):
        torch.testing.assert_close(feature_map(network, x), theirs.head.norm(stages[3]))
        torch.testing.assert_close(feature_map(network, x, norm=False), stages[3])
    torch.testing.assert_close(feature_map(ours, x), ours(x).mT.unflatten(2, (2, 3)))
    together = feature_map(ours, x, (0, 1, 2, 3), norm=False)
    assert together.shape == (2, 120, 16, 24)
    torch.testing.assert_close(together[:, :8], stages[0])
    coarse = torch.nn.functional.interpolate(stages[3], (16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(together[:, 56:], coarse)


def test_a_resnet_with_dilations_is_timms_of_output_stride_8() -> None:
    torch.manual_seed(4)
    depths = (1, 2, 2, 2)
    ours = perturbed(ResNet(depths))
    theirs = timm.create_model("resnet50", layers=depths, output_stride=8, num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict())
    dilated = ours.dilated(8)
    x = torch.randn(1, 3, 64, 96, generator=PIXELS)
    torch.testing.assert_close(feature_map(dilated, x), theirs.forward_features(x))
    assert feature_map(dilated, x).shape == (1, 2048, 8, 12) and (stride(dilated), stride(theirs)) == (8, 8)
    assert feature_map(ours, x).shape == (1, 2048, 2, 3) and stride(ours) == 32
    stages = [getattr(dilated, f"layer{i}") for i in (1, 2, 3, 4)]
    dilations = [[block.conv2.dilation[0] for block in stage] for stage in stages]
    assert dilations == [[1], [1, 1], [1, 2], [2, 4]]  # a stage's first block has half of its dilation


@pytest.mark.parametrize(
    ("name", "cells"),
    [("vit_tiny_patch16_224", 16), ("resnet18", 8), ("convnext_atto", 32), ("swin_tiny_patch4_window7_224", 32)],
)
def test_any_timm_model_gives_a_map_of_a_rectangle(name: str, cells: int) -> None:
    network = timm_backbone(name, pretrained=False)
    assert stride(network) == cells and not network.training
    assert feature_map(network, torch.zeros(1, 3, 2 * cells, 3 * cells)).shape == (1, network.num_features, 2, 3)


@pytest.mark.parametrize(
    ("name", "reason"), [("vit_nowhere", "no model"), ("vit_relpos_small_patch16_224", "any sides")]
)
def test_a_timm_model_that_cannot_serve_is_named(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){name}.*{reason}|{reason}.*{name}"):
        timm_backbone(name, pretrained=False)


def triangle_resize(values: list[float], out: int) -> list[float]:
    """One axis, antialiased bilinear as JAX and Pillow define it: a triangle as wide as an output cell."""
    n, result = len(values), []
    scale = max(n / out, 1.0)
    for i in range(out):
        middle = (i + 0.5) * n / out
        weights = [max(0.0, 1 - abs(j + 0.5 - middle) / scale) for j in range(n)]
        result.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return result


@pytest.mark.parametrize("side", [6, 14, 20])
def test_positions_are_resized_with_antialiasing(side: int) -> None:
    model = VisionTransformer(8, 1, 2, patch=8, size=14 * 8)
    grid = model.position_grid(side, side).detach()[0].unflatten(0, (side, side))
    source = model.pos_embed.detach()[0].unflatten(0, (14, 14))
    for channel in range(8):
        rows = [triangle_resize(source[:, c, channel].tolist(), side) for c in range(14)]
        expected = [triangle_resize([rows[c][r] for c in range(14)], side) for r in range(side)]
        torch.testing.assert_close(grid[..., channel], torch.tensor(expected), rtol=0, atol=2e-6)


def naive_forward(model: VisionTransformer, image: Tensor, keep: list[int] | None, positions: bool) -> Tensor:
    """One image, patch by patch and head by head, from the definitions."""
    side, width = model.patch, model.width
    tokens = []
    for index in keep if keep is not None else range(model.grid**2):
        row, column = divmod(index, model.grid)
        cut = image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
        token = (model.patch_embed.proj.weight * cut).sum((1, 2, 3)) + model.patch_embed.proj.bias
        tokens.append(token + model.pos_embed[0, index] if positions else token)
    x = torch.stack(tokens)

    def norm(layer: torch.nn.LayerNorm, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias

    for block in model.blocks:
        q, k, v = (norm(block.norm1, x) @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=-1)
        heads = []
        for h in range(model.heads):
            part = slice(h * width // model.heads, (h + 1) * width // model.heads)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width / model.heads)
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
        hidden = norm(block.norm2, x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return norm(model.norm, x)


@pytest.mark.parametrize("positions", [True, False])
def test_against_the_definitions(small: VisionTransformer, positions: bool) -> None:
    model = small.double()
    images = torch.randn(2, 3, 32, 32, generator=PIXELS, dtype=torch.float64)
    keep = torch.tensor([[3, 0, 9], [15, 7, 2]])
    whole = torch.stack([naive_forward(model, image, None, positions) for image in images])
    torch.testing.assert_close(model(images, positions=positions), whole)
    some = torch.stack([naive_forward(model, i, k.tolist(), positions) for i, k in zip(images, keep, strict=True)])
    torch.testing.assert_close(model(images, keep, positions=positions), some)
    alike = torch.stack([naive_forward(model, image, [3, 0, 9], positions) for image in images])
    for index in (keep[0], keep[:1]):
        torch.testing.assert_close(model(images, index, positions=positions), alike)


def test_context_hides_tokens_from_all_others(small: VisionTransformer) -> None:
    context = torch.arange(16)[None] < 5
    a, b = torch.randn(2, 1, 3, 32, 32, generator=PIXELS)
    b[..., :8, :] = a[..., :8, :]  # the first grid row, four patches
    b[..., 8:16, :8] = a[..., 8:16, :8]  # and the fifth
    visible_a, visible_b = small(a, context=context), small(b, context=context)
    torch.testing.assert_close(visible_a[:, :5], visible_b[:, :5])
    assert (visible_a[:, 5:] - visible_b[:, 5:]).abs().mean() > 0.1
    assert (small(a)[:, :5] - small(b)[:, :5]).abs().mean() > 0.01


def test_cls_token_stands_in_front() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(32, 2, 4, patch=8, size=32, cls_token=True)
    images = torch.randn(2, 3, 32, 32, generator=PIXELS)
    assert model(images).shape == (2, 17, 32)
    a, b = model(images, torch.tensor([1, 2])), model(images, torch.tensor([2, 1]))
    torch.testing.assert_close(a, b[:, [0, 2, 1]])


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = vit("vit_small_patch16", drop_path=0.1)
    block = model.blocks[5]
    assert model.pos_embed.std().item() == pytest.approx(384**-0.5, rel=0.02)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(768**-0.5, rel=0.02)
    assert model.patch_embed.proj.weight.abs().max() <= 2 * 768**-0.5 / 0.8796 * 1.0001
    for weight, fans in (
        (block.attn.qkv.weight, 2 * 384),  # q, k and v are square each
        (block.attn.proj.weight, 2 * 384),
        (block.mlp.fc1.weight, 5 * 384),
        (block.mlp.fc2.weight, 5 * 384),
    ):
        assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / fans), rel=1e-3)
    assert not block.attn.qkv.bias.any() and not block.attn.proj.bias.any() and not model.patch_embed.proj.bias.any()
    assert 0 < block.mlp.fc1.bias.abs().max() < 1e-5
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks]
    assert rates == pytest.approx([0.1 * l / 11 for l in range(12)])
    assert model.norm.eps == block.norm1.eps == block.norm2.eps == 1e-6


def test_normalise_is_image_major() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8, generator=PIXELS)
    mean, std = (0.5, 0.25, 0.125), (0.2, 0.3, 0.4)
    x = normalise(pixels, mean, std)
    assert x.shape == (6, 3, 4, 5) and x.dtype == torch.float32
    for image, view, row, column, channel in [(0, 0, 0, 0, 0), (1, 2, 3, 4, 2), (0, 2, 1, 3, 1), (1, 0, 2, 0, 1)]:
        expected = (pixels[image, view, row, column, channel].item() / 255 - mean[channel]) / std[channel]
        assert x[image * 3 + view, channel, row, column].item() == pytest.approx(expected, rel=1e-5)


def test_take() -> None:
    tokens = torch.arange(24).view(2, 4, 3)
    assert take(tokens, torch.tensor([2, 0])).tolist() == tokens[:, [2, 0]].tolist()
    index = torch.tensor([[1], [3]])
    assert take(tokens, index).tolist() == [[tokens[0, 1].tolist()], [tokens[1, 3].tolist()]]
    assert take(tokens[..., 0], index).tolist() == [[3], [21]]


def test_activations_computed_again_count_once_in_running_statistics() -> None:
    torch.manual_seed(0)
    plain = ResNet((1, 1, 1, 1))
    recomputed = deepcopy(plain)
    checkpoint_activations_(recomputed)
    pixels = torch.randn(2, 3, 32, 32)
    gradients = []
    for network in (plain, recomputed):
        loss = network(pixels).square().mean()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    for (name, a), b in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(a, b), name
