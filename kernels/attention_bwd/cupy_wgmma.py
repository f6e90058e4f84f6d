"""CUDA C++ for compute capability 9.0: dk, dv by blocks of keys, dq by blocks of queries, on TMA and wgmma.

Emulated down to swizzled shared memory, barrier phases and late or early completion. Results repeat to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.common import cupy as cuda
from rooftune.kernels.common.cupy_tensormap import bind, layout
from rooftune.kernels.common.resources import worst

DEVICES = ("cuda",)
PRECISIONS = ("fp16", "bf16")

HEAD_DIMS = (64, 128)
ARCH = "sm_90a"
PANEL = 64  # elements of a swizzled line of 128 bytes
STATS_LINE = 32  # fp32 statistics of such a line
STATS_ROOM = 1024  # bytes, of a stage's statistics
BARRIER = 8  # bytes
MOST_STAGES = 4
PREPARE_WARPS = 8
MULTIPROCESSORS = 132  # of an H100 or H200
L2_BYTES = 24 << 20  # half of an H100's: what the passing rows of heads that run together may take
REGISTERS = {64: 255, 128: 240, 192: 160}  # of a consumer thread, by the rows that a block owns
OTHER_REGISTERS = 22  # addresses, statistics, counters


@dataclass(frozen=True)
class _Role:
    """A launch: the axes of the rows that a block owns and of those that pass, and its sums (dk and dv, or dq)."""

    own: str
    passing: str
    keys: int

    def ring(self, config: Config, problem: Problem) -> tuple[int, int]:
        """Stages and bytes of shared memory: owned rows of two tensors, as many stages as fit (registers leave room for
        one block a multiprocessor), each with barriers, passing rows, and statistics if these are of queries."""
        row = 2 * 2 * problem["d"]
        owned = config[self.own] * row + BARRIER
        stage = config[self.passing] * row + self.keys * STATS_ROOM + 4 * BARRIER
        stages = min((cuda.SHARED_LIMIT - owned) // stage, MOST_STAGES)
        return stages, owned + stages * stage

    def registers(self, config: Config, problem: Problem) -> int:
        """Of a thread: sums, scores and slopes (whose places the 16-bit weights take), and for dv the weights that its
        product still reads beside them."""
        held = (1 + self.keys) * problem["d"] // 2 + config[self.passing] + self.keys * config[self.passing] // 4
        return int(held + OTHER_REGISTERS)


ROLES = (_Role("block_n1", "block_m1", 1), _Role("block_m2", "block_n2", 0))


def _fits(config: Config, problem: Problem) -> bool:
    return min(role.ring(config, problem)[0] for role in ROLES) >= 2


def _held(config: Config, problem: Problem) -> bool:
    return all(role.registers(config, problem) <= REGISTERS[config[role.own]] for role in ROLES)


def _default(problem: Problem) -> Config:
    """128 rows a block; 64 if there are no more, or if one wave holds twice the blocks. What passes, and is read by
    tensor cores once for 64 owned rows, is as wide as registers allow, with a ring that has room to run ahead."""

    def own(rows: int, heads: int) -> int:
        return 64 if rows <= 64 or 2 * -(-rows // 128) * heads <= MULTIPROCESSORS else 128

    wide, heads = problem["d"] == 128, problem["b"] * problem["h"]
    return {
        "block_n1": own(problem["sk"], problem["b"] * problem["hkv"]),
        "block_m1": 64 if wide else 112,
        "block_m2": own(problem["sq"], heads),
        "block_n2": 96 if wide else 144,
    }


SPACE = Space(
    axes={
        "block_n1": (64, 128, 192),
        "block_m1": (48, 64, 80, 96, 112),
        "block_m2": (64, 128, 192),
        "block_n2": (64, 80, 96, 112, 128, 144, 160, 176),
    },
    where=(_fits, _held),
    default=_default,
)


def _kernels(problem: Problem, config: Config) -> list[cuda.Kernel]:
    """Row statistics, then dk and dv, then dq."""
    d = problem["d"]
    if d not in HEAD_DIMS:
        raise UsageError(f"attention_bwd/cupy_wgmma needs d of {' or '.join(map(str, HEAD_DIMS))}, not {d}")
    if problem["h"] % problem["hkv"]:
        raise UsageError(f"{problem}: h must be a multiple of hkv")
    source = Path(__file__).with_suffix(".cu")
    base = {"PRECISION": cuda.PRECISION_CODE[problem.precision], "HEAD_DIM": d, "STATS_BLOCK": config["block_m1"]}
    prepare = {**base, "NUM_WARPS": PREPARE_WARPS, "PREPARE": 1}
    kernels = [cuda.Kernel(source, "prepare_kernel", tuple(prepare.items()), 32 * PREPARE_WARPS)]
    for role in ROLES:
        stages, shared = role.ring(config, problem)
        macros = {**base, **cuda.axes(config, OWN=role.own, BLOCK=role.passing), "STAGES": stages}
        macros |= {"CAUSAL": int(problem.flag("causal") == "1"), "KEYS": role.keys, "PREPARE": 0}
        threads = 128 * (1 + config[role.own] // 64)
        kernels.append(cuda.Kernel(source, "backward_kernel", tuple(macros.items()), threads, shared))
    return kernels


def _runner(problem: Problem, config: Config, compiled: Callable[[cuda.Kernel], cuda.Launch], device: str) -> Run:
    """run(result: dq, dk, dv as rows of d; dout, q, k, v, out, lse), see the operator."""
    import torch

    prepare, by_keys, by_queries = (compiled(kernel) for kernel in _kernels(problem, config))
    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    storage, scale, shared_by = FORMATS[problem.precision].storage, math.log2(math.e) / math.sqrt(d), h // hkv
    heads, key_heads, rows, key_rows = b * h, b * hkv, b * h * sq, b * hkv * sk

    def box(queries: bool, lines: int) -> Any:
        return layout(storage, 2, sq if queries else sk, d, (PANEL, lines), heads if queries else key_heads)

    n1, m1, m2, n2 = (config[axis] for axis in ("block_n1", "block_m1", "block_m2", "block_n2"))
    keys, passing_queries, queries, passing_keys = box(False, n1), box(True, m1), box(True, m2), box(False, n2)
    stored, stored_keys = box(True, 64), box(False, 64)
    padded = -(-sq // m1) * m1
    stats = torch.empty(2 * heads * padded, dtype=torch.float32, device=device)
    pairs = layout(stats.dtype, 4, 2 * padded // STATS_LINE, STATS_LINE, (STATS_LINE, m1 // 16), heads)
    # Heads that run together, by the rows that pass them
    together = (max(L2_BYTES // (4 * sq * d * shared_by), 1), max(L2_BYTES // (4 * sk * d), 1) * shared_by)
    prepare_rows = PREPARE_WARPS * 32 * 8 // d
    grids = -(-heads * padded // prepare_rows), -(-sk // n1) * key_heads, -(-sq // m2) * heads

    def run(result: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
        dq, dk, dv = result.split((rows, key_rows, key_rows))
        prepare(grids[0], stats, dout, out, lse, heads * padded, sq)
        statistics = bind(stats, pairs)
        outs = bind(dk, stored_keys), bind(dv, stored_keys)
        owned, passing = (bind(k, keys), bind(v, keys)), (bind(q, passing_queries), bind(dout, passing_queries))
        sizes = shared_by, sq, sk, scale
        by_keys(grids[1], *outs, *owned, *passing, statistics, stats, key_heads, min(together[0], key_heads), *sizes)
        outs = bind(dq, stored), bind(dq, stored)
        owned, passing = (bind(q, queries), bind(dout, queries)), (bind(k, passing_keys), bind(v, passing_keys))
        by_queries(grids[2], *outs, *owned, *passing, statistics, stats, heads, min(together[1], heads), *sizes)

    return run


def build(problem: Problem, config: Config) -> Run:
    """On the current GPU."""
    cuda.require_arch(cuda.current_arch(), ARCH, "attention_bwd/cupy_wgmma")
    return _runner(problem, config, cuda.device, "cuda")


def emulate(problem: Problem, config: Config) -> Run:
    """The same source on CPU tensors, one fiber per thread."""
    return _runner(problem, config, cuda.host, "cpu")


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """What the machine code takes: of the products' kernels the most that one of them does. They must be made of wgmma
    and TMA, and ptxas must not serialize the products."""
    cuda.require_arch(arch, ARCH, "attention_bwd/cupy_wgmma")
    return worst([cuda.hopper_resources(kernel, arch) for kernel in _kernels(problem, config)[1:]])
