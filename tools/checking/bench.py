"""What a check works with."""

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
    """What a check works with: shards, a device, a folder for scratch files, and where its figures are written."""

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
        """Keeps a figure, whatever happens next."""
        self.figures[name] = figure
        self.write(passed=False, error="it did not come to its end")

    def write(self, **outcome: Any) -> None:
        self.result.write_text(json.dumps({**outcome, "figures": self.figures}))

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def forbid_waiting(self, forbidden: bool) -> None:
        """Whether an operation of torch that makes the host wait for the device is an error."""
        if self.gpu:
            torch.cuda.set_sync_debug_mode("error" if forbidden else "default")

    def config(self, module: Any) -> Any:
        """A method's own settings; those of its small run where there is no GPU."""
        if self.gpu:
            return module.Config()
        name = module.__name__.rpartition(".")[2]
        return methods.config(name, yaml.safe_load((ROOT / f"trainer/presets/{name}_demo.yaml").read_text())[name])
