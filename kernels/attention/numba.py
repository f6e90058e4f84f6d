"""Fused attention in Numba: queries in vector lanes, online softmax, scores never leave the caches."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import types

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.attention import without_lse
from rooftune.kernels.common.numba import I32, ITEM, LINE, LOG2E, Emit, State, Value, intrinsic, threads
from rooftune.kernels.common.numba_cpu import dot_formats, dot_is_fast, require, vector_width
from rooftune.kernels.common.numba_dot import round_pairs
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel, slots
from rooftune.kernels.common.numba_tile import Format, pack, tile, touch, transpose

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16")

TILES = {  # rows (keys, or columns of v) x queries of the register tile, by lanes of a vector
    16: ("8x48", "12x32", "8x32", "4x96", "28x16", "8x16"),
    8: ("4x16", "4x24", "6x16", "12x8", "8x8"),
    4: ("4x12", "6x8", "4x8", "8x4"),
}


def _default(problem: Problem) -> Config:
    tiles, dtype = TILES[vector_width()], problem.precision
    few = problem["sq"] * problem["h"] // problem["hkv"] <= vector_width()
    return {
        "tile": tiles[-2] if few else tiles[0],
        "block_k": 256,
        "query_tiles": 32,
        "multiply": "dot" if dtype in dot_formats() and dot_is_fast(dtype) else "widen",
    }


SPACE = Space(
    axes={
        "tile": TILES[vector_width()],
        "block_k": (32, 64, 96, 128, 192, 256, 512),  # keys whose scores are held at once
        "query_tiles": (1, 2, 4, 8, 16, 32, 64),  # tiles of queries that share a packed block of k and v
        # dot: vdpbf16ps for both products, with probabilities rounded to bf16. Right by `numba_dot`, in the machine
        # code for Zen 5 and Sapphire Rapids; its time was not measured, the default follows that of the products
        "multiply": ("widen", "dot"),
    },
    where=(lambda config, problem: config["multiply"] == "widen" or problem.precision in dot_formats(),),
    default=_default,
)
ARGUMENTS = (*("int64",) * 13, "float32")
RESCALE = 8.0  # a maximum may be exceeded by 2^8 before earlier sums are scaled down to a new one


@cache
def begin(queries: int) -> Any:
    """Numba function (sums, count): no key seen yet; sums: maximum [queries], total [queries], output [count]."""

    def emit(e: Emit, sums: Value, count: Value) -> None:
        def clear(i: Value, _: State) -> State:
            e.store(e.splat(0.0), e.offset(sums, e.builder.add(i, e.index(queries)), 4), "fp32")
            return []

        for lane in range(0, queries, e.width):
            e.store(e.splat(-math.inf), e.builder.add(sums, e.index(lane * 4)), "fp32")
        e.loop(e.index(0), e.builder.add(count, e.index(queries)), e.width, [], clear)

    return intrinsic([types.int64] * 2, emit)


@cache
def soften(queries: int, degree: int, pairs: bool) -> Any:
    """Numba function (scores [keys][queries], keys, sums, d, limit, last, factor): scores to probabilities.

    Online softmax (Milakov and Gimelshein, 2018), one query a lane: new maximum, earlier sums scaled down,
    exponentials added to the totals. Any number near the maximum does as well, so a lane keeps the one it
    has until a score exceeds it by `RESCALE`, and most blocks scale nothing. Lane i may see the keys up to
    min(limit + i, last), counted from the block's first key. A lane that has seen no key yet has the maximum
    -inf and 0 is subtracted instead. A NaN is no maximum but makes its own lane's total NaN. Scores are
    multiplied by the factor here, which costs nothing: the subtraction of the maximum becomes an FMA.

    `pairs`: the probabilities of two keys are written as one word of bf16 each, in the first half of the rows.
    """

    def emit(
        e: Emit, scores: Value, keys: Value, sums: Value, d: Value, limit: Value, last: Value, factor: Value
    ) -> None:
        b, vectors = e.builder, queries // e.width
        lanes = range(0, queries, e.width)
        minus, factors = e.splat(-math.inf), e.splat(factor)
        limits = []
        for lane in lanes:
            order = ir.Constant(e.ints, [lane + i for i in range(e.width)])
            own = b.add(order, e.broadcast(b.trunc(limit, I32), e.width))
            most = e.broadcast(b.trunc(last, I32), e.width)
            limits.append(b.select(b.icmp_signed("<", own, most), own, most))

        def place(key: Value, lane: int) -> Value:
            return b.add(e.offset(scores, key, queries * 4), e.index(lane * 4))

        def largest(key: Value, state: State) -> State:
            return [e.max(e.load(place(key, lane), "fp32"), s) for lane, s in zip(lanes, state, strict=True)]

        def masked(key: Value, state: State) -> State:
            number = e.broadcast(b.trunc(key, I32), e.width)
            for lane, most in zip(lanes, limits, strict=True):
                seen = b.icmp_signed("<=", number, most)
                e.store(b.select(seen, e.load(place(key, lane), "fp32"), minus), place(key, lane), "fp32")
            return largest(key, state)

        def stat(index: int, lane: int) -> Value:
            return b.add(sums, e.index((index * queries + lane) * 4))

        clear = b.select(b.icmp_signed("<", limit, last), limit, last)  # every lane sees the keys up to here
        whole = b.add(clear, e.index(1))
        whole = b.select(b.icmp_signed("<", whole, keys), whole, keys)
        reached, state = e.loop(e.index(0), whole, 1, [minus] * vectors, largest)
        _, state = e.loop(reached, keys, 1, state, masked)
        old, new, changed = [e.load(stat(0, lane), "fp32") for lane in lanes], [], []
        for o, top in zip(old, state, strict=True):
            m = b.fmul(top, factors)
            grown = b.fcmp_ordered(">", m, b.fadd(o, e.splat(RESCALE)))
            new.append(b.select(grown, m, o))
            changed.append(grown)
        safe = [b.select(b.fcmp_ordered("==", m, minus), e.splat(0.0), m) for m in new]
        shrink = [e.exp2(b.fsub(o, s)) for o, s in zip(old, safe, strict=True)]
        below = [b.fneg(s) for s in safe]

        def exponential(key: Value, v: int) -> Value:
            return e.exp2(e.fma(e.load(place(key, lanes[v]), "fp32"), factors, below[v]), degree)

        def single(key: Value, totals: State) -> State:
            out = []
            for v, lane in enumerate(lanes):
                p = exponential(key, v)
                e.store(p, place(key, lane), "fp32")
                out.append(b.fadd(totals[v], p))
            return out

        def pair(key: Value, totals: State, both: bool = True) -> State:
            out = []
            for v, lane in enumerate(lanes):
                first = exponential(key, v)
                second = exponential(b.add(key, e.index(1)), v) if both else e.splat(0.0)
                e.store_raw(round_pairs(e, first, second), place(b.lshr(key, e.index(1)), lane), 4)
                out.append(b.fadd(totals[v], b.fadd(first, second)))
            return out

        totals: State = [b.fmul(e.load(stat(1, lane), "fp32"), a) for lane, a in zip(lanes, shrink, strict=True)]
        reached, totals = e.loop(e.index(0), keys, 2 if pairs else 1, totals, pair if pairs else single)
        if pairs:
            odd, sofar = b.icmp_signed("<", reached, keys), totals
            totals = e.branch(odd, lambda: pair(reached, sofar, both=False), lambda: sofar)
        for v, lane in enumerate(lanes):
            e.store(new[v], stat(0, lane), "fp32")
            e.store(totals[v], stat(1, lane), "fp32")

        def rescale(row: Value, _: State) -> State:
            for v in range(vectors):
                where = b.add(e.offset(sums, row, queries * 4), e.index((2 * queries + v * e.width) * 4))
                e.store(b.fmul(e.load(where, "fp32"), shrink[v]), where, "fp32")
            return []

        def rescale_all() -> State:
            e.loop(e.index(0), d, 1, [], rescale)
            return []

        some = b.bitcast(e.tree(changed, b.or_), ir.IntType(e.width))
        e.branch(b.icmp_unsigned("!=", some, some.type(0)), rescale_all, list)

    return intrinsic([*[types.int64] * 6, types.float32], emit)


@cache
def end(queries: int, dtype: str) -> Any:
    """Numba function (sums, d, out, valid): divide by the totals, turn [d][queries] round, round and write.

    Lanes beyond `valid` hold the last valid query again and write its row again. A total of 0 (a query
    that sees no key) gives a row of 0.
    """

    def emit(e: Emit, sums: Value, d: Value, out: Value, valid: Value) -> None:
        b, last = e.builder, e.builder.sub(valid, e.index(1))

        def least(x: Value, y: Value) -> Value:
            return b.select(b.icmp_signed("<", x, y), x, y)

        for lane in range(0, queries, e.width):
            total = e.load(b.add(sums, e.index((queries + lane) * 4)), "fp32")
            none = b.fcmp_ordered("==", total, e.splat(0.0))
            factor = b.select(none, e.splat(0.0), b.fdiv(e.splat(1.0), total))

            def turned(columns: State, lane: int = lane, factor: Value = factor) -> list[tuple[Value, Value]]:
                """(query, its values in these columns) for every lane."""
                rows = []
                for column in columns:
                    row = e.offset(sums, column, queries * 4)
                    value = e.load(b.add(row, e.index((2 * queries + lane) * 4)), "fp32")
                    rows.append(b.bitcast(b.fmul(value, factor), e.ints))
                own = [least(e.index(lane + i), last) for i in range(e.width)]
                return [(q, b.bitcast(row, e.vector)) for q, row in zip(own, transpose(e, rows), strict=True)]

            def step(column: Value, _: State, turned: Any = turned) -> State:
                for query, value in turned([b.add(column, e.index(i)) for i in range(e.width)]):
                    e.store(value, e.offset(out, b.add(b.mul(query, d), column), ITEM[dtype]), dtype)
                return []

            def long(step: Any = step) -> State:
                e.loop(e.index(0), d, e.width, [], step)
                rest = b.icmp_signed("!=", b.srem(d, e.index(e.width)), e.index(0))
                return e.branch(rest, lambda: step(b.sub(d, e.index(e.width)), []), list)

            def short(turned: Any = turned) -> State:
                """A head smaller than a vector: lanes from d on are its last column again."""
                columns = [least(e.index(i), b.sub(d, e.index(1))) for i in range(e.width)]
                for query, value in turned(columns):
                    start = b.mul(query, d)
                    e.scatter(value, [e.offset(out, b.add(start, c), ITEM[dtype]) for c in columns], dtype)
                return []

            e.branch(b.icmp_signed(">=", d, e.index(e.width)), long, short)

    return intrinsic([types.int64] * 4, emit)


@cache
def compiled(dtype: str, rows: int, queries: int, dot: bool) -> Job:
    """A task: some tiles of queries of one head, in its slot's part of the scratch memory."""
    form, item = Format(dtype, 2 if dot else 1), ITEM[dtype]
    panel = max(rows, vector_width()) if vector_width() % rows == 0 else rows  # whole vectors are packed fastest
    pack_q, pack_k, pack_v = pack(form, queries, True), pack(form, panel, True), pack(form, panel, False)
    start, finish, softmax = begin(queries), end(queries, dtype), soften(queries, 5 if dtype == "fp32" else 4, dot)
    multiply, fetch, steps = tile(form, rows, queries, panel), touch(), form.steps
    arguments = arguments_of(*ARGUMENTS)

    @job
    def attention(given, task, slot):  # type: ignore[no-untyped-def]
        q, k, v, out, scratch, size, group, sq, sk, d, causal, block, tiles, factor = arguments(given)
        every = (sq + queries - 1) // queries
        parts = (every + tiles - 1) // tiles
        columns, tall = (d + panel - 1) // panel * panel, (block + panel - 1) // panel * panel
        words = (d + steps - 1) // steps
        each = (words + columns + 2) * queries * 4
        own = scratch + slot * size
        scores = own + tiles * each
        k_pack = scores + tall * queries * 4
        v_pack = k_pack + tall * words * 4
        head, part = task // parts, task % parts
        if causal:  # the last queries see most keys: long tasks first, short ones fill the end
            part = parts - 1 - part
        begin_tile = part * tiles
        end_tile = min(begin_tile + tiles, every)
        for t in range(begin_tile, end_tile):
            first, packed = t * queries, own + (t - begin_tile) * each
            pack_q(q + (head * sq + first) * d * item, packed, min(queries, sq - first), d, d)
            start(packed + words * queries * 4, d * queries)
        stop = max(0, min(sk, min(end_tile * queries, sq) + sk - sq)) if causal else sk
        for key in range(0, stop, block):
            keys = min(block, stop - key)
            deep = (keys + steps - 1) // steps
            here = (head // group * sk + key) * d * item
            for r in range(0, keys, panel):
                pack_k(k + here + r * d * item, k_pack + r * words * 4, min(panel, keys - r), d, d)
            for c in range(0, columns, panel):
                pack_v(v + here + c * item, v_pack + c * deep * 4, min(panel, d - c), d, keys)
            ahead = block * d * item if key + block < stop else 0
            share = (ahead // (end_tile - begin_tile) + LINE - 1) // LINE * LINE
            for t in range(begin_tile, end_tile):
                fetch(k + here + ahead + (t - begin_tile) * share, share)
                fetch(v + here + ahead + (t - begin_tile) * share, share)
                first = t * queries
                limit = first + sk - sq - key if causal else keys  # the last key that lane 0 sees
                last = limit + min(queries, sq - first) - 1 if causal else keys
                seen = min(keys, last + 1)
                if seen > 0:
                    packed = own + (t - begin_tile) * each
                    sums = packed + words * queries * 4
                    for r in range(0, seen, rows):
                        left = k_pack + (r // panel * panel * words + r % panel) * 4
                        multiply(left, packed, scores + r * queries * 4, words, 0)
                    softmax(scores, seen, sums, d, limit, last, factor)
                    for c in range(0, d, rows):
                        left = v_pack + (c // panel * panel * deep + c % panel) * 4
                        multiply(left, scores, sums + (c + 2) * queries * 4, (seen + steps - 1) // steps, 1)
        for t in range(begin_tile, end_tile):
            first = t * queries
            sums = own + (t - begin_tile) * each + words * queries * 4
            finish(sums, d, out + (head * sq + first) * d * item, min(queries, sq - first))

    return attention


def build(problem: Problem, config: Config) -> Run:
    """run(out: [b, h, sq, d], q: [b, h, sq, d], k, v: [b, hkv, sk, d]), all contiguous.

    One task: `query_tiles` tiles of queries of one head against all keys. With queries in lanes, k and v are
    read one number for all lanes, and maximum, total and rescaling need no sums across lanes. A block of k
    and v is packed (and widened, unless `multiply` is dot) once for all tiles of the task.
    """
    require(problem.precision)
    without_lse(problem, "attention/numba")
    heads, group = problem["b"] * problem["h"], problem["h"] // problem["hkv"]
    sq, sk, d = problem["sq"], problem["sk"], problem["d"]
    causal = int(bool(problem.flag("causal")) and sq > 1)  # bottom right: a single query sees every key
    if not causal:  # the heads that share k and v lie one after the other: more queries of one head
        heads, group, sq = heads // group, 1, sq * group
    rows, queries = (int(side) for side in config["tile"].split("x"))
    dot = config["multiply"] == "dot"
    steps = 2 if dot else 1
    block, every = min(config["block_k"], sk), -(-sq // queries)
    tiles = min(config["query_tiles"], -(-every // -(-threads() // heads)))
    columns, tall = (-(-size // rows) * rows + vector_width() for size in (d, block))  # padded panels fit
    words, deep = -(-d // steps), -(-block // steps)
    space = tiles * (words + columns + 2) * queries + tall * (queries + words) + columns * deep
    size = -(-space // 16) * 64  # bytes, whole cache lines
    tasks = heads * -(-every // tiles)
    scratch = torch.empty(slots(tasks) * size // 4, dtype=torch.float32)
    factor = LOG2E / math.sqrt(d)
    kernel = parallel(ARGUMENTS, (compiled(problem.precision, rows, queries, dot), tasks))

    def run(out: Any, q: Any, k: Any, v: Any) -> None:
        kernel(
            *(t.data_ptr() for t in (q, k, v, out, scratch)),
            *(size, group, sq, sk, d, causal, block, tiles, factor),
        )

    return run
