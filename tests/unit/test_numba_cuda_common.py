"""Numba-CUDA's common part: number formats, the CPU scheduler, tensor-core fragments, the compile helper.

The scheduler and its operations need only numpy and run here; what chooses between CPU and GPU operations
does so once, at import, and therefore runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rooftune.kernels.common import numba_cuda_block as block
from rooftune.kernels.common import numba_cuda_sim as sim

ROOT = Path(__file__).resolve().parents[2]


def child(code: str, emulate: bool) -> str:
    """Run code in a fresh interpreter; returns what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    env |= {"PYTHONPATH": str(ROOT), **({"NUMBA_ENABLE_CUDASIM": "1"} if emulate else {})}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


# --- numbers -----------------------------------------------------------------------------------------


def test_every_bf16_survives_the_round_trip() -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    wide = sim.bf16_to_f32(bits)
    back = sim.f32_to_bf16(wide)
    assert (back[~np.isnan(wide)] == bits[~np.isnan(wide)]).all()
    assert np.isnan(sim.bf16_to_f32(back[np.isnan(wide)])).all()


@pytest.mark.parametrize(
    ("fp32", "bf16"),
    [
        (0x3F808000, 0x3F80),  # a tie goes to the even neighbour: down
        (0x3F818000, 0x3F82),  # up
        (0x3F808001, 0x3F81),  # just above a tie
        (0x3F807FFF, 0x3F80),  # just below
        (0x7F7FFFFF, 0x7F80),  # the largest fp32 rounds to infinity
        (0xFF800000, 0xFF80),  # minus infinity
        (0x80000000, 0x8000),  # minus zero
        (0x7F800001, 0x7FFF),  # a NaN whose upper half alone would read infinity
    ],
)
def test_bf16_rounds_to_nearest_even(fp32: int, bf16: int) -> None:
    value = np.array([fp32], np.uint32).view(np.float32)
    assert int(sim.f32_to_bf16(value)[0]) == bf16


def test_packed_words_hold_the_first_value_low() -> None:
    assert sim.PACK["bf16"](1.0, -2.0) == 0xC0003F80
    assert sim.PACK["fp16"](1.0, -2.0) == 0xC0003C00


def test_fmax_prefers_the_number() -> None:
    assert sim.fmax(math.nan, 1.0) == 1.0
    assert sim.fmax(1.0, math.nan) == 1.0
    assert sim.fmax(-math.inf, -3.0) == -3.0


def test_erf_is_within_its_stated_error() -> None:
    points = np.linspace(-6, 6, 1201, dtype=np.float32)
    assert max(abs(float(sim.erf(x)) - math.erf(float(x))) for x in points) < 5e-7
    assert sim.erf(np.float32(np.inf)) == 1
    assert sim.erf(np.float32(-np.inf)) == -1
    assert math.isnan(sim.erf(np.float32(np.nan)))


# --- scheduler ---------------------------------------------------------------------------------------

cuda = block.cuda


def _rotate(out: Any, barrier: bool) -> None:
    shared = cuda.shared.array(64, np.float32)
    shared[cuda.threadIdx.x] = cuda.threadIdx.x
    if barrier:
        cuda.syncthreads()
    out[cuda.blockIdx.x * 64 + cuda.threadIdx.x] = shared[(cuda.threadIdx.x + 1) % 64]


def test_blocks_threads_and_barriers() -> None:
    out = np.zeros(128, np.float32)
    for _ in range(2):  # forward and reverse order
        sim.launch(_rotate, 2, 64, (out, True))
        assert (out == np.tile(np.roll(np.arange(64), -1), 2)).all()


def test_a_missing_barrier_reads_what_nobody_wrote() -> None:
    out = np.zeros(64, np.float32)
    for _ in range(2):
        sim.launch(_rotate, 1, 64, (out, False))
        assert np.isnan(out).any()


def test_a_barrier_that_some_threads_miss_is_an_error() -> None:
    def kernel() -> None:
        if cuda.threadIdx.x < 32:
            cuda.syncthreads()

    with pytest.raises(RuntimeError, match="wait for others"):
        sim.launch(kernel, 1, 64, ())


@pytest.mark.parametrize("index", [-1, 64])
def test_an_index_outside_is_an_error(index: int) -> None:
    def kernel(array: Any) -> None:
        sim.ACCESS["fp32"][0](array, index)

    with pytest.raises(IndexError, match="64"):
        sim.launch(kernel, 1, 32, (np.zeros(64, np.float32),))


def test_a_block_is_whole_warps() -> None:
    with pytest.raises(ValueError, match="whole warps"):
        sim.launch(lambda: None, 1, 48, ())


def test_a_copy_lands_when_it_is_waited_for() -> None:
    source = np.arange(128, dtype=np.float32)
    seen: dict[int, tuple[float, float, float]] = {}
    wait = sim.copy_wait(0)

    def kernel() -> None:
        x = cuda.threadIdx.x
        shared = cuda.shared.array(256, np.float32)
        sim.copy16(shared, 4 * x, source, 4 * x, True)
        sim.copy16(shared, 128 + 4 * x, source, 4 * x, False)
        sim.copy_commit()
        before = float(shared[4 * x])
        wait()
        seen[x] = (before, float(shared[4 * x]), float(shared[128 + 4 * x]))

    sim.launch(kernel, 1, 32, ())
    assert all(math.isnan(b) and after == 4 * x and outside == 0 for x, (b, after, outside) in seen.items())


def test_a_warp_shuffles_among_its_own_lanes() -> None:
    out = np.zeros(64, np.float32)

    def kernel() -> None:
        value = np.float32(cuda.threadIdx.x)
        for mask in (16, 8, 4, 2, 1):
            value += sim.shfl_xor(value, mask)
        out[cuda.threadIdx.x] = value

    sim.launch(kernel, 1, 64, ())
    assert (out[:32] == 496).all()
    assert (out[32:] == 496 + 1024).all()


# --- fragments ---------------------------------------------------------------------------------------

FRAGMENTS = """
import numpy as np
from rooftune.kernels.common import numba_cuda as common, numba_cuda_sim as sim
from rooftune.kernels.common.numba_cuda import cuda
from rooftune.kernels.common.numba_cuda_tiles import Tile, filler, reader_a, reader_b

rng = np.random.default_rng(0)
K, M, N = 32, 32, 32
for precision, encode, decode in (("fp16", sim.f32_to_f16, sim.f16_to_f32), ("bf16", sim.f32_to_bf16, sim.bf16_to_f32)):
    for a_kinner in (True, False):
        for b_kinner in (True, False):
            # matrices smaller than their tiles, and not a multiple of 8: zeros must fill the rest
            m, n, k = (M, N, K) if a_kinner == b_kinner else (27, 21, 19)
            a = encode(rng.standard_normal((m, k)).astype(np.float32))
            b = encode(rng.standard_normal((k, n)).astype(np.float32))
            a_flat = np.ascontiguousarray(a if a_kinner else a.T).reshape(-1)
            b_flat = np.ascontiguousarray(b.T if b_kinner else b).reshape(-1)
            tile_a = Tile(M, K, k, m, k, 32) if a_kinner else Tile(K, M, m, k, m, 32)
            tile_b = Tile(N, K, k, n, k, 32) if b_kinner else Tile(K, N, n, k, n, 32)
            fill_a, fill_b = filler(tile_a), filler(tile_b)
            read_a, read_b = reader_a(tile_a.inner, a_kinner), reader_b(tile_b.inner, b_kinner)
            wait, mma = common.copy_wait(0), common.MMA[precision]

            def kernel(c, a, b):
                sa = cuda.shared.array(M * K, common.uint16, 16)
                sb = cuda.shared.array(N * K, common.uint16, 16)
                fa = cuda.local.array(4, common.uint32)
                fb = cuda.local.array(8, common.uint32)
                acc = cuda.local.array(16, common.float32)
                fill_a(sa, 0, a, 0, 0, 0)
                fill_b(sb, 0, b, 0, 0, 0)
                common.copy_commit()
                wait()
                cuda.syncthreads()
                lane = cuda.threadIdx.x
                for i in range(0, M, 16):
                    for x in range(16):
                        acc[x] = np.float32(0)
                    for step in range(0, K, 16):
                        read_a(fa, 0, sa, 0, i, step)
                        read_b(fb, 0, sb, 0, 0, step)
                        read_b(fb, 4, sb, 0, 16, step)
                        mma(acc, 0, fa, 0, fb, 0, 4)
                    for j in range(4):
                        for e in range(4):
                            c[i + lane // 4 + e // 2 * 8, 8 * j + lane % 4 * 2 + e % 2] = acc[4 * j + e]

            c = np.full((M, N), np.nan, np.float32)
            sim.launch(kernel, 1, 32, (c, a_flat, b_flat))
            want = np.zeros((M, N))
            want[:m, :n] = decode(a).astype(np.float64) @ decode(b).astype(np.float64)
            assert np.abs(c - want).max() < 1e-5, (precision, a_kinner, b_kinner)
print("ok")
"""


def test_fragments_multiply_in_every_storage_order() -> None:
    assert child(FRAGMENTS, emulate=True) == "ok"


def test_swizzled_rows_are_read_without_bank_conflicts() -> None:
    code = """
from rooftune.kernels.common.numba_cuda_tiles import _fold
for inner in (16, 32, 64, 128, 256):
    fold = _fold(inner)
    for first in (0, 8):
        for chunk in range(inner // 8):
            groups = {(r * (inner // 8) + (chunk ^ fold(r))) % 8 for r in range(first, first + 8)}
            assert len(groups) == 8, (inner, chunk)  # 8 rows, 8 different 16-byte bank groups
print("ok")
"""
    assert child(code, emulate=True) == "ok"


# --- native process ----------------------------------------------------------------------------------

COMPILE = """
from rooftune import registry
from rooftune.core import Unavailable, UsageError
problem = registry.problem("gemm[m=64,n=64,k=64,bf16,transpose=nt,epilogue=bias_gelu]")
gemm = registry.impl("gemm/numba_cuda").load()
config = gemm.SPACE.default_for(problem)
for wrong in (lambda: gemm.compile_for(problem, config, "sm_10"), lambda: gemm.emulate(problem, config)):
    try:
        wrong()
        raise SystemExit("accepted")
    except UsageError as error:
        assert "sm_90a" in str(error) or "NUMBA_ENABLE_CUDASIM" in str(error)
try:
    found = gemm.compile_for(problem, config, "sm_90a")
except Unavailable as error:
    print("unavailable:", error)
else:
    assert found.spill_bytes == 0 and found.threads == 128, found
    assert 32 < found.registers <= 255 and found.shared_bytes == 24576, found
    assert found.tensor_core == ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",), found
    print("ok")
"""


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda not installed")
def test_machine_code_without_a_gpu() -> None:
    printed = child(COMPILE, emulate=False)
    if printed.startswith("unavailable:"):
        pytest.skip(printed)
    assert printed == "ok"


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda not installed")
def test_building_without_a_driver_is_said_and_does_not_hang() -> None:
    code = """
from rooftune.kernels.common import numba_cuda as common
from rooftune.core import Unavailable
common.has_driver = lambda: False
try:
    common.build(common.Launch(lambda: None, 1, 32, ("fp32",)))
except Unavailable as error:
    print(error)
"""
    assert "libcuda.so.1" in child(code, emulate=False)
