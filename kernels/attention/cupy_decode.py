"""CUDA C++: few queries, many keys: split over the keys, heads that share keys packed into one tile, then combined.

mma.sync tensor cores, from compute capability 8.0 on. Right for any number of queries, meant for up to 32 a
group of heads: each tile of them reads all keys again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.attention import results
from rooftune.kernels.common import cupy as cuda
from rooftune.kernels.common.resources import worst

DEVICES = ("cuda",)
PRECISIONS = ("fp16", "bf16")

LARGEST_D = 256
COMBINE_THREADS = 256
BLOCKS_WANTED = 264  # two for each multiprocessor of an H100 or H200


def _row_bytes(problem: Problem) -> int:
    """A row in shared memory: chunks of 16 bytes, one more if their number is no power of two (cuda/rooftune.cuh)."""
    chunks = problem["d"] // 8
    return 16 * (chunks if chunks & (chunks - 1) == 0 else chunks | 1)


def _shared_bytes(config: Config, problem: Problem) -> int:
    """Queries and the warps' rings, or later the warps' sums, padded, with maximum and sum of each row."""
    rows, warps = config["block_m"], config["num_warps"]
    rings = (rows + 2 * warps * config["num_stages"] * config["warp_n"]) * _row_bytes(problem)
    return int(max(rings, warps * rows * (problem["d"] + 4 + 2) * 4))


def _registers(config: Config, problem: Problem) -> bool:
    """Queries if there is room for them (KEEP_Q), output and scores of a thread, 60 for fragments and addresses."""
    d, tiles, scores = problem["d"], config["block_m"] // 16, config["warp_n"] // 2
    queries = d // 4 if tiles * (d // 4 + d // 2) < 192 else 4
    return tiles * (queries + d // 2 + scores) + 60 <= 255


def _fits(config: Config, problem: Problem) -> bool:
    return _shared_bytes(config, problem) <= cuda.SHARED_LIMIT


def _splits(config: Config, problem: Problem) -> bool:
    """Each split has a tile of keys at least."""
    splits = config["num_splits"]
    return splits == 1 or splits * config["num_warps"] * config["warp_n"] <= problem["sk"]


def _default(problem: Problem) -> Config:
    """16 queries, 32 where there are more and registers for them; splits of 256 keys or more until there are
    two blocks for each multiprocessor; three stages and four warps where 99 KiB hold them."""
    rows, heads = problem["h"] // problem["hkv"] * problem["sq"], problem["b"] * problem["hkv"]
    config = {"block_m": 16, "warp_n": 16, "num_warps": 4, "num_stages": 3, "num_splits": 1}
    if rows > 16 and problem["d"] <= 128:
        config["block_m"] = 32
    if _shared_bytes(config, problem) > cuda.SHARED_PORTABLE:
        config["num_stages"] = 2
    if _shared_bytes(config, problem) > cuda.SHARED_PORTABLE:
        config["num_warps"] = 2
    blocks = heads * -(-rows // config["block_m"])
    while config["num_splits"] < 64 and blocks * config["num_splits"] < BLOCKS_WANTED:
        if problem["sk"] < 512 * config["num_splits"]:
            break
        config["num_splits"] *= 2
    return config


SPACE = Space(
    axes={
        "block_m": (16, 32),
        "warp_n": (16, 32),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
        "num_splits": (1, 2, 4, 8, 16, 32, 64),
    },
    where=(_fits, _registers, _splits),
    default=_default,
)


def _kernel(problem: Problem, config: Config) -> cuda.Kernel:
    if problem["d"] % 16 or problem["d"] > LARGEST_D:
        raise UsageError(f"attention/cupy_decode needs d in multiples of 16 up to {LARGEST_D}, not {problem['d']}")
    macros = {
        "PRECISION": cuda.PRECISION_CODE[problem.precision],
        "HEAD_DIM": problem["d"],
        "CAUSAL": int(problem.flag("causal") == "1"),
        "LSE": int(problem.flag("lse") == "1"),
        **cuda.axes(config, BLOCK_M="block_m", WARP_N="warp_n", NUM_WARPS="num_warps", STAGES="num_stages"),
        **cuda.axes(config, SPLITS="num_splits"),
    }
    source, threads = Path(__file__).with_suffix(".cu"), 32 * config["num_warps"]
    return cuda.Kernel(source, "decode_kernel", tuple(macros.items()), threads, _shared_bytes(config, problem))


def _combine(problem: Problem, config: Config) -> cuda.Kernel:
    macros = {
        "PRECISION": cuda.PRECISION_CODE[problem.precision],
        "HEAD_DIM": problem["d"],
        "SPLITS": config["num_splits"],
        "LSE": int(problem.flag("lse") == "1"),
    }
    source = Path(__file__).with_suffix(".combine.cu")
    return cuda.Kernel(source, "combine_kernel", tuple(macros.items()), COMBINE_THREADS)


def _runner(problem: Problem, config: Config, compiled: Callable[[cuda.Kernel], cuda.Launch], device: str) -> Run:
    """run(out: see the operator, q: [b, h, sq, d], k: [b, hkv, sk, d], v: [b, hkv, sk, d])."""
    import torch

    launch = compiled(_kernel(problem, config))
    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    splits, heads, rows = config["num_splits"], b * hkv, h // hkv * sq
    grid = -(-rows // config["block_m"]) * heads * splits
    scale = math.log2(math.e) / math.sqrt(d)
    partial, stats, combine = None, None, None
    if splits > 1:
        partial = torch.empty((splits, heads * rows, d), dtype=torch.float32, device=device)
        stats = torch.empty((splits, heads * rows, 2), dtype=torch.float32, device=device)
        combine = compiled(_combine(problem, config))
    combine_grid = -(-heads * rows * d // (4 * COMBINE_THREADS))

    def run(out: Any, q: Any, k: Any, v: Any) -> None:
        o, lse = results(problem, out)
        launch(grid, o, q, k, v, partial, stats, lse, heads, rows, sq, sk, scale)
        if combine:
            combine(combine_grid, o, partial, stats, lse, heads * rows, scale)

    return run


def build(problem: Problem, config: Config) -> Run:
    """On the current GPU."""
    return _runner(problem, config, cuda.device, "cuda")


def emulate(problem: Problem, config: Config) -> Run:
    """The same source on CPU tensors, one fiber per thread."""
    return _runner(problem, config, cuda.host, "cpu")


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """What the machine code takes: of the two kernels, the most that one of them does."""
    kernels = [_kernel(problem, config)] + ([_combine(problem, config)] if config["num_splits"] > 1 else [])
    return worst([cuda.resources(kernel, arch) for kernel in kernels])
