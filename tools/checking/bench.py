"""The context of a check: shards, device, settings and results."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from pipeline import Loader, Recipe, recipes
from pipeline.graph import Form
from trainer import methods

ROOT = Path(__file__).resolve().parents[2]
RECIPES: dict[str, Callable[[], Recipe]] = {"loca": recipes.loca, "vicregl": recipes.vicregl}


@dataclass
class Bench:
    """The context of a check: shards, a device, a folder for scratch files, and the file for its figures."""

    shards: str
    device: str
    scratch: Path
    quick: bool
    result: Path
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gpu = self.device.startswith("cuda")
        self.batch = 64 if self.gpu else 8
        self.forms: tuple[Form, ...] = get_args(Form) if self.gpu else ("fused",)

    def loader(self, recipe: Recipe, device: str | None = None, **settings: Any) -> Loader:
        return Loader(self.shards, recipe, self.batch, device=device or self.device, **settings)

    def note(self, name: str, figure: Any) -> None:
        """Record a figure at once, so that a later crash does not lose it."""
        self.figures[name] = figure
        self.write(passed=False, error="it did not finish")

    def write(self, **outcome: Any) -> None:
        self.result.write_text(json.dumps({**outcome, "figures": self.figures}))

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def forbid_waiting(self, forbidden: bool) -> None:
        """Make torch raise on operations that synchronise the host with the device, or allow them again."""
        if self.gpu:
            torch.cuda.set_sync_debug_mode("error" if forbidden else "default")

    def config(self, module: Any) -> Any:
        """A method's default settings, or without a GPU those of its demo preset."""
        if self.gpu:
            return module.Config()
        name = module.__name__.rpartition(".")[2]
        return methods.config(name, yaml.safe_load((ROOT / f"trainer/presets/{name}_demo.yaml").read_text())[name])
