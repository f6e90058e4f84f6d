"""AMX in Numba: Intel's products of tiles of 16 rows of 64 bytes, of which a core has eight beside its vectors.

b is packed as for every other format (`numba_tile`: [words of k][columns]), a in steps of 16 words:
[step][rows][16 words], so that a tile of it is 1 KB in a row. What is spelled out where a CPU has no AMX gives the
instructions' values.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types

from rooftune.kernels.common import numba_dot
from rooftune.kernels.common.numba import I8, I32, ITEM, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_tile import STORED, WORD, Format, element, join, transpose

SIDE = 16  # rows of a tile, and words in one
ROW = SIDE * WORD  # bytes
TILES = 8  # a core has
PRODUCTS = 4  # at once: a product takes 52 cycles and the next may begin after 16
PRODUCT = {"fp32": "tdpbf16ps", "int32": "tdpbssd"}  # by what is added up
FORMATS = {  # no 128 added to int8: both operands are signed
    "fp32": Format("fp32", 2, planes=3),  # `numba_split`
    "fixed": Format("fp32", 4, "int32", planes=3),  # `numba_fixed`
    "bf16": Format("bf16", 2),
    "int8": Format("int8", 4, "int32"),
}


def _spell(e: Emit) -> bool:
    return "amx-tile" not in e.instructions


def _registers(e: Emit, name: str, *numbers: int) -> None:
    """An instruction on tiles by their numbers."""
    e.call(f"llvm.x86.{name}", ir.VoidType(), [ir.Constant(I8, x) for x in numbers])


# six of the nine products of the three parts of b and of a, the largest last: from one to the next one of the two
# stays, so that few registers do with few loads
SIX = ((2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0))
Turn = tuple[int, int, int]  # planes of b and of a that are multiplied, and the sum that the product is added to


def turns(form: Format) -> list[Turn]:
    """Of a step of k. Digits of one weight have a sum of their own."""
    pairs = SIX if form.planes > 1 else SIX[-1:]
    return [(right, left, right + left if form.accumulator == "int32" else 0) for right, left in pairs]


@cache
def configure() -> Any:
    """Numba function (): all tiles are 16 rows of 64 bytes, for this thread, until `release`."""

    def emit(e: Emit) -> None:
        if _spell(e):
            return
        b = e.builder
        rows, bytes_of_rows = [SIDE] * TILES, [part for _ in range(TILES) for part in (ROW, 0)]  # Intel SDM 1, 18.2
        table = [1, *[0] * 15, *bytes_of_rows, *[0] * 16, *rows, *[0] * 8]
        kind = ir.ArrayType(I8, len(table))
        place = cgutils.alloca_once(b, kind)
        b.store(ir.Constant(kind, [ir.Constant(I8, x) for x in table]), place)
        e.call("llvm.x86.ldtilecfg", ir.VoidType(), [b.bitcast(place, I8.as_pointer())])

    return intrinsic([], emit)


@cache
def release() -> Any:
    """Numba function (): the tiles are free again; a thread that keeps them pays for them at every switch."""

    def emit(e: Emit) -> None:
        if not _spell(e):
            e.call("llvm.x86.tilerelease", ir.VoidType(), [])

    return intrinsic([], emit)


@cache
def pack(form: Format, size: int, along_k: bool) -> Any:
    """Numba function (source, target, valid, stride, k): pack one panel of `size` rows as [step][size][16 words].

    along_k: element (i, j) lies at source + i * stride + j (k is contiguous), else at source + j * stride + i.
    Rows from `valid` on repeat the last valid row; steps of k from k on, to the end of 16 words, are zero.
    """
    item, kind, deep = ITEM[form.dtype], STORED[form.dtype], SIDE * form.steps

    def emit(e: Emit, source: Value, target: Value, valid: Value, stride: Value, k: Value) -> None:
        b, zero, last = e.builder, e.index(0), e.builder.sub(valid, e.index(1))

        def clamp(i: Value) -> Value:
            return b.select(b.icmp_signed("<", i, last), i, last)

        def address(i: Value, j: Value) -> Value:
            row, column = (i, j) if along_k else (j, i)
            return e.offset(source, b.add(b.mul(row, stride), column), item)

        def place(j: Value, i: Value) -> Value:
            return b.add(e.offset(target, b.mul(j, e.index(size)), item), b.mul(i, e.index(ROW)))

        def whole(j: Value, _: State) -> State:
            if along_k:
                for i in range(size):
                    e.store_raw(e.load_raw(address(clamp(e.index(i)), j), e.ints, item), place(j, e.index(i)), WORD)
                return []
            for first in range(0, size, SIDE):
                words = []
                for word in range(SIDE):
                    at = [b.add(j, e.index(word * form.steps + step)) for step in range(form.steps)]
                    rows = [e.load_raw(address(e.index(first), x), ir.VectorType(kind, SIDE), item) for x in at]
                    words.append(join(e, form, [element(e, form, row) for row in rows]))
                for i, row in enumerate(transpose(e, words)):
                    e.store_raw(row, place(j, e.index(first + i)), WORD)
            return []

        def by_element(j: Value, _: State) -> State:
            def row(i: Value, _: State) -> State:
                def one(at: Value, _: State) -> State:
                    there = b.icmp_signed("<", b.add(j, at), k)
                    value = e.load_raw(address(clamp(i), b.select(there, b.add(j, at), zero)), kind, item)
                    e.store_raw(b.select(there, value, ir.Constant(kind, 0)), e.offset(place(j, i), at, item), item)
                    return []

                e.loop(zero, e.index(deep), 1, [], one)
                return []

            e.loop(zero, e.index(size), 1, [], row)
            return []

        full = k if along_k else b.select(b.icmp_signed("==", valid, e.index(size)), k, zero)
        done, _ = e.loop(zero, full, deep, [], whole)
        e.loop(done, b.add(k, e.index(deep - 1)), deep, [], by_element)

    return intrinsic([types.int64] * 5, emit)


@cache
def tile(form: Format, rows: int, columns: int, stream: str = "") -> Any:
    """Numba function (a, b, c, words, add, step, stride): c (+)= a b on one register tile, after `configure`.

    a: rows `stride` bytes apart, 16 words of which are `step` bytes from the next 16: `rows * ROW` and ROW where
    it was packed, ROW and the bytes of a row where it lies as given; b: packed [words][columns]; c: [rows][columns] of
    accumulators, added to if `add` is not 0; words: a multiple of 16. `stream`: "a" or "b" need not stay in the L1
    cache, in which the other does while panels of this one pass by. Numbers in several planes: as `numba_split` and
    `numba_fixed` pack them, the products of small parts first; of the latter c has as many as there are sums.

    Where a number is one plane, all of b goes through one register. On a virtual Xeon, in spells in which the matrix
    unit alone does a quarter, what counts is how many of the eight are in use: with operands in the L2 cache, a tile of
    32x32 does 360 GFLOP/s with eight, 490 with seven, one of 16x32 590 with five and 640 with four (outside of such
    spells 1400, 1430, 1210, 1200).
    """
    order = turns(form)
    high, wide, many = rows // SIDE, columns // SIDE, 1 + max(turn[2] for turn in order)
    sums = [[[(s * high + i) * wide + j for j in range(wide)] for i in range(high)] for s in range(many)]  # of tiles
    left = [many * high * wide + i for i in range(high)]
    # one for all of b; one for each of its tiles if they stay for another part of a
    right = [left[-1] + 1 + (j if form.planes > 1 else 0) for j in range(wide)]
    if right[-1] >= TILES:
        raise ValueError(f"a tile of {rows}x{columns} takes more than {TILES} of AMX")
    load = {operand: "tileloaddt164" if operand == stream else "tileloadd64" for operand in "ab"}

    def emit(
        e: Emit, a: Value, b_panel: Value, c: Value, words: Value, add: Value, step_a: Value, stride_a: Value
    ) -> None:
        if _spell(e):
            return _spelled(e, form, rows, columns, (a, b_panel, c, words, add, step_a, stride_a))
        b = e.builder

        def move(name: str, number: int, address: Value, stride: Value) -> None:
            where = b.inttoptr(address, I8.as_pointer())
            e.call(f"llvm.x86.{name}", ir.VoidType(), [ir.Constant(I8, number), where, stride])

        def every(name: str) -> None:
            for s, i, j in product(range(many), range(high), range(wide)):
                place = b.add(c, e.index(((s * rows + i * SIDE) * columns + j * SIDE) * WORD))
                move(name, sums[s][i][j], place, e.index(columns * WORD))

        def zeros() -> State:
            for number in range(left[0]):
                _registers(e, "tilezero", number)
            return []

        def loads() -> State:
            every("tileloadd64")
            return []

        def step(word: Value, _: State) -> State:
            base = b.add(a, b.mul(b.lshr(word, e.index(4)), step_a))  # 2^4 is SIDE
            beside = b.add(b_panel, b.mul(word, e.index(columns * WORD * form.planes)))
            before: Turn = (-1, -1, -1)
            for turn in order:
                for j in range(wide):
                    if turn[0] != before[0]:
                        place = b.add(beside, e.index((turn[0] * SIDE * columns + j * SIDE) * WORD))
                        move(load["b"], right[j], place, e.index(columns * WORD))
                    for i in range(high):
                        if j == 0 and turn[1] != before[1]:
                            start = b.add(base, e.index(turn[1] * rows * ROW))
                            move(load["a"], left[i], b.add(start, b.mul(stride_a, e.index(i * SIDE))), stride_a)
                        _registers(e, PRODUCT[form.accumulator], sums[turn[2]][i][j], left[i], right[j])
                before = turn
            return []

        e.branch(b.icmp_signed("!=", add, e.index(0)), loads, zeros)
        e.loop(e.index(0), words, SIDE, [], step)
        every("tilestored64")
        return None

    return intrinsic([types.int64] * 7, emit)


@cache
def products(form: Format) -> Any:
    """Numba function (rounds): PRODUCTS products of tiles a round that never leave the registers, after `configure`.

    Only where the CPU has the instructions: it is for measuring their rate.
    """

    def emit(e: Emit, rounds: Value) -> None:
        def each(_: Value, state: State) -> State:
            for number in range(PRODUCTS):
                _registers(e, PRODUCT[form.accumulator], number, PRODUCTS, PRODUCTS + 1)
            return []

        for number in range(PRODUCTS + 2):
            _registers(e, "tilezero", number)
        e.loop(e.index(0), rounds, 1, [], each)

    return intrinsic([types.int64], emit)


@cache
def tile_of_packed(form: Format, rows: int, columns: int) -> Any:
    """Numba function (a, b, c, words, add): the same, of an a that was packed."""
    multiply, step = tile(form, rows, columns), rows * ROW * form.planes

    @numba.njit(error_model="numpy")
    def packed(a, b, c, words, add):  # type: ignore[no-untyped-def]
        multiply(a, b, c, words, add, step, ROW)

    return packed


def _spelled(e: Emit, form: Format, rows: int, columns: int, arguments: State) -> None:
    """The same, with vectors: row by row of a tile."""
    (a, b_panel, c, words, add, step_a, stride_a), b = arguments, e.builder
    integer, order = form.accumulator == "int32", turns(form)
    dot, kind = (numba_dot.int8_sixteen, e.ints) if integer else (numba_dot.bf16_sixteen, e.vector)
    many = 1 + max(turn[2] for turn in order)

    def row(i: Value, _: State) -> State:
        for first in range(0, columns, SIDE):
            at = b.add(c, b.mul(b.add(b.mul(i, e.index(columns)), e.index(first)), e.index(WORD)))
            places = [b.add(at, e.index(s * rows * columns * WORD)) for s in range(many)]
            more = b.icmp_signed("!=", add, e.index(0))
            start = [b.select(more, e.load_raw(place, kind, WORD), ir.Constant(kind, None)) for place in places]

            def step(word: Value, state: State, first: int = first) -> State:
                sums = list(state)
                left = b.add(b.add(a, b.mul(b.lshr(word, e.index(4)), step_a)), b.mul(i, stride_a))
                right = b.add(b_panel, e.offset(e.index(first * WORD), word, columns * WORD * form.planes))
                for right_plane, left_plane, s in order:
                    xs, ys = [], []
                    for w in range(SIDE):
                        x = e.load_raw(b.add(left, e.index(left_plane * rows * ROW + w * WORD)), I32, WORD)
                        xs.append(e.broadcast(x, SIDE))
                        place = b.add(right, e.index((right_plane * SIDE + w) * columns * WORD))
                        ys.append(e.load_raw(place, e.ints, WORD))
                    sums[s] = dot(e, sums[s], xs, ys)
                return sums

            _, sums = e.loop(e.index(0), words, SIDE, start, step)
            for value, place in zip(sums, places, strict=True):
                e.store_raw(value, place, WORD)
        return []

    e.loop(e.index(0), e.index(rows), 1, [], row)
