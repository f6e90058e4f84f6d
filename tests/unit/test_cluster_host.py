"""Clusters of blocks in the emulation: stores to each other's shared memory, what is missing around them, and the row
kernels that live from them, on rows of many thousand columns in every order of threads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rooftune import registry
from rooftune.check import check_case
from rooftune.core import Unavailable, UsageError
from rooftune.kernels.common import cupy_host
from rooftune.kernels.common.cupy_kernel import HEADERS, Kernel

try:
    cupy_host.compiler()
except Unavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)
pytestmark = pytest.mark.slow

BLOCKS, THREADS = 4, 64
PROBE = r"""
#include "cluster.cuh"
using namespace rt;
// Every block tells every block of its cluster its number, twice; thread t of block b writes who told it what.
extern "C" __global__ void probe(int fault, float* out) {
  SHARED_MEMORY(shared);
  float* slots = reinterpret_cast<float*>(shared);
  const int t = threadIdx.x, rank = blockIdx.x % CLUSTER_SIZE;
  if (fault != 1) cluster_barrier();
  if (fault == 2 && rank == 1) return;
  if (fault == 2) __syncthreads();
  if (fault == 6 && t == 0) cluster_store(slots, 1 - rank, 0.0f);
  if (fault == 6) return;
  if (fault == 7 && t % 2) cluster_barrier();
  if (fault == 7 && t % 2 == 0) __syncthreads();
  for (int turn = 0; turn < 2; turn++) {
    float* place = slots + (fault == 5 ? 0 : turn * CLUSTER_SIZE);
    if (t < CLUSTER_SIZE) cluster_store(place + rank, fault == 3 ? CLUSTER_SIZE : t, blockIdx.x + 100.0f * turn);
    if (fault == 4) __syncthreads();
    else cluster_barrier();
    if (t < CLUSTER_SIZE) out[(blockIdx.x * 2 + turn) * CLUSTER_SIZE + t] = place[t];
  }
  if (fault == 4) cluster_barrier();
}
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of our own, so that every run compiles."""
    place = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOFTUNE_CACHE_DIR", str(place))
        (place / "probe.cu").write_text(PROBE)
        yield place


def _dies(kernel: Kernel, arguments: str) -> str:
    """What a launch that aborts its process says; `Room` in the arguments is a buffer (importing torch takes 3 s)."""
    script = f"""
import ctypes
from pathlib import PosixPath
from rooftune.kernels.common import cupy_host
from rooftune.kernels.common.cupy_kernel import Kernel
class Room:
    def __init__(self, size):
        self.kept = ctypes.create_string_buffer(size + 16)
    def data_ptr(self):
        return -(-ctypes.addressof(self.kept) // 16) * 16
    def is_contiguous(self):
        return True
cupy_host.host({kernel!r})({arguments})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


def _told(folder: Path, fault: int) -> torch.Tensor:
    """[block, turn, place] of two clusters of two."""
    kernel = Kernel(folder / "probe.cu", "probe", (("CLUSTER_SIZE", 2),), THREADS, 16)
    out = torch.zeros(BLOCKS, 2, 2)
    cupy_host.host(kernel)(BLOCKS, fault, out)
    return out


@pytest.mark.parametrize("order", cupy_host.ORDERS)
def test_blocks_of_a_cluster_hear_each_other(folder: Path, order: str) -> None:
    with cupy_host.thread_order(order, seed=4):
        out = _told(folder, 0)
    for block in range(BLOCKS):
        first = block // 2 * 2
        assert out[block].tolist() == [[first, first + 1.0], [first + 100.0, first + 101.0]]


@pytest.mark.parametrize("order", cupy_host.ORDERS)
@pytest.mark.parametrize("fault", [4, 5], ids=["read before the cluster's barrier", "overwritten while still read"])
def test_a_missing_cluster_barrier_shows_in_every_order(folder: Path, fault: int, order: str) -> None:
    with cupy_host.thread_order(order, seed=4):
        assert _told(folder, fault).isnan().any()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (1, "which may not have begun"),
        (2, "reaches block 1, which has returned"),
        (3, "rank 2 of a cluster of 2"),
        (6, "returns before a cluster barrier after its stores"),
        (7, "deadlock in block 0: of 64 threads 0 have returned, 32 wait at __syncthreads, 32 in a warp collective"),
    ],
)
def test_a_fault_that_ends_the_process_is_named(folder: Path, fault: int, said: str) -> None:
    kernel = Kernel(folder / "probe.cu", "probe", (("CLUSTER_SIZE", 2),), THREADS, 16)
    assert said in _dies(kernel, f"2, {fault}, None")


# --- the kernels ----------------------------------------------------------------------------------------------------

WIDE = {"threads_per_row": 256, "num_threads": 256}
CASES = [  # the last of a cluster's blocks has part of the row, or none; rows that are kept, and that are read again
    ("softmax[m=2,n=20001,fp32]", WIDE | {"vec": 4, "cluster": 8}, "random", True),
    ("softmax[m=2,n=33000,fp16]", WIDE | {"vec": 4, "cluster": 2}, "random", False),
    ("layernorm[m=3,n=17000,bf16]", WIDE | {"vec": 8, "cluster": 8}, "random", True),
    ("softmax_bwd[m=2,n=16388,fp32]", WIDE | {"vec": 4, "cluster": 4}, "random", True),
    ("layernorm_bwd[m=5,n=16390,bf16]", WIDE | {"vec": 8, "cluster": 8, "blocks": 32}, "random", True),
    ("layernorm_bwd[m=5,n=16396,rms,fp32]", WIDE | {"vec": 4, "cluster": 8, "blocks": 32}, "reverse", True),
]


@pytest.mark.parametrize(("text", "config", "order", "kept"), CASES, ids=[case[0] for case in CASES])
def test_long_rows_in_clusters_are_right(text: str, config: dict[str, int], order: str, kept: bool) -> None:
    problem = registry.problem(text)
    module = registry.impl(f"{problem.op}/cupy").load()
    assert module.SPACE.valid(config, problem)
    if problem.op == "layernorm_bwd":
        main, partial = module._plan(problem, config).kernels[0], module._plan(problem, config).partial
        assert not kept or partial == min(problem["m"], config["blocks"] // config["cluster"])
    else:
        main = module._kernel(problem, config)
    assert bool(dict(main.macros)["ITEMS"]) == kept
    with cupy_host.thread_order(order, seed=8):
        found = check_case(registry.op(problem.op), problem, module.emulate(problem, config), seed=5)
    assert found.ok, found.reason
    assert found.deterministic


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("    cluster_barrier();  // no store to a block", "which may not have begun"),
        ("  cluster_barrier();\n  x = slots[0];", "returns before a cluster barrier"),
    ],
    ids=["before the first store", "after the last"],
)
def test_a_row_kernel_without_a_cluster_barrier_is_found(folder: Path, line: str, said: str) -> None:
    problem = registry.problem("softmax[m=2,n=16384,fp32]")
    module = registry.impl("softmax/cupy").load()
    kernel = module._kernel(problem, WIDE | {"vec": 4, "cluster": 4})
    place = folder / "broken"
    place.mkdir(exist_ok=True)
    rows = (HEADERS / "rows.cuh").read_text()
    assert rows.count(line) == 1
    (place / "rows.cuh").write_text(rows.replace(line, line.replace("cluster_barrier();", "__syncthreads();")))
    broken = place / "row.cu"  # finds the header beside it first
    broken.write_text(kernel.source.read_text())
    size = 2 * 16384 * 4
    assert said in _dies(replace(kernel, source=broken), f"8, Room({size}), Room({size}), 2, 16384")


def test_clusters_need_an_architecture_that_has_them() -> None:
    problem = registry.problem("layernorm_bwd[m=64,n=16384,bf16]")
    module = registry.impl("layernorm_bwd/cupy").load()
    config = WIDE | {"vec": 8, "cluster": 2, "blocks": 32}
    with pytest.raises(UsageError, match="sm_80 has no clusters of blocks"):
        module.compile_for(problem, config, "sm_80")
    assert not module.SPACE.valid(config, registry.problem("layernorm_bwd[m=64,n=16383,bf16]"))
