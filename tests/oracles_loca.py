"""LOCA's loss written out: image by image, view by view, token by token."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import Batch
from trainer.methods.loca import Config, Method


def log_softmax(row: Tensor) -> Tensor:
    return row - row.exp().sum().log()


def cosines(head: torch.nn.Module, feature: Tensor) -> Tensor:
    x, weight = head.projector(feature), head.prototypes.weight
    return weight @ x / weight.square().sum(1).sqrt() / x.square().sum().sqrt()


def naive_sinkhorn(rows: list[list[float]], iterations: int) -> list[list[float]]:
    for _ in range(iterations):
        for k in range(len(rows[0])):
            total = sum(row[k] for row in rows)
            for row in rows:
                row[k] /= total
        rows = [[x / sum(row) for x in row] for row in rows]
    return rows


def mean_of_valid(cfg: Config, by_query: list[list[Tensor]]) -> Tensor:
    """Each inner list holds the losses of one query's valid tokens."""
    if cfg.average == "pooled":
        by_query = [[x for query in by_query for x in query]]
    means = [sum(query) / len(query) for query in by_query if query]
    return sum(means) / len(means) if means else torch.zeros(())


def naive_iou(a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor]:
    def edges(box: list[Tensor], axis: int) -> tuple[Tensor, Tensor]:
        return box[axis] - box[axis + 2] / 2, box[axis] + box[axis + 2] / 2

    overlap, hull = torch.tensor(1.0), torch.tensor(1.0)
    for axis in (0, 1):
        (a0, a1), (b0, b1) = edges(a, axis), edges(b, axis)
        overlap = overlap * max(min(a1, b1) - max(a0, b0), torch.tensor(0.0))
        hull = hull * (max(a1, b1) - min(a0, b0))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    return overlap / union, overlap / union - (hull - union) / hull


def naive_loss(method: Method, batch: Batch, keep: Tensor, visible: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, image by image, view by view, token by token."""
    cfg, student, teacher = method.cfg, method.student, method.teacher
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])

    def encode(
        vit: torch.nn.Module, pixels: Tensor, keep: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Patch tokens, and the feature of the whole view."""
        tokens = vit(((pixels / 255 - mean) / std).permute(2, 0, 1)[None], keep, **kwargs)[0]
        return tokens[int(cfg.clusters == "cls") :], tokens[0] if cfg.clusters == "cls" else tokens.mean(0)

    count = len(batch.index)
    assignments: list[list[float]] = []  # of every teacher row, then evened out
    position: list[list[Tensor]] = []
    queries: list[tuple[int, Tensor, list[int]]] = []  # image, features to cluster, row of each or -1
    right = []
    ious = []
    for b in range(count):
        pixels = batch.views["reference"].pixels[b, 0]
        seen = visible[min(b, len(visible) - 1)]
        reference = None
        if teacher is not None:
            with torch.no_grad():
                tokens, whole = encode(teacher.backbone, pixels)
                reference = tokens[seen]
                features = tokens if cfg.clusters == "patch" else [whole]
                assignments += [log_softmax(cosines(teacher.clusters, x) / 0.05).exp().tolist() for x in features]
        elif len(seen):
            reference, _ = encode(student.backbone, pixels, seen)
        for v in range(1 + cfg.views.focal_views):
            kind, view = ("query", 0) if v == 0 else ("focal", v - 1)
            kept = keep[min(b, len(keep) - 1)] if v == 0 else torch.arange(4)
            tokens, whole = encode(
                student.backbone,
                batch.views[kind].pixels[b, view],
                kept if v == 0 else None,
                positions=cfg.clusters != "off",
            )
            target = [int(batch.targets[kind][b, view, i]) for i in kept]
            if cfg.position in ("patch", "centre", "box"):
                after = student.norm(student.cross(tokens[None], None if reference is None else reference[None]))[0]
                losses = []
                if cfg.position == "box" and batch.targets["box"][b, v, 2] > 0:
                    guess = list(student.head(after.mean(0)).sigmoid())
                    box = list(batch.targets["box"][b, v])
                    iou, generalised = naive_iou(guess, box)
                    distance = sum(abs(x - y) for x, y in zip(guess, box, strict=True))
                    losses.append(5 * distance + 2 * (1 - generalised))
                    ious.append(iou)
                for i, place in enumerate(target):
                    middle = int(kept[i]) == (10 if v == 0 else 3)  # of a 4 x 4 and a 2 x 2 grid
                    if cfg.position != "box" and place >= 0 and (cfg.position == "patch" or middle):
                        logits = student.head(after[i])
                        losses.append(-log_softmax(logits)[place])
                        right.append(float(logits.argmax() == place))
                position.append(losses)
            if cfg.clusters == "patch":
                queries.append((b, tokens, target))
            elif cfg.clusters != "off":
                queries.append((b, whole[None], [0]))

    parts = {"position_loss": mean_of_valid(cfg, position)} if cfg.position != "off" else {}
    if cfg.position in ("patch", "centre"):
        parts["position_accuracy"] = torch.tensor(sum(right) / len(right))
    if cfg.position == "box":
        parts["box_iou"] = sum(ious) / len(ious)
    total = parts.get("position_loss", torch.zeros(()))
    if cfg.clusters != "off":
        assignments = naive_sinkhorn(assignments, cfg.sinkhorn)
        rows_each = len(assignments) // count
        cluster, predictions = [], []
        for b, features, rows in queries:
            losses = []
            for feature, row in zip(features, rows, strict=True):
                prediction = log_softmax(cosines(student.clusters, feature) / 0.1)
                predictions.append(prediction.exp())
                if row >= 0:
                    target = torch.tensor(assignments[b * rows_each + row], dtype=prediction.dtype)
                    losses.append(-(target * prediction).sum())
            cluster.append(losses)
        mean_prediction = sum(predictions) / len(predictions)
        negative_entropy = sum(p * p.log() for p in mean_prediction)
        parts["cluster_loss"] = mean_of_valid(cfg, cluster)
        parts["me_max"] = negative_entropy + math.log(cfg.prototypes)
        parts["target_entropy"] = torch.tensor(-sum(x * math.log(x) for row in assignments for x in row)) / len(
            assignments
        )
        parts["prototypes_in_use"] = torch.tensor(float(len({int(np.argmax(row)) for row in assignments})))
        total = total + parts["cluster_loss"] + cfg.me_max * negative_entropy
    return total, parts
