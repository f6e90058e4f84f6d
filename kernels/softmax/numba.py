"""Row softmax in Numba: LLVM vectors, a polynomial exp2, parallel over rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba import prange, types

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.numba import ITEM, LOG2E, Chunk, Emit, State, Value, intrinsic, jit, require, threads

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16")
LARGE = 2 << 20  # bytes of an output that leaves an L2 cache anyway: from there streaming was faster


def _default(problem: Problem) -> Config:
    large = problem["m"] * problem["n"] * ITEM[problem.precision] > LARGE
    return {"unroll": 4, "tasks_per_thread": 1, "exponentials": "keep", "store": "stream" if large else "cached"}


SPACE = Space(
    axes={
        "unroll": (1, 2, 4, 8),  # independent vectors in flight
        "tasks_per_thread": (1, 2, 4, 8),
        "exponentials": ("keep", "recompute"),  # keep: in an fp32 row that stays in the L1 or L2 cache
        "store": ("cached", "stream"),  # stream: past the caches, which pays for outputs larger than these
    },
    default=_default,
)


@cache
def row_kernel(dtype: str, unroll: int, keep: bool, stream: bool) -> Any:
    """Numba function (x, out, scratch, n): one row. Addresses; scratch: [n] fp32.

    Three visits: maximum; exponentials and their sum; scaled result. The maximum ignores NaN, but a NaN
    makes the sum NaN, and a row of -inf only has -inf - -inf = NaN: both give a row of NaN, as in torch.
    The maximum is subtracted before the factor log2(e): logits of 1e4 keep their accuracy.
    """

    def emit(e: Emit, x: Value, out: Value, scratch: Value, n: Value) -> None:
        b = e.builder
        largest = e.row(n, [float("-inf")], lambda c, s: [e.max(c.load(x, dtype), s[0])], unroll)[0]
        top = e.splat(e.reduce(e.tree(largest, e.max), e.max))

        def exponential(chunk: Chunk) -> Value:
            return e.exp2(b.fmul(b.fsub(chunk.load(x, dtype), top), e.splat(LOG2E)))

        def add(chunk: Chunk, state: State) -> State:
            value = exponential(chunk)
            if keep:
                chunk.store(value, scratch, "fp32")
            return [b.fadd(state[0], chunk.only_new(value))]

        total = e.total(e.row(n, [0.0], add, unroll)[0])
        factor = e.splat(b.fdiv(total.type(1.0), total))

        def scale(past_caches: bool) -> State:
            def body(chunk: Chunk, state: State) -> State:
                value = chunk.load(scratch, "fp32") if keep else exponential(chunk)
                chunk.store(b.fmul(value, factor), out, dtype, past_caches)
                return []

            e.row(n, [], body, unroll)
            return []

        if stream:
            e.branch(e.aligned(out, dtype), lambda: scale(True), lambda: scale(False))
        else:
            scale(False)

    return intrinsic([types.int64] * 4, emit)


@cache
def compiled(dtype: str, unroll: int, keep: bool, stream: bool) -> Any:
    """Numba function (x, out, scratch, m, n, tasks): rows in `tasks` equal parts, one row of scratch each."""
    row, item = row_kernel(dtype, unroll, keep, stream), ITEM[dtype]

    @jit("void(int64, int64, int64, int64, int64, int64)")
    def rows(x, out, scratch, m, n, tasks):  # type: ignore[no-untyped-def]
        for task in prange(tasks):
            for i in range(task * m // tasks, (task + 1) * m // tasks):
                row(x + i * n * item, out + i * n * item, scratch + task * n * 4, n)

    return rows


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n]); both contiguous, of the problem's precision."""
    require(problem.precision)
    m, n = problem["m"], problem["n"]
    keep = config["exponentials"] == "keep"
    kernel = compiled(problem.precision, config["unroll"], keep, config["store"] == "stream")
    tasks = min(m, threads() * config["tasks_per_thread"])
    scratch = torch.empty(tasks * n if keep else 1, dtype=torch.float32)

    def run(out: Any, x: Any) -> None:
        kernel(x.data_ptr(), out.data_ptr(), scratch.data_ptr(), m, n, tasks)

    return run
