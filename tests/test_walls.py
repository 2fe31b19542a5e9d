"""The import rules between the modules, enforced as a test."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imports(path: Path) -> set[str]:
    """Dotted names that the file imports, relative ones made absolute; `from a import b` counts as a and a.b."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])])
            module = base if node.level else node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def reaches(path: Path, *names: str) -> set[str]:
    return {i for i in imports(path) for name in names if i == name or i.startswith(f"{name}.")}


@pytest.mark.parametrize("module", ["correspondence", "draws", "order", "cutting", "windows"])
def test_kernels_know_neither_torch_nor_dali(module: str) -> None:
    assert not reaches(ROOT / "pipeline" / f"{module}.py", "torch", "nvidia", "trainer")


@pytest.mark.parametrize("module", ["cuts", "recipes", "shards", "specs", "tables"])
def test_descriptions_know_neither_torch_nor_dali(module: str) -> None:
    assert not reaches(ROOT / "pipeline" / f"{module}.py", "torch", "nvidia", "trainer")


def test_what_is_compiled_in_is_among_the_files_that_kernels_are_kept_by() -> None:
    from pipeline.kernel import COMPILED

    for path in (ROOT / "pipeline").glob("*.py"):
        if path.stem in COMPILED:
            modules = {name.split(".")[1] for name in imports(path) if name.startswith("pipeline.")}
            assert modules <= {*COMPILED, "host", "recipes"}, path  # folders and types: nothing that is compiled in
        elif path.stem != "callbacks":  # nobody's kernels use what it compiles
            assert "pipeline.kernel" not in imports(path), path


def test_the_host_needs_the_standard_library_only() -> None:
    assert {name.partition(".")[0] for name in imports(ROOT / "pipeline" / "host.py")} <= sys.stdlib_module_names


def test_one_file_says_dali() -> None:
    modules = [p for folder in ("pipeline", "trainer") for p in (ROOT / folder).rglob("*.py")]
    assert {p.name for p in modules if reaches(p, "nvidia")} == {"graph.py"}


def test_the_pipeline_does_not_know_the_trainer() -> None:
    for path in (ROOT / "pipeline").glob("*.py"):
        assert not reaches(path, "trainer", "tools"), path


def test_the_trainer_sees_only_the_face_of_the_pipeline() -> None:
    face = {"pipeline.host", "pipeline.recipes"}
    modules = {f"pipeline.{p.stem}" for p in (ROOT / "pipeline").glob("*.py")} - face
    for path in (ROOT / "trainer").rglob("*.py"):
        assert not reaches(path, *modules, "numba", "nvidia"), path


def test_a_method_knows_no_other_method_and_not_the_program() -> None:
    for path in (ROOT / "trainer" / "methods").glob("*.py"):
        if path.stem != "__init__":
            others = {f"trainer.methods.{p.stem}" for p in path.parent.glob("[!_]*.py")}
            assert not reaches(path, "trainer.run", "trainer.config", *others), path


def test_nobody_imports_the_programs() -> None:
    """But for `trainer.train`, which is the program for those who call it."""
    for folder in ("pipeline", "trainer", "tools", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            programs = {"shard_imagenet", "shard_segmentation", "bench_loader", "gpu_check"}
            if path != ROOT / "trainer" / "__init__.py":
                programs.add("trainer.run")
            assert not reaches(path, *programs), path


def test_no_room_of_the_trainer_hides_a_standard_module() -> None:
    names = {p.stem for p in (ROOT / "trainer").iterdir() if p.suffix in ("", ".py")}
    assert not names & sys.stdlib_module_names


def test_gradients_are_synchronised_in_one_way() -> None:
    """Whoever wraps a method by itself loses what `parallel.data_parallel` sets."""
    for folder in ("trainer", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.name == "parallel.py" or "DistributedDataParallel(" not in path.read_text(encoding="utf-8"), (
                path
            )
