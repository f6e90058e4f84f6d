"""Row softmax in Numba: LLVM vectors, a polynomial exp2, parallel over rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba import types

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.numba import ITEM, LOG2E, Chunk, Emit, State, Value, intrinsic, threads
from rooftune.kernels.common.numba_cpu import require, vector_width, zen
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel, slots

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16")
LARGE = 2 << 20  # bytes of an output that leaves an L2 cache anyway: from there streaming was faster
ARGUMENTS = ("int64",) * 6  # of a job: addresses of x, out and scratch; m, n, tasks
NEAR = 128 << 10  # bytes of rows that are read three times: a small part of an L2 cache
SHORT = 512  # columns of a row whose sums across lanes take longer than its visits


def _default(problem: Problem) -> Config:
    large = problem["m"] * problem["n"] * ITEM[problem.precision] > LARGE
    several = short = problem["n"] <= SHORT
    if large and vector_width() == 16:
        # few columns: 16 lanes have fewer sums to hide, and several rows streamed at once keep half-filled lines
        # waiting (1.68x of torch at 4096x256 where one row at a time is 2.03x); many of fp32: four streams of memory
        # are 1.05 to 1.11 times as fast on a Xeon (bf16 0.98), 0.8 on Zen 4
        near = problem.precision == "fp32" and 16 * problem["n"] <= NEAR and not zen()
        several = problem["n"] > 256 and (short or near)
    return {
        "unroll": 2 if several or short else 4 if large and zen() else 8,
        "rows": 4 if several else 1,
        "tasks_per_thread": 4,  # what a slow thread leaves is taken over; 1, 2, 4 and 8 are equal on two even cores
        "exponentials": "keep",
        "store": "stream" if large else "cached",
        "prefetch": "next",
    }


SPACE = Space(
    axes={
        "unroll": (1, 2, 4, 8),  # independent vectors of a row in flight
        "rows": (1, 2, 4),  # rows at once, so that one's sums across lanes hide behind another's
        "tasks_per_thread": (1, 2, 4, 8),
        "exponentials": ("keep", "recompute"),  # keep: in an fp32 row that stays in the L1 or L2 cache
        "store": ("cached", "stream"),  # stream: past the caches, which pays for outputs larger than these
        "prefetch": ("none", "next"),  # next: the rows that follow, while the exponentials are computed
    },
    where=(lambda config, problem: config["rows"] * config["unroll"] <= 8,),
    default=_default,
)


@cache
def row_kernel(dtype: str, unroll: int, rows: int, keep: bool, stream: bool, ahead: bool) -> Any:
    """Numba function (x, out, scratch, n): some rows. Addresses; scratch: [rows, n] fp32.

    Three visits: maximum; exponentials and their sum; scaled result. The maximum ignores NaN, but a NaN
    makes the sum NaN, and a row of -inf only has -inf - -inf = NaN: both give a row of NaN, as in torch.
    The maximum is subtracted before the factor log2(e): logits of 1e4 keep their accuracy.
    """
    degree = 5 if dtype == "fp32" else 4

    def emit(e: Emit, x: Value, out: Value, scratch: Value, n: Value) -> None:
        b, every = e.builder, range(rows)
        xs, outs, kept = (
            [e.offset(base, b.mul(n, e.index(r)), size) for r in every]
            for base, size in ((x, ITEM[dtype]), (out, ITEM[dtype]), (scratch, 4))
        )

        def larger(chunk: Chunk, state: State) -> State:
            return [e.max(chunk.load(xs[r], dtype), state[r]) for r in every]

        largest = e.row(n, [float("-inf")] * rows, larger, unroll)
        tops = [e.splat(e.reduce(e.tree(some, e.max), e.max)) for some in largest]

        def exponential(chunk: Chunk, r: int) -> Value:
            return e.exp2(b.fmul(b.fsub(chunk.load(xs[r], dtype), tops[r]), e.splat(LOG2E)), degree)

        def add(chunk: Chunk, state: State) -> State:
            sums = []
            for r in every:
                if ahead:
                    following = b.add(chunk.at, b.mul(n, e.index(rows)))
                    e.prefetch(e.offset(xs[r], following, ITEM[dtype]))
                value = exponential(chunk, r)
                if keep:
                    chunk.store(value, kept[r], "fp32")
                sums.append(b.fadd(state[r], chunk.only_new(value)))
            return sums

        totals = [e.total(some) for some in e.row(n, [0.0] * rows, add, unroll)]
        factors = [e.splat(b.fdiv(total.type(1.0), total)) for total in totals]

        for r in every:  # row by row: stores past the caches have to fill whole lines

            def scale(chunk: Chunk, state: State, r: int = r) -> State:
                value = chunk.load(kept[r], "fp32") if keep else exponential(chunk, r)
                chunk.store(b.fmul(value, factors[r]), outs[r], dtype, stream, short_nans=True)
                return []

            e.row(n, [], scale, unroll, e.to_aligned(outs[r], dtype) if stream else None)

    return intrinsic([types.int64] * 4, emit)


@cache
def compiled(dtype: str, unroll: int, rows: int, keep: bool, stream: bool, ahead: bool) -> Job:
    """One of `tasks` equal parts of the rows; `rows` of scratch for each slot."""
    several, item = row_kernel(dtype, unroll, rows, keep, stream, ahead), ITEM[dtype]
    single, arguments = row_kernel(dtype, unroll, 1, keep, stream, ahead), arguments_of(*ARGUMENTS)

    @job
    def part(given, task, slot):  # type: ignore[no-untyped-def]
        x, out, scratch, m, n, tasks = arguments(given)
        begin, stop, own = task * m // tasks, (task + 1) * m // tasks, scratch + slot * rows * n * 4
        whole = begin + (stop - begin) // rows * rows
        for i in range(begin, whole, rows):
            several(x + i * n * item, out + i * n * item, own, n)
        if rows > 1:
            for i in range(whole, stop):
                single(x + i * n * item, out + i * n * item, own, n)

    return part


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n]); both contiguous, of the problem's precision."""
    require(problem.precision)
    m, n, rows = problem["m"], problem["n"], config["rows"]
    keep = config["exponentials"] == "keep"
    streams, ahead = config["store"] == "stream", config["prefetch"] == "next"
    tasks = min(m, threads() * config["tasks_per_thread"])
    part = compiled(problem.precision, config["unroll"], rows, keep, streams, ahead)
    kernel = parallel(ARGUMENTS, (part, tasks))
    scratch = torch.empty(slots(tasks) * rows * n if keep else 1, dtype=torch.float32)

    def run(out: Any, x: Any) -> None:
        kernel(x.data_ptr(), out.data_ptr(), scratch.data_ptr(), m, n, tasks)

    return run
