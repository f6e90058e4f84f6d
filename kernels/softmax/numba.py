"""Row softmax in Numba: LLVM vectors, a polynomial exp2, parallel over rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import types

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.numba import F32, I32, ITEM, LOG2E, Chunk, Emit, State, Value, intrinsic, threads
from rooftune.kernels.common.numba_cpu import require, vector_width, zen
from rooftune.kernels.common.numba_dot import nearest_pairs
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel, slots

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16")
LARGE = 2 << 20  # bytes of an output that leaves an L2 cache anyway: from there streaming was faster
ARGUMENTS = ("int64",) * 6  # of a job: addresses of x, out and scratch; m, n, tasks
NEAR = 128 << 10  # bytes of rows that are read three times: a small part of an L2 cache
FAR = 0x4B800000  # the bits of 2^24
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
    # Zen 4: two rows at once are 1.02 to 1.15 times as fast where one is 1.5 to 4 KB, 0.9 where it is 8 KB
    two = zen() and not short and problem["n"] * ITEM[problem.precision] <= 4096
    return {
        "unroll": 2 if several or short else 4 if two or (large and zen()) else 8,
        "rows": 4 if several else 2 if two else 1,
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
def row_kernel(dtype: str, unroll: int, rows: int, keep: bool, stream: bool, ahead: bool, pairs: bool) -> Any:
    """Numba function (x, out, scratch, n): some rows. Addresses; scratch: [rows, n] fp32.

    Three visits: maximum; exponentials and their sum; scaled result. The maximum ignores NaN, but a NaN
    makes the sum NaN, and a row of -inf only has -inf - -inf = NaN: both give a row of NaN, as in torch.
    The maximum is subtracted before the factor log2(e): logits of 1e4 keep their accuracy.

    `pairs`, of bf16 and an even n: a vector is loaded and stored as words of two, see `_Pairs`.
    """
    stored = "fp32" if pairs else dtype  # what a row consists of: words, or elements

    def emit(e: Emit, x: Value, out: Value, scratch: Value, n: Value) -> None:
        b, every = e.builder, range(rows)
        view = (_Pairs if pairs else _Elements)(e, dtype)
        n = b.lshr(n, e.index(1)) if pairs else n
        xs, outs = ([e.offset(base, b.mul(n, e.index(r)), ITEM[stored]) for r in every] for base in (x, out))
        kept = [[e.offset(scratch, b.mul(n, e.index(r + rows * i)), 4) for i in range(view.parts)] for r in every]

        def larger(chunk: Chunk, state: State) -> State:
            return [view.larger(chunk.load(xs[r], stored), state[r]) for r in every]

        largest = e.row(n, [float("-inf")] * rows, larger, unroll)
        tops = [view.top(e.reduce(e.tree(some, e.max), e.max)) for some in largest]

        def exponentials(chunk: Chunk, r: int) -> list[Value]:
            return view.exponentials(chunk.load(xs[r], stored), tops[r])

        def add(chunk: Chunk, state: State) -> State:
            sums = []
            for r in every:
                if ahead:
                    following = b.add(chunk.at, b.mul(n, e.index(rows)))
                    e.prefetch(e.offset(xs[r], following, ITEM[stored]))
                total = state[r]
                for value, place in zip(exponentials(chunk, r), kept[r], strict=True):
                    if keep:
                        chunk.store(value, place, "fp32")
                    total = b.fadd(total, chunk.only_new(value))
                sums.append(total)
            return sums

        factors = [e.splat(view.factor(e.total(some))) for some in e.row(n, [0.0] * rows, add, unroll)]

        def scale(chunk: Chunk, r: int, past: bool) -> State:
            values = [chunk.load(place, "fp32") for place in kept[r]] if keep else exponentials(chunk, r)
            value = view.joined([b.fmul(value, factors[r]) for value in values])
            chunk.store(value, outs[r], stored, past, short_nans=True)
            return []

        for r in every:  # row by row: stores past the caches have to fill whole lines

            def cached(r: int = r) -> State:
                e.row(n, [], lambda chunk, _: scale(chunk, r, False), unroll)
                return []

            def streamed(r: int = r) -> State:
                e.row(n, [], lambda chunk, _: scale(chunk, r, True), unroll, e.to_aligned(outs[r], stored))
                return []

            if stream and pairs:
                # a word that begins at an odd element never comes to the beginning of a line
                odd = b.and_(outs[r], e.index(ITEM[stored] - 1))
                e.branch(b.icmp_signed("==", odd, e.index(0)), streamed, cached)
            else:
                (streamed if stream else cached)()

    return intrinsic([types.int64] * 4, emit)


class _Elements:
    """A row as vectors of its elements."""

    parts = 1  # vectors of fp32 that a loaded one makes

    def __init__(self, e: Emit, dtype: str) -> None:
        self.e = e
        self.degree = {"fp32": 5, "fp16": 4, "bf16": 3}[dtype]  # of exp2; bf16: errors of 0.0001, half a unit is 0.002

    def larger(self, value: Value, so_far: Value) -> Value:
        return self.e.max(value, so_far)

    def top(self, largest: Value) -> Any:
        return self.e.splat(largest)

    def exponentials(self, value: Value, top: Any) -> list[Value]:
        e, b = self.e, self.e.builder
        return [e.exp2(b.fmul(b.fsub(value, top), e.splat(LOG2E)), self.degree)]

    def factor(self, total: Value) -> Value:
        return self.e.builder.fdiv(total.type(1.0), total)

    def joined(self, values: list[Value]) -> Value:
        return values[0]


class _Pairs(_Elements):
    """A row of bf16 as vectors of words of two, which takes 25 operations on vectors instead of 44 (with AVX-512)."""

    parts = 2

    def larger(self, value: Value, so_far: Value) -> Value:
        """A word is its upper number, and some digits: `top` clears them. With them, infinity is a NaN and ignored."""
        lower, _ = self.e.widen_pairs(value)
        return self.e.max(lower, self.e.max(value, so_far))

    def top(self, largest: Value) -> Any:
        """(factor, what to subtract), of which a fused operation makes exponents.

        The rounding of top * log2(e) is the same for all numbers of a row, so it cancels; it has to stay below 1. From
        2^24 on bf16 are 2^16 apart: the exponents of all but the largest are far below 0 whatever the factor, and the
        factor 1 needs no rounding.
        """
        e, b = self.e, self.e.builder
        bits = b.and_(b.bitcast(largest, I32), ir.Constant(I32, -65536))
        top, size = b.bitcast(bits, F32), b.and_(bits, ir.Constant(I32, 0x7FFFFFFF))
        large = b.icmp_signed(">=", size, ir.Constant(I32, FAR))
        factor = b.select(large, F32(1.0), F32(LOG2E))
        return e.splat(factor), e.splat(b.fneg(b.fmul(top, factor)))

    def exponentials(self, value: Value, top: Any) -> list[Value]:
        return [self.e.exp2(self.e.fma(part, *top), self.degree) for part in self.e.widen_pairs(value)]

    def factor(self, total: Value) -> Value:
        """NaN also where an infinity made the total infinite."""
        b = self.e.builder
        return b.fadd(b.fdiv(total.type(1.0), total), b.fsub(total, total))

    def joined(self, values: list[Value]) -> Value:
        return nearest_pairs(self.e, *values)


@cache
def compiled(dtype: str, unroll: int, rows: int, keep: bool, stream: bool, ahead: bool, pairs: bool) -> Job:
    """One of `tasks` equal parts of the rows; `rows` of scratch for each slot."""
    several, item = row_kernel(dtype, unroll, rows, keep, stream, ahead, pairs), ITEM[dtype]
    single, arguments = row_kernel(dtype, unroll, 1, keep, stream, ahead, pairs), arguments_of(*ARGUMENTS)

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
    pairs = problem.precision == "bf16" and n % 2 == 0
    part = compiled(problem.precision, config["unroll"], rows, keep, streams, ahead, pairs)
    kernel = parallel(ARGUMENTS, (part, tasks))
    scratch = torch.empty(slots(tasks) * rows * n if keep else 1, dtype=torch.float32)

    def run(out: Any, x: Any) -> None:
        kernel(x.data_ptr(), out.data_ptr(), scratch.data_ptr(), m, n, tasks)

    return run
