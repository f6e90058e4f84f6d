"""Register tiles for matrix products in Numba: packed operands of 4-byte words and the kernel that multiplies them.

A word holds what one lane takes in one step: an fp32 number, two bf16 (`vdpbf16ps`), two int8 as 16 bits
(`pmaddwd`) or four int8 (`vpdpbusd`). Panels are [words of k][rows of the panel], so that every format has the
same tile kernel; 16-bit formats without an instruction of their own are widened to fp32 while they are packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
from llvmlite import ir
from numba.core import types

from rooftune.kernels.common import numba_dot
from rooftune.kernels.common.numba import F32, HALF, I8, I16, I32, ITEM, LINE, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_cpu import int8_pairs

WORD = 4  # bytes
SWEEP = 32  # words of k packed at a time where k is not contiguous
STORED = {"fp32": F32, "fp16": HALF, "bf16": I16, "int8": I8}


@dataclass(frozen=True)
class Format:
    """How numbers of a precision lie in words: `steps` of k per word, `accumulator` fp32 or int32.

    `unsigned_a`: a is stored with 128 added, as `vpdpbusd` multiplies unsigned by signed bytes; 128 times
    the column sums of b has to be taken off the result. `planes`: how many bf16 (`numba_split`) or digits
    (`numba_fixed`) a number is the sum of; a word of `steps` numbers is then as many words.
    """

    dtype: str
    steps: int
    accumulator: str = "fp32"
    unsigned_a: bool = False
    planes: int = 1

    @property
    def raw(self) -> bool:
        """Whether a word is simply 4 bytes of memory along k."""
        return self.steps * ITEM[self.dtype] == WORD


def format_of(dtype: str, dot: bool) -> Format:
    """Words of a precision, for the dot-product instruction or widened."""
    if dtype == "int8":
        return Format("int8", 4 if dot else 2 if int8_pairs() else 1, "int32", unsigned_a=dot)
    return Format(dtype, 2 if dot else 1)


def element(e: Emit, form: Format, value: Value) -> Value:
    """A stored scalar or vector as (part of) words: fp32 bits, or integers of 32 bits."""
    b, vector = e.builder, isinstance(value.type, ir.VectorType)
    ints = ir.VectorType(I32, value.type.count) if vector else I32
    if form.steps == 2 and form.dtype == "int8":
        value = b.sext(value, ir.VectorType(I16, value.type.count) if vector else I16)
    if form.steps > 1:
        return b.zext(value, ints)
    if form.accumulator == "int32":
        return b.sext(value, ints)
    return b.bitcast(e.widen(value, form.dtype), ints)


def join(e: Emit, form: Format, parts: State) -> Value:
    """One word (or vector of words) from its steps of k, the first in the low bits."""
    b, bits = e.builder, 32 // form.steps
    word = parts[0]
    for step, part in enumerate(parts[1:], 1):
        shift = ir.Constant(I32, step * bits)
        count = part.type.count if isinstance(part.type, ir.VectorType) else 0
        word = b.or_(word, b.shl(part, e.broadcast(shift, count) if count else shift))
    return word


def zipped(e: Emit, parts: State) -> Value:
    """Vectors of 2 or 4 steps of k as one of words, the first step in the low bits: bytes become pairs, pairs words, as
    one shuffle does what widening, shifting and joining take five instructions for."""
    b, parts = e.builder, list(parts)
    while len(parts) > 1:
        kind, pairs = parts[0].type, zip(parts[::2], parts[1::2], strict=True)
        order = ir.Constant(
            ir.VectorType(I32, 2 * kind.count), [i // 2 + i % 2 * kind.count for i in range(2 * kind.count)]
        )
        double = ir.VectorType(ir.IntType(2 * kind.element.width), kind.count)
        parts = [b.bitcast(b.shuffle_vector(x, y, order), double) for x, y in pairs]
    return parts[0]


def words_at(e: Emit, form: Format, address: Value) -> Value:
    """A vector of words whose steps of k lie side by side in memory."""
    b, item, kind = e.builder, ITEM[form.dtype], STORED[form.dtype]
    if form.raw:
        return e.load_raw(address, e.ints, item)
    value = e.load_raw(address, ir.VectorType(kind, e.width * form.steps), item)
    if form.steps == 1:
        return element(e, form, value)
    return b.bitcast(b.sext(value, ir.VectorType(I16, e.width * form.steps)), e.ints)


def flipped(e: Emit, word: Value) -> Value:
    """Add 128 to each of the four bytes."""
    mask = ir.Constant(I32, 0x80808080)
    count = word.type.count if isinstance(word.type, ir.VectorType) else 0
    return e.builder.xor(word, e.broadcast(mask, count) if count else mask)


def transpose(e: Emit, rows: State) -> list[Value]:
    """`width` vectors of `width` words transposed, by exchanging ever smaller blocks."""
    rows, width = list(rows), e.width
    half = width // 2
    while half:
        low = [j if not j & half else j - half + width for j in range(width)]
        high = [j + half if not j & half else j + width for j in range(width)]
        for i in range(width):
            if not i & half:
                x, y = rows[i], rows[i + half]
                rows[i] = e.builder.shuffle_vector(x, y, ir.Constant(e.ints, low))
                rows[i + half] = e.builder.shuffle_vector(x, y, ir.Constant(e.ints, high))
        half //= 2
    return rows


@cache
def pack(form: Format, size: int, along_k: bool, flip: bool = False, deep: int = 1) -> Any:
    """Numba function (source, target, valid, stride, k): pack one panel of `size` rows.

    along_k: element (i, j) lies at source + i * stride + j (k is contiguous), else at source + j * stride + i.
    Lanes from `valid` on repeat the last valid row (their products are thrown away: no zeros, so no 0 * inf
    either); steps from k on, to a whole number of `deep` words, are zero in both operands. `flip` adds 128 to bytes.
    """

    def emit(e: Emit, source: Value, target: Value, valid: Value, stride: Value, k: Value) -> None:
        b, item, kind = e.builder, ITEM[form.dtype], STORED[form.dtype]
        one = e.index(1)
        most = form.steps * deep
        words = b.mul(b.sdiv(b.add(k, e.index(most - 1)), e.index(most)), e.index(deep))
        whole = b.sdiv(k, e.index(form.steps))
        last = b.sub(valid, one)

        def clamp(i: Value) -> Value:
            return b.select(b.icmp_signed("<", i, last), i, last)

        def address(i: Value, j: Value) -> Value:
            row, column = (i, j) if along_k else (j, i)
            return e.offset(source, b.add(b.mul(row, stride), column), item)

        def finish(word: Value) -> Value:
            return flipped(e, word) if flip else word

        def place(word: Value, i: Value) -> Value:
            return e.offset(target, b.add(b.mul(word, e.index(size)), i), WORD)

        def by_lane(word: Value, _: State) -> State:
            """One word of every lane, element by element."""

            def lane(i: Value, _: State) -> State:
                parts = []
                for step in range(form.steps):
                    j = b.add(b.mul(word, e.index(form.steps)), e.index(step))
                    there = b.icmp_signed("<", j, k)
                    value = e.load_raw(address(clamp(i), b.select(there, j, b.sub(k, one))), kind, item)
                    value = element(e, form, value)
                    parts.append(b.select(there, value, value.type(0)))
                e.store_raw(finish(join(e, form, parts)), place(word, i), WORD)
                return []

            e.loop(e.index(0), e.index(size), 1, [], lane)
            return []

        def contiguous(word: Value, _: State) -> State:
            """One word of every lane; the lanes lie side by side in memory."""
            j = b.mul(word, e.index(form.steps))
            vector = ir.VectorType(kind, size)
            rows = [e.load_raw(address(e.index(0), b.add(j, e.index(s))), vector, item) for s in range(form.steps)]
            as_they_lie = form.raw and form.steps > 1
            value = zipped(e, rows) if as_they_lie else join(e, form, [element(e, form, row) for row in rows])
            e.store_raw(finish(value), place(word, e.index(0)), WORD)
            return []

        def square(word: Value, _: State) -> State:
            """`width` words of every lane; a word's steps lie side by side in memory."""
            j = b.mul(word, e.index(form.steps))
            for first in range(0, size, e.width):
                lanes = min(e.width, size - first)
                places = [address(clamp(e.index(i)), j) for i in range(first, first + lanes)]
                rows = [finish(words_at(e, form, place)) for place in places]
                rows += [rows[-1]] * (e.width - lanes)
                for step, row in enumerate(transpose(e, rows)):
                    if lanes < e.width:
                        row = b.shuffle_vector(row, row, ir.Constant(ir.VectorType(I32, lanes), list(range(lanes))))
                    e.store_raw(row, place(b.add(word, e.index(step)), e.index(first)), WORD)
            return []

        if along_k:
            done, _ = e.loop(e.index(0), whole, e.width, [], square)
        else:
            full = b.select(b.icmp_signed("==", valid, e.index(size)), whole, e.index(0))
            done, _ = e.loop(e.index(0), full, 1, [], contiguous)
        e.loop(done, words, 1, [], by_lane)

    return intrinsic([types.int64] * 5, emit)


@cache
def pack_panels(one: Any, form: Format, size: int, along_k: bool) -> Any:
    """Numba function (source, target, first, stop, count, k, word, words): panels `first` to `stop` of `count` rows.

    Of each, `words` words of k from `word` on, one panel behind the other. one: `pack`, or AMX's, for panels of `size`
    rows. Where k is not contiguous, SWEEP words of all panels come before the next: memory is read in long lines.
    """
    item, steps, each = ITEM[form.dtype], form.steps, WORD * form.planes

    @numba.njit(error_model="numpy")
    def several(source, target, first, stop, count, k, word, words):  # type: ignore[no-untyped-def]
        left, wide = min(words * steps, k - word * steps), words * size * each
        if along_k:
            for i in range(first, stop):
                place = source + (i * size * k + word * steps) * item
                one(place, target + (i - first) * wide, min(size, count - i * size), k, left)
        else:
            for at in range(0, words, SWEEP):
                for i in range(first, stop):
                    place = source + ((word + at) * steps * count + i * size) * item
                    own = target + (i - first) * wide + at * size * each
                    one(place, own, min(size, count - i * size), count, min(SWEEP * steps, left - at * steps))

    return several


def multiply_add(e: Emit, form: Format) -> Callable[[Value, Value, Value], Value]:
    """f(word of a in all lanes, words of b, sum) -> sum, on vectors of 4-byte words."""
    b = e.builder
    if form.accumulator == "fp32" and form.steps == 1:
        return lambda x, y, total: e.fma(b.bitcast(x, e.vector), b.bitcast(y, e.vector), total)
    if form.accumulator == "fp32":
        return lambda x, y, total: numba_dot.bf16_pairs(e, total, x, y)
    if form.steps > 1:
        dot = numba_dot.int8_fours if form.steps == 4 else numba_dot.int16_pairs
        return lambda x, y, total: dot(e, total, x, y)
    return lambda x, y, total: b.add(total, b.mul(x, y))


@cache
def tile(
    form: Format, rows: int, columns: int, panel: int = 0, unroll: int = 1, direct: str = "", placed: bool = False
) -> Any:
    """Numba function (a, b, c, words, add[, stride[, k, starts]][, apart, first, past]): c (+)= a b on a register tile.

    a: packed [words][panel], of which `rows` from the address on are multiplied; b: packed [words][columns];
    c: [rows][columns] of accumulators, added to if `add` is not 0. `panel` is `rows` unless given; `unroll`
    steps of k are one round of the loop. `direct`: b is not packed but lies in memory in this precision,
    rows `stride` bytes apart. If a word has several steps, b has `k` rows (behind them a's steps are 0), whose numbers
    become words here; where bytes have to be unsigned it is b that gets 128 added, and sums that are not added to begin
    with `starts`, an int32 a row (`row_sums`). `placed`: rows of c lie `apart` bytes from each other, and where c is
    not added to, every row begins with the `columns` accumulators at the address `first` (0: with zeros); if `past` is
    not 0, c is aligned to LINE and written past the caches.
    """

    def emit(e: Emit, a: Value, b_panel: Value, c: Value, words: Value, add: Value, *more: Value) -> None:
        b, vectors = e.builder, columns // e.width
        together = bool(direct) and form.steps > 1
        apart = more[0] if direct else e.index(columns * WORD)
        between = more[-3] if placed else e.index(columns * WORD)

        def words_as_they_lie(number: Value) -> list[Value]:
            end, lines = b.sub(more[1], e.index(1)), []
            for step in range(form.steps):
                j = b.add(b.mul(number, e.index(form.steps)), e.index(step))
                j = b.select(b.icmp_signed("<", j, end), j, end)
                lines.append(
                    e.load_raw(b.add(b_panel, b.mul(j, apart)), ir.VectorType(STORED[direct], columns), ITEM[direct])
                )
            word = zipped(e, lines)
            word = flipped(e, word) if form.unsigned_a else word
            places = [ir.Constant(e.ints, list(range(v * e.width, (v + 1) * e.width))) for v in range(vectors)]
            return [b.shuffle_vector(word, word, place) for place in places]

        def operand(base: Value, v: int) -> Value:
            if direct:
                return e.load(b.add(base, e.index(v * e.width * ITEM[direct])), direct)
            return e.load_raw(b.add(base, e.index(v * e.width * WORD)), e.ints, WORD)

        kind = e.vector if form.accumulator == "fp32" else e.ints
        madd = multiply_add(e, form)
        starts = [b.add(a, e.index(i * WORD)) for i in range(rows)]
        heads = [b.add(c, b.mul(between, e.index(i))) for i in range(rows)]
        flat = [b.add(head, e.index(v * e.width * WORD)) for head in heads for v in range(vectors)]
        zero = ir.Constant(kind, [0.0 if kind is e.vector else 0] * e.width)

        def afresh() -> State:
            def given() -> State:
                return [e.load_raw(b.add(more[-2], e.index(v * e.width * WORD)), kind, WORD) for v in range(vectors)]

            if together and form.unsigned_a:
                rows_begin = [e.load_raw(b.add(more[2], e.index(i * WORD)), I32, WORD) for i in range(rows)]
                return [e.broadcast(value, e.width) for value in rows_begin for _ in range(vectors)]
            nothing: State = [zero] * vectors
            row = e.branch(b.icmp_signed("!=", more[-2], e.index(0)), given, lambda: nothing) if placed else nothing
            return [*row] * rows

        start = e.branch(
            b.icmp_signed("!=", add, e.index(0)), lambda: [e.load_raw(place, kind, WORD) for place in flat], afresh
        )

        def step(k: Value, sums: list[Value]) -> State:
            behind = b.mul(k, e.index(WORD * (panel or rows)))
            base = b.add(b_panel, b.mul(k, apart))
            right = words_as_they_lie(k) if together else [operand(base, v) for v in range(vectors)]
            out = []
            for i in range(rows):
                word = e.broadcast(e.load_raw(b.add(starts[i], behind), I32, WORD), e.width)
                pairs = [(right[v], word) if together else (word, right[v]) for v in range(vectors)]
                out += [madd(*pair, sums[i * vectors + v]) for v, pair in enumerate(pairs)]
            return out

        def several(k: Value, sums: State) -> State:
            for u in range(unroll):
                sums = step(b.add(k, e.index(u)), list(sums))
            return sums

        done, sums = e.loop(e.index(0), words, unroll, start, several)
        if unroll > 1:
            _, sums = e.loop(done, words, 1, sums, step)

        def write(past: bool) -> State:
            for place, value in zip(flat, sums, strict=True):
                e.store_raw(value, place, e.width * WORD if past else WORD, past)
            return []

        if placed:
            e.branch(b.icmp_signed("!=", more[-1], e.index(0)), lambda: write(True), lambda: write(False))
        else:
            write(False)

    return intrinsic([types.int64] * (5 + bool(direct) + 2 * (bool(direct) and form.steps > 1) + 3 * placed), emit)


@cache
def row_sums(rows: int) -> Any:
    """Numba function (a, words, sums): of each row of packed words of bytes -128 times its sum, int32 [rows]."""

    def emit(e: Emit, a: Value, words: Value, sums: Value) -> None:
        b, kind = e.builder, ir.VectorType(I32, rows)

        def step(number: Value, state: State) -> State:
            word, total = e.load_raw(e.offset(a, number, WORD * rows), kind, WORD), state[0]
            for byte in range(4):
                up, down = (ir.Constant(kind, [shift] * rows) for shift in (24 - 8 * byte, 24))
                total = b.add(total, b.ashr(b.shl(word, up), down))
            return [total]

        _, (total,) = e.loop(e.index(0), words, 1, [ir.Constant(kind, [0] * rows)], step)
        e.store_raw(b.mul(total, ir.Constant(kind, [-128] * rows)), sums, WORD)

    return intrinsic([types.int64] * 3, emit)


@cache
def touch(write: bool = False) -> Any:
    """Numba function (address, bytes): bring these lines of memory near, to be read (L2) or written (L1)."""

    def emit(e: Emit, address: Value, count: Value) -> None:
        def line(at: Value, _: State) -> State:
            e.prefetch(e.builder.add(address, at), write)
            return []

        e.loop(e.index(0), count, LINE, [], line)

    return intrinsic([types.int64] * 2, emit)
