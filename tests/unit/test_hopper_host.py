"""The emulation of TMA, mbarriers, clusters and wgmma: right against formulas written out here, and it finds faults.

Layouts are from the PTX ISA (swizzle: 16-byte chunk xor line modulo 8), not from the emulation.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rooftune import registry
from rooftune.check import generator
from rooftune.core import Unavailable, UsageError
from rooftune.kernels.common import cupy, cupy_driver, cupy_host, cupy_tensormap
from rooftune.kernels.common.cupy_kernel import Kernel, Launch

try:
    cupy_host.compiler()
except Unavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

PROBES = Path(__file__).with_name("hopper_probes.cu")
KERNEL = Kernel(PROBES, "probe", (("CLUSTER_SIZE", 2),), 128, 32768 + 64)
BLOCKS = 2  # one cluster


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of our own, so that every run compiles."""
    place = tmp_path_factory.mktemp("hopper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOFTUNE_CACHE_DIR", str(place))
        yield place


@pytest.fixture(scope="module")
def probe() -> Launch:
    return cupy_host.host(KERNEL)


def _map(tensor: torch.Tensor, lines: int = 64) -> cupy_tensormap.TensorMap:
    size = tensor.element_size()
    made = cupy_tensormap.layout(tensor.dtype, size, tensor.shape[0], tensor.shape[1], (128 // size, lines))
    return cupy_tensormap.bind(tensor, made)


def _whole(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(5))


def _product(probe: Launch, what: int, fault: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What the probe computes, and a b."""
    dtype = torch.int8 if what == 2 else torch.bfloat16
    a, b = _whole(64, 128 if what == 2 else 64).to(dtype), _whole(64, 128 if what == 2 else 64).to(dtype)
    out = torch.zeros(BLOCKS, 64, 64, dtype=torch.int32 if what == 2 else torch.float32)
    probe(BLOCKS, what, fault, out, _map(a), _map(b))
    return out.double(), a.double().t() @ b.double() if what == 1 else a.double() @ b.double().t()


@pytest.mark.parametrize("what", [0, 1, 2], ids=["along k", "along m and n", "int8"])
@pytest.mark.parametrize("order", cupy_host.ORDERS)
def test_a_product_through_descriptors_is_exact(probe: Launch, what: int, order: str) -> None:
    with cupy_host.thread_order(order, seed=3):
        got, want = _product(probe, what)
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], want)


@pytest.mark.parametrize("fault", [1, 2], ids=["tiles not awaited", "product not awaited"])
@pytest.mark.parametrize("order", cupy_host.ORDERS)
def test_a_missing_wait_shows_in_every_order(probe: Launch, order: str, fault: int) -> None:
    with cupy_host.thread_order(order, seed=3):
        got, _ = _product(probe, 0, fault)
    assert got.isnan().any()


def test_a_box_is_swizzled_and_filled_with_zeros(probe: Launch) -> None:
    x = _whole(100, 72).to(torch.bfloat16)  # the box covers columns -32 to 31 and lines 56 to 119
    out = torch.full((BLOCKS, 64, 64), -1, dtype=torch.bfloat16)
    probe(BLOCKS, 3, 0, out, _map(x), _map(x))
    for line in range(64):
        for col in range(64):
            chunk = col // 8 ^ line % 8
            inside = col >= 32 and 56 + line < 100
            want = x[56 + line, col - 32].item() if inside else 0.0
            assert out[0, line, chunk * 8 + col % 8].item() == want, (line, col)


@pytest.mark.parametrize("order", cupy_host.ORDERS)
def test_a_cluster_shares_what_each_block_fetches(probe: Launch, order: str) -> None:
    x = _whole(128, 64).to(torch.bfloat16)
    out = torch.zeros(BLOCKS, 2, 64, 64, dtype=torch.bfloat16)
    with cupy_host.thread_order(order, seed=9):
        probe(BLOCKS, 4, 0, out, _map(x), _map(x, lines=32))
    lines = torch.arange(64)
    chunk = torch.arange(8)[None, :] ^ (lines % 8)[:, None]
    for block in range(BLOCKS):
        for turn in range(2):
            plain = out[block, turn].view(64, 8, 8).gather(1, chunk[:, :, None].expand(64, 8, 8)).view(64, 64)
            assert torch.equal(plain, x[64 * turn : 64 * turn + 64]), (block, turn)


def test_a_tile_given_back_too_early_shows(probe: Launch) -> None:
    x = _whole(128, 64).to(torch.bfloat16)
    out = torch.zeros(BLOCKS, 2, 64, 64, dtype=torch.bfloat16)
    probe(BLOCKS, 4, 1, out, _map(x), _map(x, lines=32))
    assert out[:, 0].isnan().any()


def test_a_tensor_store_writes_what_stmatrix_dealt(probe: Launch) -> None:
    out = torch.zeros(100, 64, dtype=torch.int16).view(torch.float16)  # the second block's box ends outside
    probe(BLOCKS, 5, 0, None, _map(out), _map(out))
    want = torch.arange(64 * 64, dtype=torch.int16).view(64, 64)
    assert torch.equal(out.view(torch.int16), torch.cat((want, want[:36])))


def _dies(what: int, fault: int) -> str:
    """What a probe that aborts its process says."""
    script = f"""
import ctypes
from pathlib import Path
from rooftune.kernels.common import cupy_host, cupy_kernel
from rooftune.kernels.common.cupy_tensormap import Layout, TensorMap
kernel = cupy_kernel.Kernel(Path({str(PROBES)!r}), "probe", (("CLUSTER_SIZE", 2),), 128, 32832)
room = ctypes.create_string_buffer(128 * 64 * 2)
a = TensorMap(ctypes.addressof(room), Layout("bfloat16", 2, (64, 128, 1), (128, 16384), (64, 64)))
cupy_host.host(kernel)(2, {what}, {fault}, None, a, a)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


@pytest.mark.parametrize(
    ("what", "fault", "said"),
    [
        (0, 3, "wgmma without wgmma.fence"),
        (5, 1, "without fence.proxy.async"),
        (6, 0, "deadlock in block 0: of 128 threads 0 have returned, 0 wait at __syncthreads, 0 in a warp collective, "
               "128 elsewhere; thread 0 at mbarrier.try_wait"),
        (6, 1, "where no barrier was initialised"),
        (6, 2, "more than 1 arrivals in a phase"),
        (7, 0, "returned with 2 asynchronous operations under way"),
        (7, 1, "reaches block 0, which has returned"),
    ],
)  # fmt: skip
def test_a_fault_that_ends_the_process_is_named(what: int, fault: int, said: str) -> None:
    assert said in _dies(what, fault)


def test_a_buffer_overwritten_before_the_store_has_read_it_shows(probe: Launch) -> None:
    out = torch.zeros(128, 64, dtype=torch.float16)
    probe(BLOCKS, 5, 2, None, _map(out), _map(out))
    want = torch.arange(64 * 64, dtype=torch.int16).view(64, 64)
    assert not torch.equal(out.view(torch.int16), torch.cat((want, want)))


def _gemm(module: Any, problem: Any, source: Path | None = None, blocks: int = 3, **axes: Any) -> torch.Tensor:
    """What the emulated product of a config (and of another source if one is given) is wrong by, twice."""
    config = {**module.SPACE.default_for(problem), **axes}
    assert module.SPACE.valid(config, problem), config
    with pytest.MonkeyPatch.context() as patch:
        if source:
            patch.setattr(module, "_kernel", lambda p, c, made=module._kernel: replace(made(p, c), source=source))
        run = module._runner(problem, config, cupy_host.host, blocks, "cpu")
    op = registry.op("gemm")
    tensors = op.inputs(problem, generator("cpu", 1), "cpu", "integers")
    out = torch.zeros(2, problem["m"], problem["n"], dtype=getattr(torch, op.output(problem)[1]))
    for turn in out:
        run(turn, *tensors)
    return out.double() - op.reference(problem, tensors).value


def test_gemm_in_turns_and_clusters_of_four_is_exact_in_random_order() -> None:
    module = registry.impl("gemm/cupy_wgmma").load()
    problem = registry.problem("gemm[m=200,n=328,k=200,transpose=nt,bf16]")
    axes = {"schedule": "pingpong", "block_n": 64, "block_m": 64, "cluster_m": 2, "cluster_n": 2, "num_stages": 3}
    with cupy_host.thread_order("random", seed=6):
        assert not _gemm(module, problem, **axes).any()


@pytest.mark.parametrize(
    ("problem", "blocks", "axes"),
    [  # 64 of k a step, 128 in int8
        # ten tiles on three blocks: six whole, four in 16 steps
        ("m=200,n=296,k=200,transpose=nt,fp16", 3, {"block_m": 128, "block_n": 64}),
        # one tile in twelve steps: the block in the middle neither begins nor ends it
        ("m=40,n=72,k=760,transpose=nn,epilogue=bias,fp16", 3, {"block_m": 64, "block_n": 128, "swap_ab": 1}),
        # three pairs of tiles on two clusters, in turn
        ("m=248,n=184,k=200,transpose=tn,epilogue=residual,fp16", 5,
         {"block_m": 128, "block_n": 64, "cluster_m": 2, "schedule": "pingpong"}),
        ("m=72,n=150,k=400,transpose=nt,int8", 2, {"block_m": 64, "block_n": 64, "cluster_m": 1, "swap_ab": 0}),
    ],
)  # fmt: skip
def test_a_streamed_gemm_is_exact_in_random_order(problem: str, blocks: int, axes: dict[str, Any]) -> None:
    module = registry.impl("gemm/cupy_wgmma").load()
    made = registry.problem(f"gemm[{problem}]")
    with cupy_host.thread_order("random", seed=4):
        wrong = _gemm(module, made, blocks=blocks, stream_k=1, split_k=1, num_stages=3, **axes)
    assert not wrong.any()  # the second time too: all flags were down again


def test_a_gemm_that_gives_its_tiles_back_too_early_is_found(folder: Path) -> None:
    module = registry.impl("gemm/cupy_wgmma").load()
    problem = registry.problem("gemm[m=64,n=64,k=640,transpose=nt,bf16]")
    text = Path(module.__file__).with_suffix(".cu").read_text()
    line = "      wgmma_wait<1>();\n"
    assert text.count(line) == 1
    broken = folder / "broken.cu"
    broken.write_text(text.replace(line, "      wgmma_wait<2>();\n"))
    assert _gemm(module, problem, broken, swap_ab=0, block_n=64, num_stages=3).isnan().any()


def test_what_tma_cannot_address_is_refused() -> None:
    module = registry.impl("gemm/cupy_wgmma").load()
    problem = registry.problem("gemm[m=64,n=96,k=65,transpose=nt,bf16]")
    with pytest.raises(UsageError, match="multiple of 16 bytes; 65 elements of 2 bytes are 130"):
        module.emulate(problem, module.SPACE.default_for(problem))
    with pytest.raises(UsageError, match="instructions of sm_90a, which sm_100a does not have"):
        module.compile_for(problem, module.SPACE.default_for(problem), "sm_100a")
    with pytest.raises(UsageError, match="contiguous and aligned"):
        _map(torch.zeros(4, 64, dtype=torch.int32)[:, :32])


DRIVER = r"""
#include <string.h>
#include <stdint.h>
int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
    const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int l2,
    int fill) {
  uint64_t* o = map;
  if ((uintptr_t)map % 64) return 1;
  memset(o, 0, 128);
  o[0] = type; o[1] = rank; o[2] = (uintptr_t)address;
  for (int i = 0; i < 3; i++) o[3 + i] = sizes[i], o[8 + i] = box[i], o[11 + i] = steps[i];
  o[6] = strides[0]; o[7] = strides[1];
  o[14] = interleave | swizzle << 8 | l2 << 16 | fill << 24;
  return box[1] == 255;
}
"""


def test_the_driver_gets_the_arguments_it_documents(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = folder / "libcuda.so"
    command = [cupy_host.compiler(), "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=DRIVER, text=True, check=True, capture_output=True)
    driver = ctypes.CDLL(str(library)).cuTensorMapEncodeTiled
    monkeypatch.setattr(cupy_tensormap, "_encode", lambda: driver)
    x = torch.zeros(6, 100, 64, dtype=torch.bfloat16)
    made = cupy_tensormap.layout(x.dtype, 2, 100, 64, (32, 48), batches=6)
    raw = bytes(cupy_tensormap.encoded(cupy_tensormap.bind(x, made)))
    assert len(raw) == 128
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, 120, 8)]
    # bfloat16 is 9, three dimensions; a line of 64 bytes has swizzle 2; promotion to 256 bytes is 3
    assert words[:8] == [9, 3, x.data_ptr(), 64, 100, 6, 128, 12800]
    assert words[8:] == [32, 48, 1, 1, 1, 1, 2 << 8 | 3 << 16]
    with pytest.raises(UsageError, match="the driver makes no tensor map"):
        cupy_tensormap.encoded(cupy_tensormap.bind(x, cupy_tensormap.layout(x.dtype, 2, 100, 64, (32, 255), 6)))


LAUNCH = r"""
#include <string.h>
static unsigned seen[8];
static char bytes[5][128];
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, void* stream, void** arguments, void** more) {
  unsigned now[8] = {gx, gy, gz, bx, by, bz, shared, (unsigned)((long)function + (long)stream)};
  const int sizes[5] = {128, 8, 8, 4, 4};
  memcpy(seen, now, sizeof now);
  for (int i = 0; i < 5; i++) memcpy(bytes[i], arguments[i], sizes[i]);
  return more || gx == 99;
}
int many(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, void* stream, void** arguments, void** more) {
  for (unsigned i = 0; i < gx; i++) memcpy(bytes[i], arguments[i], 128);
  return 0;
}
void* numbers() { return seen; }
void* argument(int i) { return bytes[i]; }
"""


def test_a_launch_passes_what_the_driver_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = []
    for number, text in enumerate((DRIVER, LAUNCH)):
        library = folder / f"libfake{number}.so"
        command = [cupy_host.compiler(), "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=text, text=True, check=True, capture_output=True)
        libraries.append(ctypes.CDLL(str(library)))
    monkeypatch.setattr(cupy_tensormap, "_encode", lambda: libraries[0].cuTensorMapEncodeTiled)
    fake = libraries[1]
    fake.numbers.restype = fake.argument.restype = ctypes.c_void_p
    launch = cupy_driver.Launcher(SimpleNamespace(ptr=5), 96, 70_000, lambda: 7, fake.cuLaunchKernel)
    x, y = torch.zeros(100, 64, dtype=torch.bfloat16), torch.zeros(32)
    made = cupy_tensormap.layout(x.dtype, 2, 100, 64, (32, 48))
    for tensor, number, real in ((y, -3, 0.5), (None, 2**31 - 1, -2.0)):
        launch(12, cupy_tensormap.bind(x, made), tensor, None, number, real)
        assert list((ctypes.c_uint * 8).from_address(fake.numbers())) == [12, 1, 1, 96, 1, 1, 70_000, 12]
        kinds = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int32, ctypes.c_float)
        seen = [kind.from_address(fake.argument(i)).value for i, kind in enumerate(kinds)]
        assert seen == [9, y.data_ptr() if tensor is not None else 0, 0, number, real]  # 9: bfloat16, of the map
    monkeypatch.setattr(cupy_tensormap, "KEPT_MAPS", 1)  # a launch with more maps than are kept: none may be freed
    several = [torch.zeros(100, 64, dtype=torch.bfloat16) for _ in range(5)]
    launch = cupy_driver.Launcher(SimpleNamespace(ptr=5), 96, 0, lambda: 7, fake.many)
    for _ in range(2):
        launch(5, *(cupy_tensormap.bind(tensor, made) for tensor in several))
        addresses = [ctypes.c_uint64.from_address(fake.argument(i) + 16).value for i in range(5)]
        assert addresses == [tensor.data_ptr() for tensor in several]
    launch = cupy_driver.Launcher(SimpleNamespace(ptr=5), 96, 70_000, lambda: 7, fake.cuLaunchKernel)
    with pytest.raises(OverflowError, match="argument 3 of a launch is 2147483648: beyond 32 bits"):
        launch(12, cupy_tensormap.bind(x, made), y, None, 2**31, 0.5)
    with pytest.raises(RuntimeError, match="refuses the launch of 99 blocks"):
        launch(99, cupy_tensormap.bind(x, made), y, None, 1, 0.5)


SEVERAL = """
#include "rooftune.cuh"
extern "C" __global__ void light(float* x) { x[threadIdx.x] += 1.0f; }
extern "C" __global__ void heavy(float* x) {
  float y[64];
#pragma unroll
  for (int i = 0; i < 64; i++) y[i] = x[64 * threadIdx.x + i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) x[64 * threadIdx.x + i] = y[63 - i];
}
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x) {
  __shared__ float shared[1024];
  float y[64];
#pragma unroll
  for (int i = 0; i < 64; i++) y[i] = x[64 * threadIdx.x + i];
  shared[threadIdx.x] = y[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) x[64 * threadIdx.x + i] = y[63 - i] + shared[i];
}
"""


def test_resources_are_those_of_the_kernel_that_is_launched(folder: Path) -> None:
    pytest.importorskip("cupy")
    source = folder / "several.cu"
    source.write_text(SEVERAL)
    light, heavy, spilling = (
        cupy.resources(Kernel(source, name, (), 1024), "sm_90a") for name in ("light", "heavy", "spilling")
    )
    assert light.registers < 32 < 64 <= heavy.registers  # type: ignore[operator]
    assert spilling.registers == 32  # two blocks of 1,024 threads
    assert (light.spill_bytes, heavy.spill_bytes) == (0, 0)
    assert spilling.spill_bytes > 0  # type: ignore[operator]
    assert (light.shared_bytes, heavy.shared_bytes, spilling.shared_bytes) == (0, 0, 4096)


SERIAL = """
#include "hopper.cuh"
using namespace rt;
extern "C" __global__ void __launch_bounds__(128) probe(float* out, const __grid_constant__ TensorMap a) {
  SHARED_MEMORY(shared);
  Barrier* full = reinterpret_cast<Barrier*>(shared + 16384);
  if (threadIdx.x == 0) tma_load(shared, a, full, 0, 0, 0);
  barrier_wait(full, 0);
  float d[32] = {};
  wgmma_fence(d);
  for (int i = 0; i < 4; i++) {
    wgmma<BF16, 64, 0, 0>(d, descriptor(shared, 16, 1024) + 2 * i, descriptor(shared + 8192, 16, 1024) + 2 * i, 1);
    if (EARLY) d[0] *= 2.0f;
  }
  wgmma_commit();
  wgmma_wait<0>(d);
  for (int i = 0; i < 32; i++) out[32 * threadIdx.x + i] = d[i];
}
"""


def test_products_that_ptxas_serializes_are_an_error(folder: Path) -> None:
    pytest.importorskip("cupy")
    source = folder / "serial.cu"
    source.write_text(SERIAL)
    good = cupy.hopper_resources(Kernel(source, "probe", (("EARLY", 0),), 128, 16392), "sm_90a")
    assert good.spill_bytes == 0
    assert any(name.startswith("wgmma.mma_async") or "HGMMA" in name for name in good.tensor_core)
    with pytest.raises(RuntimeError, match="serialized due to"):
        cupy.hopper_resources(Kernel(source, "probe", (("EARLY", 1),), 128, 16392), "sm_90a")
