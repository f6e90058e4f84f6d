"""The arithmetic model of kernels over rows of [m, n]: softmax, norms and their backward passes. See ranking.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rooftune.autotune.ranking_parts import (
    FMA_RATE,
    L2_TOTAL,
    LATENCY_S,
    LAUNCH_S,
    Traits,
    ceil,
    joined,
    resident,
    stages_of,
)
from rooftune.core import PRECISIONS, Config, Op, Problem, Resources

if TYPE_CHECKING:
    from rooftune.autotune.ranking import Gpu


HELD = {"softmax_bwd": 2, "layernorm_bwd": 4}  # values that a CUDA C++ kernel keeps for each place of a row; else 1
CLUSTER_CYCLES = 600  # of a reduction between the blocks of a cluster: a guess of three times a block's, not measured


@dataclass(frozen=True)
class _Rows:
    """How a kernel deals rows out: threads of a block, rows in it, bytes a load, values a thread, and whether the
    row stays in registers (else it is read twice, in `steps` each time)."""

    threads: int
    rows: int
    vector_bytes: int
    values: float
    kept: bool
    steps: int
    padding: float = 1.0  # lanes at work / values there are
    cluster: int = 1  # blocks that share a row


def _deal(problem: Problem, config: Config) -> _Rows | None:
    n, size = problem["n"], PRECISIONS[problem.precision].bytes_in
    aligned = next(v for v in (16, 8, 4, 2, 1) if n * size % v == 0)
    if "threads_per_row" in config and "num_threads" in config:  # CUDA C++
        threads, per_row = int(config["num_threads"]), int(config["threads_per_row"])
        vector = min(int(config.get("vec", 16 // size)) * size, aligned)
        cluster = int(config.get("cluster", 1))
        values = ceil(n * size, per_row * cluster * vector) * vector // size
        held = HELD.get(problem.op, 1) * values
        kept, steps = held <= min(64, 65536 // threads - 32), values * size // vector
        return _Rows(threads, max(1, threads // per_row), vector, held, kept, steps, cluster=cluster)
    if "block_rows" in config and "num_warps" in config:  # Numba-CUDA
        rows, per_row = int(config["block_rows"]), 32 * int(config["num_warps"])
        vector = 16 if aligned == 16 else size
        values = ceil(n * size, per_row * vector) * vector // size
        kept, steps = values <= (64 if rows * per_row <= 512 else 32), values * size // vector
        return _Rows(rows * per_row, rows, vector, values, kept, steps)
    if {"block_m", "block_n", "num_warps"} <= set(config):  # Triton: a power of two of columns
        threads, whole = 32 * int(config["num_warps"]), not config["block_n"]
        columns = 2 ** math.ceil(math.log2(max(n, 16))) if whole else int(config["block_n"])
        values = config["block_m"] * columns / threads
        vector = int(min(aligned, max(size, values * size)))
        padding = columns / n if whole else ceil(n, columns) * columns / n
        return _Rows(threads, int(config["block_m"]), vector, values, whole, ceil(n, columns), padding)
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
    blocks, slower = resident(gpu, config, ceil(deal.threads, 32), registers, 0, compiled)
    if not blocks:
        return math.inf
    total_blocks = ceil(m, deal.rows) * deal.cluster
    busy = min(1.0, total_blocks / (gpu.multiprocessors * blocks))
    loads = min(deal.values * size, 128) if deal.kept else deal.vector_bytes * min(stages_of(config), 4)
    ahead = deal.threads * loads / deal.padding * blocks * busy
    sustained = min(gpu.copy_rate, 2 * gpu.multiprocessors * ahead / LATENCY_S)  # as many bytes leave as arrive
    moved = op.bytes(problem)
    memory_s = moved / sustained
    again_s = 0.0 if deal.kept else moved / 2 / (L2_TOTAL * gpu.multiprocessors * gpu.clock_hz)
    warp_rate = gpu.multiprocessors * gpu.clock_hz / 4  # loads and stores of a warp: one in four cycles
    issue_s = moved / size * deal.padding / (32 * deal.vector_bytes / size) / warp_rate
    work_s = op.flops(problem) * 2 * deal.padding / (FMA_RATE * gpu.multiprocessors * gpu.clock_hz)
    warps_a_row = max(1, deal.threads // deal.rows // 32)
    steps = 2 * deal.steps / max(2, min(stages_of(config), 4))  # both passes; compilers keep two loads under way
    chain_s = (2 if deal.kept else max(2.0, steps)) * LATENCY_S + (
        300 + (150 if warps_a_row > 1 else 0) + 10 * warps_a_row + (CLUSTER_CYCLES if deal.cluster > 1 else 0)
    ) / gpu.clock_hz
    waves = total_blocks / (gpu.multiprocessors * blocks)
    chain_s *= max(1.0, waves if waves > 8 else math.ceil(waves))
    return joined(memory_s + again_s, issue_s, work_s, chain_s) * slower + LAUNCH_S
