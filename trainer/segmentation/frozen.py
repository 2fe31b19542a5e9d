"""A frozen backbone, loaded from a run, a checkpoint, timm's hub, or a released file."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer import checkpoint, released
from trainer.backbones import ResNet, feature_map, normalise, timm_backbone
from trainer.method import Method


class Frozen(NamedTuple):
    """A backbone in evaluation mode, the normalisation of its images, and the layers to use."""

    backbone: nn.Module
    mean: tuple[float, ...]  # in the unit range
    std: tuple[float, ...]
    layers: tuple[int, ...] = (-1,)
    norm: bool = True

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """u8 (B, H, W, 3) -> f32 (B, D, rows, columns)."""
        x = normalise(pixels[:, None], self.mean, self.std)
        return feature_map(self.backbone, x, self.layers, norm=self.norm)


def load(what: str, *, untrained: int | None = None, size: int | None = None) -> Frozen:
    """Load the backbone `what`: a run's folder, a checkpoint, ``timm:NAME`` or ``released:FILE``.

    A method with an EMA teacher yields the teacher's. A ResNet gets output stride 8. If the seed `untrained` is given,
    the weights are random. If `size` is given, a ViT's position grid is resized once to images of that side. Raises
    ValueError that says what is wrong with `what`.
    """
    kind, _, rest = what.partition(":")
    if kind == "timm":
        backbone: Any = _from_timm(rest, untrained, size)
        return Frozen(backbone, backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"])
    method: Any = trained(what)
    if untrained is not None:
        torch.manual_seed(untrained)
        method = type(method)(method.cfg)
    backbone = method.backbone().eval().requires_grad_(False)
    if size and hasattr(backbone, "set_input_size"):
        backbone.set_input_size(size)
    return Frozen(backbone.dilated() if isinstance(backbone, ResNet) else backbone, method.mean, method.std)


def trained(what: str) -> Method:
    """Load the method of a run's folder, of a checkpoint or of ``released:FILE``. Raises ValueError."""
    kind, _, rest = what.partition(":")
    return checkpoint.restore(_released(Path(rest)) if kind == "released" else checkpoint.load(Path(what)))


def _from_timm(name: str, untrained: int | None, size: int | None) -> nn.Module:
    if untrained is not None:
        torch.manual_seed(untrained)
        return timm_backbone(name, pretrained=False, size=size)
    try:
        return timm_backbone(name, pretrained=True, size=size)
    except (OSError, RuntimeError) as error:  # OSError from the hub, RuntimeError from timm for absent weights
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"timm:{name}: no pretrained weights ({reason}): name another, or say --untrained SEED for random ones"
        ) from None


def _released(path: Path) -> checkpoint.Payload:
    """Convert a released file. VICRegL's are files of torch (zip archives or pickles); LOCA's are not."""
    try:
        with path.open("rb") as file:
            torchs = file.read(2) in (b"PK", b"\x80\x02")
        return released.convert(path, "vicregl" if torchs else "loca", True)[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"released:{path}: {error}") from None
