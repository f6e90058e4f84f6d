"""fp32 products by AMX in Numba: a number is the sum of three bf16, a product the sum of six of theirs.

Three bf16 of 8 significant bits each hold the 24 of fp32 exactly. Of the nine products of two such sums, the three
smallest are left out: together they are below 2^-23 of |a b|, as much as one rounding in fp32, and on average near 0.
(Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
computations", 2019, which calls it bf16x3 with six products; cuBLAS calls nine of them BF16x9.)

AMX counts subnormal numbers as 0, and a number that bf16 rounds to infinity has no parts. So a number below 2^-110
(whose last part may be subnormal) other than 0, and one above the largest bf16, infinity and NaN among them, has a part
that is NaN: it spoils the sums it is part of, which are then computed again from the numbers as given (`spoiled`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba.core import types

from rooftune.kernels.common.numba import I32, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_dot import round_pairs
from rooftune.kernels.common.numba_tile import WORD, Format, pack_panels, transpose
from rooftune.kernels.common.numba_tile import pack as pack_words
from rooftune.kernels.common.numba_tile import tile as fma_tile
from rooftune.kernels.common.numba_tmul import FORMATS, ROW, SIDE, tile

SPLIT = FORMATS["fp32"]
SMALLEST = 0x08800000  # bits of 2^-110
ITEM = 4  # bytes
NUMBERS = SPLIT.steps  # of k in a word
DEEP, SPLIT_ROW = NUMBERS * SIDE, SPLIT.planes * ROW  # numbers of k of a tile, bytes of its rows
SPARE = 4096  # bytes: see `Recipe`
AGAIN = 512  # numbers of k at a time of what is computed again


def parts(e: Emit, first: Value, second: Value, known: bool = False) -> list[Value]:
    """Two vectors of fp32 as three of words of two bf16 (`first` in the lower halves), the largest part first.

    The first part is rounded, the second cut off (below 2^-16 of the number is left then), and the third is exact. Of a
    pair with a number that is too small all of the first part is NaN; of one that is too large, infinite or NaN a later
    part is, by the subtraction. `known`: neither counts, and the first part is cut off too, in 6 operations less of 24
    (2^-7 of the number is left then, and 2^-15, not 2^-8 and 2^-16).
    """
    b, out, upper = e.builder, [], e.int_splat(0xFFFF0000)
    small = None if known else _small(e, first, second)
    for plane in range(SPLIT.planes):
        if plane or known:
            low, high = (b.bitcast(value, e.ints) for value in (first, second))
            word = b.or_(b.lshr(low, e.int_splat(16)), b.and_(high, upper))
        else:
            word = round_pairs(e, first, second)
        low, high = b.shl(word, e.int_splat(16)), b.and_(word, upper)
        first, second = (b.fsub(x, b.bitcast(y, e.vector)) for x, y in ((first, low), (second, high)))
        if plane == 0 and small is not None:
            word = b.select(small, b.or_(word, e.int_splat(0x7FC07FC0)), word)
        out.append(word)
    return out


def _small(e: Emit, first: Value, second: Value) -> Value:
    """Whether one of two numbers is below 2^-110 and not 0: twice its bits less one, without a sign, say it at once."""
    b, one = e.builder, e.int_splat(1)
    low, high = (b.sub(b.shl(b.bitcast(value, e.ints), one), one) for value in (first, second))
    least = b.select(b.icmp_unsigned("<", low, high), low, high)
    return b.icmp_unsigned("<", least, e.int_splat(2 * SMALLEST - 1))


def lines(e: Emit, source: Value, along_k: bool, valid: Value, stride: Value, k: Value) -> Callable[..., Value]:
    """f(i, j) -> 16 numbers from (i, j) on, in the direction that is contiguous, as `pack` says; those outside are 0.

    inside: none is outside.
    """
    b, lanes = e.builder, ir.Constant(e.ints, list(range(SIDE)))

    def line(i: Value, j: Value, inside: bool = False) -> Value:
        if inside:
            across, start = (i, j) if along_k else (j, i)
            return e.load_raw(e.offset(source, b.add(b.mul(across, stride), start), ITEM), e.vector, ITEM)
        return masked(i, j)

    def masked(i: Value, j: Value) -> Value:
        start, end, across, most = (j, k, i, valid) if along_k else (i, valid, j, k)
        there, inside = b.icmp_signed("<", across, most), b.sub(end, start)
        if along_k:
            across = b.select(there, across, b.sub(valid, e.index(1)))
        else:
            inside = b.select(there, inside, e.index(0))
        some = e.broadcast(b.trunc(inside, I32), SIDE)  # a share of a matrix: fits 32 bits
        address = e.offset(source, b.add(b.mul(across, stride), start), ITEM)
        place = b.inttoptr(address, e.vector.as_pointer())
        mask = b.icmp_signed("<", lanes, some)
        return e.call("llvm.masked.load.v16f32.p0", e.vector, (place, ir.Constant(I32, ITEM), mask, e.splat(0.0)))

    return line


@cache
def pack(size: int, along_k: bool, left: bool, stream: bool = False) -> Any:
    """Numba function (source, target, valid, stride, k): pack one panel of `size` rows, a multiple of 16.

    As [step][part][size][16 words] for the left operand and [step][part][16 words][size] for the right one, where a
    step is 32 numbers of k and a word two. along_k: element (i, j) lies at source + i * stride + j (k is contiguous),
    else at source + j * stride + i. Rows from `valid` on are the last valid row again if it is along k, else zero;
    steps of k from k on are zero. `stream`: past the caches; the target begins at a line.
    """

    def emit(e: Emit, source: Value, target: Value, valid: Value, stride: Value, k: Value) -> None:
        b, deep, plane = e.builder, 2 * SIDE, size * ROW
        line = lines(e, source, along_k, valid, stride, k)

        def store(words: State, place: Value) -> None:
            for part, word in enumerate(words):
                e.store_raw(word, b.add(place, e.index(part * plane)), ROW if stream else WORD, stream)

        def block(j: Value, first: int, inside: bool) -> None:
            """16 rows of a step; inside: all of them, and all of its numbers, are there."""
            step = e.offset(target, b.lshr(j, e.index(5)), SPLIT.planes * plane)  # 2^5 is `deep`
            place = b.add(step, e.index(first * (ROW if left else WORD)))
            apart = ROW if left else size * WORD  # from one row of the block of words to the next

            def along(i: Value) -> list[Value]:
                """Two vectors of a row of k."""
                return [line(i, b.add(j, e.index(half * SIDE)), inside) for half in range(2)]

            def across(at: Value) -> list[Value]:
                """16 rows at two numbers of k."""
                return [line(e.index(first), b.add(at, e.index(i)), inside) for i in range(2)]

            if along_k == left:  # a line of words is a line of memory, or half of it

                def direct(i: Value, _: State) -> State:
                    if along_k:
                        x, y = along(b.add(i, e.index(first)))
                        pair = [b.shuffle_vector(x, y, ir.Constant(e.ints, list(range(o, deep, 2)))) for o in (0, 1)]
                    else:
                        pair = across(b.add(j, b.mul(i, e.index(2))))
                    store(parts(e, *pair), e.offset(place, i, apart))
                    return []

                e.loop(e.index(0), e.index(SIDE), 1, [], direct)
                return
            if along_k:
                halves = zip(*(along(e.index(first + i)) for i in range(SIDE)), strict=True)
                columns = [column for rows in halves for column in transpose(e, list(rows))]
                for word in range(SIDE):
                    store(parts(e, *columns[2 * word : 2 * word + 2]), b.add(place, e.index(word * apart)))
                return
            # turned before they are taken apart: two blocks instead of three
            pairs = zip(*(across(b.add(j, e.index(2 * word))) for word in range(SIDE)), strict=True)
            for i, pair in enumerate(zip(*(transpose(e, list(half)) for half in pairs), strict=True)):
                store(parts(e, *pair), b.add(place, e.index(i * apart)))

        def step(j: Value, _: State) -> State:
            def blocks(inside: bool) -> State:
                for first in range(0, size, SIDE):
                    block(j, first, inside)
                return []

            there = b.icmp_signed("<=", b.add(j, e.index(deep)), k)
            there = b.and_(there, b.icmp_signed("==", valid, e.index(size)))
            e.branch(there, lambda: blocks(True), lambda: blocks(False))
            return []

        e.loop(e.index(0), b.add(k, e.index(deep - 1)), deep, [], step)

    return intrinsic([types.int64] * 5, emit)


@cache
def spoiled() -> Any:
    """Numba function (sums, count) -> int64: not 0 if any of `count` fp32 numbers, some times 16, is not finite."""

    def emit(e: Emit, sums: Value, count: Value) -> Value:
        b, infinity = e.builder, e.int_splat(0x7F800000)

        def step(i: Value, state: State) -> State:
            bits = e.load_raw(e.offset(sums, i, ITEM), e.ints, ITEM)
            return [b.or_(state[0], b.icmp_signed(">=", b.and_(bits, e.int_splat(0x7FFFFFFF)), infinity))]

        none = ir.Constant(ir.VectorType(ir.IntType(1), e.width), [0] * e.width)
        _, found = e.loop(e.index(0), count, e.width, [none], step)
        return b.zext(b.bitcast(found[0], ir.IntType(e.width)), ir.IntType(64))

    return intrinsic([types.int64] * 2, emit, types.int64)


class Recipe(NamedTuple):
    """How products of fp32 are made of those of parts, by register tiles: what `recipe` returns.

    Attributes:
        pack_a, pack_b: Numba functions (source, target, first, stop, count, k, start, numbers): panels `first` to
            `stop`, of which there are `count` rows (columns) in all; of each, `numbers` of k from `start` on.
        multiply: Numba function (a, b, c, numbers, add, spare): c (+)= a b of two packed panels, after `configure`;
            not finite where it has to be computed again; spare: SPARE bytes at a line.
        panel: Numba function (rows, numbers): bytes of a packed panel of so many numbers of k.
        step: numbers of k of a tile.
    """

    pack_a: Any
    pack_b: Any
    multiply: Any
    panel: Any
    step: int


@numba.njit(error_model="numpy")
def panel(rows: Any, numbers: Any) -> Any:
    """Bytes of a packed panel."""
    return (numbers + DEEP - 1) // DEEP * (SPLIT_ROW * rows)


@cache
def recipe(rows: int, columns: int, a_along_k: bool, b_along_k: bool, stream: bool) -> Recipe:
    """Of three bf16. `stream`: b is packed past the caches."""
    one_a, one_b = pack(rows, a_along_k, left=True), pack(columns, b_along_k, left=False, stream=stream)
    panels_a, panels_b = pack_panels(one_a, SPLIT, rows, a_along_k), pack_panels(one_b, SPLIT, columns, b_along_k)
    tiles, step = tile(SPLIT, rows, columns, stream="a"), rows * SPLIT_ROW

    @numba.njit(error_model="numpy")
    def pack_a(source, target, first, stop, count, k, start, numbers):  # type: ignore[no-untyped-def]
        panels_a(source, target, first, stop, count, k, start // NUMBERS, (numbers + DEEP - 1) // DEEP * SIDE)

    @numba.njit(error_model="numpy")
    def pack_b(source, target, first, stop, count, k, start, numbers):  # type: ignore[no-untyped-def]
        panels_b(source, target, first, stop, count, k, start // NUMBERS, (numbers + DEEP - 1) // DEEP * SIDE)

    @numba.njit(error_model="numpy")
    def multiply(a, b, c, numbers, add, spare):  # type: ignore[no-untyped-def]
        tiles(a, b, c, (numbers + DEEP - 1) // DEEP * SIDE, add, step, ROW)

    return Recipe(pack_a, pack_b, multiply, panel, DEEP)


@cache
def again(rows: int, columns: int, a_along_k: bool, b_along_k: bool) -> Any:
    """Numba function (a, b, c, height, width, stride_a, stride_b, k, spare): c = a b of one tile, by FMA.

    Of the numbers as given: element (i, j) of a lies at a + i * stride_a + j if it is along k, else at
    a + j * stride_a + i; so do the columns of b. c: [rows][columns]; spare: AGAIN numbers for each row and column.
    """
    form, tall = Format("fp32", 1), SIDE // 2  # rows at a time: sums take half of the registers, or all but some
    left, right = pack_words(form, rows, a_along_k), pack_words(form, columns, b_along_k)
    multiply = fma_tile(form, tall, columns, panel=rows)
    row, column = (ITEM if along else 0 for along in (a_along_k, b_along_k))
    most = AGAIN

    @numba.njit(error_model="numpy")
    def product(a, b, c, height, width, stride_a, stride_b, k, spare):  # type: ignore[no-untyped-def]
        other = spare + rows * most * ITEM
        for at in range(0, k, most):
            some = min(most, k - at)
            left(a + at * (row or stride_a * ITEM), spare, height, stride_a, some)
            right(b + at * (column or stride_b * ITEM), other, width, stride_b, some)
            for i in range(0, rows, tall):
                multiply(spare + i * ITEM, other, c + i * columns * ITEM, some, at)

    return product
