"""Triton's interpreter repaired, and its machine code read without a GPU; each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MISSING = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")
ROOT = Path(__file__).parents[2]

KERNELS = """
import json, os, sys
import numpy as np
import torch, triton
import triton.language as tl

@triton.jit
def product(c, a, b, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))

@triton.jit
def convert(y, x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))

@triton.jit
def arithmetic(y, a, b, N: tl.constexpr):
    i = tl.arange(0, N)
    x, z = tl.load(a + i), tl.load(b + i)
    tl.store(y + i, tl.where(x > z, x * z, x + z))

@triton.jit
def count(y, n, STEP: tl.constexpr):
    total = 0
    for i in range(0, n, STEP):
        total += i
    tl.store(y, total)
"""

INTERPRETED = """
from rooftune.kernels.common.triton import emulated
from rooftune.kernels.common import triton_interpret as repair
emulated(lambda: None)
found = {}
g = torch.Generator().manual_seed(0)

def error(dtype, precision="ieee"):
    a, b = (torch.randn(16, 16, generator=g).to(dtype) for _ in range(2))
    c = torch.empty(16, 16)
    product[(1,)](c, a, b, 16, precision)
    want = a.double() @ b.double()
    return float((c - want).norm() / want.norm())

found["dot_bf16"] = error(torch.bfloat16)
found["dot_fp8"] = error(torch.float8_e4m3fn)
found["dot_fp32"] = error(torch.float32)
found["dot_tf32"] = error(torch.float32, "tf32")

edge = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3895e38, 448.0, 464.0, 1e6, 2**-10, 0.0, -0.0]
x = torch.tensor((edge + torch.randn(64, generator=g).tolist())[:64])
for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16):
    y = torch.empty(64, dtype=dtype)
    convert[(1,)](y, x, 64)
    limit = torch.finfo(dtype).max
    want = (x.clamp(-limit, limit) if dtype.itemsize == 1 else x).to(dtype)
    found[f"cast_{dtype}"] = bool(torch.equal(y.float(), want.float()))
    back = torch.empty(64)
    convert[(1,)](back, y, 64)
    found[f"back_{dtype}"] = bool(torch.equal(back, y.float()))
special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
y = torch.empty(4, dtype=torch.bfloat16)
convert[(1,)](y, special, 4)
found["special"] = [str(v) for v in y.float().tolist()]

a, b = (torch.randn(32, generator=g).to(torch.bfloat16) for _ in range(2))
y = torch.empty(32, dtype=torch.bfloat16)
arithmetic[(1,)](y, a, b, 32)
found["arithmetic"] = bool(torch.equal(y, torch.where(a > b, a * b, a + b)))
y = torch.zeros(1, dtype=torch.int32)
count[(1,)](y, 10, 3)
found["loop"] = int(y)
print(json.dumps(found))
"""

COMPILED = """
from rooftune.kernels.common.triton import Launch, Operand
from rooftune.kernels.common.triton_aot import matrix_instructions
found = {}
plain = Operand("bfloat16")
launch = Launch(product, (1,), (Operand("float32"), plain, plain), (), {"N": 64, "PRECISION": "ieee"}, {"num_warps": 4})
for arch in ("sm_80", "sm_90a", "sm_100a", "sm_120a"):
    r = launch.compile(arch)
    found[arch] = [r.registers, r.spill_bytes, r.shared_bytes, r.threads, list(r.tensor_core), r.toolchain]
narrow = Launch(count, (1,), (Operand("int32"),), (96,), {"STEP": 3}, {"num_warps": 1}).compile("sm_90a")
found["no matrix instructions"] = list(narrow.tensor_core)
found["from ptx"] = list(matrix_instructions(b"not machine code", "  wgmma.mma_async.sync.aligned.m64n64k16.f32;"))
try:
    launch.compile("sm_75")
except Exception as error:
    found["unknown"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""

LAUNCHED = """
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from rooftune.kernels.common.triton import Launch, Operand

class Device:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

@triton.jit
def mixed(y, box, absent, n, one, scale, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    tile = box.load([0, 0])
    i = tl.arange(0, N)
    if absent is None:
        tl.store(y + i[:, None] * N + i[None, :], tile * scale + one, mask=(i < n)[None, :])

def entries():
    return set(os.listdir(os.environ["TRITON_CACHE_DIR"]))

box = Operand("float32", (48, 64), (16, 16))
constants = {"N": 16, "TRANSPOSED": False}
launch = Launch(mixed, (1,), (Operand("float32"), box, None), (48, 1, 0.5), constants, {"num_warps": 1})
inputs = (torch.empty(16), box.bind(torch.empty(16)), None)
launch.compile("sm_90a")
before = entries()
driver.set_active(Device())
mixed.warmup(*inputs, *launch.scalars, grid=(1,), **launch.keywords)
same = entries() - before
mixed.warmup(*inputs, 47, 1, 0.5, grid=(1,), **launch.keywords)
found = {"before": len(before), "same": len(same), "another": len(entries() - before)}
launch.compile("sm_80")  # and the driver is as it was
found["driver"] = isinstance(driver.active, Device)
print(json.dumps(found))
"""


def _child(tmp_path: Path, body: str, interpret: str) -> dict[str, Any]:
    """Run kernels and body in a fresh Python: Triton reads TRITON_INTERPRET when it is imported."""
    script = tmp_path / "child.py"
    script.write_text(KERNELS + body)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": interpret, "TRITON_DEFAULT_FP_FUSION": "1"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _child(tmp_path_factory.mktemp("interpreted"), INTERPRETED, "1")


def test_interpreted_products_have_the_error_of_the_hardware(interpreted: dict[str, Any]) -> None:
    for name in ("dot_bf16", "dot_fp8", "dot_fp32"):  # inputs are exact, sums are fp32
        assert interpreted[name] < 1e-6, name
    assert 1e-4 < interpreted["dot_tf32"] < 2e-3  # 13 bits dropped from each operand


def test_interpreted_casts_round_to_nearest_even(interpreted: dict[str, Any]) -> None:
    for dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float16"):
        assert interpreted[f"cast_torch.{dtype}"], dtype
        assert interpreted[f"back_torch.{dtype}"], dtype
    assert interpreted["special"] == ["nan", "inf", "-inf", "1.0"]


def test_interpreted_arithmetic_acts_on_values_not_on_bits(interpreted: dict[str, Any]) -> None:
    assert interpreted["arithmetic"]


def test_interpreted_loops_take_bounds_known_at_run_time(interpreted: dict[str, Any]) -> None:
    assert interpreted["loop"] == 0 + 3 + 6 + 9


@pytest.mark.slow
def test_machine_code_is_read_without_a_gpu(tmp_path: Path) -> None:
    found = _child(tmp_path, COMPILED, "0")
    expected = {"sm_80": "HMMA", "sm_90a": "HGMMA", "sm_100a": "UTC", "sm_120a": "HMMA"}
    for arch, instruction in expected.items():
        registers, spilled, shared, threads, matrix, toolchain = found[arch]
        assert 16 <= registers <= 255, arch
        assert spilled == 0, arch
        assert shared >= 2 * 64 * 64 * 2, arch  # both operands pass through shared memory
        assert threads == 128, arch
        assert any(name.startswith(instruction) for name in matrix), (arch, matrix)
        assert toolchain.startswith("triton ")
        assert "ptxas" in toolchain
    assert found["no matrix instructions"] == []
    assert found["from ptx"] == ["wgmma.mma_async"]
    assert found["unknown"].startswith("UsageError")
    assert "sm_75" in found["unknown"]


def test_a_launch_finds_what_was_compiled_offline(tmp_path: Path) -> None:
    """Triton's own launcher, on a device that only has a name: nothing is compiled again, except for other values."""
    found = _child(tmp_path, LAUNCHED, "0")
    assert found["before"] > 0
    assert found["same"] == 0
    assert found["another"] == 1
    assert found["driver"]


def test_kernels_that_are_interpreted_do_not_compile(tmp_path: Path) -> None:
    body = """
from rooftune.core import UsageError, Unavailable
from rooftune.kernels.common.triton import Launch, Operand, native
launch = Launch(count, (1,), (Operand("int32"),), (96,), {"STEP": 3})
found = {}
for name, call in (("compile", lambda: launch.compile("sm_80")), ("native", lambda: native(launch))):
    try:
        call()
    except (UsageError, Unavailable) as error:
        found[name] = str(error)
print(json.dumps(found))
"""
    found = _child(tmp_path, body, "1")
    assert "TRITON_INTERPRET" in found["compile"]
    assert "TRITON_INTERPRET" in found["native"]
