"""Exported weights: timm loads them and computes the same features."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from pipeline import recipes
from trainer import checkpoint, export
from trainer.backbones import ConvNeXt, convnet, vit
from trainer.methods import loca, vicregl

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("name", ["vit_nano_patch16", "vit_small_patch16", "vit_tiny_patch8"])
def test_a_vit_computes_the_same_in_timm(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    ours = vit(name, size=64).eval()
    export.export(ours, tmp_path, MEAN, STD)
    images = torch.randn(2, 3, 64, 64)
    for theirs in (from_file(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()):
        with torch.no_grad():
            torch.testing.assert_close(theirs.forward_features(images), ours(images), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_pytorchs_own_exporters_take_what_timm_loads(tmp_path: Path) -> None:
    """As docs/training.md has it: torch.export, and ONNX where its packages are installed."""
    torch.manual_seed(0)
    export.export(vit("vit_pico_patch8", size=32), tmp_path, MEAN, STD)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model(image)
    torch.export.save(torch.export.export(model, (image,)), tmp_path / "backbone.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "backbone.pt2").module()(image), wanted)
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    torch.onnx.export(model, (image,), tmp_path / "backbone.onnx", dynamo=True, verbose=False)
    graph = onnx.load(tmp_path / "backbone.onnx")
    found = onnx.reference.ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: image.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=0)


def test_a_resnet_computes_the_same_in_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = convnet("resnet50").eval()
    export.export(ours, tmp_path, MEAN, STD)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = from_file(tmp_path).forward_features(images)
        torch.testing.assert_close(maps.flatten(2).mT, ours(images), atol=1e-6, rtol=0)


def test_a_convnext_computes_the_same_in_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = convnet("convnext_tiny").eval()
    assert isinstance(ours, ConvNeXt)
    export.export(ours, tmp_path, MEAN, STD)
    images = torch.randn(1, 3, 64, 64)
    theirs = from_file(tmp_path)
    with torch.no_grad():
        maps = theirs.head.norm(theirs.forward_features(images))  # the norm on every cell, as it was trained
        torch.testing.assert_close(maps.flatten(2).mT, ours(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"])
def test_the_large_ones_have_timms_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours = vit(name)
        architecture, arguments = export.architecture(ours)
        theirs = timm.create_model(architecture, num_classes=0, **arguments)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert shapes == {key: value.shape for key, value in ours.state_dict().items()}


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "xlarge"])
def test_every_convnext_is_recognised(size: str) -> None:
    with torch.device("meta"):
        assert export.architecture(convnet(f"convnext_{size}"))[0] == f"convnext_{size}"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, loca.Method]:
    """A checkpoint whose teacher and student differ."""
    torch.manual_seed(0)
    cfg = loca.Config(backbone="vit_nano_patch16", prototypes=8, hidden=16)
    method = loca.Method(cfg)
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(0.1)
    payload = {
        "step": 5,
        "method": "loca",
        "config": yaml.safe_dump({"loca": asdict(cfg)}),
        "model": method.state_dict(),
    }
    checkpoint.save(tmp_path / "run" / "checkpoints", payload, keep_last=1, keep_every=None)
    return tmp_path, method


def test_the_teacher_is_exported_unless_the_student_is_asked_for(saved: tuple[Path, loca.Method]) -> None:
    folder, method = saved
    assert method.teacher is not None
    assert export.main([str(folder / "run"), str(folder / "t")]) == 0
    assert export.main([str(folder / "run" / "checkpoints" / "last"), str(folder / "s"), "--student"]) == 0
    for out, branch in (("t", method.teacher), ("s", method.student)):
        weights = load_file(folder / out / "model.safetensors")
        assert torch.equal(weights["norm.weight"], branch.backbone.norm.weight)


def test_a_vicregl_run_is_exported(tmp_path: Path) -> None:
    cfg = vicregl.Config(
        "vit_nano_patch16",
        views=recipes.VICRegL(size=32, small=0, gamma=None),
        feature_gamma=None,
        expander=(8,),
        projector=(8,),
    )
    method = vicregl.Method(cfg)
    payload = {"step": 1, "method": "vicregl", "config": yaml.safe_dump({"vicregl": asdict(cfg)})}
    checkpoint.write(tmp_path / "run.pt", payload | {"model": method.state_dict()})
    assert export.main([str(tmp_path / "run.pt"), str(tmp_path / "out")]) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["norm.weight"], method.encoder.norm.weight)


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export.export(vit("vit_pico_patch16"), tmp_path, MEAN, STD)
    finally:
        os.umask(before)
    assert {(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {
        ("model.safetensors", 0o640),
        ("config.json", 0o640),
    }


def test_what_it_prints_can_be_pasted(
    saved: tuple[Path, loca.Method], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved
    scores = {"knn": 0.25, "untrained": {"knn": 0.125}}
    (folder / "run" / "evaluate.json").write_text(json.dumps(scores))
    (folder / "run" / "segment").mkdir()
    (folder / "run" / "segment" / "trained.json").write_text(json.dumps({"knn": {"miou": 29.6}}))
    assert export.main([str(folder / "run"), str(folder / "out")]) == 0
    line = capsys.readouterr().out.splitlines()[-1].strip()
    model = eval(line, {"timm": timm})
    card = (folder / "out" / "README.md").read_text()
    assert model.num_features == 128 and line in card
    assert "| classification, k-NN | 25.0 |" in card and "| classification, k-NN, random weights | 12.5 |" in card
    assert "| frozen segmentation (trained), knn, mIoU | 29.6 |" in card
    assert "# loca: vit_nano_patch16" in card and "prototypes: 8" in card and str(folder) not in card.replace(line, "")

    sent = {}
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, exist_ok: sent.update(name=name))
    monkeypatch.setattr(
        huggingface_hub, "upload_folder", lambda repo_id, folder_path: sent.update({repo_id: folder_path})
    )
    assert export.main([str(folder / "run"), str(folder / "out"), "--hub", "someone/small"]) == 0
    assert sent == {"name": "someone/small", "someone/small": folder / "out"}
    assert 'timm.create_model("hf-hub:someone/small", pretrained=True)' in (folder / "out" / "README.md").read_text()


def test_nobody_elses_readme_is_overwritten(
    saved: tuple[Path, loca.Method], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = saved
    (project := folder / "project").mkdir()
    (project / "README.md").write_text("mine")
    assert export.main([str(folder / "run"), str(project)]) == 2
    assert re.search(r"project: holds a README.md .* name another folder\n$", capsys.readouterr().err)
    assert [path.read_text() for path in project.iterdir()] == ["mine"]


def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "holds no readable checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def from_file(folder: Path) -> torch.nn.Module:
    config = json.loads((folder / "config.json").read_text())
    path = str(folder / "model.safetensors")
    return timm.create_model(config["architecture"], checkpoint_path=path, **config["model_args"]).eval()
