"""Whether numbers suit fixed point (`numba_fixed`), in Numba: from a look at some rows, before anything is packed."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
from llvmlite import ir
from numba.core import types

from rooftune.kernels.common.numba import F32, I32, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_fixed import ENOUGH, ITEM
from rooftune.kernels.common.numba_split import lines
from rooftune.kernels.common.numba_tmul import SIDE

MARGIN = 2.5  # times ENOUGH, expected: then few results fall short by chance


@cache
def evenness(along_k: bool) -> Any:
    """Numba function (source, valid, stride, k) -> fp32: the sum of sizes over the largest, mean of up to 16 rows.

    0 if any row has no such ratio. Elements lie as for `numba_split.pack`.
    """

    def emit(e: Emit, source: Value, valid: Value, stride: Value, k: Value) -> Value:
        b, load, none = e.builder, lines(e, source, along_k, valid, stride, k), e.splat(0.0)

        def larger(x: Value, y: Value) -> Value:
            return b.select(b.fcmp_ordered(">", x, y), x, y)

        def over(i: Value, by: int) -> tuple[Value, Value]:
            def step(j: Value, state: State) -> State:
                size = e.call(f"llvm.fabs.v{SIDE}f32", e.vector, [load(i, j)])
                return [b.fadd(state[0], size), e.max(state[1], size)]

            _, (total, top) = e.loop(e.index(0), b.add(k, e.index(by - 1)), by, [none, none], step)
            return total, top

        def row(i: Value, state: State) -> State:
            total, top = over(i, SIDE)
            return [b.fadd(state[0], b.fdiv(e.total([total]), e.reduce(top, larger)))]

        if along_k:
            _, (ratios,) = e.loop(e.index(0), valid, 1, [ir.Constant(F32, 0.0)], row)
        else:
            total, top = over(e.index(0), 1)
            there = b.icmp_signed("<", ir.Constant(e.ints, list(range(SIDE))), e.broadcast(b.trunc(valid, I32), SIDE))
            ratios = e.total([b.select(there, b.fdiv(total, top), none)])
        ratio = b.fdiv(ratios, b.sitofp(valid, F32))
        return b.select(b.fcmp_ordered(">=", ratio, ir.Constant(F32, 0.0)), ratio, ir.Constant(F32, 0.0))

    return intrinsic([types.int64] * 4, emit, types.float32)


@cache
def suits(a_along_k: bool, b_along_k: bool) -> Any:
    """Numba function (a, b, m, n, k, block) -> int64: not 0 if most results, in blocks of k, will pass the check.

    By 16 rows of a and columns of b: those as far apart as possible where they lie along k, else side by side.
    """
    return suits_by(evenness(a_along_k), evenness(b_along_k), a_along_k, b_along_k)


def suits_by(of_a: Any, of_b: Any, a_along_k: bool, b_along_k: bool) -> Any:
    """The same, of these functions."""

    @numba.njit(error_model="numpy")
    def ratio(a, b, m, n, k, block):  # type: ignore[no-untyped-def]
        if a_along_k:
            left = of_a(a, min(m, SIDE), max(1, m // SIDE) * k, k)
        else:
            left = of_a(a + max(0, m // 2 - SIDE) * ITEM, min(m, SIDE), m, k)
        if b_along_k:
            right = of_b(b, min(n, SIDE), max(1, n // SIDE) * k, k)
        else:
            right = of_b(b + max(0, n // 2 - SIDE) * ITEM, min(n, SIDE), n, k)
        size = float(left) * float(right) * (127.0 / k) ** 2  # of a term, on average
        return 1 if size * math.sqrt(min(block, k)) >= MARGIN * ENOUGH else 0

    return ratio
