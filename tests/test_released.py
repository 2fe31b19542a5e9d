"""Released weights, imitated with their own names and layouts, give the same features here as in the released code."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trainer import checkpoint, evaluate, export, released
from trainer.segmentation import frozen

Array = NDArray[np.float32]
Tree = dict[str, Any]
WIDTH, HEADS, PATCH, GRID, HIDDEN, PROTOTYPES = 96, 4, 16, 3, 24, 10  # our vit_pico_patch16, of two blocks

# ---- flax: the format, the names, and the network, from their definitions --------------------------------------------


def loca_tree(seed: int) -> Tree:
    """One tree of LOCA's parameters as scenic's ViT4LOCA names them."""
    g = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 0.2, shift: float = 0.0) -> Array:
        return np.float32(shift + scale * g.standard_normal(shape))

    def dense(fan_in: int, fan_out: int) -> Tree:
        return {"kernel": normal(fan_in, fan_out, scale=fan_in**-0.5), "bias": normal(fan_out)}

    def norm() -> Tree:
        return {"scale": normal(WIDTH, shift=1.0), "bias": normal(WIDTH)}

    def attention() -> Tree:
        each = WIDTH // HEADS
        parts = {
            n: {"kernel": normal(WIDTH, HEADS, each, scale=0.1), "bias": normal(HEADS, each)}
            for n in ("query", "key", "value")
        }
        return parts | {"out": {"kernel": normal(HEADS, each, WIDTH, scale=0.1), "bias": normal(WIDTH)}}

    def block(norms: int) -> Tree:
        mlp = {"Dense_0": dense(WIDTH, 4 * WIDTH), "Dense_1": dense(4 * WIDTH, WIDTH)}
        named = {f"LayerNorm_{i}": norm() for i in range(norms)}
        return named | {"MultiHeadDotProductAttention_0": attention(), "MlpBlock_0": mlp}

    return {
        "ToTokenSequence_0": {
            "embedding": {"kernel": normal(PATCH, PATCH, 3, WIDTH, scale=0.03), "bias": normal(WIDTH)},
            "posembed_input": normal(1, GRID, GRID, WIDTH),
        },
        "encoderblock_0": block(2),
        "encoderblock_1": block(2),
        "encoder_norm": norm(),
        "projection_head_for_clustering_prediction": {
            "Dense_0": dense(WIDTH, HIDDEN),
            "Dense_1": dense(HIDDEN, HIDDEN),
            "Dense_2": dense(HIDDEN, 256),
            "prototypes": {"kernel": normal(256, PROTOTYPES)},
        },
        "cross_attention_block": block(3),
        "final_norm": norm(),
        "position_predictor": dense(WIDTH, GRID**2),
    }


def as_older(tree: Tree) -> Tree:
    """The names that the published files have."""
    names = {
        "encoder_norm": "final_encoder_norm",
        "cross_attention_block": "localizer_block_0",
        "position_predictor": "pos_predictor",
        "projection_head_for_clustering_prediction": "output_projection",
    }
    return {names.get(key, key): value for key, value in tree.items()}


def packed(tree: Tree, kind: str = "float32", chunked: str | None = None) -> bytes:
    """flax's msgpack: arrays are extension type 1, those above a limit a map of chunks."""

    def array(value: Array) -> msgpack.ExtType:
        content = (value.view(np.uint32) >> 16).astype(np.uint16) if kind == "bfloat16" else value
        return msgpack.ExtType(1, msgpack.packb((value.shape, kind, content.tobytes())))

    def leaf(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: leaf(k, v) for k, v in value.items()}
        if isinstance(value, np.ndarray) and key == chunked:
            parts = np.array_split(value.reshape(-1), 3)
            return {
                "__msgpack_chunked_array__": True,
                "shape": {str(i): n for i, n in enumerate(value.shape)},
                "chunks": {str(i): array(part) for i, part in enumerate(parts)},
            }
        return array(value) if isinstance(value, np.ndarray) else value

    return msgpack.packb(leaf("", tree))


def state(**trees: Tree) -> Tree:
    """A training state: the optimizer's moments and scalars stand around the weights."""
    scalar = msgpack.ExtType(3, msgpack.packb(((), "int32", np.int32(7).tobytes())))
    moments = {"0": {"count": scalar, "mu": {"w": np.ones(5, np.float32)}}, "1": {}}
    return {"opt_state": moments, **trees, "state": None, "global_step": 125_100, "rng": msgpack.ExtType(9, b"x")}


def layer_norm(p: Tree, x: Array) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(p: Tree, x: Array) -> Array:
    return x @ p["kernel"] + p["bias"]


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attend(p: Tree, x: Array, to: Array) -> Array:
    out = p["out"]["bias"] + np.zeros_like(x)
    for h in range(HEADS):
        q, k, v = (z @ p[n]["kernel"][:, h] + p[n]["bias"][h] for n, z in (("query", x), ("key", to), ("value", to)))
        scores = np.exp(q @ k.T / np.sqrt(WIDTH // HEADS))
        out += scores / scores.sum(1, keepdims=True) @ v @ p["out"]["kernel"][h]
    return out


def mlp(p: Tree, x: Array) -> Array:
    return dense(p["Dense_1"], gelu(dense(p["Dense_0"], x)))


def encode(p: Tree, image: Array) -> Array:
    """(S, S, 3) -> (N, D): a ViT without CLS token, pre-norm."""
    start, tokens = p["ToTokenSequence_0"], []
    for row in range(GRID):
        for column in range(GRID):
            patch = image[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            token = np.tensordot(patch, start["embedding"]["kernel"], 3) + start["embedding"]["bias"]
            tokens.append(token + start["posembed_input"][0, row, column])
    x = np.stack(tokens)
    for block in (p["encoderblock_0"], p["encoderblock_1"]):
        normed = layer_norm(block["LayerNorm_0"], x)
        x = x + attend(block["MultiHeadDotProductAttention_0"], normed, normed)
        x = x + mlp(block["MlpBlock_0"], layer_norm(block["LayerNorm_1"], x))
    return layer_norm(p["encoder_norm"], x)


def locate(p: Tree, query: Array, reference: Array) -> Array:
    """Position logits of query tokens that look at reference tokens."""
    block = p["cross_attention_block"]
    norms = (layer_norm(block[f"LayerNorm_{i}"], x) for i, x in enumerate((query, reference)))
    x = query + attend(block["MultiHeadDotProductAttention_0"], *norms)
    x = x + mlp(block["MlpBlock_0"], layer_norm(block["LayerNorm_2"], x))
    return dense(p["position_predictor"], layer_norm(p["final_norm"], x))


def cosines(p: Tree, x: Array) -> Array:
    """Of tokens and prototypes."""
    p = p["projection_head_for_clustering_prediction"]
    x = dense(p["Dense_2"], gelu(dense(p["Dense_1"], gelu(dense(p["Dense_0"], x)))))
    w = p["prototypes"]["kernel"]
    return x / np.linalg.norm(x, axis=-1, keepdims=True) @ (w / np.linalg.norm(w, axis=0))


# ---- LOCA ------------------------------------------------------------------------------------------------------------


def converted(folder: Path, content: bytes, *options: str) -> Any:
    """The method that the file's checkpoint holds."""
    (folder / "released").write_bytes(content)
    assert released.main([str(folder / "released"), str(folder / "ours.pt"), *options]) == 0
    return checkpoint.restore(checkpoint.load(folder / "ours.pt")).eval()


@pytest.mark.parametrize("names", ["published code", "published files"])
@torch.no_grad()
def test_loca_computes_what_flax_computes(tmp_path: Path, names: str, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = loca_tree(0), loca_tree(1)
    if names == "published code":
        content = packed(state(params=student, ema_params=teacher), chunked="posembed_input")
    else:
        content = packed(state(student_weights=as_older(student), teacher_weights=as_older(teacher)), chunked="kernel")
    method = converted(tmp_path, content, "--method", "loca")
    said = capsys.readouterr().out
    assert "vit_pico_patch16: backbone, clusters, cross, norm, head" in said and "random" not in said

    images = np.float32(np.random.default_rng(2).standard_normal((2, GRID * PATCH, GRID * PATCH, 3)))
    for tree, branch in ((student, method.student), (teacher, method.teacher)):
        query, reference = (np.float64(encode(tree, image)) for image in images)
        ours = branch.backbone(torch.from_numpy(images).permute(0, 3, 1, 2))
        np.testing.assert_allclose(ours.numpy(), np.stack([query, reference]), atol=1e-5)
        np.testing.assert_allclose(branch.locate(*ours.split(1))[0].numpy(), locate(tree, query, reference), atol=1e-5)
        np.testing.assert_allclose(branch.clusters(ours[0]).numpy(), cosines(tree, query), atol=1e-5)


def test_loca_goes_on_to_timm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(tmp_path, packed(state(params=loca_tree(0), ema_params=loca_tree(1))), "--method", "loca")
    assert export.main([str(tmp_path / "ours.pt"), str(tmp_path / "timm")]) == 0
    argv = [str(tmp_path / "ours.pt"), "--train", str(tmp_path / "nowhere"), "--val", "x", "--device", "cpu"]
    assert evaluate.main(argv) == 2  # the checkpoint is read; the shards are not there
    assert "nowhere" in capsys.readouterr().err


def test_loca_is_segmented_with_as_released(tmp_path: Path) -> None:
    teacher = loca_tree(1)
    (tmp_path / "released").write_bytes(packed(state(params=loca_tree(0), ema_params=teacher)))
    found = frozen.load(f"released:{tmp_path / 'released'}")
    assert found.backbone.norm.weight.tolist() == teacher["encoder_norm"]["scale"].tolist()


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    tree = loca_tree(0)
    method = converted(tmp_path, packed({"params": tree}, "bfloat16"), "--method", "loca")
    scale = torch.from_numpy(tree["encoder_norm"]["scale"])
    assert method.student.backbone.norm.weight.dtype == torch.float32
    torch.testing.assert_close(method.student.backbone.norm.weight.detach(), scale, rtol=2**-7, atol=0)


def test_one_tree_serves_as_both(tmp_path: Path) -> None:
    method = converted(tmp_path, packed({"ema_params": loca_tree(3)}), "--method", "loca")
    for a, b in zip(method.student.parameters(), method.teacher.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["missing", "decayed", "left out"])
def test_a_head_that_is_not_there_is_initialised(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = loca_tree(0), loca_tree(1)
    head = "projection_head_for_clustering_prediction"
    if how == "missing":
        del student[head], teacher[head], student["final_norm"], teacher["final_norm"]
    elif how == "decayed":  # in the published ViT-B/16 for ImageNet-1k
        for part in teacher[head].values():
            part |= {key: value * np.float32(1e-30) for key, value in part.items()}
    options = ("--method", "loca", *(("--backbone-only",) if how == "left out" else ()))
    method = converted(tmp_path, packed({"params": student, "ema_params": teacher}), *options)
    initialised = {"missing": "clusters, norm", "decayed": "clusters", "left out": "clusters, cross, norm, head"}[how]
    assert f"initialised at random: {initialised}\n" in capsys.readouterr().out
    weight = method.student.clusters.prototypes.weight
    assert torch.equal(weight, method.teacher.clusters.prototypes.weight)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))  # as a run would draw them
    assert not torch.equal(method.student.backbone.norm.weight, method.teacher.backbone.norm.weight)
    assert torch.equal(method.student.head[0].bias == 0, torch.full((GRID**2,), how == "left out"))


def fails(folder: Path, capsys: pytest.CaptureFixture[str], method: str) -> str:
    """What is said of the file ``released``."""
    assert released.main([str(folder / "released"), str(folder / "ours.pt"), "--method", method]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and not (folder / "ours.pt").exists()
    return said


def drop(tree: Tree) -> None:
    del tree["encoderblock_1"]["MlpBlock_0"]["Dense_0"]["kernel"]


def reshape(tree: Tree) -> None:
    tree["encoderblock_1"]["MultiHeadDotProductAttention_0"]["out"]["kernel"] = np.zeros((4, 25, 96), np.float32)


def widen(tree: Tree) -> None:
    tree["encoderblock_0"]["extra"] = np.zeros((2, 3), np.float32)


def behead(tree: Tree) -> None:
    del tree["cross_attention_block"]["LayerNorm_2"]


def regrow(tree: Tree) -> None:
    tree["encoderblock_2"] = tree["encoderblock_1"]


def empty(tree: Tree) -> None:
    tree.clear()
    tree["x"] = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (drop, r"ema_params/encoderblock_1/MlpBlock_0/Dense_0/kernel is missing: shape \(96, 384\) was expected"),
        (reshape, r"ema_params/encoderblock_1/\S*/out/kernel has shape \(4, 25, 96\): \(4, 24, 96\) was expected"),
        (widen, r"ema_params/encoderblock_0/extra of shape \(2, 3\) has no place here"),
        (behead, r"ema_params/cross_attention_block/LayerNorm_2/scale is missing: shape \(96,\)"),
        (regrow, r"ema_params/encoderblock_2/\S+ of shape \(.*\) has no place here"),
        (empty, r"ema_params/\S* is missing"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Tree], None], sentence: str
) -> None:
    student, teacher = loca_tree(0), loca_tree(1)
    harm(teacher)
    (tmp_path / "released").write_bytes(packed({"params": student, "ema_params": teacher}))
    assert re.search(sentence, fails(tmp_path, capsys, "loca"))


def flat(*path: str) -> Tree:
    """A tree in which one array, of those that say how large the network is, has one axis."""
    tree = found = loca_tree(0)
    for key in path:
        found = found[key]
    found["kernel"] = np.zeros(9, np.float32)
    return tree


class Evil:
    def __reduce__(self) -> tuple:
        return (os._exit, (66,))  # the test process would end here


@pytest.mark.parametrize("method", ["loca", "vicregl"])
@pytest.mark.parametrize(
    "content",
    [
        "truncated",
        "empty",
        "text",
        "pickle",
        "absent",
        "no weights",
        "no size",
        "number",
        "flat",
        "other keys",
        "too large",
    ],
)
def test_a_file_that_is_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, content: str
) -> None:
    file = tmp_path / "released"
    if method == "loca":
        whole = packed({"params": loca_tree(0)})
    else:
        torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, file)
        whole = file.read_bytes()
    if content == "no size" and method == "vicregl":
        torch.save({"model": {"module.norm.weight": torch.zeros(3)}}, file)
    elif content == "other keys" and method == "vicregl":
        torch.save({"model": {3: torch.zeros(3)}}, file)
    elif content == "too large" and method == "vicregl":
        wide = torch.zeros(1).expand(10**9)  # a few bytes in the file
        torch.save({"layer1.0.conv1.weight": wide, **{f"projector.{i}.weight": wide for i in (0, 3, 6)}}, file)
    elif content == "pickle" and method == "vicregl":
        torch.save({"model": Evil()}, file)
    elif content == "no weights" and method == "vicregl":
        torch.save({"model": {"epoch": 3}}, file)
    elif content != "absent":
        made = {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"<html>404</html>\n",
            "pickle": pickle.dumps(Evil()),
            "no weights": packed({"step": 3}),
            "no size": packed({"params": {"w": np.zeros(3, np.float32)}}),
            "number": packed({"params": {"ToTokenSequence_0": {"embedding": {"kernel": 3}}}}),
            "flat": packed({"params": flat("encoderblock_0", "MultiHeadDotProductAttention_0", "query")}),
            "other keys": packed({"params": [1, 2]}),
            "too large": packed({"params": flat("ToTokenSequence_0", "embedding")}),
        }
        file.write_bytes(made[content])
    else:
        file.unlink(missing_ok=True)
    said = fails(tmp_path, capsys, method)
    assert str(file) in said
    if (content, method) == ("pickle", "vicregl"):
        assert "it refers to posix._exit, which is code" in said
