"""Checkpoints: one file per saved step, written atomically and in the background.

`last` links to the newest. If a file cannot be read, the one before it is used, with a warning. Files are loaded with
`weights_only=True`: they hold tensors and plain values, and no code is unpickled.
"""

import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_map_only

from pipeline import host
from trainer import config, methods, parallel
from trainer.method import Method

FORMAT = 1
Payload = dict[str, Any]
NEEDED = {"step": int, "method": str, "config": str, "model": dict}  # the config is YAML
OPTIONAL = {"optimizer": dict, "loader": dict, "scaler": dict}  # needed to resume a run
_PAUSES = (5.0, 30.0)  # seconds between attempts to write: a full disk may be freed, a file server may return


class Writer:
    """Writes the checkpoints of one folder in a background thread, one at a time, while training continues.

    A write that fails is retried twice. Each failure is a warning, not an error.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None) -> None:
        self._folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._kept = True

    def save(self, payload: Payload) -> None:
        """Wait for the previous write, then start to write `payload`, which must not be modified any more."""
        self.wait()
        self._thread = threading.Thread(target=self._save, args=(payload,), name="checkpoint")
        self._thread.start()

    def wait(self) -> bool:
        """Wait for the last write. Return whether it succeeded; True if there was none."""
        if self._thread:
            self._thread.join()
            self._thread = None
        return self._kept

    def _save(self, payload: Payload) -> None:
        self._kept = False
        for pause in (*_PAUSES, 0.0):
            self._kept = save(self._folder, payload, self._keep_last, self._keep_every)
            if self._kept:
                break
            time.sleep(pause)


def save(folder: Path, payload: Payload, keep_last: int, keep_every: int | None) -> bool:
    """Write `payload` as ``folder/step_XXXXXXXXX.pt`` and remove old checkpoints. Return False if writing failed.

    A full disk costs this checkpoint only, neither the run nor earlier checkpoints. One process at a time may save.
    """
    target = folder / f"step_{payload['step']:09d}.pt"
    try:
        for part in folder.glob("*.part"):  # left by a writer that was killed
            part.unlink()
        write(target, payload)
        with suppress(OSError):  # some file systems lack symlinks (exFAT, some network ones); nothing reads `last`
            link = folder / "last.part"
            link.symlink_to(target.name)
            link.replace(folder / "last")
        host.sync_folder(folder)
    except OSError as error:
        warnings.warn(f"no checkpoint at step {payload['step']}: {error}; the ones before it are kept", stacklevel=2)
        return False
    for path in _paths(folder)[keep_last:]:
        if not (keep_every and _step(path) % keep_every == 0):
            path.unlink(missing_ok=True)
    return True


def write(path: Path, payload: Payload) -> None:
    """Write one file atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        host.write_atomic(path, lambda file: torch.save({"format": FORMAT, **payload}, file))
    except RuntimeError as error:  # torch replaces the OSError of a full disk by its own RuntimeError
        raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from None


def load(path: Path) -> Payload:
    """Load the checkpoint `path`: a file, or a folder's newest readable one. Raises ValueError naming the defect."""
    if path.is_dir():
        payload = latest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if payload is None:
            raise ValueError(f"{path}: holds no readable checkpoint; name the folder of a run that has one")
        return payload
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # read lazily
    except Exception:  # a truncated file raises many kinds of errors
        why = "it is damaged, or another kind of file" if path.exists() else "there is no such file or folder"
        raise ValueError(f"{path}: not a readable checkpoint ({why})") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        found = payload.get("format") if isinstance(payload, dict) else None
        raise ValueError(f"{path}: not a checkpoint of format {FORMAT} (found {found})")
    for key, kind in (NEEDED | {key: kind for key, kind in OPTIONAL.items() if key in payload}).items():
        if not isinstance(payload.get(key), kind):
            raise ValueError(f"{path}: not a whole checkpoint, its {key!r} is no {kind.__name__}")
    weights = payload["model"].values()
    if payload["step"] < 0 or not weights or not all(isinstance(value, torch.Tensor) for value in weights):
        raise ValueError(f"{path}: not a whole checkpoint, its 'step' is below 0 or its 'model' holds no tensors")
    return payload


def latest(folder: Path) -> Payload | None:
    """Load the newest readable checkpoint in `folder`; return None if there are no checkpoints.

    Raises ValueError if there are some but none is readable: a run that started over would overwrite them.
    """
    return (_newest(folder) or (None, None))[1]


def _newest(folder: Path) -> tuple[Path, Payload] | None:
    for path in _paths(folder):
        try:
            return path, load(path)
        except ValueError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=3)
    if _paths(folder):
        raise ValueError(f"{folder}: holds no readable checkpoint, only damaged ones; move them away to start over")
    return None


def resume(folder: Path, name: str, method: nn.Module, optimizer: torch.optim.Optimizer) -> Payload | None:
    """Load the newest readable checkpoint into the method `name` and its optimizer, and return its other entries.

    Returns None if there is no checkpoint. Only rank 0 reads. Raises ValueError, on every rank, if the file does not
    fit; the message names the file.
    """
    found = None
    with parallel.agreed():
        if parallel.rank() == 0 and (found := _newest(folder)):
            path, payload = found
            try:
                if payload["method"] != name:
                    raise ValueError(f"it is of method {payload['method']!r}")
                if lacking := [key for key in OPTIONAL if key not in payload]:
                    raise ValueError(f"it holds weights for --init, but no {lacking[0]!r} to resume with")
                check_fit(method, optimizer, payload)
            except ValueError as error:
                before = [other.name for other in _paths(folder) if other < path]
                remedy = f"; if it is damaged, remove it to resume from {before[0]}" if before else ""
                raise ValueError(f"{path}: {error}{remedy}") from None
    payload = found[1] if found else {}
    rest = parallel.from_rank_0({key: value for key, value in payload.items() if key not in ("model", "optimizer")})
    if rest:
        set_model_state_dict(method, payload.get("model", {}), options=_from_rank_0())
        set_optimizer_state_dict(method, optimizer, payload.get("optimizer", {}), options=_from_rank_0())
    return rest or None


def restore(payload: Payload) -> Method:
    """Build the method that a checkpoint holds, with its settings and weights. Raises ValueError if they do not fit."""
    name = payload["method"]
    if name not in methods.names():
        raise ValueError(f"the checkpoint is of method {name!r}, which is none of {', '.join(methods.names())}")
    with _one_sentence(f"the checkpoint's settings of {name} cannot be used"):
        settings = config.load_yaml(payload["config"])
        if not isinstance(settings, dict) or not isinstance(settings.get(name), dict):
            raise ValueError(f"they hold no mapping {name!r}")
        method: Method = methods.load(name).Method(methods.config(name, settings[name]))
    with _one_sentence("the checkpoint's weights do not fit its settings"):
        method.load_state_dict(payload["model"])
    return method


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn any error that an invalid file causes in the block into a ValueError of one sentence."""
    try:
        yield
    except Exception as error:  # an invalid file can raise almost any type
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise ValueError(f"{what}: {reason}") from None


def state(method: nn.Module, optimizer: torch.optim.Optimizer) -> Payload:
    """Return unsharded copies of weights and optimizer state on the host. Collective: only rank 0 gets the values.

    Entries are keyed by parameter name, so that a run can resume with another number of ranks, sharded or not.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optim = get_state_dict(method, optimizer, options=options)
    if next(method.parameters()).device.type == "cpu":  # there cpu_offload returns the live tensors, not copies
        model, optim = tree_map_only(torch.Tensor, torch.clone, (model, optim))
    return {"model": model, "optimizer": optim}


def check_fit(method: nn.Module, optimizer: torch.optim.Optimizer, payload: Payload) -> None:
    """Raise ValueError if names or shapes differ. Checked on rank 0 before the broadcast, where an error would hang."""
    with _one_sentence("the checkpoint was made with other settings of the method or the optimizer"):
        _check_weights(method, payload)
        shapes = {name: p.shape for name, p in method.named_parameters() if p.requires_grad}
        saved = payload["optimizer"]
        for name, shape in shapes.items():
            for key, value in saved["state"][name].items():  # KeyError if absent: torch would silently start fresh
                if isinstance(value, torch.Tensor) and value.ndim and value.shape != shape:
                    raise ValueError(f"{key} of {name} has the shape {[*value.shape]} instead of {[*shape]}")
        grouped = [name for group in saved["param_groups"] for name in group["params"]]
        if len(saved["param_groups"]) != len(optimizer.param_groups) or {*grouped} != {*shapes}:
            raise ValueError("its parameter groups differ")


def _check_weights(method: nn.Module, payload: Payload) -> None:
    mine, theirs = ({k: [*v.shape] for k, v in weights.items()} for weights in (method.state_dict(), payload["model"]))
    for name in sorted(mine.keys() ^ theirs.keys()):
        raise ValueError(f"it {'lacks' if name in mine else 'has an unknown'} {name}")
    for name, shape in mine.items():
        if theirs[name] != shape:
            raise ValueError(f"{name} has the shape {theirs[name]} instead of {shape}")


def set_weights(method: nn.Module, payload: Payload) -> None:
    """Load the weights of a checkpoint into `method`, on each rank. Raises ValueError if names or shapes differ."""
    with parallel.agreed(), _one_sentence("the checkpoint's weights do not fit the method's settings"):
        _check_weights(method, payload)
    set_model_state_dict(method, payload["model"], options=_from_rank_0())


def _from_rank_0() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, strict=True, broadcast_from_rank0=parallel.world_size() > 1)


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.pt"), reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
