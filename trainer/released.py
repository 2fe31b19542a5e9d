"""Convert released weights to a checkpoint: ``python -m trainer.released FILE OUT --method loca|vicregl``.

    loca      a checkpoint of google-research/scenic's projects/loca (flax's msgpack), student and teacher
    vicregl   a .pth of facebookresearch/VICRegL: a backbone alone, or a full checkpoint

OUT is one file. `python -m trainer.evaluate OUT` and `python -m trainer.export OUT` read it, and `run.py --init OUT`
starts from it. Nothing in FILE is executed: msgpack is data, and torch may load tensors only.

Sizes are inferred from the weights. Every weight must be present with its shape, and no other weight may be. Only a
head may be missing altogether, or have decayed to 0 (as the projector of a released LOCA has). Such a head is
initialised at random, from seed 0, and named in the output. The optimizer's state is not converted.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import torch
import yaml
from torch import Tensor

from pipeline import recipes
from trainer import checkpoint, methods
from trainer.backbones import CONVNEXT_SIZES, VIT_SIZES
from trainer.command import command

# Our modules -> flax's. Names joined by | are separate modules in flax and stacked in ours.
FLAX = (
    (r"backbone\.patch_embed\.proj", "ToTokenSequence_0/embedding"),
    (r"backbone\.blocks\.(\d+)\.norm1", r"encoderblock_\1/LayerNorm_0"),
    (r"backbone\.blocks\.(\d+)\.attn\.qkv", r"encoderblock_\1/MultiHeadDotProductAttention_0/query|key|value"),
    (r"backbone\.blocks\.(\d+)\.attn\.proj", r"encoderblock_\1/MultiHeadDotProductAttention_0/out"),
    (r"backbone\.blocks\.(\d+)\.norm2", r"encoderblock_\1/LayerNorm_1"),
    (r"backbone\.blocks\.(\d+)\.mlp\.fc1", r"encoderblock_\1/MlpBlock_0/Dense_0"),
    (r"backbone\.blocks\.(\d+)\.mlp\.fc2", r"encoderblock_\1/MlpBlock_0/Dense_1"),
    (r"backbone\.norm", "encoder_norm"),
    (r"cross\.norm_query", "cross_attention_block/LayerNorm_0"),
    (r"cross\.norm_reference", "cross_attention_block/LayerNorm_1"),
    (r"cross\.attn\.q", "cross_attention_block/MultiHeadDotProductAttention_0/query"),
    (r"cross\.attn\.kv", "cross_attention_block/MultiHeadDotProductAttention_0/key|value"),
    (r"cross\.attn\.proj", "cross_attention_block/MultiHeadDotProductAttention_0/out"),
    (r"cross\.norm_mlp", "cross_attention_block/LayerNorm_2"),
    (r"cross\.mlp\.fc1", "cross_attention_block/MlpBlock_0/Dense_0"),
    (r"cross\.mlp\.fc2", "cross_attention_block/MlpBlock_0/Dense_1"),
    (r"norm", "final_norm"),
    (r"head\.0", "position_predictor"),
    (r"clusters\.projector\.0", "projection_head_for_clustering_prediction/Dense_0"),
    (r"clusters\.projector\.2", "projection_head_for_clustering_prediction/Dense_1"),
    (r"clusters\.projector\.4", "projection_head_for_clustering_prediction/Dense_2"),
    (r"clusters\.prototypes", "projection_head_for_clustering_prediction/prototypes"),
)
# The published files are older than the published code: their trees and some modules have other names.
TREES = {"params": "student", "ema_params": "teacher", "student_weights": "student", "teacher_weights": "teacher"}
OLDER = {
    "encoder_norm": "final_encoder_norm",
    "cross_attention_block": "localizer_block_0",
    "position_predictor": "pos_predictor",
    "projection_head_for_clustering_prediction": "output_projection",
}
# Our modules -> those of VICRegL's ConvNeXt. VICRegL's ResNet has timm's names.
CONVNEXT = (
    (r"stem\.(\d)", r"downsample_layers.0.\1"),
    (r"stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2"),
    (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw", r"stages.\1.\2.dwconv"),
    (r"stages\.(\d)\.blocks\.(\d+)\.norm", r"stages.\1.\2.norm"),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc(\d)", r"stages.\1.\2.pwconv\3"),
    (r"head\.norm", "norm"),
)
VICREGL_HEADS = {"expander": "projector", "projector": "maps_projector"}
LARS_RULE, LARS_MODULES = "exclude_bias_and_norm", ("optimizers", "__main__")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

Weights = dict[str, Tensor]


class Place(NamedTuple):
    """The location of one of our weights in a released file."""

    keys: list[str]  # of its parts, which are stacked along the first axis
    shape: tuple[int, ...]  # of each part, in the file
    ours: Callable[[Tensor], Tensor]  # converts a part to our layout


# ---- Reading the file ------------------------------------------------------------------------------------------------


def flax_weights(path: Path) -> Weights:
    """Read the weights in a flax checkpoint, by tree and path: ``params/encoder_norm/scale``. Raises ValueError.

    The rest of the training state, such as the optimizer's moments, which are twice as large, is skipped.
    """
    found: Weights = {}
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(file, ext_hook=_array, max_buffer_size=0, max_array_len=64, max_map_len=10**5)
        try:
            for _ in range(unpacker.read_map_header()):
                if (name := unpacker.unpack()) in TREES:
                    found |= _flat(unpacker.unpack(), name)
                else:
                    unpacker.skip()
        except (msgpack.UnpackException, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"not a readable flax checkpoint ({type(error).__name__}: {error})") from None
    if not found:
        raise ValueError(f"a flax checkpoint without weights: it has none of {', '.join(TREES)}")
    return found


def _array(code: int, data: bytes) -> Tensor:
    """Decode flax's extension types 1 and 3: an array or a scalar, as (shape, type, bytes in row-major order)."""
    if code not in (1, 3):
        raise ValueError(f"extension type {code} is no array")
    shape, name, content = msgpack.unpackb(data)
    if name not in DTYPES:
        raise ValueError(f"an array of type {name} is no weight")
    return torch.frombuffer(bytearray(content), dtype=DTYPES[name]).reshape(shape)


def _flat(tree: dict[str, Any], prefix: str) -> Weights:
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix} is no tree of arrays")
    if "__msgpack_chunked_array__" in tree:  # an array above flax's limit of a gibibyte
        shape, chunks = ([tree[name][str(i)] for i in range(len(tree[name]))] for name in ("shape", "chunks"))
        return {prefix: torch.cat(chunks).reshape(shape)}
    flat: Weights = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}"
        if not isinstance(value, dict | Tensor):
            raise ValueError(f"{path} is no array")
        flat |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return flat


def torch_weights(path: Path) -> Weights:
    """Read the weights in a .pth: a state dict, or one under ``model``. Raises ValueError."""
    try:
        with torch.serialization.safe_globals([(_nothing, f"{module}.{LARS_RULE}") for module in LARS_MODULES]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for a file of another format
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it refers to {code[1]}, which is code" if code else type(error).__name__
        raise ValueError(f"not a readable file of tensors ({reason})") from None
    found = found.get("model", found) if isinstance(found, dict) else found
    named = isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    if not named:
        raise ValueError("holds something other than named weights")
    return found


def _nothing(*_: Any) -> None:
    """Placeholder for the function that the optimizer state of a full ResNet-50 checkpoint refers to; never called."""


# ---- Locating our weights in the file --------------------------------------------------------------------------------


def flax_place(name: str, weight: Tensor, heads: int) -> Place:
    """Locate our weight `name` in a flax tree.

    In flax, kernels are transposed and convolutions are HWIO. Weights of q, k, v and o have an extra axis of heads, and
    so have the biases of q, k and v.
    """
    module, _, leaf = name.rpartition(".")
    if leaf == "pos_embed":
        side = isqrt(weight.shape[1])
        shape: tuple[int, ...] = (1, side, side, weight.shape[2])
        return Place(["ToTokenSequence_0/posembed_input"], shape, lambda x: x.reshape(weight.shape))
    folder, slash, last = _renamed(module, FLAX).rpartition("/")
    parts = last.split("|")
    leaf = {"bias": "bias", "weight": "scale" if weight.ndim == 1 else "kernel"}[leaf]
    keys = [f"{folder}{slash}{part}/{leaf}" for part in parts]
    if weight.ndim == 4:
        return Place(keys, tuple(weight.permute(2, 3, 1, 0).shape), lambda x: x.permute(3, 2, 0, 1))
    rows, *columns = weight.shape[0] // len(parts), *weight.shape[1:]
    shape = (*columns, rows)
    if parts[0] in ("query", "key"):
        shape = (*columns, heads, rows // heads)
    elif parts[0] == "out" and columns:
        shape = (heads, columns[0] // heads, rows)
    return Place(keys, shape, lambda x: x.reshape(*columns, rows).T if columns else x.reshape(rows))


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in table:
        if match := re.fullmatch(ours, name):
            return match.expand(theirs)
    return name


def loca(found: Weights) -> tuple[dict[str, Any], Callable[[str, Tensor], Place]]:
    """Return the settings that follow from the weights' sizes, and a function that locates our weights in the file.

    Raises KeyError if a weight that determines a size is missing.
    """
    trees = {TREES[key]: key for key in (key.partition("/")[0] for key in found)}
    trees = {branch: trees.get(branch) or next(iter(trees.values())) for branch in ("student", "teacher")}
    tree = trees["student"]
    older = f"{tree}/final_encoder_norm/scale" in found

    def where(key: str) -> str:
        top, slash, rest = key.partition("/")
        return (OLDER.get(top, top) if older else top) + slash + rest

    embedding = found[f"{tree}/ToTokenSequence_0/embedding/kernel"].shape
    patch, width = embedding[0], embedding[3]
    query = found[f"{tree}/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"]
    blocks = len({key.split("/")[1] for key in found if key.startswith(f"{tree}/encoderblock_")})
    shape = (width, blocks, query.shape[1])
    size = next((name for name, known in VIT_SIZES.items() if known == shape), None)
    if size is None:
        raise ValueError(f"no known ViT has width, blocks and heads {shape}, only {', '.join(VIT_SIZES)} are known")
    settings = {
        "backbone": f"vit_{size}_patch{patch}",
        "views": recipes.Loca(size=patch * found[f"{tree}/ToTokenSequence_0/posembed_input"].shape[1]),
    }
    projector = f"{tree}/{where('projection_head_for_clustering_prediction')}"
    if (kernel := found.get(f"{projector}/prototypes/kernel")) is not None:
        settings |= {"prototypes": kernel.shape[1], "hidden": found[f"{projector}/Dense_0/kernel"].shape[1]}

    def place(name: str, weight: Tensor) -> Place:
        branch, _, name = name.partition(".")
        there = flax_place(name, weight, query.shape[1])
        return there._replace(keys=[f"{trees[branch]}/{where(key)}" for key in there.keys])

    return settings, place


def vicregl(found: Weights) -> tuple[dict[str, Any], Callable[[str, Tensor], Place]]:
    """Return settings and a function that locates our weights, like `loca`. Drops online classifiers from `found`."""
    start = "module." if all(key.startswith("module.") for key in found) else ""
    for key in [key for key in found if key.startswith((f"{start}classifier.", f"{start}maps_classifier."))]:
        del found[key]
    full = any(key.startswith(f"{start}backbone.") for key in found)
    encoder = f"{start}backbone." if full else start
    if f"{encoder}layer1.0.conv1.weight" in found:
        settings: dict[str, Any] = {"backbone": "resnet50", "drop_path": 0.0, "views": recipes.VICRegLResNet50()}
    else:
        shape = len({key for key in found if re.fullmatch(rf"{re.escape(encoder)}stages\.2\.\d+\.norm\.weight", key)})
        width = found[f"{encoder}downsample_layers.0.0.weight"].shape[0]
        known = {(depths[2], widths[0]): name for name, (depths, widths) in CONVNEXT_SIZES.items()}
        if (shape, width) not in known:
            raise ValueError(f"no known ConvNeXt has a width of {width} and {shape} blocks in its third stage")
        settings = {"backbone": f"convnext_{known[shape, width]}"}
    for ours, theirs in VICREGL_HEADS.items():
        widths = [found.get(f"{start}{theirs}.{i}.weight") for i in (0, 3, 6)]
        if all(weight is not None for weight in widths):
            settings[ours] = tuple(weight.shape[0] for weight in widths)  # type: ignore[union-attr]

    def place(name: str, weight: Tensor) -> Place:
        module, _, rest = name.partition(".")
        key = encoder + rest if module == "encoder" else f"{start}{VICREGL_HEADS[module]}.{rest}"
        if module == "encoder" and settings["backbone"] != "resnet50":
            layer, dot, leaf = rest.rpartition(".")
            key = f"{encoder}{_renamed(layer, CONVNEXT)}{dot}{leaf}"
        return Place([key], tuple(weight.shape), lambda x: x)

    return settings, place


def convert(path: Path, method_name: str, backbone_only: bool) -> tuple[checkpoint.Payload, str]:
    """Convert the released file `path` to a checkpoint; also return a summary of it. Raises ValueError, OSError.

    The error names the first weight that is missing, has another shape, or is unknown.
    """
    found = flax_weights(path) if method_name == "loca" else torch_weights(path)
    try:
        settings, place = {"loca": loca, "vicregl": vicregl}[method_name](found)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing: the size of the network cannot be read without it") from None
    except IndexError:
        raise ValueError(
            f"the weights that give the size of the network have other axes than those of {method_name}"
        ) from None
    module = methods.load(method_name)
    cfg = module.Config(**settings)
    torch.manual_seed(0)
    try:
        method = module.Method(cfg)
    except RuntimeError as error:  # raised by torch's allocator
        raise ValueError(f"its sizes ask for too large a network ({error})") from None
    ours = method.state_dict()
    parts: dict[str, list[str]] = {}  # names by part, "backbone", "clusters"...; LOCA's student and teacher together
    for name in ours:
        parts.setdefault(re.sub(r"^(student|teacher)\.", "", name).partition(".")[0], []).append(name)
    backbone = next(iter(parts))
    used: set[str] = set()
    fresh = []
    for part, names in parts.items():
        places = {name: place(name, ours[name]) for name in names}
        keys = [key for there in places.values() for key in there.keys]
        if part != backbone and (backbone_only or not found.keys() & keys):
            fresh.append(part)
            continue
        for there in places.values():
            for key in there.keys:
                if key not in found:
                    raise ValueError(f"{key} is missing: shape {there.shape} was expected")
                if found[key].shape != there.shape:
                    raise ValueError(f"{key} has shape {tuple(found[key].shape)}: {there.shape} was expected")
        used.update(keys)
        largest: dict[str, float] = {}  # largest absolute weight, for student and teacher separately
        for name, there in places.items():
            branch = name.partition(".")[0]
            largest[branch] = max(largest.get(branch, 0.0), *(found[key].abs().max().item() for key in there.keys))
        if part != backbone and min(largest.values()) < 1e-12:
            fresh.append(part)
            continue
        for name, there in places.items():
            weights = [there.ours(found[key]) for key in there.keys]
            ours[name] = torch.cat(weights) if len(weights) > 1 else weights[0]
    for extra, value in () if backbone_only else found.items():
        if extra not in used:
            raise ValueError(
                f"{extra} of shape {tuple(value.shape)} has no place here; --backbone-only takes the backbone alone"
            )
    method.load_state_dict(ours)
    summary = f"{cfg.backbone}: {', '.join(part for part in parts if part not in fresh)}"
    if fresh:
        summary += f"; initialised at random: {', '.join(fresh)}"
    text = yaml.safe_dump({"method": method_name, method_name: asdict(cfg)})
    return {"step": 0, "method": method_name, "config": text, "model": method.state_dict()}, summary


@command("trainer.released")
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="trainer.released", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="released weights")
    parser.add_argument("out", type=Path, help="the checkpoint to write")
    parser.add_argument("--method", required=True, choices=("loca", "vicregl"), help="method of the weights")
    parser.add_argument("--backbone-only", action="store_true", help="convert the backbone, and ignore other weights")
    args = parser.parse_args(argv)
    try:
        payload, summary = convert(args.file, args.method, args.backbone_only)
    except ValueError as error:
        raise ValueError(f"{args.file}: {error}") from None
    checkpoint.write(args.out, payload)
    print(f"{args.out}: {summary}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
