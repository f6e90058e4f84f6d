"""Layer norm and RMS norm in Numba: LLVM vectors, two-pass variance, parallel over rows."""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import prange, types

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.numba import F32, ITEM, Chunk, Emit, State, Value, intrinsic, jit, require, threads
from rooftune.kernels.layernorm import EPS

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16")
LARGE = 2 << 20  # bytes of an output that leaves an L2 cache anyway: from there streaming was faster


def _default(problem: Problem) -> Config:
    large = problem["m"] * problem["n"] * ITEM[problem.precision] > LARGE
    return {"unroll": 4, "tasks_per_thread": 1, "store": "stream" if large else "cached"}


SPACE = Space(
    axes={
        "unroll": (1, 2, 4, 8),  # independent vectors in flight
        "tasks_per_thread": (1, 2, 4, 8),
        "store": ("cached", "stream"),  # stream: past the caches, which pays for outputs larger than these
    },
    default=_default,
)


@cache
def row_kernel(dtype: str, rms: bool, unroll: int, stream: bool) -> Any:
    """Numba function (x, weight, bias, out, n): one row. Addresses; bias is not read if rms.

    The mean, then the mean of squared distances from it (the row is in the L1 cache by then), then the
    result. A one-pass variance would lose 4 digits on rows with a mean of 100 deviations.
    """

    def emit(e: Emit, x: Value, weight: Value, bias: Value, out: Value, n: Value) -> None:
        b = e.builder
        count = b.sitofp(n, F32)

        def mean_of(term: Any) -> Value:
            """Mean over the row of term(chunk)."""
            sums = e.row(n, [0.0], lambda c, s: [b.fadd(s[0], c.only_new(term(c)))], unroll)[0]
            return b.fdiv(e.total(sums), count)

        mean = e.splat(0.0) if rms else e.splat(mean_of(lambda c: c.load(x, dtype)))

        def centred(chunk: Chunk) -> Value:
            value = chunk.load(x, dtype)
            return value if rms else b.fsub(value, mean)

        def square(chunk: Chunk) -> Value:
            value = centred(chunk)
            return b.fmul(value, value)

        variance = b.fadd(mean_of(square), ir.Constant(F32, EPS))
        scale = e.splat(b.fdiv(ir.Constant(F32, 1.0), e.call("llvm.sqrt.f32", F32, [variance])))

        def normalise(past_caches: bool) -> State:
            def body(chunk: Chunk, state: State) -> State:
                value = b.fmul(centred(chunk), scale)
                if rms:
                    value = b.fmul(value, chunk.load(weight, dtype))
                else:
                    value = e.fma(value, chunk.load(weight, dtype), chunk.load(bias, dtype))
                chunk.store(value, out, dtype, past_caches)
                return []

            e.row(n, [], body, unroll)
            return []

        if stream:
            e.branch(e.aligned(out, dtype), lambda: normalise(True), lambda: normalise(False))
        else:
            normalise(False)

    return intrinsic([types.int64] * 5, emit)


@cache
def compiled(dtype: str, rms: bool, unroll: int, stream: bool) -> Any:
    """Numba function (x, weight, bias, out, m, n, tasks): the rows in `tasks` equal parts."""
    row, item = row_kernel(dtype, rms, unroll, stream), ITEM[dtype]

    @jit("void(int64, int64, int64, int64, int64, int64, int64)")
    def rows(x, weight, bias, out, m, n, tasks):  # type: ignore[no-untyped-def]
        for task in prange(tasks):
            for i in range(task * m // tasks, (task + 1) * m // tasks):
                row(x + i * n * item, weight, bias, out + i * n * item, n)

    return rows


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n], weight: [n], bias: [n]), no bias with the flag rms; all contiguous."""
    require(problem.precision)
    m, n, rms = problem["m"], problem["n"], bool(problem.flag("rms"))
    kernel = compiled(problem.precision, rms, config["unroll"], config["store"] == "stream")
    tasks = min(m, threads() * config["tasks_per_thread"])

    def run(out: Any, x: Any, weight: Any, bias: Any = None) -> None:
        place = 0 if bias is None else bias.data_ptr()
        kernel(x.data_ptr(), weight.data_ptr(), place, out.data_ptr(), m, n, tasks)

    return run
