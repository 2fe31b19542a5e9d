"""Backbones that return one feature per patch or cell, and the normalisation of pixels that every method starts with.

Weights keep timm's names (`blocks.*`, `patch_embed.*`, `norm.*`, `pos_embed`), so a trained backbone loads into timm's
model of the same shape without conversion.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import convnext as timm_convnext
from timm.models import resnet as timm_resnet
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.parallel import gather, world_size


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalise u8 (B, V, S, S, 3) -> f32 (B*V, 3, S, S), image-major: view v of image b is row b*V + v.

    `mean` and `std` are in the unit range. The result is channels-last in memory, like the pixels.
    """
    x = pixels.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def blocks(module: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks in `module`, the units in which a large model is sharded, recomputed and compiled."""
    return [m for m in module.modules() if isinstance(m, Block | timm_convnext.ConvNeXtBlock | timm_resnet.Bottleneck)]


def checkpoint_activations_(module: nn.Module) -> None:
    """Make every block drop its activations and recompute them in the backward pass."""
    for block in blocks(module):
        block.forward = partial(_checkpointed, block, block.forward)  # type: ignore[method-assign]


def _checkpointed(block: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if torch.compiler.is_compiling():  # a compiled graph does not repeat its mutations in the recomputation
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    contexts = lambda: (nullcontext(), _statistics_at_rest(block))  # noqa: E731 - for forward pass and recomputation
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _statistics_at_rest(block: nn.Module) -> Iterator[None]:
    """Within the context, batch norms of `block` use batch statistics but do not update their running statistics."""
    momenta = {m: m.momentum for m in block.modules() if isinstance(m, BatchNorm)}
    for norm in momenta:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def stride(backbone: Any) -> int:
    """Return the side of a patch or cell in pixels, for backbones of this module and of timm."""
    return backbone.patch if hasattr(backbone, "patch") else backbone.feature_info[-1]["reduction"]


def input_size(backbone: Any) -> int:
    """Return the image side that a backbone of this module is made for: by its positions for a ViT, about 224 else."""
    return getattr(backbone, "grid", 224 // backbone.patch) * backbone.patch


def feature_map(backbone: Any, pixels: Tensor, layers: Sequence[int] = (-1,), *, norm: bool = True) -> Tensor:
    """Return features (B, D, rows, columns) of f32 (B, 3, H, W), for any backbone, including timm's.

    H and W must be multiples of the stride. `layers` are blocks of a ViT or stages of a convolutional network (stage 0
    of a ResNet is the stem). Several maps are resized bilinearly to the finest grid and concatenated along D. `norm`
    applies the final norm: to every block of a ViT, as in DINOv2, to the last stage of a ConvNeXt. ResNets have none.
    """
    maps = backbone.forward_intermediates(pixels, indices=list(layers), norm=norm, intermediates_only=True)
    if norm and isinstance(backbone, timm_convnext.ConvNeXt) and {-1, len(backbone.stages) - 1} & set(layers):
        last: Any = getattr(backbone.head, "norm", nn.Identity())
        maps[-1] = last(maps[-1])
    grid = maps[0].shape[-2:]
    return torch.cat([maps[0], *(F.interpolate(m, grid, mode="bilinear") for m in maps[1:])], dim=1)


def named(
    name: str,
    *,
    size: int | None = None,
    drop_path: float = 0.0,
    cls_token: bool = False,
    dilated: bool = True,
) -> nn.Module:
    """Build the backbone `name` with random weights: a `vit`, a `convnet`, or a model of timm as ``timm:NAME``.

    A ViT's position grid is made for images of side `size`; None means 224, or timm's default. A `dilated` ResNet has
    output stride 8. Raises ValueError.
    """
    if name.startswith("timm:"):
        options: dict[str, Any] = {"size": size, "drop_path": drop_path, "dilated": dilated}
        return timm_backbone(name.removeprefix("timm:"), pretrained=False, **options)
    if name.startswith("vit"):
        return vit(name, size=size or 224, drop_path=drop_path, cls_token=cls_token)
    if cls_token:
        raise ValueError(f"{name} has no CLS token")
    if name == "resnet50" and dilated:
        return ResNet(RESNET50, drop_path=drop_path, output_stride=8)
    return convnet(name, drop_path=drop_path)


def timm_backbone(
    name: str, *, pretrained: bool, size: int | None = None, drop_path: float = 0.0, dilated: bool = True
) -> nn.Module:
    """Build timm's model `name` without its classifier, in evaluation mode, for images of any height and width.

    If `size` is given, a ViT's position grid is resized once to images of that side. A `dilated` ResNet has output
    stride 8, as segmentation uses it. Raises ValueError for an unknown name, and for a network that supports only one
    image size or no `drop_path`. Errors of the hub are passed on.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: timm.list_models() names all")
    own: dict[str, Any] = {"dynamic_img_size": True, "img_size": size}
    if name.partition(".")[0] in timm.list_models(module="resnet"):
        own = {"output_stride": 8 if dilated else 32}
    always: dict[str, Any] = {"num_classes": 0} | ({"drop_path_rate": drop_path} if drop_path else {})
    for options in (own, {}):
        try:
            network = timm.create_model(name, pretrained=pretrained, **always, **options).eval()
            break
        except TypeError:  # this family of models lacks one of the arguments
            continue
    else:
        raise ValueError(f"timm's {name} takes no drop_path: set it to 0")
    try:
        with torch.no_grad():
            feature_map(network, torch.zeros(1, 3, 2 * stride(network), 3 * stride(network)))
    except (AssertionError, AttributeError, RuntimeError) as error:
        raise ValueError(f"timm's {name} gives no feature map for images of any sides ({error})") from None
    return network


# ---- Vision Transformers ---------------------------------------------------------------------------------------------

# width, blocks, heads; the MLP is four times as wide. "pico" and "nano" are not published sizes; they train on a CPU.
VIT_SIZES = {
    "pico": (96, 2, 4),
    "nano": (128, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


class LayerNorm(nn.LayerNorm):
    """LayerNorm for weights of lower precision than the input, which FSDP gathers and the CPU kernel rejects."""

    def forward(self, x: Tensor) -> Tensor:
        kind = torch.promote_types(x.dtype, self.weight.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(kind), self.bias.to(kind), self.eps)


layer_norm: Any = partial(LayerNorm, eps=1e-6)
gelu: Any = partial(nn.GELU, approximate="tanh")


class VitShape(NamedTuple):
    width: int
    depth: int
    heads: int
    patch: int


def vit_shape(name: str) -> VitShape:
    """Parse the name ``vit_{pico,nano,tiny,small,base,large,huge}_patch{8,14,16,...}``. Raises ValueError."""
    match = re.fullmatch(r"vit_([a-z]+)_patch([1-9]\d*)", name)
    if match is None or match[1] not in VIT_SIZES:
        raise ValueError(f"unknown backbone {name!r}: choose vit_SIZE_patchP with SIZE one of {', '.join(VIT_SIZES)}")
    return VitShape(*VIT_SIZES[match[1]], int(match[2]))


def vit(name: str, *, size: int = 224, drop_path: float = 0.0, cls_token: bool = False) -> "VisionTransformer":
    """Build the ViT `name` (see `vit_shape`) for images of side `size`."""
    width, depth, heads, patch = vit_shape(name)
    return VisionTransformer(width, depth, heads, patch=patch, size=size, drop_path=drop_path, cls_token=cls_token)


class Block(timm_vit.Block):
    """timm's pre-norm block. The caller may pass the drop-path draws, so that several passes share them."""

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, drops: Tensor | None = None
    ) -> Tensor:
        """(B, N, D) -> (B, N, D). `drops` (B, 2) has uniform draws in [0, 1) for attention and MLP; None: draw here."""
        if drops is None:
            return super().forward(x, attn_mask)
        kept = 1 - getattr(self.drop_path1, "drop_prob", 0.0)
        scale = ((drops < kept) / kept).to(x.dtype)[:, :, None, None]
        x = x + scale[:, 0] * self.attn(self.norm1(x), attn_mask=attn_mask)
        return x + scale[:, 1] * self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A pre-norm ViT with learned 2-D positions and a final norm. By default it has no CLS token, as in LOCA's code.

    `size` is the side of the images that the position grid is learned for; for other sides the grid is resized. Block l
    of L drops its branches, per sample, with probability ``drop_path * l / (L - 1)``. Tanh GELU, LayerNorm eps 1e-6 and
    the initialisation are those of the released LOCA code, whose weights require them.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        patch: int = 16,
        size: int = 224,
        drop_path: float = 0.0,
        cls_token: bool = False,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(
                f"images of side {size} do not divide into patches of {patch}: choose a multiple of {patch}"
            )
        self.width, self.heads, self.patch, self.grid = width, heads, patch, size // patch
        self.num_features = width  # timm's name for the width
        self.num_prefix_tokens = int(cls_token)
        self.patch_embed = PatchEmbed(None, patch, 3, width)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2, width))
        if cls_token:  # has no position embedding
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                qkv_bias=True,
                drop_path=drop_path * l / max(depth - 1, 1),
                norm_layer=layer_norm,
                act_layer=gelu,
            )
            for l in range(depth)
        )
        self.norm = layer_norm(width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.pos_embed, std=self.width**-0.5)
        lecun_normal_(self.patch_embed.proj)
        if self.num_prefix_tokens:
            nn.init.normal_(self.cls_token, std=self.width**-0.5)
        for block in self.blocks:
            block_init_(block)

    def forward(
        self,
        pixels: Tensor,
        keep: Tensor | None = None,
        *,
        positions: bool = True,
        context: Tensor | None = None,
        drops: Tensor | None = None,
    ) -> Tensor:
        """f32 (B, 3, H, W) -> (B, N, D), or (B, 1 + N, D) with the CLS token first.

        `keep`, i64 (n,) for all images or (B, n), selects the patches that enter the first block; the others cost
        nothing. `positions=False` leaves the position embeddings out. `context`, bool (1 or B, N), selects the tokens
        that serve as keys and values in every block; by default all do. `drops` (B, L, 2) are uniform draws in [0, 1)
        that decide which branches are dropped; by default each pass makes its own draws.
        """
        x = self.embed(pixels, keep, positions)
        mask = None if context is None else context[:, None, None, :]
        for l, block in enumerate(self.blocks):
            x = block(x, mask, None if drops is None else drops[:, l])
        return self.norm(x)

    def forward_intermediates(
        self, pixels: Tensor, indices: Sequence[int], *, norm: bool, intermediates_only: Literal[True] = True
    ) -> list[Tensor]:
        """Return the patches after the blocks at `indices`, each (B, D, rows, columns), like timm's method."""
        x, maps = self.embed(pixels), []
        wanted = {range(len(self.blocks))[i] for i in indices}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in wanted:
                patches = (self.norm(x) if norm else x)[:, self.num_prefix_tokens :]
                maps.append(patches.mT.unflatten(2, (-1, pixels.shape[-1] // self.patch)))
        return maps

    def embed(self, pixels: Tensor, keep: Tensor | None = None, positions: bool = True) -> Tensor:
        """Turn f32 (B, 3, H, W) into the tokens that enter the first block."""
        rows, columns = pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch
        if (rows * self.patch, columns * self.patch) != tuple(pixels.shape[-2:]):
            raise ValueError(f"images of {tuple(pixels.shape[-2:])} do not divide into patches of {self.patch}")
        x = self.patch_embed(pixels.to(self.pos_embed.dtype))
        if positions:
            x = x + self.position_grid(rows, columns)
        if keep is not None:
            x = take(x, keep)
        if self.num_prefix_tokens:
            x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return x

    @torch.no_grad()
    def set_input_size(self, size: int) -> None:
        """Resize the position grid permanently to images of side `size`, so that training has a vector for each patch.

        A grid that is resized in every forward pass would only train the vectors of its old size. Raises ValueError.
        """
        if size % self.patch:
            raise ValueError(f"images of side {size} do not divide into patches of {self.patch}")
        grid = size // self.patch
        self.pos_embed = nn.Parameter(self.position_grid(grid, grid).clone(), self.pos_embed.requires_grad)
        self.grid = grid

    def position_grid(self, rows: int, columns: int) -> Tensor:
        """Return position embeddings (1, rows*columns, D), resized bilinearly, antialiased if the grid shrinks."""
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        grid = self.pos_embed.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        return F.interpolate(grid, (rows, columns), mode="bilinear", antialias=True).flatten(2).mT


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Select tokens (B, n, ...) of (B, N, ...) by `index`: i64 (n,) or (1, n) for all images, or (B, n)."""
    if index.ndim == 1 or len(index) == 1:
        return tokens.index_select(1, index.flatten())
    index = index.reshape(*index.shape, *(1,) * (tokens.ndim - 2))
    return tokens.gather(1, index.expand(-1, -1, *tokens.shape[2:]))


@torch.no_grad()
def lecun_normal_(layer: nn.Linear | nn.Conv2d) -> None:
    """Set weights to a truncated normal of standard deviation 1/sqrt(fan in), cut at +-2 sigma, and the bias to 0."""
    std = layer.weight[0].numel() ** -0.5 / 0.8796256610342398  # the factor by which truncation lowers the deviation
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def block_init_(block: Any) -> None:
    """Initialise every linear layer of a transformer block as in the original ViT.

    Weights are Xavier uniform, with q, k and v as separate square matrices. Biases are 0 in attention and normal with
    standard deviation 1e-6 in the MLP.
    """
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear):
            for part in layer.weight.split(min(layer.weight.shape)) if ".attn." in f".{name}" else (layer.weight,):
                nn.init.xavier_uniform_(part)
            nn.init.normal_(layer.bias, std=1e-6 if ".mlp." in f".{name}" else 0.0)


# ---- Convolutional networks ------------------------------------------------------------------------------------------

# depths and widths of the four stages
CONVNEXT_SIZES = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}

RESNET50 = (3, 4, 6, 3)


def convnet(name: str, *, drop_path: float = 0.0) -> "ConvNeXt | ResNet":
    """Build the network `name`: ``resnet50`` or ``convnext_{tiny,small,base,large,xlarge}``. Raises ValueError."""
    if name == "resnet50":
        return ResNet(RESNET50, drop_path=drop_path)
    if (size := name.removeprefix("convnext_")) in CONVNEXT_SIZES and name != size:
        return ConvNeXt(*CONVNEXT_SIZES[size], drop_path=drop_path)
    sizes = ", ".join(CONVNEXT_SIZES)
    raise ValueError(f"unknown backbone {name!r}: choose resnet50 or convnext_SIZE with SIZE one of {sizes}")


class ConvNeXt(timm_convnext.ConvNeXt):
    """timm's ConvNeXt as in the released VICRegL code: no layer scale, and the last LayerNorm applied to every cell.

    The original ConvNeXt normalises the pooled mean instead. The norm is `head.norm`, as in timm. Block l of L drops
    its branch, per sample, with probability ``drop_path * l / (L - 1)``.
    """

    patch = 32  # side of a cell in pixels

    def __init__(self, depths: tuple[int, ...], widths: tuple[int, ...], *, drop_path: float = 0.0) -> None:
        super().__init__(num_classes=0, depths=depths, dims=widths, ls_init_value=None, drop_path_rate=drop_path)
        self.width = widths[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        """f32 (B, 3, H, W) -> (B, N, D), cells row by row."""
        norm: Any = self.head.norm
        return norm(self.forward_features(pixels.to(norm.weight.dtype))).flatten(2).mT


class ResNet(timm_resnet.ResNet):
    """timm's bottleneck ResNet (v1.5: the stride is in the 3x3 convolution). Features follow the last block's ReLU.

    Convolutions are initialised as Kaiming normal by fan-out, the last norm of each block with gain 0 (released VICRegL
    code).
    """

    def __init__(self, depths: tuple[int, ...], *, drop_path: float = 0.0, output_stride: int = 32) -> None:
        block: Any = timm_resnet.Bottleneck
        super().__init__(
            block,
            depths,
            num_classes=0,
            norm_layer=BatchNorm,
            drop_path_rate=drop_path,
            output_stride=output_stride,
        )
        self.width, self.patch = self.num_features, output_stride

    def dilated(self, output_stride: int = 8) -> "ResNet":
        """Return this network with dilations in place of strides, so that a cell has `output_stride` pixels.

        The result is in evaluation mode and shares its weights with this network.
        """
        depths = tuple(len(getattr(self, f"layer{stage}")) for stage in (1, 2, 3, 4))
        with torch.device("meta"):
            network = ResNet(depths, output_stride=output_stride)
        network.load_state_dict(self.state_dict(), assign=True)
        return network.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """f32 (B, 3, H, W) -> (B, N, D), cells row by row."""
        stem: Any = self.conv1
        return self.forward_features(pixels.to(stem.weight.dtype)).flatten(2).mT


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of (B, D) or (B, D, H, W) with statistics over all ranks, on any device, with exact gradients.

    Each layer gathers two vectors in the forward and in the backward pass; with one process it gathers none. Parameters
    and buffers have the names of nn.BatchNorm2d.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(self.momentum > 0)
        if not self.training or world_size() == 1:
            statistics = self.running_mean, self.running_var
            return F.batch_norm(input, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        axes = [0, *range(2, input.ndim)]
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        each = gather(torch.stack(torch.var_mean(x, axes, correction=0))[None])  # (ranks, variance and mean, D)
        mean = each[:, 1].mean(0)
        var = each[:, 0].mean(0) + (each[:, 1] - mean).square().mean(0)
        with torch.no_grad():
            count = input.numel() // input.shape[1] * world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / max(count - 1, 1)), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shape = (-1, *(1,) * (input.ndim - 2))
        return ((x - mean.reshape(shape)) * scale.reshape(shape) + self.bias.reshape(shape)).to(input.dtype)
