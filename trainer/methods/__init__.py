"""The methods. The folder is the registry: a file here is a choice of `--method`, and nothing else needs an edit.

A method is one file with `Config` (a frozen dataclass), `views(cfg) -> Recipe` (what it wants cut, with the
correspondences) and `Method`, a subclass of trainer.method.Method. Files whose names begin with "_" are no methods.
"""

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonargparse

MOVED = {"loca.queries": "now it is loca.views.focal_views, which does not count the random query"}


def names() -> list[str]:
    """The choices of `--method`."""
    return sorted(p.stem for folder in __path__ for p in Path(folder).glob("[!_]*.py"))


def load(name: str) -> ModuleType:
    """The method's module."""
    return import_module(f"{__name__}.{name}")


def config(name: str, values: Mapping[str, Any]) -> Any:
    """The method's Config of values as YAML has them. Raises ValueError, TypeError or jsonargparse's ArgumentError."""
    kind = load(name).Config
    if unknown := values.keys() - {f.name for f in fields(kind)}:
        raise ValueError(
            f"unknown {', '.join(sorted(unknown))}: before version 0.2, settings of views were not under {name}.views; "
            "use such a file with the version that wrote it"
        )
    if not isinstance(values.get("views", {}), Mapping):  # else the parser would open a file of that name
        raise ValueError(f"{name}.views must be a mapping")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, name)
    return parser.instantiate(parser.parse_object({name: dict(values)}))[name]
