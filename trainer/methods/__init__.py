"""The methods. The folder is the registry: a file here is a choice of `--method`, and nothing else needs an edit.

A method is one file with `Config` (a frozen dataclass), `views(cfg) -> Recipe` (what it wants cut, with the
correspondences) and `Method`, a subclass of trainer.method.Method. Files whose names begin with "_" are no methods.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType


def names() -> list[str]:
    """The choices of `--method`."""
    return sorted(p.stem for folder in __path__ for p in Path(folder).glob("[!_]*.py"))


def load(name: str) -> ModuleType:
    """The method's module."""
    return import_module(f"{__name__}.{name}")
