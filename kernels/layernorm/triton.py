"""Triton: rows held in registers (two-pass variance), or walked twice with Welford's update where too long."""

from __future__ import annotations

import triton
import triton.language as tl

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources
from rooftune.kernels.common.triton import Launch, Operand, emulated, native, row_block, row_space
from rooftune.kernels.layernorm import EPS

DEVICES = ("cuda", "rocm")
PRECISIONS = ("fp32", "fp16", "bf16")
# The weights and the centred row are held beside x. 16 values a thread spilled 16 bytes on sm_80 at n = 8192.
SPACE = row_space(held=32, wanted=32)


@triton.jit
def norm_rows(y, x, weight, bias, m, n, eps, RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """BLOCK_M whole rows a program: one read, one write; the variance is that of the centred row."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at = row[:, None] * n + column[None, :]
    inside = (row < m - first)[:, None] & (column < n)[None, :]
    value = tl.load(x + first * n + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32)
    if not RMS:
        mean = tl.sum(value, 1) / n
        value = tl.where(inside, value - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / n + eps)
    result = value * inverse[:, None] * scale[None, :]
    if not RMS:
        result += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + first * n + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_loop(y, x, weight, bias, n, eps, RMS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row a program, BLOCK_N at a time: statistics per lane in one pass, the result in a second.

    Each lane keeps count, mean and centred sum of squares (Welford 1962); lanes are merged at the end
    (Chan, Golub, LeVeque 1983), so a large mean costs no digits. RMS needs only the sum of squares.
    """
    first = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK_N)
    count = tl.zeros((BLOCK_N,), tl.float32)
    centre = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        inside = column < n - start
        value = tl.load(x + first + start + column, mask=inside, other=0.0).to(tl.float32)
        if RMS:
            squares += value * value
        else:
            count += inside.to(tl.float32)
            delta = value - centre
            moved = tl.where(inside, delta / tl.maximum(count, 1.0), 0.0)
            centre += moved
            squares += tl.where(inside, delta * (delta - moved), 0.0)
    mean = tl.sum(count * centre, 0) / n
    if not RMS:
        squares += count * (centre - mean) * (centre - mean)
    inverse = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        inside = column < n - start
        value = tl.load(x + first + start + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(weight + start + column, mask=inside, other=0.0).to(tl.float32)
        result = (value - mean) * inverse * scale
        if not RMS:
            result += tl.load(bias + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + first + start + column, result.to(y.dtype.element_ty), mask=inside)


def _launch(problem: Problem, config: Config) -> Launch:
    m, n, rms = problem["m"], problem["n"], bool(problem.flag("rms"))
    vector = Operand.of(problem, "in")
    operands = (Operand.of(problem, "out"), vector, vector, None if rms else vector)
    options = {"num_warps": config["num_warps"]}
    if config["block_n"]:
        constants = {"RMS": rms, "BLOCK_N": config["block_n"], "STAGES": config["num_stages"]}
        return Launch(norm_loop, (m,), operands, (n, EPS), constants, options)
    constants = {"RMS": rms, "BLOCK_M": config["block_m"], "BLOCK_N": row_block(n)}
    return Launch(norm_rows, (triton.cdiv(m, config["block_m"]),), operands, (m, n, EPS), constants, options)


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n], weight: [n], bias: [n]), contiguous; no bias with the flag `rms`."""
    launch = _launch(problem, config)
    native(launch)
    return launch.runner()


def emulate(problem: Problem, config: Config) -> Run:
    """The same on CPU tensors, interpreted."""
    return emulated(_launch(problem, config).runner())


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """Machine code of the kernel for `arch`."""
    return _launch(problem, config).compile(arch)
