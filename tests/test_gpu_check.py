"""gpu_check without a GPU: its checks run, and if one fails, the others still run and are reported."""

import argparse
import ast
import json
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mapimages import smooth_image, write_set

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    return runpy.run_path(str(PROGRAM))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_set(tmp_path_factory.mktemp("photos"), 24, 1, make=smooth_image, form="JPEG"))


def outcome(program: dict[str, Any], name: str, shards: str, folder: Path) -> dict[str, Any]:
    bench = program["Bench"](shards, "cpu", folder, True, folder / "result.json")
    program["run_here"](name, bench)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("windows_are_equal_and_pixels_close", {"loca/reference fused", "vicregl/small fused"}),
        ("outputs_stay_valid", {"fused"}),
        ("the_host_runs_ahead", {"ms_per_batch_behind_a_busy_stream fused"}),
        ("loader_throughput", {"loca fused", "fastest of vicregl"}),
        ("shares_and_threads", {"loca fused hw=None threads=1"}),
        ("the_gpu_is_left_to_the_trainer", {"loca fused", "vicregl fused"}),
        pytest.param("a_short_training", {"first", "last"}, marks=pytest.mark.slow),
    ],
)
def test_a_check_passes_on_a_cpu(
    program: dict[str, Any], name: str, figures: set[str], shards: str, tmp_path: Path
) -> None:
    found = outcome(program, name, shards, tmp_path)
    assert found["passed"], found
    assert figures <= found["figures"].keys()


@pytest.mark.slow
def test_a_methods_graphs_are_counted(
    program: dict[str, Any], shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found = outcome(program, "one_compiled_graph", shards, tmp_path)
    assert found["passed"], found
    assert found["figures"].keys() == {"loca", "vicregl"}
    found = outcome(program, "nccl_and_ddp", shards, tmp_path)  # by gloo, on a CPU
    assert found["passed"], found
    assert found["figures"]["whole"]["graphs"] == 1 and found["figures"]["launched by"] == "itself"


@pytest.mark.slow
def test_torchrun_starts_the_check_of_ranks(
    program: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # how long a CPU's compiler takes says nothing
    args = argparse.Namespace(device="cpu", quick=True, minutes=9)
    found = program["run_apart"]("nccl_and_ddp", args, "any", tmp_path, 4.0)
    assert found["passed"], found
    assert found["figures"].keys() == {"split at buckets", "whole", "launched by"}
    assert found["figures"]["launched by"] == "torchrun"


def test_other_pixels_are_noticed(
    program: dict[str, Any], shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second loader's pictures are made lighter by 40: the check fails, and says by how much."""
    made, real = [], program["Bench"].loader

    def loader(bench: Any, *arguments: Any, **settings: Any) -> Any:
        source = real(bench, *arguments, **settings)
        made.append(source)
        if len(made) == 2:
            take = source._take
            source._take = lambda run: [torch.from_dlpack(kind) // 2 for kind in take(run)]
        return source

    monkeypatch.setattr(program["Bench"], "loader", loader)
    found = outcome(program, "windows_are_equal_and_pixels_close", shards, tmp_path)
    assert not found["passed"]
    assert "loca/reference" in found["error"]
    assert "vicregl" not in found["error"]
    assert found["figures"]["loca/focal fused"]["mean_levels"] > 20


STAND_IN = """
import json, os, sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
result = Path(words["--out"]) / "result.json"
name = words["--alone"]
if name == "outputs_stay_valid":
    os.abort()
result.write_text(json.dumps({"passed": name == "loader_throughput", "error": "so far", "figures": {"a": 1}}))
if name == "the_host_runs_ahead":
    time.sleep(60)
if name == "one_compiled_graph":
    sys.exit("said | so")
"""


def test_a_crash_or_a_hang_costs_the_others_nothing(
    program: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setitem(program["main"].__globals__, "__file__", str(tmp_path / "stand_in.py"))
    words = ["--device", "cpu", "--shards", "any", "--each", "0.03", "--out", str(tmp_path / "out")]
    assert program["main"](words) == 1
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    checks = report["checks"]
    assert checks.keys() == program["CHECKS"].keys()
    assert {name for name, check in checks.items() if check["passed"]} == {"loader_throughput"}
    assert checks["outputs_stay_valid"]["error"] == "it did not begin; its process ended with -6"
    assert checks["the_host_runs_ahead"]["error"] == "so far; it was stopped after 0.03 minutes"
    assert checks["the_host_runs_ahead"]["figures"] == {"a": 1}  # what it had found
    assert "said | so" in checks["one_compiled_graph"]["trace"]
    table = (tmp_path / "out" / "gpu_check.md").read_text().splitlines()
    assert len([line for line in table if line.count(" | ") == 3]) == len(checks) + 1
    assert program["main"]([*words, "--only", "throughput"]) == 0
    assert "FAILED" in capsys.readouterr().out
    assert program["main"]([*words, "--only", "throughput", "--minutes", "0"]) == 1
    assert "not begun: 0.0 minutes are over" in capsys.readouterr().out


def test_missing_packages_are_named_before_anything_is_imported(program: dict[str, Any], tmp_path: Path) -> None:
    assert program["missing"]({"json": "json", "no_such_module": "some-package", "no_such.part": "other[extra]"}) == [
        "some-package",
        "other[extra]",
    ]
    hidden = "import importlib.util as u, runpy, sys; find = u.find_spec; sys.path.insert(0, '.')\n"
    hidden += "u.find_spec = lambda name: None if name in ('timm', 'nvidia') else find(name)\n"
    hidden += f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "gpu_check: missing packages: pip install nvidia-dali-cuda130 timm"


def foreign(path: Path, seen: set[Path]) -> set[str]:
    """The packages that importing a file imports: those of functions and of type checkers left out."""
    if path in seen or not path.exists():
        return set()
    seen.add(path)
    found, left = set(), list(ast.parse(path.read_text()).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            left += node.body
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            base = ".".join(filter(None, [package, node.module]))
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            top, *_ = parts = name.split(".")
            if top in ("pipeline", "trainer", "tools"):
                for length in range(1, len(parts) + 1):
                    place = ROOT.joinpath(*parts[:length])
                    found |= foreign(place / "__init__.py", seen) | foreign(place.with_suffix(".py"), seen)
            elif top not in sys.stdlib_module_names:
                found.add(top)
    return found


def test_what_is_imported_is_asked_for_first(program: dict[str, Any]) -> None:
    """Else a bare machine sees a traceback where it should see what to install."""
    found = foreign(PROGRAM, set())
    brought = {"triton", "llvmlite"}  # by torch and numba
    assert {"torch", "jsonargparse", "numba", "nvidia"} <= found
    assert found <= {name.partition(".")[0] for name in program["MODULES"]} | brought


def test_a_failing_check_keeps_its_figures(
    program: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bench: Any) -> None:
        bench.note("until here", 7)
        raise AssertionError("too dark")

    monkeypatch.setitem(program["CHECKS"], "fails", fails)
    found = outcome(program, "fails", "any", tmp_path)
    assert found["figures"] == {"until here": 7}
    assert found["error"] == "AssertionError: too dark"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has one")
def test_without_a_gpu_it_says_so(program: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert program["main"](["--out", "/nowhere"]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.slow  # 64 pictures are drawn first
def test_its_own_shards_can_be_read(program: dict[str, Any], tmp_path: Path) -> None:
    from pipeline import ShardSet

    found = ShardSet(program["make_shards"](tmp_path / "made", 6))
    assert len(found) == 6
    assert found.table["label"].tolist() == [0, 1, 2, 3, 4, 5]
