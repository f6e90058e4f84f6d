"""Triton: rows held in registers, or walked twice with an online maximum where they are too long."""

from __future__ import annotations

import triton
import triton.language as tl

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources
from rooftune.kernels.common.triton import Launch, Operand, emulated, native, row_block, row_space

DEVICES = ("cuda", "rocm")
PRECISIONS = ("fp32", "fp16", "bf16")


@triton.jit
def softmax_rows(y, x, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """BLOCK_M whole rows a program: one read, one write. A NaN reaches its row through the sum."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at = row[:, None] * n + column[None, :]
    inside = (row < m - first)[:, None] & (column < n)[None, :]
    value = tl.load(x + first * n + at, mask=inside, other=-float("inf")).to(tl.float32)
    # Subtract before exp scales by log2(e): at logits of 1e4 the product alone would lose 1e-3.
    weight = tl.exp(value - tl.max(value, 1)[:, None])
    result = weight * (1.0 / tl.sum(weight, 1))[:, None]
    tl.store(y + first * n + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def softmax_loop(y, x, n, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row a program, BLOCK_N at a time: maximum and sum per lane in one pass, the result in a second.

    Online normaliser of Milakov and Gimelshein (2018), kept per lane so that a chunk needs no reduction.
    """
    first = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        inside = column < n - start
        value = tl.load(x + first + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, value)
        base = tl.where(new == -float("inf"), 0.0, new)  # a lane that has seen only -inf: 0, not inf - inf
        total = total * tl.exp(top - base) + tl.exp(value - base)
        top = new
    peak = tl.max(top, 0)
    scale = 1.0 / tl.sum(total * tl.exp(top - peak), 0)
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        inside = column < n - start
        value = tl.load(x + first + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        tl.store(y + first + start + column, (tl.exp(value - peak) * scale).to(y.dtype.element_ty), mask=inside)


SPACE = row_space()


def _launch(problem: Problem, config: Config) -> Launch:
    m, n = problem["m"], problem["n"]
    operands = (Operand.of(problem, "out"), Operand.of(problem, "in"))
    options = {"num_warps": config["num_warps"]}
    if config["block_n"]:
        constants = {"BLOCK_N": config["block_n"], "STAGES": config["num_stages"]}
        return Launch(softmax_loop, (m,), operands, (n,), constants, options)
    constants = {"BLOCK_M": config["block_m"], "BLOCK_N": row_block(n)}
    return Launch(softmax_rows, (triton.cdiv(m, config["block_m"]),), operands, (m, n), constants, options)


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n]), both contiguous and of the problem's precision."""
    launch = _launch(problem, config)
    native(launch)
    return launch.runner()


def emulate(problem: Problem, config: Config) -> Run:
    """The same on CPU tensors, interpreted."""
    return emulated(_launch(problem, config).runner())


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """Machine code of the kernel for `arch`."""
    return _launch(problem, config).compile(arch)
