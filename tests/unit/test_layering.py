"""Who may import whom, and what the command line may not load."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"kernels", "autotune", "suites", "results", "bench"}
HEAVY = {"torch", "triton", "numba", "cupy", "numba_cuda", "llvmlite"}
LAYERS = {  # folder -> what it must not import
    "kernels": ("rooftune.autotune", "rooftune.suites", "rooftune.bench", "rooftune.commands", "rooftune.lab"),
    "results": ("rooftune.kernels", "rooftune.autotune", "rooftune.suites", "rooftune.bench", "rooftune.commands"),
    "autotune": ("rooftune.suites", "rooftune.bench", "rooftune.commands"),
    "suites": ("rooftune.bench", "rooftune.commands"),
}


def _sources() -> list[Path]:
    folders = ("rooftune", "kernels", "autotune", "suites", "results")
    found = [p for f in folders for p in sorted((ROOT / f).rglob("*.py")) if not _through_link(p)]
    assert len(found) > 100, "the sources are not where these tests look"
    return [*found, ROOT / "bench.py"]


def _through_link(path: Path) -> bool:
    return any(parent.is_symlink() for parent in (path, *path.parents))


def _imports(tree: ast.AST, top_only: bool) -> set[str]:
    nodes = tree.body if top_only and isinstance(tree, ast.Module) else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("folder", sorted(LAYERS))
def test_lower_layers_do_not_reach_up(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in _imports(ast.parse(path.read_text()), top_only=False):
            assert not any(name == bad or name.startswith(bad + ".") for bad in LAYERS[folder]), f"{path}: {name}"


def test_heavy_packages_are_imported_at_the_top_only_where_kernels_live() -> None:
    for path in _sources():
        if "kernels" in path.relative_to(ROOT).parts:
            continue
        heavy = {name.partition(".")[0] for name in _imports(ast.parse(path.read_text()), top_only=True)} & HEAVY
        assert not heavy, f"{path} imports {heavy} at the top"


def test_everything_is_imported_as_rooftune() -> None:
    for path in _sources():
        for name in _imports(ast.parse(path.read_text()), top_only=False):
            assert name.partition(".")[0] not in ("kernels", "autotune", "suites", "results", "bench"), (
                f"{path}: {name}"
            )


def test_no_source_file_is_too_long_to_read() -> None:
    kernels = (path for suffix in ("*.cu", "*.[ch]*") for path in (ROOT / "kernels").rglob(suffix))
    for path in [*_sources(), *kernels, *(ROOT / "tests").rglob("*.py")]:
        if path.is_file() and "__pycache__" not in path.parts:
            lines = len(path.read_text(errors="replace").splitlines())
            assert lines <= 400, f"{path} has {lines} lines"


def test_help_loads_nothing_heavy_and_the_checkout_folders_keep_their_names_free() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['bench.py', '--help']\n"
        "try:\n    runpy.run_path('bench.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "bad = {'numpy', 'torch', 'rich', 'numba', 'kernels', 'results', 'autotune'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, env=dict(os.environ))
