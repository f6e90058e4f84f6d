"""The arithmetic model of the backward pass of attention: two launches over blocks of keys and of queries. See
ranking.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rooftune.autotune.ranking_parts import (
    EXP_RATE,
    FMA_RATE,
    L2_TOTAL,
    LATENCY_S,
    LAUNCH_S,
    MMA_SYNC,
    SHARED_RATE,
    SIMT,
    SOFTMAX_OPS,
    STEP_CYCLES,
    Traits,
    ceil,
    feed_rate,
    joined,
    registers_of,
    resident,
    stages_of,
)
from rooftune.core import PRECISIONS, Config, Op, Problem, Resources

if TYPE_CHECKING:
    from rooftune.autotune.ranking import Gpu


@dataclass(frozen=True)
class _Launch:
    """Blocks own rows, of keys or of queries, and walk over the others: so many products a step, and sums."""

    own: int
    passing: int
    products: int
    sums: int
    own_total: int
    passing_total: int


def _launches(problem: Problem, config: Config) -> list[_Launch] | None:
    sq, sk, group = problem["sq"], problem["sk"], problem["h"] // problem["hkv"]
    if {"block_m1", "block_n1", "block_m2", "block_n2"} <= set(config):  # Triton, and CUDA C++ with wgmma
        keys, queries = config["block_n1"], config["block_m2"]
    elif {"block_m1", "block_n2", "num_warps"} <= set(config):  # CUDA C++: 16 rows a warp
        keys = queries = 16 * config["num_warps"]
    else:
        return None
    heads = problem["b"] * problem["h"]
    apart = "block_n1" not in config and problem["d"] > 128  # dv and dk by a launch each
    return [
        *(
            _Launch(keys, config["block_m1"], products, sums, sk * heads // group, sq * group)
            for products, sums in (((2, 1), (3, 1)) if apart else ((4, 2),))
        ),
        _Launch(queries, config["block_n2"], 3, 1, sq * heads, sk),
    ]


def attention_backward(
    op: Op, problem: Problem, config: Config, traits: Traits, gpu: Gpu, compiled: Resources | None
) -> float | None:
    """The launches follow one another, so their times add up."""
    launches = _launches(problem, config)
    if launches is None or problem.precision not in gpu.matrix_rate:
        return None
    found = [_launch(problem, config, traits, gpu, launch, compiled) for launch in launches]
    memory_s = op.bytes(problem) / gpu.copy_rate
    return joined(sum(found), memory_s) + (len(found) + 1) * LAUNCH_S


def _launch(
    problem: Problem, config: Config, traits: Traits, gpu: Gpu, launch: _Launch, compiled: Resources | None
) -> float:
    # Without an axis for it: 16 rows a warp, and a warpgroup that loads.
    d, computing, stages = problem["d"], int(config.get("num_warps", launch.own // 16)), stages_of(config)
    warps = computing + (4 if traits.warpgroup else 0)
    size, own, passing = PRECISIONS[problem.precision].bytes_in, launch.own, launch.passing
    simt = problem.precision == "fp32"
    held = own * (launch.sums * d + 2 * passing) // (32 * computing)
    shared = 2 * (own + stages * passing) * d * size
    blocks, slower = resident(gpu, config, warps, registers_of(traits, warps, held, held + 60), shared, compiled)
    if not blocks:
        return math.inf
    wide = traits.wide(own, warps, gpu, compiled) and not simt
    rate = gpu.matrix_rate[problem.precision] / gpu.multiprocessors
    rate *= SIMT if simt else 1.0 if wide or not gpu.arch.startswith(("sm_90", "sm_10")) else MMA_SYNC
    math_s = 2.0 * own * passing * d * launch.products / rate
    soft_s = own * passing * (1 / EXP_RATE + SOFTMAX_OPS / FMA_RATE) / gpu.clock_hz
    readers = max(1, own // 64) if wide else max(1, own // 16)  # warps, or warpgroups, that read what passes
    read = passing * (launch.products * readers + 2) + 2 * own  # and their own rows in two products
    shared_s = read * d * size / (SHARED_RATE * gpu.clock_hz)
    feed_s = 2 * passing * d * size / feed_rate(gpu, blocks, 2 * max(stages - 1, 0.5) * passing * d * size)
    step_s = joined(math_s + 0.3 * soft_s, shared_s, feed_s) + STEP_CYCLES / gpu.clock_hz / blocks
    tiles, steps = ceil(launch.own_total, own), ceil(launch.passing_total, passing)
    work = tiles * steps * (0.5 if problem.flag("causal") else 1.0)
    busiest = max(work / gpu.multiprocessors, steps)
    if not problem.flag("causal"):
        busiest = steps * ceil(tiles, gpu.multiprocessors)
    waves = ceil(tiles, gpu.multiprocessors * blocks)
    l2_s = work * 2 * passing * d * size / (L2_TOTAL * gpu.multiprocessors * gpu.clock_hz)
    return joined(busiest * step_s + waves * 3 * LATENCY_S, l2_s) * slower
