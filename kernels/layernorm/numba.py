"""Layer norm and RMS norm in Numba: LLVM vectors, two-pass variance, parallel over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.numba import F32, ITEM, LINE, Chunk, Emit, State, Value, intrinsic, threads
from rooftune.kernels.common.numba_cpu import dot_formats, dot_is_fast, require, vector_width, zen
from rooftune.kernels.common.numba_dot import bf16_pairs, nearest_pairs
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel
from rooftune.kernels.layernorm import EPS

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16")
LARGE = 2 << 20  # bytes of an output that leaves an L2 cache anyway: from there streaming was faster
ARGUMENTS = ("int64",) * 7  # of a job: addresses of x, weight, bias and out; m, n, tasks
NEAR = 128 << 10  # bytes of rows that are read three times: a small part of an L2 cache
SHORT = 512  # columns of a row whose sums across lanes take longer than its visits


def _default(problem: Problem) -> Config:
    large = problem["m"] * problem["n"] * ITEM[problem.precision] > LARGE
    row = problem["n"] * ITEM[problem.precision]
    # Zen 4, in the caches: four rows at once are 1.02 to 1.17 times as fast where one is 1.5 to 4 KB, 0.8 at 8 KB
    short = problem["n"] <= SHORT or (zen() and not large and row <= 4096)
    # beyond the caches 1.16 to 1.24 times as fast on a Xeon, at 256 columns 0.94; on Zen 4 0.9 to 1.07 at 1024 columns,
    # 0.7 to 1.0 at 4096; CPUs with narrower vectors were not measured
    far = zen() and problem["n"] > 2048
    abreast = large and not short and not far and 4 * row <= NEAR and _lines(problem) and vector_width() == 16
    return {
        "unroll": 2 if short or abreast else 8,
        "rows": 4 if short or abreast else 1,
        "tasks_per_thread": 4,  # what a slow thread leaves is taken over; 1, 2, 4 and 8 are equal on two even cores
        "store": "abreast" if abreast else "stream" if large else "cached",
        "prefetch": "next",
    }


def _lines(problem: Problem) -> bool:
    """Whether rows are whole cache lines, so that all begin at the same place of one."""
    return problem["n"] * ITEM[problem.precision] % LINE == 0


SPACE = Space(
    axes={
        "unroll": (1, 2, 4, 8),  # independent vectors of a row in flight
        "rows": (1, 2, 4),  # rows at once: one's sums across lanes hide behind another's, and so does memory
        "tasks_per_thread": (1, 2, 4, 8),
        # stream: past the caches, which pays for outputs larger than these; abreast: of all rows at once, and the next
        # ones are read meanwhile, as memory copies do with pages (the C library's)
        "store": ("cached", "stream", "abreast"),
        "prefetch": ("none", "next"),  # next: the rows that follow, while the variance is computed, or results written
    },
    where=(
        lambda config, problem: config["rows"] * config["unroll"] <= 8,
        lambda config, problem: config["store"] != "abreast" or (config["rows"] > 1 and _lines(problem)),
    ),
    default=_default,
)


@cache
def row_kernel(dtype: str, rms: bool, unroll: int, rows: int, store: str, ahead: bool, pairs: bool) -> Any:
    """Numba function (x, weight, bias, out, n): some rows. Addresses; bias is not read if rms.

    The mean, then the mean of squared distances from it (the row is in the L1 cache by then), then the
    result. A one-pass variance would lose 4 digits on rows with a mean of 100 deviations.

    `pairs`, of bf16 and an even n: a vector is loaded and stored as words of two, which takes 16 operations on vectors
    of 16 numbers instead of 23 (fewer with AVX-512's own for bf16).
    """
    stored = "fp32" if pairs else dtype  # what a row consists of: words, or elements

    def emit(e: Emit, x: Value, weight: Value, bias: Value, out: Value, n: Value) -> None:
        b, every = e.builder, range(rows)
        count = b.sitofp(n, F32)
        n = b.lshr(n, e.index(1)) if pairs else n
        xs, outs = ([e.offset(base, b.mul(n, e.index(r)), ITEM[stored]) for r in every] for base in (x, out))

        # products with 1 add two numbers a word: 1.03 to 1.15 times as fast on Zen 4, where that instruction is fast
        dots, ones = pairs and "bf16" in dot_formats() and dot_is_fast("bf16"), e.int_splat(0x3F803F80)

        def load(chunk: Chunk, base: Value) -> list[Value]:
            return e.widen_pairs(chunk.load(base, stored)) if pairs else [chunk.load(base, stored)]

        def means(term: Callable[[Chunk, int, Value], Value]) -> list[Value]:
            """For each row the mean of term(chunk, row, sum so far) - sum."""

            def add(chunk: Chunk, state: State) -> State:
                return [term(chunk, r, state[r]) for r in every]

            return [b.fdiv(e.total(sums), count) for sums in e.row(n, [0.0] * rows, add, unroll)]

        def value(chunk: Chunk, r: int, total: Value) -> Value:
            if dots:
                return bf16_pairs(e, total, chunk.only_new(chunk.load(xs[r], stored)), ones)
            for part in load(chunk, xs[r]):
                total = b.fadd(total, chunk.only_new(part))
            return total

        centres = [] if rms else [e.splat(mean) for mean in means(value)]

        def centred(chunk: Chunk, r: int) -> list[Value]:
            return [part if rms else b.fsub(part, centres[r]) for part in load(chunk, xs[r])]

        def fetch(chunk: Chunk, r: int) -> None:
            following = b.add(chunk.at, b.mul(n, e.index(rows)))
            e.prefetch(e.offset(xs[r], following, ITEM[stored]))

        def square(chunk: Chunk, r: int, total: Value) -> Value:
            if ahead and store != "abreast":
                fetch(chunk, r)
            for part in centred(chunk, r):
                distance = chunk.only_new(part)
                total = e.fma(distance, distance, total)
            return total

        scales = []
        for mean in means(square):
            root = e.call("llvm.sqrt.f32", F32, [b.fadd(mean, ir.Constant(F32, EPS))])
            scales.append(e.splat(b.fdiv(ir.Constant(F32, 1.0), root)))

        def normalise(chunk: Chunk, some: Sequence[int], stream: bool) -> State:
            factors, added = load(chunk, weight), [] if rms else load(chunk, bias)
            for r in some:
                if ahead and store == "abreast":
                    fetch(chunk, r)
                values = [b.fmul(part, scales[r]) for part in centred(chunk, r)]
                if rms:
                    values = [b.fmul(*given) for given in zip(values, factors, strict=True)]
                else:
                    values = [e.fma(*given) for given in zip(values, factors, added, strict=True)]
                value = nearest_pairs(e, *values) if pairs else values[0]
                chunk.store(value, outs[r], stored, stream, short_nans=True)
            return []

        # past the caches, lines have to be filled whole: rows abreast all begin at the same place of one
        for some in [every] if store == "abreast" else [[r] for r in every]:

            def cached(some: Sequence[int] = some) -> State:
                e.row(n, [], lambda chunk, _: normalise(chunk, some, False), unroll)
                return []

            def streamed(some: Sequence[int] = some) -> State:
                begin = e.to_aligned(outs[some[0]], stored)
                e.row(n, [], lambda chunk, _: normalise(chunk, some, True), unroll, begin)
                return []

            if store != "cached" and pairs:
                # a word that begins at an odd element never comes to the beginning of a line
                odd = b.and_(outs[some[0]], e.index(ITEM[stored] - 1))
                e.branch(b.icmp_signed("==", odd, e.index(0)), streamed, cached)
            else:
                (cached if store == "cached" else streamed)()

    return intrinsic([types.int64] * 5, emit)


@cache
def compiled(dtype: str, rms: bool, unroll: int, rows: int, store: str, ahead: bool, pairs: bool) -> Job:
    """One of `tasks` equal parts of the rows."""
    several, item = row_kernel(dtype, rms, unroll, rows, store, ahead, pairs), ITEM[dtype]
    single, arguments = row_kernel(dtype, rms, unroll, 1, store, ahead, pairs), arguments_of(*ARGUMENTS)

    @job
    def part(given, task, _):  # type: ignore[no-untyped-def]
        x, weight, bias, out, m, n, tasks = arguments(given)
        begin, stop = task * m // tasks, (task + 1) * m // tasks
        whole = begin + (stop - begin) // rows * rows
        for i in range(begin, whole, rows):
            several(x + i * n * item, weight, bias, out + i * n * item, n)
        if rows > 1:
            for i in range(whole, stop):
                single(x + i * n * item, weight, bias, out + i * n * item, n)

    return part


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n], weight: [n], bias: [n]), no bias with the flag rms; all contiguous."""
    require(problem.precision)
    m, n, rms = problem["m"], problem["n"], bool(problem.flag("rms"))
    ahead = config["prefetch"] == "next"
    tasks = min(m, threads() * config["tasks_per_thread"])
    pairs = problem.precision == "bf16" and n % 2 == 0
    part = compiled(problem.precision, rms, config["unroll"], config["rows"], config["store"], ahead, pairs)
    kernel = parallel(ARGUMENTS, (part, tasks))

    def run(out: Any, x: Any, weight: Any, bias: Any = None) -> None:
        place = 0 if bias is None else bias.data_ptr()
        kernel(x.data_ptr(), weight.data_ptr(), place, out.data_ptr(), m, n, tasks)

    return run
