"""The methods. The folder is the registry: a file here is a choice of `--method`, and nothing else needs an edit.

A method is one file with `Config` (a frozen dataclass of plain values), `views(cfg) -> Recipe` (what it wants cut, with
the correspondences) and `Method(nn.Module)`:

    forward(batch, progress) -> (loss, metrics)   progress is a 0-d tensor in [0, 1]; metrics are detached 0-d tensors
    after_step(progress)                          after the optimizer moved the weights (an EMA teacher follows here)
    parameter_groups(weight_decay)                for the optimizer
    backbone()                                    the module to evaluate and to export
    scheduled(progress)                           if there is one: 0-d tensors for the log, such as an EMA's momentum
"""

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType


def names() -> list[str]:
    """The choices of `--method`."""
    return sorted(p.stem for folder in __path__ for p in Path(folder).glob("*.py") if p.stem != "__init__")


def load(name: str) -> ModuleType:
    """The method's module."""
    return import_module(f"{__name__}.{name}")


def config_class(name: str) -> type:
    """The method's `Config`, read without running the rest of the file.

    Importing a method imports torch, which takes seconds; a command line has to answer at once. So only the file's
    standard-library imports and its class `Config` are executed here.
    """
    path = next(p for folder in __path__ if (p := Path(folder) / f"{name}.py").exists())
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if _is_light(node)]
    light = ModuleType(f"{__name__}:{name}")
    light.__file__ = str(path)  # inspect finds the fields' docstrings through it: they are the help texts
    sys.modules[light.__name__] = light
    exec(compile(tree, path, "exec"), light.__dict__)
    return light.Config


def _is_light(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level == 0 and (node.module or "").partition(".")[0] in sys.stdlib_module_names
    if isinstance(node, ast.Import):
        return all(alias.name.partition(".")[0] in sys.stdlib_module_names for alias in node.names)
    return isinstance(node, ast.ClassDef) and node.name == "Config"
