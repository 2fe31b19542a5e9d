"""The segmentation program on real shards: features computed once, figures, pictures, and rejected input."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import NAMES, pair, write_pairs

from trainer import checkpoint, segment
from trainer.methods import loca
from trainer.segmentation import features, frozen, probes
from trainer.segmentation.features import extract
from trainer.segmentation.frozen import Frozen
from trainer.segmentation.labelled import VOID, Labelled, class_names
from trainer.segmentation.metric import evaluate


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """20 and 6 pairs, half of them upright."""
    folder = tmp_path_factory.mktemp("pairs")
    sizes = [(48, 64), (64, 48)]
    train, val = ([pair(seed, *sizes[seed % 2]) for seed in range(*part)] for part in ((0, 20), (50, 56)))
    return write_pairs(folder / "train", train), write_pairs(folder / "val", val)


def run(capsys: pytest.CaptureFixture[str], what: str, sets: tuple[str, str], *more: str) -> dict[str, Any]:
    argv = [what, "--train", sets[0], "--val", sets[1], "--size", "48", "--device", "cpu", *more]
    assert segment.main(argv) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_program(
    sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["timm:test_vit", sets, "--untrained", "0", "--out", str(tmp_path)]
    found = run(capsys, *argv)  # type: ignore[arg-type]
    assert found["images"] == 6 and found["train_images"] == 20 and found["patches"] == [[3, 3], [4, 4]]
    assert found["floors"].keys() == {"constant", "prior", "colour_position"}
    assert found["floors"]["constant"] < found["floors"]["prior"] < found["floors"]["colour_position"]
    assert found["floors"]["prior"] < found["logistic"]["miou"] < found["ceiling"] < 100
    assert found["floors"]["constant"] < found["knn"]["miou"]
    for probe in ("knn", "logistic"):
        assert list(found[probe]["per_class"]) == NAMES
        assert found[probe]["miou"] == pytest.approx(np.mean(list(found[probe]["per_class"].values())))
    assert json.loads((tmp_path / "untrained_0.json").read_text()) == found
    pictures = [Image.open(path) for path in sorted((tmp_path / "untrained_0").glob("*.png"))]
    assert len(pictures) == 6 and {picture.size[0] for picture in pictures} == {4 * 48, 4 * 64}

    monkeypatch.setattr(features, "class_shares", None)  # features are there: none is computed again
    assert run(capsys, *argv) == found  # type: ignore[arg-type]


def test_a_runs_backbone_and_the_same_one_untrained(tmp_path: Path) -> None:
    cfg = loca.Config("vit_nano_patch16", hidden=8, prototypes=4)
    torch.manual_seed(5)
    method = loca.Method(cfg)
    with torch.no_grad():
        method.teacher.backbone.pos_embed.add_(1)  # the teacher is what counts
    saved = {"step": 1, "method": "loca", "config": f"loca: {json.dumps(asdict(cfg))}", "model": method.state_dict()}
    checkpoint.save(tmp_path / "checkpoints", saved, keep_last=1, keep_every=None)
    trained = frozen.load(str(tmp_path))
    assert torch.equal(trained.backbone.pos_embed, method.teacher.backbone.pos_embed)
    assert (trained.mean, trained.std) == (method.mean, method.std) and not trained.backbone.training
    start = frozen.load(str(tmp_path), untrained=5).backbone.pos_embed
    torch.testing.assert_close(start, method.teacher.backbone.pos_embed - 1)
    assert not torch.equal(frozen.load(str(tmp_path), untrained=6).backbone.pos_embed, start)


def network(seed: int = 0) -> Frozen:
    return frozen.load("timm:test_vit", untrained=seed)


def test_features_are_the_backbones_of_each_image(sets: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images of two sizes, whatever the batches, in the order of the set."""
    data, net = Labelled(sets[1]), network()
    found = extract(net, data, 3, short_side=32)
    monkeypatch.setattr(features, "PIXELS", 1)
    for a, b in zip(found[:3], extract(net, data, 3, short_side=32)[:3], strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
    for i, (rows, columns) in enumerate([(2, 3), (3, 2)] * 3):
        picture = np.asarray(data.image(i).resize((columns * 16, rows * 16), Image.Resampling.BICUBIC))
        assert found.grids[i].tolist() == [rows, columns]
        x = (torch.from_numpy(picture / 255.0).float() - torch.tensor(net.mean)) / torch.tensor(net.std)
        tokens = net.backbone.forward_features(x.permute(2, 0, 1)[None])[0, net.backbone.num_prefix_tokens :]
        torch.testing.assert_close(found.x[found.rows(i)].float(), tokens.detach(), atol=5e-3, rtol=2e-3)
        cell = picture[:16, 16:32] / 255.0  # the first row's second
        colour = torch.tensor([*cell.mean((0, 1)), *cell.std((0, 1))])
        torch.testing.assert_close(found.colour[found.rows(i)][1].double(), colour, atol=1e-3, rtol=1e-3)
    some = extract(net, data, 3, short_side=32, images=np.array([4, 1]))
    torch.testing.assert_close(some.x[some.rows(0)], found.x[found.rows(4)], atol=2e-3, rtol=1e-3)


def test_an_interrupted_extraction_goes_on(
    sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, net = Labelled(sets[0]), network()
    expected = extract(net, data, 3, short_side=48)
    monkeypatch.setattr(features, "PIXELS", 2 * 48 * 64)  # an image or two at a time
    read = Labelled.image
    seen: list[int] = []

    def dying(self: Labelled, i: int) -> Image.Image:
        seen.append(i)
        if len(seen) > 13:
            raise KeyboardInterrupt
        return read(self, i)

    monkeypatch.setattr(Labelled, "image", dying)
    with pytest.raises(KeyboardInterrupt):
        extract(net, data, 3, short_side=48, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    done = int(np.load(folder / "filled.npy")[0])
    assert 0 < done < 13
    seen.clear()
    monkeypatch.setattr(Labelled, "image", lambda self, i: seen.append(i) or read(self, i))
    found = extract(net, data, 3, short_side=48, cache=tmp_path)
    assert len(seen) == 20 - done
    for a, b in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
    for other, side in ((network(1), 48), (net._replace(norm=False), 48), (net, 32)):
        extract(other, data, 3, short_side=side, images=np.arange(2), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_classes_without_a_list_are_counted(tmp_path: Path) -> None:
    data = Labelled(write_pairs(tmp_path / "a", [pair(0)], None))
    assert class_names(data) == ["0", "1", "2"]
    listed = Labelled(write_pairs(tmp_path / "b", [pair(0)], [*NAMES, "nowhere"]))
    assert class_names(listed) == [*NAMES, "nowhere"]
    with pytest.raises(ValueError, match=r"different classes: .* the same classes.txt, or none"):
        class_names(data, listed)
    (tmp_path / "b" / "classes.txt").write_text("a\nb\na\n")
    with pytest.raises(ValueError, match=r"classes.txt names 'a' twice"):
        class_names(Labelled(listed.name))
    (tmp_path / "b" / "classes.txt").write_bytes(b"stra\xdfe\n")
    with pytest.raises(ValueError, match=r"classes.txt: is no text in UTF-8"):
        Labelled(listed.name)


PICTURE, MASK = pair(0)


@pytest.mark.parametrize(
    ("what", "train", "reason"),
    [
        ("timm:test_vit", [(PICTURE, MASK), (PICTURE, None)], "street/001 has no mask"),
        ("timm:test_vit", [(PICTURE, MASK), (PICTURE, MASK + 1)], "street/001 .*class 3.*lists 3"),
        ("timm:test_vit", [(PICTURE, PICTURE)], "street/000 .*its mask has colours"),
        ("timm:test_vit", [(PICTURE, MASK.T)], r"street/000 is of size \(48, 64\), its mask \(64, 48\)"),
        ("timm:test_vit", [(b"no image", MASK)], "street/000 cannot be read"),
        ("timm:test_vit", [(PICTURE, MASK)], "one training image is too few"),
        ("timm:test_vit", [(PICTURE, np.full_like(MASK, VOID))] * 2, "no labelled pixel"),
        ("timm:nothing", [(PICTURE, MASK)] * 2, "no model 'nothing'"),
        ("nowhere", [(PICTURE, MASK)] * 2, "nowhere: not a readable checkpoint .there is no such file"),
        ("released:nowhere", [(PICTURE, MASK)] * 2, "released:nowhere: .*No such file"),
    ],
)
def test_what_cannot_be_used_is_named_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, train: list[Any], reason: str, sets: tuple[str, str]
) -> None:
    spec = write_pairs(tmp_path / "train", train)
    argv = [what, "--train", spec, "--val", sets[1], "--untrained", "0", "--device", "cpu", "--out", str(tmp_path)]
    assert segment.main(argv) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("trainer.segment: ")
    assert re.search(reason, message), message


@pytest.mark.parametrize(
    "option", ["--size 0", "--memory 0", "--layers 9", "--untrained -1", "--device nowhere", "--seed 1"]
)
def test_options_that_cannot_be_meant(
    option: str, sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["timm:test_vit", "--train", sets[0], "--val", sets[1], "--untrained", "0", "--out", str(tmp_path)]
    assert segment.main([*argv, *option.split()]) == 2
    assert option.split(maxsplit=1)[0].strip("-") in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(ValueError, match=r"timm:test_vit.*couldn't connect.*--untrained"):
        frozen.load("timm:test_vit")


def test_weights_that_diverged_are_named(sets: tuple[str, str]) -> None:
    net = network()
    with torch.no_grad():
        net.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        extract(net, Labelled(sets[1]), 3, short_side=32)


def test_scores_of_the_training_images_are_said_to_be_meaningless(
    sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["timm:test_vit", "--untrained", "0", "--train", sets[0], "--val", sets[0], "--size", "48"]
    assert segment.main([*argv, "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "trainer.segment: --train and --val are the same images: the scores are meaningless" in printed.err


@pytest.mark.slow
@pytest.mark.skipif(
    "CAMVID" not in os.environ, reason="CAMVID is to name shards of its training and test images, 'A B'"
)
def test_floors_and_ceilings_of_camvid() -> None:
    """As an independent program found them: 17.0 and 2.4, and 84.7, 75.2 and 63.5 at 480 x 352."""
    train, test = (Labelled(spec) for spec in os.environ["CAMVID"].split())
    prior = probes.prior(train, 11)
    predictors = {"prior": lambda j: prior, "constant": lambda j: prior.sum((1, 2), keepdim=True)}
    found = evaluate(test, np.arange(len(test)), predictors, 11)
    assert 100 * found["prior"].miou == pytest.approx(17.0, abs=0.1)
    assert 100 * found["prior"].pixel_accuracy == pytest.approx(61.5, abs=0.1)
    assert 100 * found["constant"].miou == pytest.approx(2.4, abs=0.1)
