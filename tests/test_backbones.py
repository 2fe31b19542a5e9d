"""Backbones: sizes, positions, token dropping, initialisation, and timm's names."""

import math

import pytest
import timm
import torch
from torch import Tensor

from trainer.backbones import VisionTransformer, normalise, take, vit

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
