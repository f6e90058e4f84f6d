"""Fused attention in Numba: queries in vector lanes, online softmax, scores never leave the caches."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import prange, types

from rooftune.check import Run
from rooftune.core import Config, Problem, Space, UsageError
from rooftune.kernels.common.numba import (
    I32,
    ITEM,
    LOG2E,
    Chunk,
    Emit,
    State,
    Value,
    intrinsic,
    jit,
    require,
    threads,
    vector_width,
)
from rooftune.kernels.common.numba_tile import Format, pack, tile, transpose

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16")

TILES = {  # rows (keys, or columns of v) x queries of the register tile, by lanes of a vector
    16: ("8x48", "8x32", "4x96", "4x48", "8x16"),
    8: ("4x24", "4x16", "8x8"),
    4: ("4x12", "4x8", "8x4"),
}
SPACE = Space(
    axes={
        "tile": TILES[vector_width()],
        "block_k": (32, 64, 128, 256, 512),  # keys whose scores are held at once
        "tasks_per_thread": (1, 2, 4),
    },
    default={"tile": TILES[vector_width()][0], "block_k": 128, "tasks_per_thread": 1},
)


@cache
def begin(queries: int) -> Any:
    """Numba function (queries packed [d][queries], d, factor, sums): scale the queries; empty sums.

    sums: maximum [queries], total [queries], output [d][queries], all fp32 and one after the other.
    """

    def emit(e: Emit, packed: Value, d: Value, factor: Value, sums: Value) -> None:
        b = e.builder
        factors = e.splat(factor)
        count = b.mul(d, e.index(queries))

        def scale(i: Value, _: State) -> State:
            place = e.offset(packed, i, 4)
            e.store(b.fmul(e.load(place, "fp32"), factors), place, "fp32")
            e.store(e.splat(0.0), e.offset(sums, b.add(i, e.index(2 * queries)), 4), "fp32")
            return []

        for lane in range(0, queries, e.width):
            e.store(e.splat(-math.inf), b.add(sums, e.index(lane * 4)), "fp32")
            e.store(e.splat(0.0), b.add(sums, e.index((queries + lane) * 4)), "fp32")
        e.loop(e.index(0), count, e.width, [], scale)

    return intrinsic([types.int64, types.int64, types.float32, types.int64], emit)


@cache
def soften(queries: int) -> Any:
    """Numba function (scores [keys][queries], keys, sums, d, limit, last): scores to probabilities.

    Online softmax (Milakov and Gimelshein, 2018), one query a lane: new maximum, earlier sums scaled down,
    exponentials added to the totals. Lane i may see the keys up to min(limit + i, last), counted from the
    block's first key. A lane that has seen no key yet has the maximum -inf and 0 is subtracted instead. A
    NaN is no maximum but makes its own lane's total NaN.
    """

    def emit(e: Emit, scores: Value, keys: Value, sums: Value, d: Value, limit: Value, last: Value) -> None:
        b, vectors = e.builder, queries // e.width
        lanes = range(0, queries, e.width)
        minus = e.splat(-math.inf)
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

        old = [e.load(stat(0, lane), "fp32") for lane in lanes]
        clear = b.select(b.icmp_signed("<", limit, last), limit, last)  # every lane sees the keys up to here
        whole = b.add(clear, e.index(1))
        whole = b.select(b.icmp_signed("<", whole, keys), whole, keys)
        reached, state = e.loop(e.index(0), whole, 1, old, largest)
        _, new = e.loop(reached, keys, 1, state, masked)
        safe = [b.select(b.fcmp_ordered("==", m, minus), e.splat(0.0), m) for m in new]
        shrink = [e.exp2(b.fsub(o, s)) for o, s in zip(old, safe, strict=True)]

        def exponentials(key: Value, state: State) -> State:
            out = []
            for lane, s, total in zip(lanes, safe, state, strict=True):
                p = e.exp2(b.fsub(e.load(place(key, lane), "fp32"), s))
                e.store(p, place(key, lane), "fp32")
                out.append(b.fadd(total, p))
            return out

        totals = [b.fmul(e.load(stat(1, lane), "fp32"), a) for lane, a in zip(lanes, shrink, strict=True)]
        _, totals = e.loop(e.index(0), keys, 1, totals, exponentials)
        for v, lane in enumerate(lanes):
            e.store(new[v], stat(0, lane), "fp32")
            e.store(totals[v], stat(1, lane), "fp32")

        def rescale(row: Value, _: State) -> State:
            for v in range(vectors):
                where = b.add(e.offset(sums, row, queries * 4), e.index((2 * queries + v * e.width) * 4))
                e.store(b.fmul(e.load(where, "fp32"), shrink[v]), where, "fp32")
            return []

        e.loop(e.index(0), d, 1, [], rescale)

    return intrinsic([types.int64] * 6, emit)


@cache
def end(queries: int, dtype: str) -> Any:
    """Numba function (sums, d, out, valid): divide by the totals, turn [d][queries] round, round and write.

    Lanes beyond `valid` hold the last valid query again and write its row again. A total of 0 (a query
    that sees no key) gives a row of 0.
    """

    def emit(e: Emit, sums: Value, d: Value, out: Value, valid: Value) -> None:
        b, last = e.builder, e.builder.sub(valid, e.index(1))
        for lane in range(0, queries, e.width):
            total = e.load(b.add(sums, e.index((queries + lane) * 4)), "fp32")
            none = b.fcmp_ordered("==", total, e.splat(0.0))
            factor = b.select(none, e.splat(0.0), b.fdiv(e.splat(1.0), total))

            def block(column: Value, lane: int = lane, factor: Value = factor) -> None:
                rows = []
                for i in range(e.width):
                    row = e.offset(sums, b.add(column, e.index(i)), queries * 4)
                    value = e.load(b.add(row, e.index((2 * queries + lane) * 4)), "fp32")
                    rows.append(b.bitcast(b.fmul(value, factor), e.ints))
                for i, row in enumerate(transpose(e, rows)):
                    own = e.index(lane + i)
                    query = b.select(b.icmp_signed("<", own, last), own, last)
                    where = e.offset(out, b.add(b.mul(query, d), column), ITEM[dtype])
                    e.store(b.bitcast(row, e.vector), where, dtype)

            def step(column: Value, _: State, block: Any = block) -> State:
                block(column)
                return []

            e.loop(e.index(0), d, e.width, [], step)
            rest = b.icmp_signed("!=", b.srem(d, e.index(e.width)), e.index(0))
            e.branch(rest, lambda: step(b.sub(d, e.index(e.width)), []), list)

    return intrinsic([types.int64] * 4, emit)


@cache
def widen(dtype: str) -> Any:
    """Numba function (source, target, count): elements of a precision to fp32."""

    def emit(e: Emit, source: Value, target: Value, count: Value) -> None:
        def body(chunk: Chunk, _: State) -> State:
            chunk.store(chunk.load(source, dtype), target, "fp32")
            return []

        e.row(count, [], body, 4)

    return intrinsic([types.int64] * 3, emit)


@cache
def compiled(dtype: str, rows: int, queries: int) -> Any:
    """Numba function (q, k, v, out, scratch, scratch size, heads, group, sq, sk, d, causal, block, factor, slots)."""
    form, item, wide = Format(dtype, 1), ITEM[dtype], dtype == "fp32"
    fp32 = Format("fp32", 1)
    pack_q, start, softmax, finish = pack(form, queries, True), begin(queries), soften(queries), end(queries, dtype)
    multiply, single = tile(fp32, rows, queries, packed=False), tile(fp32, 1, queries, packed=False)
    convert = widen(dtype)

    @jit("void(" + ", ".join(["int64"] * 13) + ", float32, int64)")
    def attention(  # type: ignore[no-untyped-def]
        q, k, v, out, scratch, size, heads, group, sq, sk, d, causal, block, factor, slots
    ):
        tiles = (sq + queries - 1) // queries
        for slot in prange(slots):
            packed = scratch + slot * size
            sums = packed + d * queries * 4
            scores = sums + (d + 2) * queries * 4
            wide_k = scores + block * queries * 4
            wide_v = wide_k + block * d * 4
            for task in range(slot, heads * tiles, slots):
                head, first = task // tiles, task % tiles * queries
                valid = min(queries, sq - first)
                place = (head * sq + first) * d * item
                pack_q(q + place, packed, valid, d, d)
                start(packed, d, factor, sums)
                shift = first + sk - sq if causal else sk
                stop = max(0, min(sk, shift + valid)) if causal else sk
                for key in range(0, stop, block):
                    keys = min(block, stop - key)
                    here = (head // group * sk + key) * d * item
                    k_block, v_block = k + here, v + here
                    if not wide:
                        convert(k_block, wide_k, keys * d)
                        convert(v_block, wide_v, keys * d)
                        k_block, v_block = wide_k, wide_v
                    for r in range(0, keys - rows + 1, rows):
                        multiply(k_block + r * d * 4, packed, scores + r * queries * 4, d, d * 4, 4, 0)
                    for r in range(keys // rows * rows, keys):
                        single(k_block + r * d * 4, packed, scores + r * queries * 4, d, d * 4, 4, 0)
                    last = shift + valid - 1 - key if causal else keys
                    softmax(scores, keys, sums, d, shift - key, last)
                    for column in range(0, d, rows):
                        output = sums + (column + 2) * queries * 4
                        multiply(v_block + column * 4, scores, output, keys, 4, d * 4, 1)
                finish(sums, d, out + place, valid)

    return attention


def build(problem: Problem, config: Config) -> Run:
    """run(out: [b, h, sq, d], q: [b, h, sq, d], k, v: [b, hkv, sk, d]), all contiguous.

    One task: `queries` rows of one head against all keys. With queries in lanes, k and v are read as they
    lie in memory (one number for all lanes), and maximum, total and rescaling need no sums across lanes.

    Raises:
        UsageError: the head size is no multiple of 8, or less than a vector.
    """
    require(problem.precision)
    heads, group = problem["b"] * problem["h"], problem["h"] // problem["hkv"]
    sq, sk, d = problem["sq"], problem["sk"], problem["d"]
    rows, queries = (int(side) for side in config["tile"].split("x"))
    if d % 8 or d < vector_width():
        raise UsageError(f"d must be a multiple of 8 and at least {vector_width()}, not {d}")
    kernel = compiled(problem.precision, rows, queries)
    block = min(config["block_k"], sk)
    words = (2 * d + 2 + block) * queries + (0 if problem.precision == "fp32" else 2 * block * d)
    size = -(-words // 16) * 64  # bytes, whole cache lines
    slots = min(heads * -(-sq // queries), threads() * config["tasks_per_thread"])
    scratch = torch.empty(slots * size // 4, dtype=torch.float32)
    causal, factor = int(bool(problem.flag("causal"))), LOG2E / math.sqrt(d)

    def run(out: Any, q: Any, k: Any, v: Any) -> None:
        kernel(
            *(t.data_ptr() for t in (q, k, v, out, scratch)),
            *(size, heads, group, sq, sk, d, causal, block, factor, slots),
        )

    return run
