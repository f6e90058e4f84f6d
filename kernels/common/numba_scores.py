"""The first product of attention in fixed point (`numba_fixed`), in Numba: scores, and whether their error may show.

A score is the product of a row of q and one of k, both scaled by their largest numbers. What an error of it does to the
result depends on how large scores are, not on its own terms: so no product of sizes is needed here, one comparison for
each query at the end does (`uneven`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
from llvmlite import ir
from numba.core import types

from rooftune.kernels.common.numba import F32, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_fixed import FIXED, HEAD, ITEM, PLANE, STEP, THICK, largest, pack, settle
from rooftune.kernels.common.numba_split import SPLIT_ROW
from rooftune.kernels.common.numba_tile import WORD
from rooftune.kernels.common.numba_tmul import ROW, SIDE, tile

LEAST = 65  # numbers of a head: their panels need no more room than those of `numba_split`, whose place they take
# Of the product of the reciprocals of two scales, over the root of the head's size. The standard deviation of a score,
# as it enters the exponential, is some 31 such products by the terms that are left out (2^-11 of a unit of the first
# digits' products, each); four of these are to stay below 2^-22 (1 + largest score), which is what fp32 may have.
BOUND = 2.0**-22 / (4 * 31)
LN2 = math.log(2)


@cache
def unscaled() -> Any:
    """Numba function (head): rows that are not 0 and have no scale get NaN for its reciprocal."""

    def emit(e: Emit, head: Value) -> None:
        b = e.builder
        scale, inverse, marks = (e.load_raw(b.add(head, e.index(i * ROW)), e.vector, WORD) for i in range(3))
        none = b.and_(
            b.fcmp_ordered("==", scale, e.splat(0.0)), b.icmp_signed("!=", b.bitcast(marks, e.ints), e.int_splat(0))
        )
        e.store_raw(b.select(none, e.splat(math.nan), inverse), b.add(head, e.index(ROW)), WORD)

    return intrinsic([types.int64], emit)


@cache
def rows(count: int, left: bool) -> Any:
    """Numba function (source, target, valid, stride, d): pack `count` rows, 16 by 16; after `valid` the last one again.

    Panels of 16 lie where `numba_split.pack` would have them.
    """
    look, found, spoil, one = largest(True), settle(), unscaled(), pack(True, left)

    @numba.njit(error_model="numpy")
    def several(source, target, valid, stride, d):  # type: ignore[no-untyped-def]
        for first in range(0, count, SIDE):
            begin = min(first, valid - 1)
            some, place = min(SIDE, valid - begin), source + begin * stride * ITEM
            head = target + first * apart(d)
            look(place, head, some, stride, d, 0)
            found(head)
            spoil(head)
            for at in range(0, d, STEP):
                own = head + HEAD + at // STEP * THICK
                one(place + at * ITEM, head, own, 0, some, stride, min(STEP, d - at))

    return several


@numba.njit(error_model="numpy")
def apart(d: Any) -> Any:
    """Bytes of a row of a packed panel of split numbers."""
    return (d + 2 * SIDE - 1) // (2 * SIDE) * SPLIT_ROW


@cache
def products(queries: int) -> Any:
    """Numba function (keys, queries, c, words, d, spare): 16 rows of scores, [16][queries], after AMX's `configure`."""
    tiles, scored = tile(FIXED, SIDE, SIDE, stream="a"), scores(queries)

    @numba.njit(error_model="numpy")
    def product(keys, given, c, _words, d, spare):  # type: ignore[no-untyped-def]
        for first in range(0, queries, SIDE):
            right = given + first * apart(d)
            tiles(keys + HEAD, right + HEAD, spare, (d + STEP - 1) // STEP * SIDE, 0, THICK, ROW)
            scored(spare, keys, right, c + first * ITEM)

    return product


@cache
def scores(queries: int) -> Any:
    """Numba function (sums, a, b, c): from sums of products of digits, and the panels' heads, to 16 columns of c."""

    def emit(e: Emit, sums: Value, a: Value, b_head: Value, c: Value) -> None:
        b = e.builder
        reciprocals = e.load_raw(b.add(b_head, e.index(ROW)), e.vector, WORD)

        def row(i: Value, _: State) -> State:
            at = e.offset(sums, i, ROW)
            first, second, third = (
                b.sitofp(e.load_raw(b.add(at, e.index(s * PLANE)), e.ints, WORD), e.vector) for s in range(3)
            )
            inverse = e.splat(e.load_raw(b.add(e.offset(a, i, WORD), e.index(ROW)), F32, WORD))
            value = e.fma(first, e.splat(65536.0), e.fma(second, e.splat(256.0), third))
            e.store_raw(b.fmul(value, b.fmul(inverse, reciprocals)), e.offset(c, i, queries * WORD), WORD)
            return []

        e.loop(e.index(0), e.index(SIDE), 1, [], row)

    return intrinsic([types.int64] * 4, emit)


@cache
def widest() -> Any:
    """Numba function (head) -> fp32: the largest reciprocal of a scale in a panel; a NaN does not count."""

    def emit(e: Emit, head: Value) -> Value:
        b = e.builder
        return e.reduce(
            e.max(e.load_raw(b.add(head, e.index(ROW)), e.vector, WORD), e.splat(0.0)),
            lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y),
        )

    return intrinsic([types.int64], emit, types.float32)


@cache
def uneven() -> Any:
    """Numba function (head, maxima, top, bound) -> int64: not 0 if the error of a score of one of 16 queries may show.

    maxima: their largest scores, times log2(e); top: `widest` of all keys; bound: BOUND times the root of d.
    """

    def emit(e: Emit, head: Value, maxima: Value, top: Value, bound: Value) -> Value:
        b = e.builder
        inverse = e.load_raw(b.add(head, e.index(ROW)), e.vector, WORD)
        size = e.call(f"llvm.fabs.v{SIDE}f32", e.vector, [e.load_raw(maxima, e.vector, WORD)])
        most = b.fmul(e.splat(bound), e.fma(size, e.splat(LN2), e.splat(1.0)))
        found = b.fcmp_ordered(">", b.fmul(inverse, e.splat(top)), most)
        return b.zext(b.bitcast(found, ir.IntType(SIDE)), ir.IntType(64))

    return intrinsic([types.int64, types.int64, types.float32, types.float32], emit, types.int64)
