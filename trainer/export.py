"""Export a trained backbone for timm: ``python -m trainer.export CHECKPOINT OUT``.

It writes model.safetensors and config.json to OUT. Either of these calls loads them:

    timm.create_model("local-dir:OUT", pretrained=True)
    timm.create_model(config["architecture"], checkpoint_path="OUT/model.safetensors", **config["model_args"])

It also writes README.md, a model card. CHECKPOINT is a file, or a run's folder, whose scores then appear in the card.
The weights are those of the EMA teacher if the method has one; ``--student`` exports the student's. ``--hub USER/NAME``
also uploads OUT to the Hugging Face hub, for ``timm.create_model("hf-hub:USER/NAME", pretrained=True)``.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import torch as safetensors
from torch import nn

from pipeline import host
from trainer import checkpoint
from trainer.backbones import CONVNEXT_SIZES, VIT_SIZES, ConvNeXt, ResNet, VisionTransformer
from trainer.command import command
from trainer.config import load_yaml

# Our sizes -> the size in timm's architecture names. Differences from timm's architecture go into model_args.
VITS = {VIT_SIZES[size]: size for size in ("small", "base", "large", "huge")}
CONVNEXTS = {(depths[2], widths[3]): size for size, (depths, widths) in CONVNEXT_SIZES.items()}


def architecture(backbone: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return timm's architecture name for `backbone`, and the arguments that make timm's model equivalent to it.

    Raises ValueError if timm has no such model.
    """
    if isinstance(backbone, VisionTransformer):
        shape = (backbone.width, len(backbone.blocks), backbone.heads)
        size = VITS.get(shape, "tiny")
        name = "vit_huge_patch14_224" if size == "huge" else f"vit_{size}_patch16_224"
        arguments = {
            "img_size": backbone.grid * backbone.patch,
            "patch_size": backbone.patch,
            "class_token": bool(backbone.num_prefix_tokens),
            "no_embed_class": True,
            "global_pool": "avg",
            "fc_norm": False,
            "act_layer": "gelu_tanh",
        }
        if size == "tiny":
            arguments |= dict(zip(("embed_dim", "depth", "num_heads"), shape, strict=True))
        return name, arguments
    if isinstance(backbone, ConvNeXt):
        depth = len(backbone.stages[2].blocks)  # type: ignore[union-attr, arg-type]
        if (depth, backbone.width) in CONVNEXTS:
            return f"convnext_{CONVNEXTS[depth, backbone.width]}", {}
    if isinstance(backbone, ResNet) and sum(1 for m in backbone.modules() if isinstance(m, nn.Conv2d)) == 53:
        return "resnet50", {}
    raise ValueError(
        f"timm has no architecture for {type(backbone).__name__} of width {getattr(backbone, 'width', '?')}"
    )


def export(backbone: nn.Module, out: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Write the weights and the configuration to `out`.

    A ConvNeXt gets a layer scale of ones, which timm's model requires and VICRegL's lacks. Its last norm is applied to
    every cell here, but to the mean of the cells in timm: the weights are the same, the pooled features are not.
    Raises ValueError if that would overwrite files that are not from an earlier export.
    """
    name, arguments = architecture(backbone)
    others = [path.name for path in (out / "README.md", out / "config.json") if path.exists()]
    if others and not (out / "model.safetensors").exists():
        raise ValueError(f"{out}: holds a {others[0]} that is no export's, and would lose it; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in backbone.state_dict().items()}
    if isinstance(backbone, ConvNeXt):
        bias = ".mlp.fc2.bias"
        weights |= {key.replace(bias, ".gamma"): torch.ones_like(weights[key]) for key in weights if key.endswith(bias)}
    content = safetensors.save(weights, metadata={"format": "pt"})  # save_file would allow only the owner to read
    host.write_atomic(out / "model.safetensors", content)
    side = arguments.get("img_size", 224)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": backbone.width,
        "model_args": {**arguments, "num_classes": 0},
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "num_classes": 0,
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


CARD = """---
library_name: timm
tags: [image-feature-extraction, timm, self-supervised-learning]
---
# {method}: {backbone}

A backbone pretrained without labels by {method}, {steps:,} steps of {batch_size:,} images{of}, with dense-ssl.

```python
import timm

model = timm.create_model("{where}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model.forward_features(transform(image)[None])  # image: a PIL.Image
```
{scores}
## Settings

```yaml
{settings}```
"""


def card(payload: checkpoint.Payload, source: Path, where: str, *, student: bool) -> str:
    """Return the model card: method, data, settings, and the scores found in `source` if it is a run's folder."""
    name = payload["method"]
    settings = load_yaml(payload["config"])
    shards, kept = settings.get("shards"), {key: settings[key] for key in ("optim", name) if key in settings}
    found = _scores(source)
    rows = "".join(f"| {what} | {value:.1f} |\n" for what, value in found.items())
    return CARD.format(
        method=name,
        backbone=f"{settings[name].get('backbone', 'its default backbone')}{', the student' * student}",
        steps=payload["step"],
        batch_size=settings.get("batch_size", 0),
        of=f" of {Path(shards).name}" if shards else "",  # the name only: paths are private
        where=where,
        scores=f"\n## Scores, in percent\n\n| | |\n|---|---|\n{rows}" if rows else "",
        settings=yaml.safe_dump(kept, sort_keys=False),
    )


def _scores(run: Path) -> dict[str, float]:
    """Return the scores that `trainer.evaluate` and `trainer.segment` saved in a run's folder, in percent."""
    found = {}
    result = host.read_json(run / "evaluate.json") or {}
    for key, title in (("knn", "k-NN"), ("ridge", "linear probe"), ("ten_shot", "10-shot linear probe")):
        for scores, of in ((result, ""), (result.get("untrained", {}), ", random weights")):
            if key in scores:
                found[f"classification, {title}{of}"] = 100 * scores[key]
    for path in sorted(run.glob("segment/*.json")):
        result = host.read_json(path) or {}
        for key in ("knn", "logistic"):
            if key in result:
                found[f"frozen segmentation ({path.stem}), {key}, mIoU"] = result[key]["miou"]
    return found


@command("trainer.export")
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="trainer.export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's folder for its newest one")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--student", action="store_true", help="export the student's weights, not the teacher's")
    parser.add_argument("--hub", metavar="USER/NAME", help="also upload it to the Hugging Face hub, with your login")
    args = parser.parse_args(argv)
    payload = checkpoint.load(args.checkpoint)
    method = checkpoint.restore(payload)
    if args.student and getattr(method, "student", None) is None:
        raise ValueError("--student: this method has no teacher beside its student")
    backbone: Any = method.student.backbone if args.student else method.backbone()  # type: ignore[union-attr]
    export(backbone, args.out, method.mean, method.std)
    where = f"hf-hub:{args.hub}" if args.hub else f"local-dir:{args.out}"
    text = card(payload, args.checkpoint, where, student=args.student)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(f"{args.out}: {sum(p.numel() for p in backbone.parameters()):,} weights; to load them:")
    print(f'  timm.create_model("{where}", pretrained=True)')
    if args.hub:
        import huggingface_hub  # timm's own dependency

        huggingface_hub.create_repo(args.hub, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=args.hub, folder_path=args.out)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
