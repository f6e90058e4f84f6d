"""Dot products of rows for matrix products with few rows: both operands are read along k, nothing is packed."""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types

from rooftune.kernels.common.numba import F32, I32, ITEM, Chunk, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_cpu import vector_width
from rooftune.kernels.common.numba_tile import WORD, Format, flipped, multiply_add, words_at

SUMS = {16: 24, 8: 12, 4: 12}  # vectors of sums that leave registers for the operands, by lanes
# rows of b read side by side: a Xeon reads 4096 x 4096 in fp32 at 9.7 GB/s by one, 11.8 by 2, 13.2 by 4, 14 by 8 to 24
STREAMS = {16: 8, 8: 4, 4: 4}


def columns_at_once(rows: int, columns: int) -> int:
    """How many rows of b meet `rows` rows of a in one pass: a divisor of `columns`, at most STREAMS."""
    most = min(STREAMS[vector_width()], SUMS[vector_width()] // rows)
    return max(c for c in range(1, max(1, most) + 1) if columns % c == 0)


def store_totals(e: Emit, values: State, place: Value) -> None:
    """The sum of the lanes of each vector (at most as many as lanes), side by side.

    Halves of two vectors are added as one vector, which then holds both: 3 operations a vector instead of 2 for each
    halving of each (attention of one query of 128 numbers: 11 operations a key instead of 17 in fp32).
    """
    b, count, width = e.builder, len(values), values[0].type.count
    add = b.fadd if values[0].type.element == F32 else b.add
    vectors = [*values, *([values[-1]] * ((1 << (count - 1).bit_length()) - count))]
    size = width  # lanes of the parts of a number
    while size > 1:
        half = size // 2
        pairs = [(x, x) for x in vectors] if len(vectors) == 1 else [*zip(vectors[::2], vectors[1::2], strict=True)]
        order = [start + lane for start in range(0, 2 * width, size) for lane in range(half)]
        low, high = (ir.Constant(e.ints, [lane + up for lane in order]) for up in (0, half))
        vectors = [add(b.shuffle_vector(x, y, low), b.shuffle_vector(x, y, high)) for x, y in pairs]
        size = half
    lanes = ir.Constant(ir.VectorType(I32, count), list(range(count)))
    e.store_raw(b.shuffle_vector(vectors[0], vectors[0], lanes), place, WORD)


def fetch_next(e: Emit, rows: State, k: Value, at: Value, item: int) -> None:
    """Ask for the same place of as many rows behind these, which are read next: no prefetcher follows so many streams.
    4096 x 4096 beyond the caches, Zen 4: 1.2 times as fast for one row of a, 1.3 to 1.5 times for 16."""
    for row in rows:
        e.prefetch(e.offset(row, e.builder.add(at, e.builder.mul(k, e.index(len(rows)))), item))


@cache
def dots(dtype: str, rows: int, group: int, columns: int, ahead: bool = True) -> Any:
    """Numba function (a, b, c, k, valid): c = a b^T for `rows` rows of a and `group` rows of b.

    a: fp32 [rows][k]; b: [..., k] of a precision, of which rows from `valid` on are not read (the last valid
    one again); c: fp32, `columns` a row. `ahead`: `fetch_next`.
    """

    def emit(e: Emit, a: Value, b_rows: Value, c: Value, k: Value, valid: Value) -> None:
        b, last = e.builder, e.builder.sub(valid, e.index(1))
        left = [e.offset(a, b.mul(k, e.index(i)), 4) for i in range(rows)]
        own = [b.select(b.icmp_signed("<", e.index(j), last), e.index(j), last) for j in range(group)]
        right = [e.offset(b_rows, b.mul(j, k), ITEM[dtype]) for j in own]

        def step(chunk: Chunk, sums: State) -> State:
            if ahead:
                fetch_next(e, right, k, chunk.at, ITEM[dtype])
            y = [chunk.only_new(chunk.load(row, dtype)) for row in right]
            out = []
            for i, row in enumerate(left):
                x = chunk.only_new(chunk.load(row, "fp32"))
                out += [e.fma(x, y[j], sums[i * group + j]) for j in range(group)]
            return out

        sums = e.row(k, [0.0] * (rows * group), step, max(1, 8 // (rows * group)))  # 8 cover the latency of an FMA
        for i in range(rows):
            some = [e.tree(parts, b.fadd) for parts in sums[i * group : (i + 1) * group]]
            store_totals(e, some, b.add(c, e.index(i * columns * WORD)))

    return intrinsic([types.int64] * 5, emit)


@cache
def word_dots(form: Format, rows: int, group: int, columns: int, ahead: bool = True) -> Any:
    """Numba function (a, b, c, k, valid): c = a b^T for `rows` rows of a and `group` rows of b, in words of a format.

    a: rows of words, one behind the other, as `pack` leaves them; b: [..., k] as it lies, of which rows from `valid` on
    are not read (the last valid one again); c: accumulators, `columns` a row. k: at least a vector of words. For the
    instruction that takes unsigned bytes, 128 is added to b, and 128 times the sum of a's row taken off at the end.
    """

    def emit(e: Emit, a: Value, b_rows: Value, c: Value, k: Value, valid: Value) -> None:
        b, last, madd = e.builder, e.builder.sub(valid, e.index(1)), multiply_add(e, form)
        steps, each, bits = form.steps, WORD // form.steps, 32 // form.steps
        long = b.mul(b.sdiv(b.add(k, e.index(steps - 1)), e.index(steps)), e.index(WORD))
        left = [b.add(a, b.mul(long, e.index(i))) for i in range(rows)]
        own = [b.select(b.icmp_signed("<", e.index(j), last), e.index(j), last) for j in range(group)]
        right = [e.offset(b_rows, b.mul(j, k), ITEM[form.dtype]) for j in own]
        ones = ir.Constant(e.ints, [0x01010101] * e.width)

        def step(at: Value, sums: State, mask: Value | None = None) -> State:
            def only_new(word: Value) -> Value:
                return word if mask is None else b.and_(word, mask)

            if ahead:
                fetch_next(e, right, k, at, ITEM[form.dtype])
            y = [only_new(words_at(e, form, e.offset(row, at, ITEM[form.dtype]))) for row in right]
            y = [flipped(e, word) if form.unsigned_a else word for word in y]
            x = [only_new(e.load_raw(e.offset(row, at, each), e.ints, each)) for row in left]
            out = [madd(y[j], x[i], sums[i * group + j]) for i in range(rows) for j in range(group)]
            extra = sums[rows * group :]
            return [*out, *(madd(ones, word, total) for word, total in zip(x, extra, strict=False))]

        kind = e.vector if form.accumulator == "fp32" else e.ints
        zero, wide = ir.Constant(kind, [0.0 if kind is e.vector else 0] * e.width), e.width * steps
        count = rows * group + rows * form.unsigned_a
        at, sums = e.loop(e.index(0), k, wide, [zero] * count, step)
        rest, elements = b.sub(k, at), ir.VectorType(ir.IntType(bits), wide)

        def tail() -> State:
            """The last vector of the row, without what was seen."""
            lanes = ir.VectorType(ir.IntType(16), wide)
            seen = e.broadcast(b.trunc(b.sub(e.index(wide), rest), ir.IntType(16)), wide)
            new = b.icmp_signed(">=", ir.Constant(lanes, list(range(wide))), seen)
            mask = b.bitcast(b.sext(new, elements), e.ints)
            return step(b.sub(k, e.index(wide)), sums, mask)

        sums = e.branch(b.icmp_signed(">", rest, e.index(0)), tail, lambda: sums)
        for i in range(rows):
            own_sums = sums[i * group : (i + 1) * group]
            if form.unsigned_a:
                extra = b.shl(sums[rows * group + i], ir.Constant(e.ints, [7] * e.width))
                own_sums = [b.sub(value, extra) for value in own_sums]
            store_totals(e, own_sums, b.add(c, e.index(i * columns * WORD)))

    return intrinsic([types.int64] * 5, emit)
