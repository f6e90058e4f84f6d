"""Arithmetic models of tiled kernels on an NVIDIA GPU: matrix product and attention. See ranking.py.

Each returns seconds for one config, infinity if it cannot be launched, None if its axes are not those it knows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rooftune.autotune.ranking_parts import (
    CLUSTERED,
    EXP_RATE,
    FMA_RATE,
    L2_RATE,
    L2_TOTAL,
    LATENCY_S,
    LAUNCH_S,
    MMA_SYNC,
    SHARED_LOAD,
    SHARED_RATE,
    SIMT,
    SOFTMAX_OPS,
    STEP_CYCLES,
    STREAM_STEPS,
    Traits,
    axis,
    ceil,
    feed_rate,
    joined,
    registers_of,
    resident,
    stages_of,
    warps_of,
)
from rooftune.core import PRECISIONS, Config, Op, Problem, Resources

if TYPE_CHECKING:
    from rooftune.autotune.ranking import Gpu


def gemm(
    op: Op, problem: Problem, config: Config, traits: Traits, gpu: Gpu, compiled: Resources | None
) -> float | None:
    """Tiles of block_m x block_n: the busiest multiprocessor's work, against L2 and memory traffic of the whole."""
    warps = warps_of(config)
    if not {"block_m", "block_n", "block_k"} <= set(config) or problem.precision not in gpu.matrix_rate:
        return None
    m, n, k = problem["m"], problem["n"], problem["k"]
    bm, bn, bk = (int(config[a]) for a in ("block_m", "block_n", "block_k"))
    side, other = (bn, bm) if config.get("swap_ab") else (bm, bn)  # the instruction's rows are c's columns then
    if traits.warpgroup:
        warps = 4 * max(1, side // 64) + 4  # warpgroups of 64 rows, and one that loads
    warps = warps or 4
    size, out = PRECISIONS[problem.precision].bytes_in, PRECISIONS[problem.precision].bytes_out
    split, stages, stream = int(config.get("split_k", 1)), stages_of(config), bool(config.get("stream_k"))
    wide = traits.wide(bm, warps, gpu, compiled) and problem.precision != "fp32"
    sums = bm * bn // (32 * (warps - 4 if traits.warpgroup else warps))
    shared = max(stages * (bm + bn) * bk * size, 0)
    registers = registers_of(traits, warps, sums, sums + min(sums, 64) // 2 + 40)
    blocks, slower = resident(gpu, config, warps, registers, shared, compiled)
    if not blocks:
        return math.inf
    steps = ceil(ceil(k, bk), split)
    tiles_m, tiles_n = ceil(m, bm), ceil(n, bn)
    tiles = tiles_m * tiles_n * split
    rate = gpu.matrix_rate[problem.precision] / gpu.multiprocessors
    if problem.precision == "fp32":
        rate *= SIMT
    elif not wide and gpu.arch.startswith(("sm_90", "sm_10")):
        rate *= MMA_SYNC
    math_s = 2.0 * bm * bn * steps * bk / rate
    if wide:
        read = side + other * max(1, side // 64)
    else:
        rows, cols = _warp_grid(config, warps, bm, bn)
        read = bm * cols + bn * rows
    shared_s = steps * bk * size * (read + bm + bn) / (SHARED_RATE * gpu.clock_hz)
    if problem.precision == "fp32":  # each thread reads its rows and columns itself, four values a load
        shared_s += steps * bk * warps * 2 * math.sqrt(sums) / 4 * SHARED_LOAD / gpu.clock_hz
    lines = _cluster(config)
    loaded = steps * bk * size * (bm / lines[1] + bn / lines[0])
    each = (bm + bn) * bk * size
    there = min(blocks, max(1.0, tiles / gpu.multiprocessors))  # few tiles leave multiprocessors with one block
    feed_s = loaded / feed_rate(gpu, there, max(stages - 1, 0.5) * each, each)
    tile_s = joined(math_s, shared_s, feed_s) + steps * STEP_CYCLES / gpu.clock_hz / blocks
    lone = gpu.multiprocessors if lines[0] * lines[1] < 4 else int(CLUSTERED * gpu.multiprocessors)
    busiest: float = ceil(tiles, lone)
    store_s = bm * bn * (4 if split > 1 else out) / (L2_RATE / 2 * gpu.clock_hz)
    fixed_s = 2 * LATENCY_S + store_s
    streamed_s = 0.0
    if stream and tiles % lone:  # no last round; a tile's sums are written and read, through L2
        busiest = max(tiles / lone, min(1.0, STREAM_STEPS / steps))
        streamed_s = 2 * bm * bn * 4 / (L2_RATE / 2 * gpu.clock_hz) + 2 * LATENCY_S
    overlapped = config.get("schedule") in ("persistent", "pingpong") or blocks > 1 or traits.warpgroup
    own_s = busiest * tile_s + fixed_s * (1 + max(busiest - 1, 0) * (0.2 if overlapped else 1.0)) + streamed_s
    l2_s = tiles * loaded / (L2_TOTAL * gpu.multiprocessors * gpu.clock_hz)
    concurrent = max(1, min(gpu.multiprocessors * blocks, tiles_m * tiles_n))
    group = min(int(config.get("group_m", 1)), tiles_m, concurrent)
    columns = min(tiles_n, concurrent / group)
    once = size * k * (m + n)
    waves = tiles_m * tiles_n / concurrent
    moved = max(once, min(waves * size * k * (group * bm + columns * bn), once * max(tiles_m, tiles_n)))
    moved = once if once < 0.6 * gpu.l2_bytes else moved
    moved += m * n * (out if split == 1 else out + 8 * split)
    total = joined(own_s, l2_s, moved / gpu.copy_rate) * slower
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
    return max(1, axis(config, "cluster", "cluster_m")), max(1, axis(config, "cluster_n"))


def attention(
    op: Op, problem: Problem, config: Config, traits: Traits, gpu: Gpu, compiled: Resources | None
) -> float | None:
    """Blocks of queries that walk over blocks of keys: two products and an exponential a score."""
    if not {"block_m", "block_n"} <= set(config) or problem.precision not in gpu.matrix_rate:
        return None
    b, h, sq, sk, d = (problem[x] for x in ("b", "h", "sq", "sk", "d"))
    bm, bn = int(config["block_m"]), int(config["block_n"])
    simt = problem.precision == "fp32"
    warps = warps_of(config) or max(1, bm // (8 if simt else 16))
    if traits.warpgroup:
        warps = 4 * max(1, bm // 64) + 4
    size, stages = PRECISIONS[problem.precision].bytes_in, stages_of(config)
    splits = axis(config, "num_splits", "splits", "split_kv")
    wide = traits.wide(bm, warps, gpu, compiled) and not simt
    held = bm * (d + bn) // (32 * (warps - 4 if traits.warpgroup else warps))
    shared = (bm + 2 * stages * bn) * d * size
    blocks, slower = resident(gpu, config, warps, registers_of(traits, warps, held, held + 60), shared, compiled)
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
    each = 2 * bn * d * size
    feed_s = each / feed_rate(gpu, blocks, max(stages - 1, 0.5) * each, each)
    groups = blocks * (warps - 4 if traits.warpgroup else warps) // 4  # who computes while others exponentiate
    join = 1.0 if groups <= 1 else 0.15 if config.get("pingpong") else 0.3
    both_s = max(math_s, soft_s) + join * min(math_s, soft_s)
    step_s = joined(both_s, shared_s, feed_s) + STEP_CYCLES / gpu.clock_hz / blocks
    pack = h // problem["hkv"] if config.get("pack_gqa") else 1  # heads of q that share a tile, and its keys
    lines, heads = bm // pack, b * h // pack
    rows = ceil(sq, lines)
    shift = sk - sq if problem.flag("causal") else sk
    keys = [ceil(max(1, min(sk, (row + 1) * lines + shift)), bn) for row in range(rows)]
    work = sum(keys) * heads / splits
    longest = ceil(max(keys), splits)
    tiles = rows * heads * splits
    busiest = max(work / gpu.multiprocessors, longest * ceil(tiles, gpu.multiprocessors) if rows == 1 else longest)
    if not problem.flag("causal"):
        busiest = longest * ceil(tiles, gpu.multiprocessors)
    waves = ceil(tiles, gpu.multiprocessors * blocks)
    own_s = busiest * step_s + waves * 3 * LATENCY_S
    moved = op.bytes(problem) + (8.0 * splits * b * h * sq * d if splits > 1 else 0.0)
    l2_s = work * 2 * bn * d * size / (L2_TOTAL * gpu.multiprocessors * gpu.clock_hz)
    total = joined(own_s, l2_s, moved / gpu.copy_rate) * slower
    return total + LAUNCH_S * (1 if splits == 1 else 2)
