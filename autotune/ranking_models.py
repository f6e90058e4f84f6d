"""Arithmetic models of tiled kernels on an NVIDIA GPU: matrix product, attention, rows. See ranking.py.

Each returns seconds for one config, infinity if it cannot be launched, None if its axes are not those it knows.
The constants are round figures of public microbenchmarks and of DeepGEMM's own picker (its L1 and L2 terms).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rooftune.core import PRECISIONS, Config, Op, Problem, Resources
from rooftune.occupancy import multiprocessor, occupancy

if TYPE_CHECKING:
    from rooftune.autotune.ranking import Gpu
    from rooftune.registry import Impl

LATENCY_S = 0.7e-6  # of a load that misses L2
LAUNCH_S = 2e-6
SHARED_RATE = 128  # bytes a cycle and multiprocessor, between shared memory and registers or tensor cores
SHARED_LOAD = 3  # cycles of a multiprocessor for a warp's 16-byte load from shared memory, broadcasts included
L2_RATE = 64  # the same, from L2 to one multiprocessor ...
L2_TOTAL = 46  # ... and what is left of it when all of them read
EXP_RATE = 16  # exponentials a cycle and multiprocessor
FMA_RATE = 128  # fp32 operations a cycle and multiprocessor
MMA_SYNC = 0.62  # of the tensor cores' peak, for warp-wide instructions on architectures with warpgroup-wide ones
SIMT = 0.85  # of the fp32 peak, for register tiles
SPILL_BYTES = 256  # spilled bytes a thread that cost as much again
SOFTMAX_OPS = 8  # per score, beside the exponential
STEP_CYCLES = 60  # of a block per step of its loop: barrier, waiting for a stage, addresses
OVERLAP = 4  # exponent of `_joined`: two equal loads together take 1.19 times as long as one


@dataclass(frozen=True)
class Traits:
    """What the models must know of a competitor beside its axes."""

    triton: bool
    warpgroup: bool  # written for warpgroup-wide instructions

    @classmethod
    def of(cls, impl: Impl) -> Traits:
        """By the language it builds on, and its name."""
        return cls(impl.language.startswith("triton"), "wgmma" in impl.name)

    def wide(self, rows: int, warps: int, gpu: Gpu, compiled: Resources | None) -> bool:
        """Whether a tile's product uses warpgroup-wide (or Blackwell's) instructions."""
        if compiled is not None and compiled.tensor_core:
            starts = ("HGMMA", "IGMMA", "QGMMA", "UTC", "wgmma", "tcgen05")
            return any(name.startswith(starts) for name in compiled.tensor_core)
        newest = gpu.arch.startswith(("sm_90", "sm_10"))
        return newest and (self.warpgroup or (self.triton and rows >= 64 and warps % 4 == 0))


def _ceil(a: float, b: float) -> int:
    return -(-int(a) // int(b))


def _joined(*loads_s: float) -> float:
    """Loads that overlap: nearly the longest, and a little more for every other one, which also breaks ties."""
    top = max(loads_s)
    return float(top * sum((s / top) ** OVERLAP for s in loads_s) ** (1 / OVERLAP)) if top > 0 else 0.0


def _axis(config: Config, *names: str, default: int = 1) -> int:
    """The value of the first of these axes that the competitor has."""
    return next((int(config[name]) for name in names if name in config), default)


def _warps(config: Config) -> int | None:
    """Warps of a block, by the axes that our kernels have for it."""
    if "num_warps" in config:
        return int(config["num_warps"])
    if "warps_m" in config and "warps_n" in config:
        return int(config["warps_m"] * config["warps_n"])
    if "num_threads" in config:
        return _ceil(config["num_threads"], 32)
    return None


def _stages(config: Config) -> int:
    return _axis(config, "num_stages", "stages", default=2)


def _resident(
    gpu: Gpu, config: Config, warps: int, registers: int, shared: int, compiled: Resources | None
) -> tuple[int, float]:
    """Blocks on a multiprocessor at a time, and by what factor spills slow them.

    A kernel that caps its registers for a number of blocks gets that many, and spills what it lacks: 32 registers
    of each thread are taken to cost as much again.
    """
    asked = _axis(config, "min_blocks", "blocks_per_sm")
    threads = warps * 32
    if compiled is not None and None not in (compiled.registers, compiled.shared_bytes):
        registers, shared = int(compiled.registers or 0), int(compiled.shared_bytes or 0)
        slower = 1 + (compiled.spill_bytes or 0) / SPILL_BYTES
        return occupancy(gpu.arch, compiled.threads or threads, registers, shared).blocks, slower
    allowed = max(16, min(255, multiprocessor(gpu.arch).registers // (threads * max(asked, 1)) // 8 * 8))
    slower = 1 + max(0, registers - allowed) / 32
    return occupancy(gpu.arch, threads, min(registers, allowed), shared).blocks, slower


def _feed_rate(gpu: Gpu, blocks: int, bytes_ahead: float) -> float:
    """Bytes a second that one multiprocessor gets: Little's law, up to what its port to L2 carries."""
    return min(L2_RATE * gpu.clock_hz, blocks * bytes_ahead / LATENCY_S)


def gemm(
    op: Op, problem: Problem, config: Config, traits: Traits, gpu: Gpu, compiled: Resources | None
) -> float | None:
    """Tiles of block_m x block_n: the busiest multiprocessor's work, against L2 and memory traffic of the whole."""
    warps = _warps(config)
    if not {"block_m", "block_n", "block_k"} <= set(config) or problem.precision not in gpu.matrix_rate:
        return None
    m, n, k = problem["m"], problem["n"], problem["k"]
    bm, bn, bk = (int(config[a]) for a in ("block_m", "block_n", "block_k"))
    warps = warps or (4 * max(1, bm // 64) + 4)  # warpgroups of 64 rows, and one that loads
    size, out = PRECISIONS[problem.precision].bytes_in, PRECISIONS[problem.precision].bytes_out
    split, stages = int(config.get("split_k", 1)), _stages(config)
    wide = traits.wide(bm, warps, gpu, compiled) and problem.precision != "fp32"
    sums = bm * bn // (32 * (warps - 4 if traits.warpgroup and warps > 4 else warps))
    shared = max(stages * (bm + bn) * bk * size, 0)
    blocks, slower = _resident(gpu, config, warps, sums + min(sums, 64) // 2 + 40, shared, compiled)
    if not blocks:
        return math.inf
    steps = _ceil(_ceil(k, bk), split)
    tiles_m, tiles_n = _ceil(m, bm), _ceil(n, bn)
    tiles = tiles_m * tiles_n * split
    rate = gpu.matrix_rate[problem.precision] / gpu.multiprocessors
    if problem.precision == "fp32":
        rate *= SIMT
    elif not wide and gpu.arch.startswith(("sm_90", "sm_10")):
        rate *= MMA_SYNC
    math_s = 2.0 * bm * bn * steps * bk / rate
    if wide:
        read = bm + bn * max(1, bm // 64)
    else:
        rows, cols = _warp_grid(config, warps, bm, bn)
        read = bm * cols + bn * rows
    shared_s = steps * bk * size * (read + bm + bn) / (SHARED_RATE * gpu.clock_hz)
    if problem.precision == "fp32":  # each thread reads its rows and columns itself, four values a load
        shared_s += steps * bk * warps * 2 * math.sqrt(sums) / 4 * SHARED_LOAD / gpu.clock_hz
    lines = _cluster(config)
    loaded = steps * bk * size * (bm / lines[1] + bn / lines[0])
    ahead = max(stages - 1, 0.5) * (bm + bn) * bk * size
    feed_s = loaded / _feed_rate(gpu, blocks, ahead)
    tile_s = _joined(math_s, shared_s, feed_s) + steps * STEP_CYCLES / gpu.clock_hz / blocks
    busiest = _ceil(tiles, gpu.multiprocessors)
    store_s = bm * bn * (4 if split > 1 else out) / (L2_RATE / 2 * gpu.clock_hz)
    fixed_s = 2 * LATENCY_S + store_s
    overlapped = config.get("schedule") in ("persistent", "pingpong") or blocks > 1 or traits.warpgroup
    own_s = busiest * tile_s + fixed_s * (1 + (busiest - 1) * (0.2 if overlapped else 1.0))
    l2_s = tiles * loaded / (L2_TOTAL * gpu.multiprocessors * gpu.clock_hz)
    concurrent = max(1, min(gpu.multiprocessors * blocks, tiles_m * tiles_n))
    group = min(int(config.get("group_m", 1)), tiles_m, concurrent)
    columns = min(tiles_n, concurrent / group)
    once = size * k * (m + n)
    waves = tiles_m * tiles_n / concurrent
    moved = max(once, min(waves * size * k * (group * bm + columns * bn), once * max(tiles_m, tiles_n)))
    moved = once if once < 0.6 * gpu.l2_bytes else moved
    moved += m * n * (out if split == 1 else out + 8 * split)
    total = _joined(own_s, l2_s, moved / gpu.copy_rate) * slower
    return total + LAUNCH_S * (1 if split == 1 else 2)


def _warp_grid(config: Config, warps: int, bm: int, bn: int) -> tuple[int, int]:
    """Warps along m and n: as the config says, else as square as their number allows."""
    if "warps_m" in config and "warps_n" in config:
        return int(config["warps_m"]), int(config["warps_n"])
    rows = 2 ** (int(math.log2(warps)) // 2)
    return (rows, warps // rows) if bn >= bm else (warps // rows, rows)


def _cluster(config: Config) -> tuple[int, int]:
    """Blocks of a cluster along m and n: those along m share the columns' data, those along n the rows'."""
    named = str(config.get("cluster", ""))
    if "x" in named:
        along_m, _, along_n = named.partition("x")
        return int(along_m), int(along_n)
    return max(1, _axis(config, "cluster", "cluster_m")), max(1, _axis(config, "cluster_n"))


def attention(
    op: Op, problem: Problem, config: Config, traits: Traits, gpu: Gpu, compiled: Resources | None
) -> float | None:
    """Blocks of queries that walk over blocks of keys: two products and an exponential a score."""
    if not {"block_m", "block_n"} <= set(config) or problem.precision not in gpu.matrix_rate:
        return None
    b, h, sq, sk, d = (problem[x] for x in ("b", "h", "sq", "sk", "d"))
    bm, bn = int(config["block_m"]), int(config["block_n"])
    simt = problem.precision == "fp32"
    warps = _warps(config) or max(1, bm // (8 if simt else 16))
    size, stages = PRECISIONS[problem.precision].bytes_in, _stages(config)
    splits = _axis(config, "num_splits", "splits", "split_kv")
    wide = traits.wide(bm, warps, gpu, compiled) and not simt
    held = bm * (d + bn) // (32 * warps)
    blocks, slower = _resident(gpu, config, warps, held + 60, (bm + 2 * stages * bn) * d * size, compiled)
    if not blocks:
        return math.inf
    rate = gpu.matrix_rate[problem.precision] / gpu.multiprocessors
    rate *= SIMT if simt else 1.0 if wide or not gpu.arch.startswith(("sm_90", "sm_10")) else MMA_SYNC
    math_s = 4.0 * bm * bn * d / rate
    # Every step also rescales the output that the block holds.
    soft_s = (bm * bn * (1 / EXP_RATE + SOFTMAX_OPS / FMA_RATE) + bm * d / FMA_RATE) / gpu.clock_hz
    readers = max(1, bm // 64) if wide else warps if bm // warps <= 16 else max(1, bm // 32)
    queries = bm * d if config.get("keep_q") == 0 else 0  # read again in every step
    shared_s = (2 * bn * d * (readers + 1) + queries) * size / (SHARED_RATE * gpu.clock_hz)
    feed_s = 2 * bn * d * size / _feed_rate(gpu, blocks, 2 * max(stages - 1, 0.5) * bn * d * size)
    groups = blocks * warps // 4  # who computes while others exponentiate
    join = 1.0 if groups <= 1 else 0.3
    both_s = max(math_s, soft_s) + join * min(math_s, soft_s)
    step_s = _joined(both_s, shared_s, feed_s) + STEP_CYCLES / gpu.clock_hz / blocks
    rows = _ceil(sq, bm)
    shift = sk - sq if problem.flag("causal") else sk
    keys = [_ceil(max(1, min(sk, (row + 1) * bm + shift)), bn) for row in range(rows)]
    work = sum(keys) * b * h / splits
    longest = _ceil(max(keys), splits)
    tiles = rows * b * h * splits
    busiest = max(work / gpu.multiprocessors, longest * _ceil(tiles, gpu.multiprocessors) if rows == 1 else longest)
    if not problem.flag("causal"):
        busiest = longest * _ceil(tiles, gpu.multiprocessors)
    waves = _ceil(tiles, gpu.multiprocessors * blocks)
    own_s = busiest * step_s + waves * 3 * LATENCY_S
    moved = op.bytes(problem) + (8.0 * splits * b * h * sq * d if splits > 1 else 0.0)
    l2_s = work * 2 * bn * d * size / (L2_TOTAL * gpu.multiprocessors * gpu.clock_hz)
    more = op.flops(problem) / (4.0 * b * h * sq * sk * d)  # a backward pass has more products of the same kind
    factor = max(1.0, more) if not problem.flag("causal") else max(1.0, 2 * more)
    total = _joined(own_s * factor, l2_s, moved / gpu.copy_rate) * slower
    return total + LAUNCH_S * (1 if splits == 1 else 2)


@dataclass(frozen=True)
class _Rows:
    """How a kernel deals rows out: threads of a block, rows in it, bytes a load, values a thread, and whether the
    row stays in registers (else it is read twice)."""

    threads: int
    rows: int
    vector_bytes: int
    values: float
    kept: bool
    padding: float = 1.0  # lanes at work / values there are


def _deal(problem: Problem, config: Config) -> _Rows | None:
    n, size = problem["n"], PRECISIONS[problem.precision].bytes_in
    aligned = next(v for v in (16, 8, 4, 2, 1) if n * size % v == 0)
    if "threads_per_row" in config and "num_threads" in config:  # CUDA C++
        threads, per_row = int(config["num_threads"]), int(config["threads_per_row"])
        vector = min(int(config.get("vec", 16 // size)) * size, aligned)
        values = _ceil(n * size, per_row * vector) * vector // size
        return _Rows(threads, max(1, threads // per_row), vector, values, values <= min(64, 65536 // threads - 32))
    if "block_rows" in config and "num_warps" in config:  # Numba-CUDA
        rows, per_row = int(config["block_rows"]), 32 * int(config["num_warps"])
        vector = 16 if aligned == 16 else size
        values = _ceil(n * size, per_row * vector) * vector // size
        return _Rows(rows * per_row, rows, vector, values, values <= (64 if rows * per_row <= 512 else 32))
    if {"block_m", "block_n", "num_warps"} <= set(config):  # Triton: a power of two of columns
        threads, whole = 32 * int(config["num_warps"]), not config["block_n"]
        columns = 2 ** math.ceil(math.log2(max(n, 16))) if whole else int(config["block_n"])
        values = config["block_m"] * columns / threads
        vector = int(min(aligned, max(size, values * size)))
        padding = columns / n if whole else _ceil(n, columns) * columns / n
        return _Rows(threads, int(config["block_m"]), vector, values, whole, padding)
    return None


def rows(
    op: Op, problem: Problem, config: Config, traits: Traits, gpu: Gpu, compiled: Resources | None
) -> float | None:
    """Rows of [m, n]: bytes at the rate that the loads under way sustain, and the latency of a block's chain."""
    deal = _deal(problem, config)
    if deal is None:
        return None
    m, size = problem["m"], PRECISIONS[problem.precision].bytes_in
    registers = int(28 + (deal.values if deal.kept else 16))
    blocks, slower = _resident(gpu, config, _ceil(deal.threads, 32), registers, 0, compiled)
    if not blocks:
        return math.inf
    total_blocks = _ceil(m, deal.rows)
    busy = min(1.0, total_blocks / (gpu.multiprocessors * blocks))
    loads = min(deal.values * size, 128) if deal.kept else deal.vector_bytes * min(_stages(config), 4)
    ahead = deal.threads * loads / deal.padding * blocks * busy
    sustained = min(gpu.copy_rate, 2 * gpu.multiprocessors * ahead / LATENCY_S)  # as many bytes leave as arrive
    moved = op.bytes(problem)
    memory_s = moved / sustained
    again_s = 0.0 if deal.kept else moved / 2 / (L2_TOTAL * gpu.multiprocessors * gpu.clock_hz)
    warp_rate = gpu.multiprocessors * gpu.clock_hz / 4  # loads and stores of a warp: one in four cycles
    issue_s = moved / size * deal.padding / (32 * deal.vector_bytes / size) / warp_rate
    work_s = op.flops(problem) * 2 * deal.padding / (FMA_RATE * gpu.multiprocessors * gpu.clock_hz)
    warps_a_row = max(1, deal.threads // deal.rows // 32)
    steps = 2 * problem["n"] * deal.rows / (deal.threads * deal.values) / min(_stages(config), 4)
    chain_s = (2 if deal.kept else max(2.0, steps)) * LATENCY_S + (
        300 + (150 if warps_a_row > 1 else 0) + 10 * warps_a_row
    ) / gpu.clock_hz
    waves = total_blocks / (gpu.multiprocessors * blocks)
    chain_s *= max(1.0, waves if waves > 8 else math.ceil(waves))
    return _joined(memory_s + again_s, issue_s, work_s, chain_s) * slower + LAUNCH_S


Model = Callable[[Op, Problem, Config, Traits, "Gpu", Resources | None], float | None]
# The dimensions an operator must have, most telling first.
MODELS: tuple[tuple[frozenset[str], Model], ...] = (
    (frozenset({"m", "n", "k"}), gemm),
    (frozenset({"b", "h", "sq", "d"}), attention),
    (frozenset({"m", "n"}), rows),
)
