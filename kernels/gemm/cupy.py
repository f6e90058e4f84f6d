"""CUDA C++: cp.async ring, ldmatrix and mma.sync tensor cores, register tiles for fp32; compute capability 8.0 on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.common import cupy as cuda
from rooftune.kernels.gemm import EPILOGUES

DEVICES = ("cuda",)
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")


def _shared_bytes(config: Config, problem: Problem) -> int:
    """The ring of tiles, or the 4-byte accumulators that later take its place, padded by 32 bytes a line.

    The ring has no padding: its tiles' rows are powers of two of chunks, so they are swizzled.
    """
    m, n, k = config["block_m"], config["block_n"], config["block_k"]
    ring = config["num_stages"] * (m + n) * k * cuda.bytes_in(problem)
    return int(max(ring, m * (n * 4 + 32)))


def _warp(config: Config) -> tuple[int, int]:
    """Rows and columns that one warp computes."""
    return config["block_m"] // config["warps_m"], config["block_n"] // config["warps_n"]


def _threads(config: Config) -> int:
    return int(32 * config["warps_m"] * config["warps_n"])


def _warp_tile(config: Config, problem: Problem) -> bool:
    """Fragments come in 16s, quads (see cupy.cu) in 32s; at most 128 accumulators a thread, 64 in fp32."""
    rows, cols = _warp(config)
    if problem.precision == "fp32":
        return rows in (16, 32) and cols in (32, 64)
    ta, tb = problem.flag("transpose", "nn")
    quads = cuda.bytes_in(problem) != 2
    least_m, least_n = 32 if quads and ta == "t" else 16, 32 if quads and tb == "n" else 16
    return rows >= least_m and cols >= least_n and rows <= 64 and rows * cols <= 64 * 64


def _depth(config: Config, problem: Problem) -> bool:
    """A row of k is 64 or 128 bytes: two or four mma steps a tile."""
    return config["block_k"] * cuda.bytes_in(problem) in (64, 128)


def _registers(config: Config, problem: Problem) -> bool:
    """Accumulators, two sets of fragments (half a set above 64 accumulators) and about 40 for addresses."""
    rows, cols = _warp(config)
    accumulators = rows * cols // 32
    fragments = (rows + cols) // 4 * (2 if accumulators <= 64 else 1)
    if problem.precision == "fp32":
        fragments = rows + 8
    wanted = min(accumulators + fragments + 24, 255)
    return wanted * _threads(config) * config["min_blocks"] <= cuda.REGISTERS


def _block_size(config: Config, problem: Problem) -> bool:
    return 64 <= _threads(config) <= 512


def _fits(config: Config, problem: Problem) -> bool:
    return _shared_bytes(config, problem) * config["min_blocks"] <= cuda.SHARED_LIMIT


def _default(problem: Problem) -> Config:
    """128 x 128 and 128 bytes of k, three stages: 96 KiB; fewer rows where m has no more. In 16 bits and int8 two
    blocks of four warps at once, with 64 bytes of k: 1.2 times as fast on an H200.

    fp32: 128 x 64 in 4 warps, three blocks at once, which is 12 warps of up to 168 registers (128 x 128
    in 8 warps, two at once, has 128 registers and spills some).
    """
    size, rows = cuda.bytes_in(problem), next((r for r in (32, 64) if problem["m"] <= r), 128)
    fp32 = problem.precision == "fp32"
    if rows == 128 and problem.precision in ("fp16", "bf16", "int8"):
        tile = {"block_m": 128, "block_n": 128, "block_k": 64 // size, "warps_m": 2, "warps_n": 2}
        return {**tile, "num_stages": 4, "group_m": 8, "min_blocks": 2}
    return {
        "block_m": rows,
        "block_n": 64 if fp32 else 128,
        "block_k": (64 if fp32 else 128) // size,
        "warps_m": rows // 32 if fp32 else max(rows // 64, 1),
        "warps_n": 1 if fp32 and rows == 128 else 2 if fp32 else 4,
        "num_stages": 3,
        "group_m": 8,
        "min_blocks": 3 if fp32 else 1,
    }


SPACE = Space(
    axes={
        "block_m": (16, 32, 64, 128, 256),
        "block_n": (32, 64, 128, 256),
        "block_k": (16, 32, 64, 128),
        "warps_m": (1, 2, 4),
        "warps_n": (1, 2, 4),
        "num_stages": (2, 3, 4, 5),
        "group_m": (1, 4, 8, 16),
        "min_blocks": (1, 2, 3),
    },
    where=(_depth, _block_size, _warp_tile, _fits, _registers),
    default=_default,
)


def _kernel(problem: Problem, config: Config) -> cuda.Kernel:
    size, out = cuda.bytes_in(problem), FORMATS[problem.precision].bytes_out
    m, n, k = problem["m"], problem["n"], problem["k"]
    ta, tb = problem.flag("transpose", "nn")
    macros = {
        "PRECISION": cuda.PRECISION_CODE[problem.precision],
        "TRANS_A": int(ta == "t"),
        "TRANS_B": int(tb == "t"),
        "EPILOGUE": EPILOGUES.index(problem.flag("epilogue", "none")),
        "COPY_A": cuda.chunk(m if ta == "t" else k, size) * size,
        "COPY_B": cuda.chunk(k if tb == "t" else n, size) * size,
        "VEC_C": cuda.chunk(n, out),
        **cuda.axes(config, BLOCK_M="block_m", BLOCK_N="block_n", BLOCK_K="block_k", WARPS_M="warps_m"),
        **cuda.axes(config, WARPS_N="warps_n", STAGES="num_stages", GROUP_M="group_m", MIN_BLOCKS="min_blocks"),
    }
    source = Path(__file__).with_suffix(".cu")
    return cuda.Kernel(source, "gemm_kernel", tuple(macros.items()), _threads(config), _shared_bytes(config, problem))


def _runner(problem: Problem, config: Config, compiled: Callable[[cuda.Kernel], cuda.Launch]) -> Run:
    """run(c: [m, n], a, b as stored[, scale_a: [1], scale_b: [1]][, bias: [n] or residual: [m, n]])."""
    launch = compiled(_kernel(problem, config))
    m, n, k = problem["m"], problem["n"], problem["k"]
    grid = -(-m // config["block_m"]) * -(-n // config["block_n"])
    scaled = problem.precision == "fp8"

    def run(out: Any, a: Any, b: Any, *rest: Any) -> None:
        scales = rest[:2] if scaled else (None, None)
        added = rest[2:] if scaled else rest
        launch(grid, out, a, b, *scales, added[0] if added else None, m, n, k)

    return run


def _supported(problem: Problem, arch: str) -> None:
    """Raises UsageError for fp8 before compute capability 8.9: its tensor cores do not know the format."""
    if problem.precision == "fp8" and int("".join(filter(str.isdigit, arch))) < 89:
        raise UsageError(f"gemm/cupy in fp8 needs sm_89 or newer, not {arch}")


def build(problem: Problem, config: Config) -> Run:
    """On the current GPU."""
    _supported(problem, cuda.current_arch())
    return _runner(problem, config, cuda.device)


def emulate(problem: Problem, config: Config) -> Run:
    """The same source on CPU tensors, one fiber per thread."""
    return _runner(problem, config, cuda.host)


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """What the machine code takes."""
    _supported(problem, arch)
    return cuda.resources(_kernel(problem, config), arch)
