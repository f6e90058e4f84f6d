"""CUDA C++: dk, dv by blocks of keys, dq by blocks of queries, on mma.sync or plain fp32; results repeat to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.common import cupy as cuda
from rooftune.kernels.common.resources import worst

DEVICES = ("cuda",)
PRECISIONS = ("bf16", "fp16", "fp32")
LARGEST_D = 256
LARGEST_BOTH = 128  # dk and dv of one launch take d registers a thread
PREPARE_WARPS = 8


@dataclass(frozen=True)
class _Role:
    """A launch: the axis of the rows that pass, whether the block owns keys, and its sums (1: dq or dk, 2: dv)."""

    axis: str
    keys: int
    sums: int

    def shared_bytes(self, config: Config, problem: Problem) -> int:
        """A tile of 16 rows a warp, two if ds is wanted, and num_stages of two passing ones; chunks as `Rows` in
        cuda/rooftune.cuh."""
        chunks, owned = problem["d"] * cuda.bytes_in(problem) // 16, 2 if self.sums & 1 else 1
        row = 16 * (chunks if chunks & (chunks - 1) == 0 else chunks | 1)
        passing = 2 * config[self.axis] * row + (8 * config[self.axis] if self.keys else 0)
        return int(owned * 16 * config["num_warps"] * row + config["num_stages"] * passing)

    def registers(self, config: Config, problem: Problem) -> int:
        """Of a thread: sums, two tiles of weights, and 80 for fragments and addresses. In fp32 a row's chunks are
        shared by eight threads, and a chunk is whole."""
        held = -(-problem["d"] // 32) * 16 if problem.precision == "fp32" else problem["d"] // 2
        return int(held * self.sums.bit_count() + config[self.axis] + 80)


def _roles(problem: Problem) -> tuple[_Role, ...]:
    """dv and dk by blocks of keys, apart for wide heads; dq by blocks of queries."""
    keys = (3,) if problem["d"] <= LARGEST_BOTH else (2, 1)
    return (*(_Role("block_m1", 1, sums) for sums in keys), _Role("block_n2", 0, 1))


def _shared_bytes(config: Config, problem: Problem) -> int:
    return max(role.shared_bytes(config, problem) for role in _roles(problem))


def _fits(config: Config, problem: Problem) -> bool:
    return _shared_bytes(config, problem) <= cuda.SHARED_LIMIT


def _held(config: Config, problem: Problem) -> bool:
    return max(role.registers(config, problem) for role in _roles(problem)) <= 255


def _tiles(config: Config, problem: Problem) -> bool:
    """A product of tensor cores sums over 16 passing rows; fp32 goes by eight lanes."""
    return problem.precision == "fp32" or min(config["block_m1"], config["block_n2"]) >= 16


def _loads(config: Config, problem: Problem) -> bool:
    """A thread fetches the statistics of at most one query."""
    return bool(config["block_m1"] <= 32 * config["num_warps"])


def _default(problem: Problem) -> Config:
    """128 rows a block in the shared memory of the smallest architecture; wide heads have half of that, or less."""
    config = {"block_m1": 32, "block_n2": 32, "num_warps": 8, "num_stages": 2}
    if _shared_bytes(config, problem) > cuda.SHARED_PORTABLE:
        config["num_warps"] = 4
    if _shared_bytes(config, problem) > cuda.SHARED_PORTABLE:
        config |= {"block_m1": 16, "block_n2": 16}
    if _shared_bytes(config, problem) > cuda.SHARED_PORTABLE:  # fp32
        config |= {"block_m1": 8, "block_n2": 8, "num_warps": 2}
    return config


SPACE = Space(
    axes={
        "block_m1": (8, 16, 32, 64),
        "block_n2": (8, 16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
    },
    where=(_tiles, _fits, _held, _loads),
    default=_default,
)


def _kernels(problem: Problem, config: Config) -> list[cuda.Kernel]:
    """Row statistics, then dk and dv, then dq."""
    d, h = problem["d"], problem["h"]
    if d % 16 or d > LARGEST_D:
        raise UsageError(f"attention_bwd/cupy needs d in multiples of 16 up to {LARGEST_D}, not {d}")
    if h % problem["hkv"]:
        raise UsageError(f"{problem}: h must be a multiple of hkv")
    source, plain = Path(__file__).with_suffix(".cu"), Path(__file__).with_suffix(".fp32.cu")
    base = (("PRECISION", cuda.PRECISION_CODE[problem.precision]), ("HEAD_DIM", d))
    prepare = (*base, ("NUM_WARPS", PREPARE_WARPS), ("PREPARE", 1))
    kernels = [cuda.Kernel(source, "prepare_kernel", prepare, 32 * PREPARE_WARPS)]
    for role in _roles(problem):
        macros = {**cuda.axes(config, NUM_WARPS="num_warps", STAGES="num_stages", BLOCK=role.axis)}
        macros |= {"CAUSAL": int(problem.flag("causal") == "1"), "KEYS": role.keys, "SUMS": role.sums, "PREPARE": 0}
        threads, shared = 32 * config["num_warps"], role.shared_bytes(config, problem)
        body = plain if problem.precision == "fp32" else source
        kernels.append(cuda.Kernel(body, "backward_kernel", (*base, *macros.items()), threads, shared))
    return kernels


def _runner(problem: Problem, config: Config, compiled: Callable[[cuda.Kernel], cuda.Launch], device: str) -> Run:
    """run(result: dq, dk, dv as rows of d; dout, q, k, v, out, lse), see the operator."""
    import torch

    prepare, *keys, queries = (compiled(kernel) for kernel in _kernels(problem, config))
    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    scale, own = math.log2(math.e) / math.sqrt(d), 16 * config["num_warps"]
    stats = torch.empty(2 * b * h * sq, device=device)
    rows, key_rows = b * h * sq, b * hkv * sk
    grids = (-(-rows // PREPARE_WARPS), -(-sk // own) * b * hkv, -(-sq // own) * b * h)

    def run(result: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
        prepare(grids[0], stats, dout, out, lse, rows)
        for launch in keys:
            launch(grids[1], result, k, v, q, dout, stats, h // hkv, sq, sk, rows, rows + key_rows, scale)
        queries(grids[2], result, q, dout, k, v, stats, h // hkv, sq, sk, 0, 0, scale)

    return run


def build(problem: Problem, config: Config) -> Run:
    """On the current GPU."""
    return _runner(problem, config, cuda.device, "cuda")


def emulate(problem: Problem, config: Config) -> Run:
    """The same source on CPU tensors, one fiber per thread."""
    return _runner(problem, config, cuda.host, "cpu")


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """What the machine code takes: of the products' kernels the most that one of them does (the row statistics are a
    plain loop, with blocks of its own size)."""
    return worst([cuda.resources(kernel, arch) for kernel in _kernels(problem, config)[1:]])
