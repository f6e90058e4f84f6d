"""Online softmax in Numba: queries in vector lanes; scores become probabilities where they are, sums follow."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types

from rooftune.kernels.common.numba import I32, ITEM, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_dot import round_pairs
from rooftune.kernels.common.numba_tile import transpose

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
def soften(queries: int, degree: int, pairs: bool, deep: int = 1) -> Any:
    """Numba function (scores [keys][queries], keys, sums, d, limit, last, factor): scores to probabilities.

    Online softmax (Milakov and Gimelshein, 2018), one query a lane: new maximum, earlier sums scaled down,
    exponentials added to the totals. Any number near the maximum does as well, so a lane keeps the one it
    has until a score exceeds it by `RESCALE`, and most blocks scale nothing. Lane i may see the keys up to
    min(limit + i, last), counted from the block's first key. A lane that has seen no key yet has the maximum
    -inf and 0 is subtracted instead. A NaN is no maximum but makes its own lane's total NaN. Scores are
    multiplied by the factor here, which costs nothing: the subtraction of the maximum becomes an FMA.

    `pairs`: the probabilities of two keys are written as one word of bf16 each, in the first half of the rows, and
    zeros behind them up to a whole number of `deep` words.
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
            words = b.lshr(b.add(keys, e.index(1)), e.index(1))

            def clear(word: Value, _: State) -> State:
                for lane in lanes:
                    e.store(e.splat(0.0), place(word, lane), "fp32")
                return []

            e.loop(words, b.mul(b.sdiv(b.add(words, e.index(deep - 1)), e.index(deep)), e.index(deep)), 1, [], clear)
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
