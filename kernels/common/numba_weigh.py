"""Online softmax in Numba, keys in vector lanes: what attention of few queries consists of beside dot products.

What a query keeps: `KEPT` numbers (maximum, total, what earlier sums are scaled by), and its sums of values [d] in two
places, as a step reads one and writes the other.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types

from rooftune.kernels.common.numba import F32, I32, ITEM, Chunk, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_dot import bf16_pairs, nearest_pairs

CHAINS = 4  # sums that the latency of an FMA leaves room for
KEPT = 3


@cache
def convert(dtype: str) -> Any:
    """Numba function (source, target, count): numbers of a precision as fp32; fp32 as it is, whatever is in it."""

    def emit(e: Emit, source: Value, target: Value, count: Value) -> None:
        def step(chunk: Chunk, _: State) -> State:
            chunk.store(chunk.load(source, dtype), target, "fp32")
            return []

        e.row(count, [], step)

    return intrinsic([types.int64] * 3, emit)


@cache
def begin() -> Any:
    """Numba function (state, sums, d): a query that has seen no key."""

    def emit(e: Emit, state: Value, sums: Value, d: Value) -> None:
        for i, value in enumerate((-math.inf, 0.0, 1.0)):
            e.store_raw(ir.Constant(F32, value), e.offset(state, e.index(i), 4), 4)

        def clear(chunk: Chunk, _: State) -> State:
            chunk.store(e.splat(0.0), sums, "fp32")
            return []

        e.row(d, [], clear)

    return intrinsic([types.int64] * 3, emit)


@cache
def weigh(pairs: bool = False) -> Any:
    """Numba function (scores, seen, keys, state, factor): scores of one query to probabilities.

    Scores times the factor are powers of 2. `pairs`: probabilities are left as bf16, of two keys a word.

    Online softmax (Milakov and Gimelshein, 2018): `state` holds the maximum so far, the total of the probabilities and
    what sums before must be multiplied by. Keys from `seen` on, up to a whole vector, get 0. A query that has seen no
    key yet has the maximum -inf and 0 is subtracted instead; a NaN is no maximum but makes the total NaN.
    """

    def emit(e: Emit, scores: Value, seen: Value, keys: Value, state: Value, factor: Value) -> None:
        b, minus, factors = e.builder, e.splat(-math.inf), e.splat(factor)
        lanes = ir.Constant(e.ints, list(range(e.width)))
        padded = b.mul(b.sdiv(b.add(keys, e.index(e.width - 1)), e.index(e.width)), e.index(e.width))
        limit = e.broadcast(b.trunc(seen, I32), e.width)

        def mask(at: Value, tops: State) -> State:
            place = e.offset(scores, at, 4)
            number = b.add(e.broadcast(b.trunc(at, I32), e.width), lanes)
            score = b.select(b.icmp_signed("<", number, limit), b.fmul(e.load(place, "fp32"), factors), minus)
            e.store(score, place, "fp32")
            return [e.max(score, tops[0])]

        _, tops = e.loop(e.index(0), padded, e.width, [minus], mask)
        old, before = (e.load_raw(e.offset(state, e.index(i), 4), F32, 4) for i in range(2))
        new = e.max(e.splat(e.reduce(tops[0], e.max)), e.splat(old))
        safe = b.select(b.fcmp_ordered("==", new, minus), e.splat(0.0), new)

        def exponential(at: Value, totals: State) -> State:
            p = e.exp2(b.fsub(e.load(e.offset(scores, at, 4), "fp32"), safe), 4 if pairs else 5)
            stored = "bf16" if pairs else "fp32"
            e.store(p, e.offset(scores, at, ITEM[stored]), stored, short_nans=True)
            return [b.fadd(totals[0], p)]

        _, totals = e.loop(e.index(0), padded, e.width, [e.splat(0.0)], exponential)
        shrink = b.extract_element(e.exp2(b.fsub(e.splat(old), safe), 5), ir.Constant(I32, 0))
        total = b.fadd(b.fmul(before, shrink), e.total(totals))
        for i, value in enumerate((b.extract_element(new, ir.Constant(I32, 0)), total, shrink)):
            e.store_raw(value, e.offset(state, e.index(i), 4), 4)

    return intrinsic([types.int64] * 4 + [types.float32], emit)


def _fetch(e: Emit, following: Value, chunk: Chunk, keys: Value, key: Value, item: int) -> None:
    """Ask for a line of what is read next: as many of these as of what is read now, one at a time. All at once keep the
    processor waiting (keys and values beyond the caches: 1.2 to 1.5 times as fast, on Zen 4)."""
    b = e.builder
    e.prefetch(e.offset(following, b.add(b.mul(chunk.at, keys), b.mul(key, e.index(e.width))), item))


@cache
def add_values(dtype: str, rows: int, apart: int) -> Any:
    """Numba function (p, v, old, new, state, keys, d, following): new = old, scaled down, + p v, for some queries.

    p: [rows][apart]; v: [keys][d] of a precision; old, new: [rows][d], not the same memory (a row's last vector may
    overlap the one before); state: as `weigh` leaves it; following: an address, from which on is read next.
    """

    def emit(
        e: Emit, p: Value, v: Value, old: Value, new: Value, state: Value, keys: Value, d: Value, following: Value
    ) -> None:
        b, together = e.builder, max(1, CHAINS // rows)

        def columns(chunk: Chunk, _: State) -> State:
            def some(key: Value, sums: State, count: int = together) -> State:
                out = list(sums)
                for u in range(count):
                    number = b.add(key, e.index(u))
                    _fetch(e, following, chunk, keys, number, ITEM[dtype])
                    value = chunk.load(e.offset(v, b.mul(number, d), ITEM[dtype]), dtype)
                    for i in range(rows):
                        weight = e.load_raw(e.offset(p, b.add(number, e.index(i * apart)), 4), F32, 4)
                        out[u * rows + i] = e.fma(e.splat(weight), value, out[u * rows + i])
                return out

            start = []
            for i in range(rows):
                shrink = e.load_raw(e.offset(state, e.index(i * KEPT + 2), 4), F32, 4)
                before = chunk.load(e.offset(old, b.mul(d, e.index(i)), 4), "fp32")
                start.append(b.fmul(before, e.splat(shrink)))
            start += [e.splat(0.0)] * (rows * (together - 1))
            at, sums = e.loop(e.index(0), keys, together, start, some)
            _, first = e.loop(at, keys, 1, sums[:rows], lambda key, s: some(key, s, 1))
            for i in range(rows):
                total = e.tree([first[i], *sums[rows + i :: rows]], b.fadd)
                chunk.store(total, e.offset(new, b.mul(d, e.index(i)), 4), "fp32")
            return []

        e.row(d, [], columns)

    return intrinsic([types.int64] * 8, emit)


@cache
def add_pairs(rows: int, apart: int) -> Any:
    """As `add_values` for bf16, two keys at once; p: bf16 [rows][2 * apart]. A row of `old` and `new` has the numbers
    at even places first, then those at odd ones."""

    def emit(
        e: Emit, p: Value, v: Value, old: Value, new: Value, state: Value, keys: Value, d: Value, following: Value
    ) -> None:
        b, together = e.builder, max(1, CHAINS // rows)
        half, zero = b.lshr(d, e.index(1)), e.splat(0.0)

        def sums_of(base: Value, i: int) -> list[Value]:
            return [e.offset(base, b.add(b.mul(d, e.index(i)), part), 4) for part in (e.index(0), half)]

        def columns(chunk: Chunk, _: State) -> State:
            def words(key: Value, both: bool) -> tuple[Value, Value]:
                """Of two keys the numbers at even places, then at odd ones."""
                first = chunk.load(e.offset(v, b.mul(key, d), 2), "fp32")
                second = chunk.load(e.offset(v, b.mul(b.add(key, e.index(1)), d), 2), "fp32") if both else zero
                x, y = (b.bitcast(value, e.ints) for value in (first, second))
                low, high, sixteen = e.int_splat(0xFFFF), e.int_splat(0xFFFF0000), e.int_splat(16)
                return b.or_(b.and_(x, low), b.shl(y, sixteen)), b.or_(b.lshr(x, sixteen), b.and_(y, high))

            def some(key: Value, sums: State, count: int = together, both: bool = True) -> State:
                out = list(sums)
                for u in range(count):
                    number = b.add(key, e.index(2 * u))
                    for one in range(1 + both):
                        _fetch(e, following, chunk, keys, b.add(number, e.index(one)), 4)
                    value = words(number, both)
                    for i in range(rows):
                        place = e.offset(p, b.add(number, e.index(i * 2 * apart)), 2)
                        weights = e.broadcast(e.load_raw(place, I32, 2), e.width)
                        for side in range(2):
                            at = (u * rows + i) * 2 + side
                            out[at] = bf16_pairs(e, out[at], value[side], weights)
                return out

            start = []
            for i in range(rows):
                shrink = e.load_raw(e.offset(state, e.index(i * KEPT + 2), 4), F32, 4)
                start += [b.fmul(chunk.load(place, "fp32"), e.splat(shrink)) for place in sums_of(old, i)]
            count = len(start)
            at, sums = e.loop(e.index(0), keys, 2 * together, [*start, *([zero] * (count * (together - 1)))], some)
            at, first = e.loop(at, keys, 2, sums[:count], lambda key, s: some(key, s, 1))
            odd = b.icmp_signed("<", at, keys)  # its partner's weight is 0, but no memory is behind the last key
            first = e.branch(odd, lambda: some(at, first, 1, both=False), lambda: first)
            totals = [e.tree([first[i], *sums[count + i :: count]], b.fadd) for i in range(count)]
            for i in range(rows):
                for total, place in zip(totals[2 * i :], sums_of(new, i), strict=False):
                    chunk.store(total, place, "fp32")
            return []

        e.row(half, [], columns)

    return intrinsic([types.int64] * 8, emit)


@cache
def divide(dtype: str, pairs: bool = False) -> Any:
    """Numba function (sums, total, out, d): what a query gets, rounded; 0 if it saw no key. total: an address.
    `pairs`: sums as `add_pairs` leaves them."""

    def emit(e: Emit, sums: Value, total: Value, out: Value, d: Value) -> None:
        b, all_lanes = e.builder, e.splat(e.load_raw(total, F32, 4))
        none = b.fcmp_ordered("==", all_lanes, e.splat(0.0))
        factor = b.select(none, e.splat(0.0), b.fdiv(e.splat(1.0), all_lanes))
        half = b.lshr(d, e.index(1))
        places = [sums, e.offset(sums, half, 4)] if pairs else [sums]

        def step(chunk: Chunk, _: State) -> State:
            values = [b.fmul(chunk.load(place, "fp32"), factor) for place in places]
            chunk.store(nearest_pairs(e, *values) if pairs else values[0], out, "fp32" if pairs else dtype)
            return []

        e.row(half if pairs else d, [], step)

    return intrinsic([types.int64] * 4, emit)
