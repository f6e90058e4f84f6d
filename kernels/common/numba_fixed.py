"""fp32 products by AMX's integers in Numba: a number in fixed point is three digits of 8 bits, a product six of theirs.

A row of a (a column of b), in a block of k, is scaled so that its largest number is close to 2^23, and rounded to whole
numbers d0 2^16 + d1 2^8 + d2 of digits between -128 and 127. Sums of products of digits are exact; of the nine products
of two such numbers the three smallest are left out. (Ootomo, Ozaki and Yokota, "DGEMM on integer matrix multiplication
unit", 2024, for float64; AMX multiplies int8 at twice the rate of the bf16 of `numba_split`.)

The error is relative to the largest number of the row, not to each: on normal or uniform numbers like fp32's own, on a
row whose numbers differ by powers of ten not. So it is checked where it counts, for every number of the result: one
more product, of some tiles of k, sums up the sizes of the largest digits. These are the sizes of the terms, and where
the sum says that they are small beside the error of rounding, or where there is no scale (the largest number is below
2^-48, above 2^75, infinite or NaN), the result is NaN: it is to be computed again from the numbers as given. Where a
look at some rows says that this would be often (`numba_suits`), bf16 is the better choice.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
from llvmlite import ir
from numba.core import types

from rooftune.kernels.common.numba import I8, I16, I32, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_split import Recipe, lines
from rooftune.kernels.common.numba_tile import WORD, transpose
from rooftune.kernels.common.numba_tmul import FORMATS, ROW, SIDE, tile

FIXED = FORMATS["fixed"]
PLANE = SIDE * ROW  # bytes of a tile
THICK = FIXED.planes * PLANE
STEP = FIXED.steps * SIDE  # numbers of k of a tile
LOOKS = 2  # tiles of k, of a block of k, of which the sizes are summed up, or up to twice as many less one
HEAD = 256  # bytes before a panel's steps: of each row its scale, the reciprocal, and whether it is not 0 (-1, else 0)
TOGETHER = 16  # panels packed at once where k is not contiguous: half an L2 cache of numbers, read in lines of 1 KB
SWEEP = 32  # numbers of k of all of these looked at before the next ones
ITEM = 4  # bytes
SMALLEST, LARGEST = (
    0x27800000,
    0x65000000,
)  # bits of 2^-48 and 2^75: products of scales and their reciprocals are normal
TOP = 127 * 256.0  # the largest number after scaling, in units of 2^8
# The mean size of the terms, in units of the last place of the first digits, times the square root of their number is
# at least this: the error of a result is then below what fp32 may have (2^-22 of the root of the sum of squares of the
# terms times that of their number), at 5 standard deviations of 2^-24 (products left out) and 2^-18 (rounding) each.
ENOUGH = 6000.0


@cache
def largest(along_k: bool) -> Any:
    """Numba function (source, head, valid, stride, k, add): bits of the largest size in each of 16 rows, to the head.

    Of those and what is there already, if `add` is not 0. Elements lie as for `numba_split.pack`.
    """

    def emit(e: Emit, source: Value, head: Value, valid: Value, stride: Value, k: Value, add: Value) -> None:
        b = e.builder
        more, none = b.icmp_signed("!=", add, e.index(0)), ir.Constant(e.ints, None)
        load = lines(e, source, along_k, valid, stride, k)

        def top(x: Value, y: Value) -> Value:
            return b.select(b.icmp_signed(">", x, y), x, y)

        def size(i: Value, j: Value, inside: bool) -> Value:
            return b.and_(b.bitcast(load(i, j, inside), e.ints), e.int_splat(0x7FFFFFFF))

        def over(start: Value, i: Value, first: Value, stop: Value, by: int, inside: bool) -> tuple[Value, Value]:
            """The largest of some vectors, `by` apart; four at once if all of them lie inside."""
            together = 4 if inside else 1

            def several(j: Value, state: State) -> State:
                return [top(s, size(i, b.add(j, e.index(n * by)), inside)) for n, s in enumerate(state)]

            at, tops = e.loop(first, stop, together * by, [start] * together, several)
            return at, e.tree(tops, top)

        if not along_k:
            start = b.select(more, e.load_raw(head, e.ints, WORD), none)
            full = b.select(b.icmp_signed("==", valid, e.index(SIDE)), k, e.index(0))
            at, found = over(start, e.index(0), e.index(0), full, 1, True)
            _, found = over(found, e.index(0), at, k, 1, False)
            e.store_raw(found, head, WORD)
            return

        def row(i: Value, _: State) -> State:
            last = b.sub(valid, e.index(1))
            own = b.select(b.icmp_signed("<", i, last), i, last)
            at, found = over(none, own, e.index(0), k, SIDE, True)
            _, found = over(found, own, at, b.add(k, e.index(SIDE - 1)), SIDE, False)
            place = e.offset(head, i, WORD)
            before = b.select(more, e.load_raw(place, I32, WORD), ir.Constant(I32, 0))
            e.store_raw(top(before, e.reduce(found, top)), place, WORD)
            return []

        e.loop(e.index(0), e.index(SIDE), 1, [], row)

    return intrinsic([types.int64] * 6, emit)


@cache
def settle() -> Any:
    """Numba function (head): from the bits of the largest sizes to the head of a panel.

    Scales have four significant bits, so numbers that are small multiples of a power of two stay exact. A row that is 0
    has scale 0, and so has one that has none: -1 is where the result has to be checked, which it then fails.
    """

    def emit(e: Emit, head: Value) -> None:
        b, none = e.builder, e.splat(0.0)
        bits = e.load_raw(head, e.ints, WORD)
        there = b.icmp_unsigned("<=", b.sub(bits, e.int_splat(SMALLEST)), e.int_splat(LARGEST - SMALLEST))
        scale = b.bitcast(b.fdiv(e.splat(TOP), b.bitcast(bits, e.vector)), e.ints)
        scale = b.bitcast(b.and_(scale, e.int_splat(0xFFF00000)), e.vector)
        marks = b.sext(b.icmp_signed("!=", bits, e.int_splat(0)), e.ints)
        for i, value in enumerate((scale, b.fdiv(e.splat(1.0), scale))):
            e.store_raw(b.select(there, value, none), b.add(head, e.index(i * ROW)), WORD)
        e.store_raw(marks, b.add(head, e.index(2 * ROW)), WORD)

    return intrinsic([types.int64], emit)


def whole(e: Emit, value: Value) -> Value:
    """To the nearest whole numbers: below 2^24."""
    if e.width == 16 and "avx512f" in e.instructions:
        kind = (value, ir.Constant(e.ints, None), ir.Constant(I16, 0xFFFF), ir.Constant(I32, 4))
        return e.call("llvm.x86.avx512.mask.cvtps2dq.512", e.ints, kind)
    return e.builder.fptosi(e.call(f"llvm.rint.v{e.width}f32", e.vector, [value]), e.ints)


def digits(e: Emit, values: State, factor: Value) -> list[Value]:
    """Four vectors times the factor as three of words of a digit of each, the largest digits first.

    The bytes of a word are those of vectors 0, 2, 1, 3: in 24 operations.
    """
    b, sixteen, eight = e.builder, e.int_splat(16), e.int_splat(8)
    offset = e.splat(float(0x8080))  # carries to the next digit what a byte would hold as more than 127
    first, second, third, fourth = (whole(e, e.fma(value, factor, offset)) for value in values)

    def select(x: Value, y: Value, mask: int) -> Value:
        """Bits of x where the mask has them, else of y."""
        return b.or_(b.and_(x, e.int_splat(mask)), b.and_(y, e.int_splat(~mask & 0xFFFFFFFF)))

    low = [select(x, b.shl(y, sixteen), 0xFFFF) for x, y in ((first, second), (third, fourth))]
    high = [select(b.lshr(x, sixteen), y, 0xFFFF) for x, y in ((first, second), (third, fourth))]
    flip = e.int_splat(0x80808080)
    return [
        select(high[0], b.shl(high[1], eight), 0x00FF00FF),
        b.xor(select(b.lshr(low[0], eight), low[1], 0x00FF00FF), flip),
        b.xor(select(low[0], b.shl(low[1], eight), 0x00FF00FF), flip),
    ]


@cache
def pack(along_k: bool, left: bool, stream: bool = False) -> Any:
    """Numba function (source, head, target, sizes, valid, stride, k): pack a step of 16 rows, whose head is settled.

    As [plane][16][16 words]: a tile's rows are those of the left operand, and words of k of the right one. A word holds
    the digits of numbers 16 apart: word i those of k = i, i + 32, i + 16, i + 48. The sizes of the first plane go to
    `sizes`, unless that is 0. Elements lie, and `stream` means, what they do for `numba_split.pack`.
    """
    turned = along_k != left

    def emit(
        e: Emit, source: Value, head: Value, target: Value, sizes: Value, valid: Value, stride: Value, k: Value
    ) -> None:
        b, load = e.builder, lines(e, source, along_k, valid, stride, k)
        place = _scratch(e, FIXED.planes) if turned else target
        every = e.index(SIDE)

        def store(word: Value, at: Value, past: bool) -> None:
            e.store_raw(word, at, ROW if past else WORD, past)

        def row(i: Value, inside: bool) -> State:
            """A row of words: 64 numbers of a row, or four of each of 16 rows."""
            if along_k:
                factor = e.splat(e.load_raw(e.offset(head, i, WORD), e.vector.element, WORD))
                values = [load(i, e.index(part * SIDE), inside) for part in range(FIXED.steps)]
            else:
                factor = e.load_raw(head, e.vector, WORD)
                values = [load(e.index(0), b.add(i, e.index(part * SIDE)), inside) for part in range(FIXED.steps)]
            for plane, word in enumerate(digits(e, values, b.fmul(factor, e.splat(256.0)))):
                store(word, b.add(e.offset(place, i, ROW), e.index(plane * PLANE)), stream and not turned)
            return []

        def rows(inside: bool) -> State:
            e.loop(e.index(0), every, 1, [], lambda i, _: row(i, inside))
            return []

        def turn(plane: Value, _: State) -> State:
            start = b.mul(plane, e.index(PLANE))
            words = [e.load_raw(b.add(b.add(place, start), e.index(i * ROW)), e.ints, WORD) for i in range(SIDE)]
            for i, word in enumerate(transpose(e, words)):
                store(word, b.add(b.add(target, start), e.index(i * ROW)), stream)
            return []

        def look() -> State:
            def size(i: Value, _: State) -> State:
                kind = ir.VectorType(I8, 4 * e.width)
                word = e.load_raw(e.offset(target, i, ROW), kind, WORD)
                negative = b.icmp_signed("<", word, ir.Constant(kind, None))
                word = b.bitcast(b.select(negative, b.neg(word), word), e.ints)
                store(word, e.offset(sizes, i, ROW), stream)
                return []

            e.loop(e.index(0), every, 1, [], size)
            return []

        whole_step = b.icmp_signed("==", k, e.index(STEP))
        whole_step = b.and_(whole_step, b.icmp_signed("==", valid, every))
        e.branch(whole_step, lambda: rows(True), lambda: rows(False))
        if turned:
            e.loop(e.index(0), e.index(FIXED.planes), 1, [], turn)
        e.branch(b.icmp_signed("!=", sizes, e.index(0)), look, list)

    return intrinsic([types.int64] * 7, emit)


def _scratch(e: Emit, planes: int) -> Value:
    """Address of so many tiles of the stack, at a line."""
    with e.builder.goto_entry_block():
        place = e.builder.alloca(ir.ArrayType(I8, planes * PLANE))
    place.align = ROW
    return e.builder.ptrtoint(place, ir.IntType(64))


@numba.njit(error_model="numpy")
def apart(steps: Any) -> Any:
    """How many steps of so many lie between those whose sizes are summed up."""
    return max(1, steps // LOOKS)


@numba.njit(error_model="numpy")
def panel(rows: Any, numbers: Any) -> Any:
    """Bytes of a packed panel (of 16 rows): head, steps, sizes."""
    steps = (numbers + STEP - 1) // STEP
    return HEAD + steps * THICK + (steps + apart(steps) - 1) // apart(steps) * PLANE


@cache
def pack_panels(along_k: bool, left: bool, stream: bool = False) -> Any:
    """Numba function (source, target, first, stop, count, k, start, numbers): panels `first` to `stop` of `count` rows.

    Of each, `numbers` of k from `start` on, one panel behind the other.
    """
    return panels_by(largest(along_k), settle(), pack(along_k, left, stream), along_k)


def panels_by(look: Any, found: Any, one: Any, along_k: bool) -> Any:
    """The same, of these functions."""
    together = 1 if along_k else TOGETHER

    @numba.njit(error_model="numpy")
    def several(source, target, first, stop, count, k, start, numbers):  # type: ignore[no-untyped-def]
        steps, wide = (numbers + STEP - 1) // STEP, panel(SIDE, numbers)
        row, column, stride = (k, 1, k) if along_k else (1, count, count)  # numbers from one to the next
        from_here = source + start * column * ITEM
        for begin in range(first, stop, together):
            end = min(begin + together, stop)
            for at in range(0, numbers, numbers if along_k else SWEEP):
                some = numbers if along_k else min(SWEEP, numbers - at)
                for i in range(begin, end):
                    place = from_here + (i * SIDE * row + at * column) * ITEM
                    look(place, target + (i - first) * wide, min(SIDE, count - i * SIDE), stride, some, at)
            for i in range(begin, end):
                found(target + (i - first) * wide)
            for at in range(0, numbers, STEP):
                for i in range(begin, end):
                    place, head = from_here + (i * SIDE * row + at * column) * ITEM, target + (i - first) * wide
                    step = at // STEP
                    turn, rest = divmod(step, apart(steps))
                    sizes = head + HEAD + steps * THICK + turn * PLANE if rest == 0 else 0
                    own = head + HEAD + step * THICK
                    one(place, head, own, sizes, min(SIDE, count - i * SIDE), stride, min(STEP, numbers - at))

    return several


@cache
def recipe(a_along_k: bool, b_along_k: bool, stream: bool) -> Recipe:
    """Of three digits, by register tiles of 16x16. `stream`: b is packed past the caches."""
    tiles, sizes, result = tile(FIXED, SIDE, SIDE, stream="a"), tile(FORMATS["int8"], SIDE, SIDE), results()

    @numba.njit(error_model="numpy")
    def multiply(a, b, c, numbers, add, spare):  # type: ignore[no-untyped-def]
        steps = (numbers + STEP - 1) // STEP
        looks, behind = (steps + apart(steps) - 1) // apart(steps), HEAD + steps * THICK
        sizes(a + behind, b + behind, spare + THICK, looks * SIDE, 0, PLANE, ROW)
        tiles(a + HEAD, b + HEAD, spare, steps * SIDE, 0, THICK, ROW)
        seen = looks * STEP - (0 if (steps - 1) % apart(steps) else steps * STEP - numbers)
        result(spare, a, b, c, int(ENOUGH * seen / math.sqrt(numbers)), add)

    panels_a, panels_b = pack_panels(a_along_k, True), pack_panels(b_along_k, False, stream)
    return Recipe(panels_a, panels_b, multiply, panel, STEP)


@cache
def results() -> Any:
    """Numba function (sums, a, b, c, enough, add): from sums of products of digits, and the panels' heads, to c."""

    def emit(e: Emit, sums: Value, a: Value, b_head: Value, c: Value, enough: Value, add: Value) -> None:
        b = e.builder
        scales, reciprocals = (e.load_raw(b.add(b_head, e.index(i * ROW)), e.vector, WORD) for i in range(2))
        marks = e.load_raw(b.add(b_head, e.index(2 * ROW)), e.ints, WORD)
        more, limit = b.icmp_signed("!=", add, e.index(0)), b.trunc(enough, I32)
        limits = b.and_(e.broadcast(limit, SIDE), marks)

        def row(i: Value, _: State) -> State:
            at, of_a = e.offset(sums, i, ROW), e.offset(a, i, WORD)
            first, second, third, sizes = (e.load_raw(b.add(at, e.index(s * PLANE)), e.ints, WORD) for s in range(4))
            own, inverse, mark = (
                e.broadcast(e.load_raw(b.add(of_a, e.index(p * ROW)), kind, WORD), SIDE)
                for p, kind in enumerate((e.vector.element, e.vector.element, I32))
            )
            value = e.fma(b.sitofp(second, e.vector), e.splat(256.0), b.sitofp(third, e.vector))
            value = e.fma(b.sitofp(first, e.vector), e.splat(65536.0), value)
            # divided by both scales, to the last bit: by the reciprocals, then once more what is left
            scale, factor = b.fmul(own, scales), b.fmul(inverse, reciprocals)
            quotient = b.fmul(value, factor)
            rest = e.fma(b.fneg(quotient), scale, value)
            quotient = e.fma(rest, factor, quotient)
            right = b.icmp_signed(">=", sizes, b.and_(limits, mark))
            quotient = b.select(right, quotient, e.splat(math.nan))
            place = e.offset(c, i, ROW)
            before = b.select(more, e.load_raw(place, e.vector, WORD), e.splat(-0.0))
            e.store_raw(b.fadd(before, quotient), place, WORD)
            return []

        e.loop(e.index(0), e.index(SIDE), 1, [], row)

    return intrinsic([types.int64] * 6, emit)
