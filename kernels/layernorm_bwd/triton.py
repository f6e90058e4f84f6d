"""Triton: dx by rows, dweight and dbias as partial sums of persistent programs, added up by a second kernel.

A row that fits stays in registers, and one pass over dy and x makes all three. Longer rows are walked in
chunks, twice for dx, and the sums over rows are a pass of their own over blocks of columns.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Resources, Space
from rooftune.kernels.common.resources import worst
from rooftune.kernels.common.triton import Launch, Operand, emulated, native, power_of_two, row_block

DEVICES = ("cuda", "rocm")
PRECISIONS = ("fp32", "fp16", "bf16")
HELD = 16  # places of a row a thread holds at most: x, dy, weight and two sums are five values each
COLUMNS, ROWS = 128, 32  # the block of the kernels that sum over rows
SUM_STAGES = 3  # rows ahead of a sum over rows


@triton.jit
def norm_backward_rows(  # type: ignore[no-untyped-def]
    out, parts, dy, x, weight, mean, rstd, m, n,
    RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows at a time, every num_programs-th block of them; the program's sums go to `parts`.

    parts: [2, programs, n] fp32, dweight before dbias; with RMS [1, programs, n].
    """
    column = tl.arange(0, BLOCK_N)
    used = column < n
    scale = tl.load(weight + column, mask=used, other=0.0).to(tl.float32)
    by_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    by_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_M, m, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_M)
        at = row.to(tl.int64)[:, None] * n + column[None, :]
        inside = (row < m)[:, None] & used[None, :]
        slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row, mask=row < m, other=0.0)[:, None]
        if not RMS:
            value -= tl.load(mean + row, mask=row < m, other=0.0)[:, None]
        normed = value * inverse
        by_weight += tl.where(inside, slope * normed, 0.0)
        scaled = slope * scale[None, :]
        result = scaled - normed * (tl.sum(scaled * normed, 1) / n)[:, None]
        if not RMS:
            by_bias += slope
            result -= (tl.sum(scaled, 1) / n)[:, None]
        tl.store(out + at, (result * inverse).to(out.dtype.element_ty), mask=inside)
    programs = tl.num_programs(0)
    parts += tl.program_id(0).to(tl.int64) * n
    tl.store(parts + column, tl.sum(by_weight, 0), mask=used)
    if not RMS:
        tl.store(parts + programs.to(tl.int64) * n + column, tl.sum(by_bias, 0), mask=used)


@triton.jit
def norm_backward_loop(  # type: ignore[no-untyped-def]
    out, dy, x, weight, mean, rstd, n, RMS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr
):
    """dx of one row, BLOCK_N at a time: both sums per lane in one pass, the result in a second."""
    row = tl.program_id(0).to(tl.int64)
    first = row * n
    column = tl.arange(0, BLOCK_N)
    inverse = tl.load(rstd + row)
    centre = 0.0
    if not RMS:
        centre = tl.load(mean + row)
    total = tl.zeros((BLOCK_N,), tl.float32)
    product = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        inside = column < n - start
        slope = tl.load(dy + first + start + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + first + start + column, mask=inside, other=0.0).to(tl.float32)
        scaled = slope * tl.load(weight + start + column, mask=inside, other=0.0).to(tl.float32)
        total += scaled
        product += scaled * ((value - centre) * inverse)
    along = tl.sum(product, 0) / n
    level = tl.sum(total, 0) / n
    if RMS:
        level = 0.0
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        inside = column < n - start
        slope = tl.load(dy + first + start + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + first + start + column, mask=inside, other=0.0).to(tl.float32)
        scaled = slope * tl.load(weight + start + column, mask=inside, other=0.0).to(tl.float32)
        result = (scaled - level - (value - centre) * inverse * along) * inverse
        tl.store(out + first + start + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_columns(  # type: ignore[no-untyped-def]
    parts, dy, x, mean, rstd, m, n,
    RMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums of COLUMNS columns over every num_programs(1)-th block of ROWS rows: `parts` as above."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    used = column < n
    by_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    by_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.program_id(1) * ROWS, m, tl.num_programs(1) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * n + column[None, :]
        inside = (row < m)[:, None] & used[None, :]
        slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if not RMS:
            value -= tl.load(mean + row, mask=row < m, other=0.0)[:, None]
            by_bias += slope
        by_weight += slope * (value * tl.load(rstd + row, mask=row < m, other=0.0)[:, None])
    parts += tl.program_id(1).to(tl.int64) * n
    tl.store(parts + column, tl.sum(by_weight, 0), mask=used)
    if not RMS:
        tl.store(parts + tl.num_programs(1).to(tl.int64) * n + column, tl.sum(by_bias, 0), mask=used)


@triton.jit
def norm_backward_sum(out, parts, m, n, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row m + program_id(1) of out: the sum of `count` partial rows, always in the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    used = column < n
    which = tl.program_id(1).to(tl.int64)
    parts += which * count * n
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * n + column[None, :]
        total += tl.load(parts + at, mask=(row < count)[:, None] & used[None, :], other=0.0)
    tl.store(out + (m + which) * n + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=used)


def _shaped(config: Config, problem: Problem) -> bool:
    """Chunks are of one row, and shorter than it."""
    return not config["block_n"] or (config["block_m"] == 1 and bool(config["block_n"] < problem["n"]))


def _holds(config: Config, problem: Problem) -> bool:
    """No spills; and for rows that matter no threads that only repeat what others hold."""
    block = config["block_n"] or row_block(problem["n"])
    per_thread = config["block_m"] * block / (32 * config["num_warps"])
    most = 2 * HELD if config["block_n"] else HELD if config["num_warps"] <= 8 else HELD // 2
    return (per_thread >= 2 or block <= 1024) and per_thread <= (most if config["num_warps"] <= 16 else 4)


def _ahead(config: Config, problem: Problem) -> bool:
    """Rows of dy and x on their way in shared memory, below what every architecture has."""
    block = config["block_m"] * (config["block_n"] or row_block(problem["n"]))
    size = 2 * block * FORMATS[problem.precision].bytes_in
    return config["num_stages"] == 1 or bool(config["num_stages"] * size <= 96 * 1024)


def _spread(config: Config, problem: Problem) -> bool:
    """Not more programs than blocks of rows, below which a count is another's equal."""
    return config["programs"] == 32 or bool(config["programs"] * config["block_m"] <= problem["m"])


def _default(problem: Problem) -> Config:
    whole = row_block(problem["n"])
    chunked = whole > 16 * 32 * HELD // 2
    rows = 1 if chunked else min(power_of_two(problem["m"]), max(1, 512 // whole))
    programs = max((p for p in (128, 256, 512) if p * rows <= problem["m"]), default=32)
    if chunked:
        return {"block_m": 1, "block_n": 2048, "num_warps": 8, "num_stages": 2, "programs": programs}
    warps = min(16, max(1, rows * whole // (32 * 8)))
    return {"block_m": rows, "block_n": 0, "num_warps": warps, "num_stages": 1, "programs": programs}


SPACE = Space(
    axes={
        "block_m": (1, 2, 4, 8, 16, 32),
        "block_n": (0, 1024, 2048, 4096),
        "num_warps": (1, 2, 4, 8, 16, 32),
        "num_stages": (1, 2, 3),
        "programs": (32, 128, 256, 512, 1024, 2048),
    },
    where=(_shaped, _holds, _ahead, _spread),
    default=_default,
)


def _launches(problem: Problem, config: Config) -> tuple[list[Launch], int]:
    """The kernels in order, and how many partial rows there are."""
    m, n, rms = problem["m"], problem["n"], bool(problem.flag("rms"))
    out, matrix = Operand.of(problem, "out"), Operand.of(problem, "in")
    stat, parts = Operand("float32"), Operand("float32")
    mean = None if rms else stat
    options, stages = {"num_warps": config["num_warps"]}, config["num_stages"]
    blocks = triton.cdiv(n, COLUMNS)
    if config["block_n"]:
        count = min(triton.cdiv(m, ROWS), max(1, config["programs"] * 4 // blocks))
        constants: dict[str, Any] = {"RMS": rms, "BLOCK_N": config["block_n"], "STAGES": stages}
        rows = Launch(norm_backward_loop, (m,), (out, matrix, matrix, matrix, mean, stat), (n,), constants, options)
        constants = {"RMS": rms, "ROWS": ROWS, "COLUMNS": COLUMNS, "STAGES": SUM_STAGES}
        summed = (parts, matrix, matrix, mean, stat)
        columns = Launch(norm_backward_columns, (blocks, count), summed, (m, n), constants, {"num_warps": 8})
        launches = [rows, columns]
    else:
        count = min(config["programs"], triton.cdiv(m, config["block_m"]))
        constants = {"RMS": rms, "BLOCK_M": config["block_m"], "BLOCK_N": row_block(n), "STAGES": stages}
        operands = (out, parts, matrix, matrix, matrix, mean, stat)
        launches = [Launch(norm_backward_rows, (count,), operands, (m, n), constants, options)]
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    grid = (blocks, 1 if rms else 2)
    return [*launches, Launch(norm_backward_sum, grid, (out, parts), (m, n, count), constants, {"num_warps": 4})], count


def _run(problem: Problem, config: Config, launches: list[Launch], count: int, device: str) -> Run:
    import torch

    parts = torch.empty((1 if problem.flag("rms") else 2) * count * problem["n"], device=device)
    runs = [launch.runner() for launch in launches]

    def whole(out: Any, dy: Any, x: Any, weight: Any, *stats: Any) -> None:
        runs[0](out, parts, dy, x, weight, *stats)
        runs[1](out, parts)

    def chunked(out: Any, dy: Any, x: Any, weight: Any, *stats: Any) -> None:
        runs[0](out, dy, x, weight, *stats)
        runs[1](parts, dy, x, *stats)
        runs[2](out, parts)

    return chunked if config["block_n"] else whole


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m + 2, n], dy, x: [m, n], weight: [n], mean, rstd: [m]); with rms no mean, and m + 1 rows."""
    launches, count = _launches(problem, config)
    native(*launches)
    return _run(problem, config, launches, count, "cuda")


def emulate(problem: Problem, config: Config) -> Run:
    """The same on CPU tensors, interpreted."""
    launches, count = _launches(problem, config)
    return emulated(_run(problem, config, launches, count, "cpu"))


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """Machine code for `arch`: the most that one kernel takes (the last, which adds up, is a plain loop)."""
    return worst([launch.compile(arch) for launch in _launches(problem, config)[0][:-1]])
