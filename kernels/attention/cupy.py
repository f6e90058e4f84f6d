"""CUDA C++: FlashAttention-2 scheme on mma.sync tensor cores; plain online softmax in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.attention import results
from rooftune.kernels.common import cupy as cuda

DEVICES = ("cuda",)
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
LARGEST_D = 256


def _row_bytes(problem: Problem) -> int:
    """A row of q, k or v in shared memory: chunks of 16 bytes, one more if their number is no power of two
    (`Rows` in cuda/rooftune.cuh)."""
    chunks = problem["d"] * cuda.bytes_in(problem) // 16
    return 16 * (chunks if chunks & (chunks - 1) == 0 else chunks | 1)


def _shared_bytes(config: Config, problem: Problem) -> int:
    rows = config["block_m"] + 2 * config["num_stages"] * config["block_n"]
    return int(rows * _row_bytes(problem))


def _registers(config: Config, problem: Problem) -> int:
    """Estimate for a thread: output, scores, queries kept, and 80 for fragments and addresses (seen: 60 to 90)."""
    d, block_n, rows = problem["d"], config["block_n"], config["block_m"] // config["num_warps"]
    if problem.precision == "fp32":
        return int(rows // 4 * (-(-d // 32) * 4 + block_n // 8 + 8) + 40)
    operand = rows * d * cuda.bytes_in(problem) // 128 if config["keep_q"] else 0
    return int(rows * (d + block_n) // 32 + operand + 80)


def _rows(config: Config, problem: Problem) -> bool:
    """16 or 32 queries a warp; in fp32 also fewer. keep_q exists with tensor cores only."""
    rows, fp32 = config["block_m"] / config["num_warps"], problem.precision == "fp32"
    return rows in ((8, 16, 32) if fp32 else (16, 32)) and not (fp32 and config["keep_q"])


def _held(config: Config, problem: Problem) -> bool:
    return _registers(config, problem) <= min(255, cuda.REGISTERS // (32 * config["num_warps"]))


def _fits(config: Config, problem: Problem) -> bool:
    return _shared_bytes(config, problem) <= cuda.SHARED_LIMIT


def _default(problem: Problem) -> Config:
    """128 queries in 8 warps; as many keys as two stages hold in 99 KiB; fewer queries for wide rows."""
    fp32, row = problem.precision == "fp32", _row_bytes(problem)
    config = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 2, "keep_q": int(not fp32)}
    while _shared_bytes(config, problem) > cuda.SHARED_PORTABLE:
        if config["block_n"] > 32 and row > 256:
            config["block_n"] = 32
        elif config["block_m"] > 32:
            config["block_m"] //= 2
            config["num_warps"] = max(config["num_warps"] // 2, 4 if fp32 else 2)
        else:
            config["block_n"] //= 2
    if not _held(config, problem):
        config["keep_q"] = 0
    return config


SPACE = Space(
    axes={
        "block_m": (32, 64, 128, 256),
        "block_n": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3),
        "keep_q": (0, 1),
    },
    where=(_rows, _fits, _held),
    default=_default,
)


def _kernel(problem: Problem, config: Config) -> cuda.Kernel:
    if problem["d"] % 16 or problem["d"] > LARGEST_D:
        raise UsageError(f"attention/cupy needs d in multiples of 16 up to {LARGEST_D}, not {problem['d']}")
    macros = {
        "PRECISION": cuda.PRECISION_CODE[problem.precision],
        "HEAD_DIM": problem["d"],
        "CAUSAL": int(problem.flag("causal") == "1"),
        "LSE": int(problem.flag("lse") == "1"),
        **cuda.axes(config, BLOCK_M="block_m", BLOCK_N="block_n", NUM_WARPS="num_warps", STAGES="num_stages"),
        **cuda.axes(config, KEEP_Q="keep_q"),
    }
    source = Path(__file__).with_suffix(".fp32.cu" if problem.precision == "fp32" else ".cu")
    threads, shared = 32 * config["num_warps"], _shared_bytes(config, problem)
    return cuda.Kernel(source, "attention_kernel", tuple(macros.items()), threads, shared)


def _runner(problem: Problem, config: Config, compiled: Callable[[cuda.Kernel], cuda.Launch]) -> Run:
    """run(out: see the operator, q: [b, h, sq, d], k: [b, hkv, sk, d], v: [b, hkv, sk, d])."""
    launch = compiled(_kernel(problem, config))
    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    grid = -(-sq // config["block_m"]) * b * h
    scale = math.log2(math.e) / math.sqrt(d)  # the kernels exponentiate to base 2

    def run(out: Any, q: Any, k: Any, v: Any) -> None:
        o, lse = results(problem, out)
        launch(grid, o, q, k, v, lse, h, hkv, sq, sk, scale)

    return run


def build(problem: Problem, config: Config) -> Run:
    """On the current GPU."""
    return _runner(problem, config, cuda.device)


def emulate(problem: Problem, config: Config) -> Run:
    """The same source on CPU tensors, one fiber per thread."""
    return _runner(problem, config, cuda.host)


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """What the machine code takes."""
    return cuda.resources(_kernel(problem, config), arch)
