"""What a competitor's source hash covers: what it is made of, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from rooftune import registry, sources
from rooftune.kernels.common import cupy_kernel

TREE = {
    "common/__init__.py": "",
    "common/used.py": "from rooftune.kernels.common import deeper\n",
    "common/deeper.py": "ONE = 1\n",
    "common/other.py": "TWO = 2\n",
    "common/cuda/tile.cuh": '#pragma once\n  # include "deep.cuh"\n#include <cuda_fp16.h>\n',
    "common/cuda/deep.cuh": "// deep\n",
    "common/cuda/other.cuh": "// other\n",
    "op/__init__.py": "import math\n",
    "op/cupy.py": "def run():\n    from rooftune.kernels.common.used import deeper\n",
    "op/cupy.cu": '#include "tile.cuh"\n#include "beside.cuh"\n',
    "op/cupy.reduce.cu": "// a second kernel\n",
    "op/beside.cuh": "// of this operator alone\n",
    "op/numba.py": "import rooftune.kernels.common.other\nfrom . import helper\nfrom ..common import deeper\n",
    "op/helper.py": "",
}
USED = {
    "op/cupy.py": {
        "common/__init__.py", "common/used.py", "common/deeper.py", "common/cuda/tile.cuh", "common/cuda/deep.cuh",
        "op/__init__.py", "op/cupy.py", "op/cupy.cu", "op/cupy.reduce.cu", "op/beside.cuh",
    },
    "op/numba.py": {
        "common/__init__.py", "common/other.py", "common/deeper.py", "op/__init__.py", "op/numba.py", "op/helper.py",
    },
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize("kernel", USED)
def test_a_hash_covers_what_a_kernel_is_made_of_and_nothing_else(root: Path, kernel: str) -> None:
    roots = {"rooftune.kernels": root}
    assert {str(p.relative_to(root)) for p in sources.files(root / kernel, roots)} == USED[kernel]
    before = sources.digest(root / kernel, roots)
    for name, text in TREE.items():
        (root / name).write_text(text + "\n")
        assert (sources.digest(root / kernel, roots) != before) == (name in USED[kernel]), name
        (root / name).write_text(text)
    assert sources.digest(root / kernel, roots) == before


def test_a_compiled_kernel_is_kept_under_what_its_source_includes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_kernel, "HEADERS", root / sources.HEADERS)
    kernel = cupy_kernel.Kernel(root / "op" / "cupy.cu", "run", (("SIZE", 1),), 32)
    before = kernel.key("sm_90a")
    other = cupy_kernel.Kernel(kernel.source, "run", (("SIZE", 2),), 32)
    assert before not in (kernel.key("sm_80"), other.key("sm_90a"))
    used = {"op/cupy.cu", "op/beside.cuh", "common/cuda/tile.cuh", "common/cuda/deep.cuh"}
    for name, text in TREE.items():
        (root / name).write_text(text + "\n")
        assert (kernel.key("sm_90a") != before) == (name in used), name
        (root / name).write_text(text)


def test_kernels_of_another_package_use_ours_too(root: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs" / "op"
    theirs.mkdir(parents=True)
    (theirs / "mine.py").write_text("from rooftune.kernels.common import other\nfrom plugin.kernels.op import part\n")
    (theirs / "part.py").write_text("")
    roots = {"rooftune.kernels": root, "plugin.kernels": theirs.parent}
    found = {p.name for p in sources.files(theirs / "mine.py", roots)}
    assert found == {"mine.py", "part.py", "other.py", "__init__.py"}


OPERATOR = """
import math
from rooftune.kernels.common import deeper
from rooftune.kernels.common import other

EPS = 2 * math.pi
ROWS = 4
def rows(problem): return helper(problem) * ROWS
def helper(problem): return deeper.ONE
def judge(problem): return other.TWO
OP = dict(judge=judge, eps=EPS)
"""


def test_what_judges_a_competitor_is_no_part_of_it(root: Path) -> None:
    roots = {"rooftune.kernels": root}
    operator, kernel = root / "op" / "__init__.py", root / "op" / "mine.py"
    operator.write_text(OPERATOR)
    kernel.write_text("from rooftune.kernels.op import rows\n")

    def changes(old: str, new: str) -> bool:
        before = sources.digest(kernel, roots)
        operator.write_text(OPERATOR.replace(old, new))
        after = sources.digest(kernel, roots)
        operator.write_text(OPERATOR)
        return before != after

    assert {p.name for p in sources.files(kernel, roots)} == {"mine.py", "__init__.py", "deeper.py"}
    assert not changes("other.TWO", "3")  # nor what only that needs
    assert not changes("2 * math.pi", "1e-5")
    assert not changes("judge=judge", "judge=None")
    assert changes("ROWS = 4", "ROWS = 5")
    assert changes("deeper.ONE", "deeper.ONE + 1")
    kernel.write_text("def run():\n    from . import EPS, rows\n")
    assert changes("2 * math.pi", "1e-5")
    kernel.write_text("from rooftune.kernels.op import *\n")
    assert changes("judge=judge", "judge=None")
    kernel.write_text("from rooftune.kernels import op\n")  # as a whole, so all of it may count
    assert changes("judge=judge", "judge=None")
    kernel.write_text("")
    assert not changes(OPERATOR, "")


def test_a_users_file_is_made_of_what_it_imports_from_beside_it(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Else a tuning would be resumed, and a tuned config used, after its helper changed."""
    home = tmp_path_factory.mktemp("user")
    mine = home / "mine.py"
    mine.write_text("import math, helper\nfrom pack import inner\nfrom rooftune.kernels.common import other\n")
    (home / "pack").mkdir()
    for name in ("helper.py", "unused.py", "pack/__init__.py", "pack/inner.py"):
        (home / name).write_text("import json\n")
    roots = {"rooftune.kernels": root}
    found = sources.files(mine, roots)
    beside = {str(p.relative_to(home)) for p in found if p.is_relative_to(home)}
    assert beside == {"mine.py", "helper.py", "pack/__init__.py", "pack/inner.py"}
    assert root / "common" / "other.py" in found
    before = sources.digest(mine, roots)
    (home / "helper.py").write_text("import csv\n")
    assert sources.digest(mine, roots) != before


def test_a_file_that_is_not_python_has_a_hash(root: Path) -> None:
    broken = root / "op" / "broken.py"
    broken.write_text("def (:\n")
    first = sources.digest(broken, {})
    broken.write_text("def ):\n")
    assert sources.digest(broken, {}) != first


def test_every_shared_file_is_part_of_some_competitor() -> None:
    """A shared file that no competitor reaches is dead, or is reached in a way that `sources` does not see."""
    roots = dict(registry._roots())
    root = roots[registry.KERNELS]
    impls = [impl for op in registry.op_names() for impl in registry.impls(op)]
    reached = {path for impl in impls for path in sources.files(impl.path, roots)}
    reached |= {
        path for op in registry.op_names() for path in sources.files(root / op / "__init__.py", roots)
    }  # judges
    shared = {p for p in (root / "common").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert shared <= reached, sorted(str(p.relative_to(root)) for p in shared - reached)
