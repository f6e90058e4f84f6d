"""Triton: rows of y and dy held in registers, or walked twice where they are too long: the sum, then dx."""

from __future__ import annotations

import triton
import triton.language as tl

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources
from rooftune.kernels.common.triton import Launch, Operand, emulated, native, row_block, row_space

DEVICES = ("cuda", "rocm")
PRECISIONS = ("fp32", "fp16", "bf16")


@triton.jit
def softmax_backward_rows(dx, dy, y, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """BLOCK_M whole rows a program: two reads, one write."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at = row[:, None] * n + column[None, :]
    inside = (row < m - first)[:, None] & (column < n)[None, :]
    weight = tl.load(y + first * n + at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dy + first * n + at, mask=inside, other=0.0).to(tl.float32)
    result = weight * (slope - tl.sum(weight * slope, 1)[:, None])
    tl.store(dx + first * n + at, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def softmax_backward_loop(dx, dy, y, n, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row a program, BLOCK_N at a time; the sum is kept per lane, so a chunk needs no reduction."""
    first = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        inside = column < n - start
        weight = tl.load(y + first + start + column, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dy + first + start + column, mask=inside, other=0.0).to(tl.float32)
        total += weight * slope
    product = tl.sum(total, 0)
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        inside = column < n - start
        weight = tl.load(y + first + start + column, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dy + first + start + column, mask=inside, other=0.0).to(tl.float32)
        result = weight * (slope - product)
        tl.store(dx + first + start + column, result.to(dx.dtype.element_ty), mask=inside)


SPACE = row_space(held=32)  # two values a place: y and dy


def _launch(problem: Problem, config: Config) -> Launch:
    m, n = problem["m"], problem["n"]
    operands = (Operand.of(problem, "out"), Operand.of(problem, "in"), Operand.of(problem, "in"))
    options = {"num_warps": config["num_warps"]}
    if config["block_n"]:
        constants = {"BLOCK_N": config["block_n"], "STAGES": config["num_stages"]}
        return Launch(softmax_backward_loop, (m,), operands, (n,), constants, options)
    constants = {"BLOCK_M": config["block_m"], "BLOCK_N": row_block(n)}
    grid = (triton.cdiv(m, config["block_m"]),)
    return Launch(softmax_backward_rows, grid, operands, (m, n), constants, options)


def build(problem: Problem, config: Config) -> Run:
    """run(dx: [m, n], dy: [m, n], y: [m, n]), contiguous and of the problem's precision."""
    launch = _launch(problem, config)
    native(launch)
    return launch.runner()


def emulate(problem: Problem, config: Config) -> Run:
    """The same on CPU tensors, interpreted."""
    return emulated(_launch(problem, config).runner())


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """Machine code of the kernel for `arch`."""
    return _launch(problem, config).compile(arch)
