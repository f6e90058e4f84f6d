"""Exported packages compute the same in a process where rooftune cannot be imported."""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_dispatch import record, store

from rooftune import device, registry
from rooftune.autotune import export, production, standalone, vendor
from rooftune.core import UsageError

ALONE = """
import json, sys
sys.modules["rooftune"] = None  # any import of it raises
import torch
torch.set_num_threads(1)
import tuned_kernels as tuned
from tuned_kernels.dispatch import table
answers = {}
generator = torch.Generator().manual_seed(5)
def normal(*shape): return torch.randn(shape, generator=generator)
x, w, b = normal(8, 64), normal(64), normal(64)
cases = {
    "softmax": ((x,), {}, torch.softmax(x, -1)),
    "layernorm": ((x, w, b), {}, torch.nn.functional.layer_norm(x, (64,), w, b)),
    "layernorm other": ((x[:3], w, b), {}, torch.nn.functional.layer_norm(x[:3], (64,), w, b)),
    "gemm": ((x, normal(64, 16)), {}, None),
}
for name, (tensors, flags, right) in cases.items():
    op = name.split()[0]
    right = tensors[0] @ tensors[1] if right is None else right
    got = getattr(tuned, op)(*tensors, **flags)
    into = torch.full_like(right, 7.0)
    assert getattr(tuned, op)(*tensors, out=into, **flags) is into
    kernel = tuned.best(op, *tensors, **flags)
    assert tuned.best(op, *tensors, **flags) is kernel
    answers[name] = [kernel.impl, kernel.config, kernel.why, float((got - right).abs().max()),
                     float((into - right).abs().max())]
torch.set_num_threads(2)
answers["threads"] = [tuned.best("softmax", x[:, :32].contiguous()).why, len(table()["winners"])]
import tuned_kernels.dispatch as dispatch
dispatch._kernels.clear()
for op, tensors in (("nosuch", (x,)), ("gemm", (x, normal(64, 16).bfloat16()))):
    try:
        dispatch.call(op, *tensors)
    except Exception as error:
        answers[f"refused {op}"] = str(error)
answers["other threads"] = tuned.best("softmax", x).why
assert not any(name.startswith("rooftune.") for name in sys.modules)
print(json.dumps(answers))
"""


@pytest.fixture(autouse=True)
def _steady_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint's load-dependent parts must not make two looks at this machine differ."""
    found = device.find("cpu").identity()
    monkeypatch.setattr(device.Device, "identity", lambda self: dict(found))
    production.forget()


def raced(text: str, ratio: float) -> Any:
    """A stored race in which Numba had this ratio to torch; returns the problem."""
    problem = registry.problem(text)
    torch, numba = registry.impl(f"{problem.op}/torch"), registry.impl(f"{problem.op}/numba")
    shape = {"problem": str(problem), "op": problem.op, "shape": problem.shape, "precision": problem.precision}
    config = numba.load().SPACE.default_for(problem)
    call = torch.load().SPACE.default_for(problem)
    store(record(torch, call, None, **shape), record(numba, config, ratio, ratio - 0.1, **shape))
    return problem


def alone(folder: Path, code: str, *arguments: str) -> Any:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_package_computes_the_same_without_rooftune(tmp_path: Path) -> None:
    problems = [raced("softmax[m=8,n=64]", 1.5), raced("layernorm[m=8,n=64]", 0.5), raced("gemm[m=8,n=16,k=64]", 0.5)]
    here = device.find("cpu")
    older = "softmax[m=8,n=64,sparse,fp32]"  # a flag that the operator has no more
    store(record(registry.impl("softmax/torch"), {}, None, problem=older, shape="m=8,n=64,sparse"))
    known = export.known_problems(here, 1)
    assert set(known) >= set(problems)
    assert older not in map(str, known)
    choices, left = export.winners([*problems, registry.problem("softmax[m=9,n=9]")], here, 1)
    assert list(left) == ["softmax[m=9,n=9,fp32]"]
    target = export.write(tmp_path / "out", choices, here, threads=1)
    answers = alone(tmp_path / "out", ALONE)
    assert answers["softmax"][0] == "softmax/numba"
    assert answers["softmax"][1] == choices[0].use.config
    assert "1.50x torch's speed" in answers["softmax"][2]
    assert answers["layernorm"][0] == "layernorm/torch"
    assert "nothing beats torch" in answers["layernorm"][2]
    assert answers["gemm"][0] == "gemm/torch"
    assert "nothing beats torch" in answers["gemm"][2]
    assert answers["layernorm other"][:1] == ["layernorm/torch"]
    assert answers["layernorm other"][2] == "torch: not among the tuned problems"
    assert all(max(answers[name][3:]) < 1e-4 for name in ("softmax", "layernorm", "layernorm other", "gemm")), answers
    assert answers["other threads"] == "torch: tuned with 1 threads, this process has 2"
    assert answers["refused nosuch"] == "nosuch was not exported; there is: softmax, layernorm, gemm"
    assert answers["refused gemm"] == "gemm: tensor 1 is bfloat16, expected float32"
    text = "\n".join(path.read_text() for path in target.rglob("*.py"))
    assert "from rooftune" not in text
    assert "import rooftune" not in text
    assert "| `softmax[m=8,n=64,fp32]` | softmax/numba |" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UsageError, match="cannot write"):
        export.write(tmp_path / "file", choices, here, threads=1)
    assert "out = tuned_kernels.softmax(a)" in (tmp_path / "out" / "README.md").read_text()
    entry = json.loads((target / "table.json").read_text())["winners"]["softmax[m=8,n=64,fp32]"]
    assert entry["source_hash"] == registry.impl("softmax/numba").source_hash
    assert entry["ratio_ci"] == [1.4, 1.6]


def test_an_export_replaces_its_own_folder_only(tmp_path: Path) -> None:
    here = device.find("cpu")
    choices, _ = export.winners([raced("softmax[m=8,n=64]", 1.5)], here, 1)
    target = export.write(tmp_path, choices, here, 1)
    assert (target / "kernels/softmax/numba.py").exists()
    raced("softmax[m=8,n=64]", 0.5)
    choices, _ = export.winners([registry.problem("softmax[m=8,n=64]")], here, 1)
    export.write(tmp_path, choices, here, 1)
    assert not (target / "kernels/softmax/numba.py").exists()
    (target / "table.json").unlink()
    with pytest.raises(UsageError, match="is no export of ours"):
        export.write(tmp_path, choices, here, 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# my project\n")
    with pytest.raises(UsageError, match=r"README\.md exists and is no export's"):
        export.write(tmp_path / "mine", choices, here, 1)
    assert (tmp_path / "mine" / "README.md").read_text() == "# my project\n"
    with pytest.raises(UsageError, match="run or tune first"):
        export.write(tmp_path, [], here, 1)
    with pytest.raises(UsageError, match="lower-case"):
        export.write(tmp_path, choices, here, 1, "my-kernels")


def test_float32_tensors_are_fp32_wherever_tf32_stands_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(precision: str) -> dict[str, Any]:
        pairs = [["float32", ["m", "k"]], ["float32", ["k", "n"]]]
        return {"precision": precision, "flags": {}, "inputs": pairs, "output": ["float32", ["m", "n"]]}

    torch = {"impl": "gemm/torch", "module": "kernels.gemm.torch", "torch": True, "products": True}
    about = {"dims": ["m", "n", "k"], "torch": torch, "forms": [form("tf32"), form("fp32")]}
    monkeypatch.setattr(standalone, "table", lambda: {"operators": {"gemm": about}, "winners": {}})
    asked: list[str] = []
    monkeypatch.setattr(standalone, "_build", lambda problem, *rest: asked.append(problem.precision))
    a = importlib.import_module("torch").zeros(4, 4)
    standalone._choose("gemm", (a, a), None, {})
    standalone._choose("gemm", (a, a), "tf32", {})
    assert asked == ["fp32", "tf32"]
    about["forms"] = [form("tf32")]
    with pytest.raises(UsageError, match="was not exported; there is: tf32"):
        standalone._choose("gemm", (a, a), None, {})


def unbound(tree: ast.Module) -> set[str]:
    """Names that are read and bound nowhere in the module: a statement that was needed stayed behind."""
    bound = set(dir(builtins)) | {"__file__", "__package__", "__name__"}
    read: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return read - bound


@pytest.mark.parametrize("impl", [i for op in registry.op_names() for i in registry.impls(op)], ids=lambda i: i.key)
def test_every_competitors_source_can_leave_or_says_why_not(impl: registry.Impl) -> None:
    package = vendor.Package()
    if impl.per_shape:  # torch.compile's: they ask the registry for inputs to compile with
        with pytest.raises(UsageError, match=r"needs rooftune\.registry"):
            package.add(impl.module, "build")
        return
    package.add(impl.module, "build")
    for path, text in package.files().items():
        assert unbound(ast.parse(text)) == set(), path
        assert "from rooftune" not in text, path
    assert not {"emulate", "compile_for"} & {name for s in package.kept[impl.module] for name in s.binds}


COMPILED = """
import json, sys
sys.modules["rooftune"] = None
from cuda_alone.core import Problem
from cuda_alone.kernels.common.cupy import compile_cubin
from cuda_alone.kernels.softmax import cupy as ours
problem, config = Problem.parse(sys.argv[1]), json.loads(sys.argv[2])
cubin, *_ = compile_cubin(ours._kernel(problem, config), "sm_90a")
print(json.dumps(cubin.stat().st_size))
"""


def test_cuda_sources_travel_with_the_headers_they_include(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impl = registry.impl("softmax/cupy")
    if impl.missing:
        pytest.skip(impl.missing)
    package = vendor.Package()
    package.add(impl.module, "build")
    for path, text in (package.files() | export._data(package)).items():
        place = tmp_path / "cuda_alone" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    (tmp_path / "cuda_alone" / "__init__.py").touch()
    problem = registry.problem("softmax[m=64,n=512,fp32]")
    config = json.dumps(impl.load().SPACE.default_for(problem))
    monkeypatch.setenv("ROOFTUNE_CACHE_DIR", str(tmp_path / "cache"))
    assert alone(tmp_path, COMPILED, str(problem), config) > 1000


def test_torch_compile_wins_but_the_next_best_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = raced("softmax[m=8,n=64]", 1.5)
    monkeypatch.setattr(export, "_refused", lambda c: "is bound" if c.impl == "softmax/numba" else "")
    choices, left = export.winners([problem], device.find("cpu"), 1)
    assert choices[0].use.impl == "softmax/torch"
    assert left == {"softmax[m=8,n=64,fp32] softmax/numba": "is bound"}


def test_processor_is_named() -> None:
    assert standalone.processor() == device.find("cpu").name
