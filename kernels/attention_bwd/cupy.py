"""CUDA C++: dk and dv by blocks of keys, dq by blocks of queries, on mma.sync tensor cores; nothing added in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.common import cupy as cuda
from rooftune.kernels.common.resources import worst

DEVICES = ("cuda",)
PRECISIONS = ("bf16", "fp16")
LARGEST_D = 128  # dk and dv take d registers a thread
PREPARE_WARPS = 8
ROLES = (("block_m1", 1), ("block_n2", 0))  # axis of the rows that pass, and whether the block owns keys


def _shared_bytes(config: Config, problem: Problem, axis: str, keys: int) -> int:
    """Two tiles of 16 rows a warp, and num_stages of two passing ones; chunks as `Rows` in cuda/rooftune.cuh."""
    chunks = problem["d"] // 8
    row = 16 * (chunks if chunks & (chunks - 1) == 0 else chunks | 1)
    passing = 2 * config[axis] * row + (8 * config[axis] if keys else 0)
    return int(2 * 16 * config["num_warps"] * row + config["num_stages"] * passing)


def _fits(config: Config, problem: Problem) -> bool:
    return all(_shared_bytes(config, problem, axis, keys) <= cuda.SHARED_LIMIT for axis, keys in ROLES)


def _held(config: Config, problem: Problem) -> bool:
    """Sums, two tiles of weights, and 80 for fragments and addresses."""
    keys = problem["d"] + config["block_m1"] + 80
    queries = problem["d"] // 2 + config["block_n2"] + 80
    return bool(max(keys, queries) <= 255)


def _loads(config: Config, problem: Problem) -> bool:
    """A thread fetches the statistics of at most one query."""
    return bool(config["block_m1"] <= 32 * config["num_warps"])


def _default(problem: Problem) -> Config:
    """128 rows a block in the shared memory of the smallest architecture."""
    config = {"block_m1": 32, "block_n2": 32, "num_warps": 8, "num_stages": 2}
    if max(_shared_bytes(config, problem, axis, keys) for axis, keys in ROLES) > cuda.SHARED_PORTABLE:
        config["num_warps"] = 4
    return config


SPACE = Space(
    axes={
        "block_m1": (16, 32, 64),
        "block_n2": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
    },
    where=(_fits, _held, _loads),
    default=_default,
)


def _kernels(problem: Problem, config: Config) -> list[cuda.Kernel]:
    """Row statistics, then dk and dv, then dq."""
    d, h = problem["d"], problem["h"]
    if d % 16 or d > LARGEST_D:
        raise UsageError(f"attention_bwd/cupy needs d in multiples of 16 up to {LARGEST_D}, not {d}")
    if h % problem["hkv"]:
        raise UsageError(f"{problem}: h must be a multiple of hkv")
    source = Path(__file__).with_suffix(".cu")
    base = (("PRECISION", cuda.PRECISION_CODE[problem.precision]), ("HEAD_DIM", d))
    prepare = (*base, ("NUM_WARPS", PREPARE_WARPS), ("PREPARE", 1))
    kernels = [cuda.Kernel(source, "prepare_kernel", prepare, 32 * PREPARE_WARPS)]
    for axis, keys in ROLES:
        macros = {**cuda.axes(config, NUM_WARPS="num_warps", STAGES="num_stages", BLOCK=axis)}
        macros |= {"CAUSAL": int(problem.flag("causal") == "1"), "KEYS": keys, "PREPARE": 0}
        shared = _shared_bytes(config, problem, axis, keys)
        threads = 32 * config["num_warps"]
        kernels.append(cuda.Kernel(source, "backward_kernel", (*base, *macros.items()), threads, shared))
    return kernels


def _runner(problem: Problem, config: Config, compiled: Callable[[cuda.Kernel], cuda.Launch], device: str) -> Run:
    """run(result: dq, dk, dv as rows of d; dout, q, k, v, out, lse), see the operator."""
    import torch

    prepare, keys, queries = (compiled(kernel) for kernel in _kernels(problem, config))
    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    scale, own = math.log2(math.e) / math.sqrt(d), 16 * config["num_warps"]
    stats = torch.empty(2 * b * h * sq, device=device)
    rows, key_rows = b * h * sq, b * hkv * sk
    grids = (-(-rows // PREPARE_WARPS), -(-sk // own) * b * hkv, -(-sq // own) * b * h)

    def run(result: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
        prepare(grids[0], stats, dout, out, lse, rows)
        keys(grids[1], result, k, v, q, dout, stats, h // hkv, sq, sk, rows, rows + key_rows, scale)
        queries(grids[2], result, q, dout, k, v, stats, h // hkv, sq, sk, 0, 0, scale)

    return run


def build(problem: Problem, config: Config) -> Run:
    """On the current GPU."""
    return _runner(problem, config, cuda.device, "cuda")


def emulate(problem: Problem, config: Config) -> Run:
    """The same source on CPU tensors, one fiber per thread."""
    return _runner(problem, config, cuda.host, "cpu")


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """What the machine code takes: of several kernels, the most that one of them does."""
    return worst([cuda.resources(kernel, arch) for kernel in _kernels(problem, config)])
