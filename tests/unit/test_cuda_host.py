"""The emulation of CUDA on the CPU is itself on trial here: it must find what is wrong, and nothing else.

Fragment layouts are written out from the PTX ISA ("Matrix fragments for mma.m16n8k*", "ldmatrix"), not
taken from the emulation.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rooftune import registry
from rooftune.check import generator
from rooftune.core import RooftuneError, Unavailable, UsageError
from rooftune.kernels.common import cupy_host
from rooftune.kernels.common.cupy_kernel import Kernel, Launch

try:
    cupy_host.compiler()
except Unavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

PROBES = r"""
#include "rooftune.cuh"
using namespace rt;

template <int P> __device__ void product(const unsigned* a, const unsigned* b, void* d) {
  using Acc = typename Format<P>::Acc;
  const int lane = threadIdx.x;
  unsigned ra[4], rb[2];
  Acc acc[4] = {};
  for (int i = 0; i < 4; i++) ra[i] = a[4 * lane + i];
  for (int i = 0; i < 2; i++) rb[i] = b[2 * lane + i];
  mma<P>(acc, ra, rb);
  for (int i = 0; i < 4; i++) static_cast<Acc*>(d)[4 * lane + i] = acc[i];
}

extern "C" __global__ void probe(int what, int variant, void* out, const void* in, const void* more) {
  SHARED_MEMORY(shared);
  float* mirror = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x, n = blockDim.x;
  float* y = static_cast<float*>(out) + blockIdx.x * n;
  const float* x = static_cast<const float*>(in) + blockIdx.x * n;
  switch (what) {
    case 0:  // reverse a block through shared memory; variant 0 forgets the barrier
      mirror[i] = x[i];
      if (variant) __syncthreads();
      y[i] = mirror[n - 1 - i];
      break;
    case 1:  // copy asynchronously; variant 0 forgets the wait, 1 waits for too little, 3 only zero-fills
      copy_async<4>(mirror + i, x + i, variant != 3);
      copy_commit();
      if (variant == 1) copy_wait<1>();
      if (variant >= 2) copy_wait<0>();
      __syncthreads();
      y[i] = mirror[n - 1 - i];
      break;
    case 2:  // half a warp at a shuffle, half at a barrier
      if (i < 16) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
      else __syncthreads();
      break;
    case 3:  // half a warp at one collective, half at another
      if (i < 16) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
      else __ballot_sync(0xffffffffu, 1);
      break;
    case 4:  // one element behind the shared memory
      mirror[i + 1] = 0.0f;
      break;
    case 5:  // two halves of a warp shuffle among themselves; one thread in eight has returned at a barrier
      if (i % 8 == 7 && i >= 32) return;
      __syncthreads();
      if (i < 32) y[i] = __shfl_xor_sync(i < 16 ? 0x0000ffffu : 0xffff0000u, x[i], 15);
      break;
    case 6: y[i] = reduce_threads<128>(x[i], mirror, Sum()); break;
    case 7: y[i] = __ballot_sync(0xffffffffu, x[i] > 0) % 65536; break;
    case 10: product<TF32>(static_cast<const unsigned*>(in), static_cast<const unsigned*>(more), out); break;
    case 11: product<FP16>(static_cast<const unsigned*>(in), static_cast<const unsigned*>(more), out); break;
    case 12: product<BF16>(static_cast<const unsigned*>(in), static_cast<const unsigned*>(more), out); break;
    case 13: product<INT8>(static_cast<const unsigned*>(in), static_cast<const unsigned*>(more), out); break;
    case 14: product<FP8>(static_cast<const unsigned*>(in), static_cast<const unsigned*>(more), out); break;
    case 20: {  // ldmatrix of four 8x8 matrices, one after another; variant 1 transposes
      unsigned r[4];
      for (int c = 0; c < 4; c++) mirror[4 * i + c] = static_cast<const float*>(in)[4 * i + c];
      __syncwarp();
      if (variant) load_matrices_transposed(r, shared + 16 * i);
      else load_matrices(r, shared + 16 * i);
      for (int c = 0; c < 4; c++) static_cast<unsigned*>(out)[4 * i + c] = r[c];
      break;
    }
    case 30: static_cast<unsigned short*>(out)[i] = to_f16(x[i]).bits; break;
    case 31: static_cast<unsigned short*>(out)[i] = to_bf16(x[i]).bits; break;
    case 32: y[i] = __int_as_float(to_tf32(x[i])); break;
    case 33: y[i] = to_float(f16{static_cast<const unsigned short*>(in)[i + blockIdx.x * n]}); break;
    case 34: y[i] = to_float(e4m3{static_cast<const unsigned char*>(in)[i]}); break;
  }
}
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of our own, so that every run compiles."""
    place = tmp_path_factory.mktemp("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOFTUNE_CACHE_DIR", str(place))
        (place / "probes.cu").write_text(PROBES)
        yield place


def _probe(folder: Path, threads: int) -> Launch:
    """The probes with as many threads, and four floats of shared memory for each."""
    return cupy_host.host(Kernel(folder / "probes.cu", "probe", (), threads, 16 * threads))


def _dies(folder: Path, what: int, threads: int = 64) -> str:
    """What a probe that aborts its process says."""
    script = f"""
from pathlib import Path
from rooftune.kernels.common import cupy_host, cupy_kernel
kernel = cupy_kernel.Kernel(Path({str(folder / "probes.cu")!r}), "probe", (), {threads}, {4 * threads})
cupy_host.host(kernel)(1, {what}, 0, None, None, None)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


def test_a_missing_barrier_shows_in_every_order(folder: Path) -> None:
    x = torch.randn(2, 128)
    for order in cupy_host.ORDERS:
        with cupy_host.thread_order(order, seed=7):
            good, bad = torch.zeros(2, 128), torch.zeros(2, 128)
            _probe(folder, 128)(2, 0, 1, good, x, None)
            _probe(folder, 128)(2, 0, 0, bad, x, None)
        assert torch.equal(good, x.flip(1)), order
        assert bad.isnan().any(), order  # what was not yet written is poison


@pytest.mark.parametrize(("variant", "right"), [(0, False), (1, False), (2, True)])
def test_an_asynchronous_copy_is_complete_after_its_wait_only(folder: Path, variant: int, right: bool) -> None:
    x, y = torch.randn(128), torch.zeros(128)
    _probe(folder, 128)(1, 1, variant, y, x, None)
    assert torch.equal(y, x.flip(0)) if right else bool(y.isnan().all())


def test_an_asynchronous_copy_from_outside_writes_zeros(folder: Path) -> None:
    y = torch.ones(128)
    _probe(folder, 128)(1, 1, 3, y, torch.randn(128), None)
    assert not y.any()


def test_a_deadlock_says_where_everybody_stands(folder: Path) -> None:
    said = _dies(folder, 2)
    assert "deadlock in block 0: of 64 threads 0 have returned, 48 wait at __syncthreads" in said
    assert "thread 0 at __shfl_xor_sync" in said


def test_lanes_at_different_collectives_are_named(folder: Path) -> None:
    said = _dies(folder, 3)
    assert "is at __ballot_sync" in said
    assert "is at __shfl_xor_sync" in said


def test_a_write_behind_shared_memory_is_found(folder: Path) -> None:
    assert "bytes behind its 256 bytes of shared memory" in _dies(folder, 4)


def test_without_assembly_it_is_the_same(folder: Path) -> None:
    """Other processors than x86-64 switch stacks by ucontext."""
    portable = Kernel(folder / "probes.cu", "probe", (("ROOFTUNE_UCONTEXT", 1),), 128, 2048)
    x, y = torch.randn(128), torch.zeros(128)
    cupy_host.host(portable)(1, 0, 1, y, x, None)
    assert torch.equal(y, x.flip(0))


def test_collectives_of_part_of_a_warp_and_returned_threads(folder: Path) -> None:
    x, y = torch.arange(64.0), torch.zeros(64)
    _probe(folder, 64)(1, 5, 0, y, x, None)
    assert y[:32].tolist() == [float(i ^ 15) for i in range(32)]


def test_reduction_and_ballot(folder: Path) -> None:
    x, y = torch.arange(128.0), torch.zeros(128)
    _probe(folder, 128)(1, 6, 0, y, x, None)
    assert set(y.tolist()) == {127 * 64.0}
    signs = torch.tensor([1.0 if i % 3 == 0 else -1.0 for i in range(32)])
    _probe(folder, 32)(1, 7, 0, y, signs, None)
    assert set(y[:32].tolist()) == {float(sum(1 << i for i in range(0, 16, 3)))}


def _fragments(a: np.ndarray, b: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Registers [32, 4] of a: [16, k] and [32, 2] of b: [k, 8] (numpy storage), by the PTX ISA's formulas."""
    per_word, words_a, words_b = 4 // a.itemsize, np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for r in range(4):
            row, first = group + (8 if r % 2 else 0), thread * per_word + (a.shape[1] // 2 if r >= 2 else 0)
            words_a[lane, r] = np.ascontiguousarray(a[row, first : first + per_word]).view(np.uint32)[0]
        for r in range(2):
            first = thread * per_word + (b.shape[0] // 2 if r else 0)
            words_b[lane, r] = np.ascontiguousarray(b[first : first + per_word, group]).view(np.uint32)[0]
    return torch.from_numpy(words_a.view(np.int32)), torch.from_numpy(words_b.view(np.int32))


@pytest.mark.parametrize(
    ("what", "dtype"), [(10, "float32"), (11, "float16"), (12, "bfloat16"), (13, "int8"), (14, "float8_e4m3fn")]
)
def test_mma_fragments_are_those_of_the_ptx_isa(folder: Path, what: int, dtype: str) -> None:
    kind = getattr(torch, dtype)
    k = 32 // kind.itemsize
    a = torch.randint(-8, 9, (16, k)).float().to(kind)  # exact in every format and in the sums
    b = torch.randint(-8, 9, (k, 8)).float().to(kind)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[kind.itemsize]
    words_a, words_b = _fragments(a.view(bits).numpy(), b.view(bits).numpy())
    d = torch.zeros(32, 4, dtype=torch.int32 if dtype == "int8" else torch.float32)
    _probe(folder, 32)(1, what, 0, d, words_a, words_b)
    want = a.double() @ b.double()
    for lane in range(32):
        for i in range(4):
            row, col = (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2
            assert d[lane, i].item() == want[row, col].item(), (lane, i)


def test_ldmatrix_deals_rows_or_columns(folder: Path) -> None:
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    for transposed in (0, 1):
        registers = torch.zeros(32, 4, dtype=torch.int32)
        _probe(folder, 32)(1, 20, transposed, registers, matrices, None)
        halves = registers.view(torch.int16).view(32, 4, 2)
        m = matrices.transpose(1, 2) if transposed else matrices
        for lane in range(32):
            want = m[:, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert torch.equal(halves[lane], want), (transposed, lane)


def test_conversions_agree_with_torch(folder: Path) -> None:
    exponents = torch.randint(-30, 20, (122,)).float().exp2() * torch.randn(122)
    edges = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65519.996, 65520.0])
    x = torch.cat((exponents, edges))
    for what, dtype in ((30, torch.float16), (31, torch.bfloat16)):
        y = torch.zeros(128, dtype=torch.int16)
        _probe(folder, 128)(1, what, 0, y, x, None)
        assert torch.equal(y, x.to(dtype).view(torch.int16)), dtype
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    wide = torch.zeros(65536)
    _probe(folder, 128)(512, 33, 0, wide, every, None)
    assert torch.equal(wide.nan_to_num(0.5), every.view(torch.float16).float().nan_to_num(0.5))
    small, wide = torch.arange(256, dtype=torch.int32).to(torch.uint8), torch.zeros(256)
    _probe(folder, 256)(1, 34, 0, wide, small, None)
    assert torch.equal(wide.nan_to_num(0.5), small.view(torch.float8_e4m3fn).float().nan_to_num(0.5))


def test_tf32_rounds_to_the_nearest(folder: Path) -> None:
    x, y = torch.randn(128), torch.zeros(128)
    _probe(folder, 128)(1, 32, 0, y, x, None)
    assert not (y.view(torch.int32) & 0x1FFF).any()
    assert ((x - y).abs() <= x.abs() * 2**-11).all()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("    copy_wait<STAGES - 2>();\n", "a tile is used before its copies are complete"),
        ("    __syncthreads();  // the tile is there for all", "a tile is used before the others' copies"),
    ],
)
def test_a_broken_gemm_is_found(folder: Path, line: str, fault: str) -> None:
    problem = registry.problem("gemm[m=64,n=64,k=96,fp16]")
    module = registry.impl("gemm/cupy").load()
    config = {**module.SPACE.default_for(problem), "block_m": 32, "block_n": 64, "warps_m": 1, "warps_n": 2}
    assert module.SPACE.valid(config, problem)
    kernel = module._kernel(problem, config)
    text = kernel.source.read_text()
    assert text.count(line) == 1, fault
    broken = folder / "broken.cu"
    broken.write_text(text.replace(line, "    //" if line.strip().startswith("__") else ""))
    a, b = registry.op("gemm").inputs(problem, generator("cpu", 1), "cpu", "normal")
    out = torch.zeros(64, 64, dtype=torch.float16)
    faulty = Kernel(broken, kernel.entry, kernel.macros, kernel.threads, kernel.shared_bytes)
    cupy_host.host(faulty)(2, out, a, b, None, None, None, 64, 64, 96)
    assert out.isnan().any(), fault


def test_errors_are_one_line(folder: Path) -> None:
    (folder / "bad.cu").write_text('#include "rooftune.cuh"\nextern "C" __global__ void probe() { nothing(); }\n')
    with pytest.raises(RooftuneError, match=r"failed on bad\.cu: .*nothing"):
        cupy_host.host(Kernel(folder / "bad.cu", "probe", (), 32))
    with pytest.raises(UsageError, match="unknown order of threads 'sideways'"), cupy_host.thread_order("sideways"):
        pass
    with pytest.raises(UsageError, match="contiguous and aligned to 16 bytes"):
        _probe(folder, 128)(1, 0, 1, torch.zeros(129)[1:], torch.zeros(128), None)
