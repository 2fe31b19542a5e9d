"""Checkpoints: one file a step, whole or absent.

Written beside, flushed to the disk, renamed; `last` links to the newest. A file that cannot be read is passed over,
with a warning, for the one before it. Nothing is unpickled: tensors and plain values only (`weights_only=True`).
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from trainer import methods
from trainer.method import Method

FORMAT = 1
Payload = dict[str, Any]  # format, step, method, config (YAML), model, optimizer, loader, and scaler if there is one


def save(folder: Path, payload: Payload, *, keep_last: int, keep_every: int | None) -> bool:
    """Writes `payload` as ``folder/step_XXXXXXXXX.pt`` and removes what need not be kept. False if the disk refused.

    A full disk costs this checkpoint, not the run and not the checkpoints before it.
    """
    target = folder / f"step_{payload['step']:09d}.pt"
    try:
        write(target, payload)
        link = folder / "last.part"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(folder / "last")
        _sync_folder(folder)
    except OSError as error:
        warnings.warn(f"no checkpoint at step {payload['step']}: {error}; the ones before it are kept", stacklevel=2)
        return False
    for path in _paths(folder)[keep_last:]:
        if not (keep_every and _step(path) % keep_every == 0):
            path.unlink(missing_ok=True)
    return True


def write(path: Path, payload: Payload) -> None:
    """Writes one file, whole or not at all. Raises OSError."""
    beside = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            torch.save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        reason = error.__context__ or error  # torch hides a full disk behind a RuntimeError of its own
        raise reason if isinstance(reason, OSError) else OSError(str(error)) from None


def load(path: Path) -> Payload:
    """The checkpoint in `path` (a file, or a folder's newest readable one). Raises ValueError naming what is wrong."""
    if path.is_dir():
        payload = latest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if payload is None:
            raise ValueError(f"{path}: holds no readable checkpoint")
        return payload
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file fails in a dozen ways
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        found = payload.get("format") if isinstance(payload, dict) else None
        raise ValueError(f"{path}: not a checkpoint of format {FORMAT} (found {found})")
    return payload


def latest(folder: Path) -> Payload | None:
    """The newest checkpoint in `folder` that can be read, or None."""
    for path in _paths(folder):
        try:
            return load(path)
        except ValueError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    return None


def restore(payload: Payload) -> Method:
    """The method that a checkpoint holds, with its settings and weights. Raises ValueError if they do not fit."""
    room = methods.load(payload["method"])
    settings = yaml.safe_load(payload["config"])[payload["method"]]
    cfg = room.Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
    method: Method = room.Method(cfg)
    try:
        method.load_state_dict(payload["model"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's weights do not fit its settings: {' '.join(str(error).split())}") from None
    return method


def state(method: nn.Module, optimizer: torch.optim.Optimizer) -> Payload:
    """Weights and optimizer state, by name and whole, on the host; every rank must ask, rank 0 is answered.

    By name, so that a run can go on with another number of ranks, sharded or not.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optim = get_state_dict(method, optimizer, options=options)
    return {"model": model, "optimizer": optim}


def set_state(method: nn.Module, optimizer: torch.optim.Optimizer, payload: Payload) -> None:
    """The way back. Raises RuntimeError where names or shapes do not fit."""
    options = StateDictOptions(full_state_dict=True, strict=True)
    set_state_dict(
        method,
        optimizer,
        model_state_dict=payload["model"],
        optim_state_dict=payload["optimizer"],
        options=options,
    )


def set_weights(method: nn.Module, payload: Payload) -> None:
    """The weights alone, to begin with. Raises RuntimeError where names or shapes do not fit."""
    set_model_state_dict(method, payload["model"], options=StateDictOptions(full_state_dict=True, strict=True))


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.pt"), reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
