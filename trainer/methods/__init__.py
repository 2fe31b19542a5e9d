"""The methods. This folder is the registry: every file in it is a choice of `--method`, without any other edit.

A method is one file with `Config` (a frozen dataclass), `views(cfg) -> Recipe` (the views to cut and their
correspondences) and `Method`, a subclass of trainer.method.Method. Files whose names begin with "_" are not methods.
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
    """Return the names of all methods, the choices of `--method`."""
    return sorted(p.stem for folder in __path__ for p in Path(folder).glob("[!_]*.py"))


def load(name: str) -> ModuleType:
    """Import and return the module of the method `name`."""
    return import_module(f"{__name__}.{name}")


def config(name: str, values: Mapping[str, Any]) -> Any:
    """Build a method's Config from YAML values. Raises ValueError, TypeError or jsonargparse.ArgumentError."""
    kind = load(name).Config
    if unknown := values.keys() - {f.name for f in fields(kind)}:
        raise ValueError(
            f"unknown {', '.join(sorted(unknown))}: before version 0.2, settings of views were not under {name}.views; "
            "use such a file with the version that wrote it"
        )
    if not isinstance(values.get("views", {}), Mapping):  # the parser would take a string for the name of a file
        raise ValueError(f"{name}.views must be a mapping")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, name)
    return parser.instantiate(parser.parse_object({name: dict(values)}))[name]
