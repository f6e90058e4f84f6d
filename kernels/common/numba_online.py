"""Online softmax in Numba: queries in vector lanes; scores become probabilities where they are, sums follow.

What a tile of queries keeps: maximum [queries], total [queries], the last key that each sees [queries] (int32), then
the output so far, [d][queries].
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types

from rooftune.kernels.common.numba import I32, ITEM, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_dot import round_pairs
from rooftune.kernels.common.numba_split import SPLIT, parts
from rooftune.kernels.common.numba_tile import WORD, transpose

CHAINS = 8  # maxima at once: one takes 4 cycles until the next may follow, and two may begin in each
KEPT = 3  # rows of queries before the output
RESCALE = 8.0  # a maximum may be exceeded by 2^8 before earlier sums are scaled down to a new one


@cache
def begin(queries: int) -> Any:
    """Numba function (sums, count, query, period, beyond, valid): no key seen yet; output: [count].

    Lane i is query (query + i) % period of its head and sees the keys up to that number + beyond: heads that share keys
    lie one after the other. Lanes from `valid` on are the last valid query again.
    """

    def emit(e: Emit, sums: Value, count: Value, query: Value, period: Value, beyond: Value, valid: Value) -> None:
        b = e.builder

        def clear(i: Value, _: State) -> State:
            e.store(e.splat(0.0), e.offset(sums, i, WORD), "fp32")
            return []

        def lane(i: Value, state: State) -> State:
            (own,) = state
            e.store_raw(b.trunc(b.add(own, beyond), I32), e.offset(sums, b.add(i, e.index(2 * queries)), WORD), WORD)
            after = b.add(own, e.index(1))
            after = b.select(b.icmp_signed("==", after, period), e.index(0), after)
            return [b.select(b.icmp_signed("<", b.add(i, e.index(1)), valid), after, own)]

        for first in range(0, queries, e.width):
            e.store(e.splat(-math.inf), b.add(sums, e.index(first * WORD)), "fp32")
        e.loop(e.index(queries), e.index(2 * queries), e.width, [], clear)
        e.loop(e.index(0), e.index(queries), 1, [query], lane)
        e.loop(e.index(KEPT * queries), b.add(count, e.index(KEPT * queries)), e.width, [], clear)

    return intrinsic([types.int64] * 6, emit)


@cache
def soften(queries: int, degree: int, pairs: bool, deep: int = 1, split: bool = False) -> Any:
    """Numba function (scores [keys][queries], keys, sums, d, first, clear, factor, out): scores to probabilities.

    Online softmax (Milakov and Gimelshein, 2018), one query a lane: new maximum, earlier sums scaled down,
    exponentials added to the totals. Any number near the maximum does as well, so a lane keeps the one it
    has until a score exceeds it by `RESCALE`, and most blocks scale nothing. `first` is the number of the block's
    first key; its first `clear` keys are seen by all, of the others a lane sees those up to its last one. A lane
    that has seen no key yet has the maximum -inf and 0 is subtracted instead. A NaN is no maximum but makes its own
    lane's total NaN. Scores are multiplied by the factor here, which costs nothing: the subtraction of the maximum
    becomes an FMA.

    `pairs`: the probabilities of two keys are written as one word of bf16 each, to `out`, and zeros behind them up to a
    whole number of `deep` words; else they take their scores' place. `split`: as the three parts of `numba_split`.
    Pairs that are not split may take the place of the scores.
    """

    def emit(
        e: Emit,
        scores: Value,
        keys: Value,
        sums: Value,
        d: Value,
        first: Value,
        clear: Value,
        factor: Value,
        into: Value,
    ) -> None:
        b, vectors = e.builder, queries // e.width
        lanes = range(0, queries, e.width)
        minus, factors = e.splat(-math.inf), e.splat(factor)

        def place(key: Value, lane: int) -> Value:
            return b.add(e.offset(scores, key, queries * 4), e.index(lane * 4))

        def largest(key: Value, state: State) -> State:
            return [e.max(e.load(place(key, lane), "fp32"), s) for lane, s in zip(lanes, state, strict=True)]

        def several(key: Value, state: State) -> State:
            each = [state[i : i + vectors] for i in range(0, len(state), vectors)]
            return [top for i, part in enumerate(each) for top in largest(b.add(key, e.index(i)), part)]

        def masked(key: Value, state: State) -> State:
            number = e.broadcast(b.trunc(b.add(first, key), I32), e.width)
            for lane in lanes:
                seen = b.icmp_signed("<=", number, e.load_raw(stat(2, lane), e.ints, WORD))
                e.store(b.select(seen, e.load(place(key, lane), "fp32"), minus), place(key, lane), "fp32")
            return largest(key, state)

        def stat(index: int, lane: int) -> Value:
            return b.add(sums, e.index((index * queries + lane) * 4))

        whole = b.select(b.icmp_signed("<", clear, keys), clear, keys)
        together = max(1, CHAINS // vectors)
        reached, state = e.loop(e.index(0), whole, together, [minus] * (together * vectors), several)
        state = [e.tree(state[v::vectors], e.max) for v in range(vectors)]
        reached, state = e.loop(reached, whole, 1, state, largest)
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

        def store(words: State, key: Value, lane: int) -> None:
            """Words of keys `key` and `key` + 1; parts of `deep` of them lie behind each other."""
            row = b.lshr(key, e.index(1))
            if split:
                row = b.add(b.mul(b.udiv(row, e.index(deep)), e.index(len(words) * deep)), b.urem(row, e.index(deep)))
            for part, word in enumerate(words):
                at = b.add(row, e.index(part * deep))
                e.store_raw(word, b.add(e.offset(into, at, queries * 4), e.index(lane * 4)), 4)

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
                store(parts(e, first, second, known=True) if split else [round_pairs(e, first, second)], key, lane)
                out.append(b.fadd(totals[v], b.fadd(first, second)))
            return out

        totals: State = [b.fmul(e.load(stat(1, lane), "fp32"), a) for lane, a in zip(lanes, shrink, strict=True)]
        reached, totals = e.loop(e.index(0), keys, 2 if pairs else 1, totals, pair if pairs else single)
        if pairs:
            odd, sofar = b.icmp_signed("<", reached, keys), totals
            totals = e.branch(odd, lambda: pair(reached, sofar, both=False), lambda: sofar)
            words = b.lshr(b.add(keys, e.index(1)), e.index(1))

            def blank(word: Value, _: State) -> State:
                for lane in lanes:
                    store([ir.Constant(e.ints, None)] * (SPLIT.planes if split else 1), b.shl(word, e.index(1)), lane)
                return []

            e.loop(words, b.mul(b.sdiv(b.add(words, e.index(deep - 1)), e.index(deep)), e.index(deep)), 1, [], blank)
        for v, lane in enumerate(lanes):
            e.store(new[v], stat(0, lane), "fp32")
            e.store(totals[v], stat(1, lane), "fp32")

        def rescale(row: Value, _: State) -> State:
            for v in range(vectors):
                where = b.add(e.offset(sums, row, queries * 4), e.index((KEPT * queries + v * e.width) * 4))
                e.store(b.fmul(e.load(where, "fp32"), shrink[v]), where, "fp32")
            return []

        def rescale_all() -> State:
            e.loop(e.index(0), d, 1, [], rescale)
            return []

        some = b.bitcast(e.tree(changed, b.or_), ir.IntType(e.width))
        e.branch(b.icmp_unsigned("!=", some, some.type(0)), rescale_all, list)

    return intrinsic([*[types.int64] * 6, types.float32, types.int64], emit)


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
                    value = e.load(b.add(row, e.index((KEPT * queries + lane) * 4)), "fp32")
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
