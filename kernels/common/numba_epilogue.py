"""What follows a register tile of sums in Numba: bias or residual, activation, rounding, edges."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types

from rooftune.kernels.common.numba import ITEM, LOG2E, Chunk, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_dot import int8_fours
from rooftune.kernels.common.numba_tile import Format


def gelu(e: Emit, x: Value) -> Value:
    """x * Phi(x) with the normal distribution's tail by Abramowitz and Stegun 7.1.26: erfc(|z|) =
    t (a1 + t (a2 + ...)) exp(-z^2), t = 1 / (1 + 0.3275911 |z|), error below 1.5e-7.

    At +inf it is +inf and at -inf NaN, as in torch's float64.
    """
    b = e.builder
    size = e.call(f"llvm.fabs.v{e.width}f32", e.vector, [x])
    z = b.fmul(size, e.splat(0.7071067811865476))
    t = b.fdiv(e.splat(1.0), e.fma(z, e.splat(0.3275911), e.splat(1.0)))
    p = e.splat(1.061405429)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = e.fma(p, t, e.splat(c))
    tail = b.fmul(b.fmul(p, t), e.exp2(b.fmul(b.fmul(z, z), e.splat(-LOG2E))))
    half = b.fmul(tail, e.splat(0.5))
    finite = b.select(b.fcmp_ordered("<", size, e.splat(1e30)), size, e.splat(1e30))
    upper = b.fsub(x, b.fmul(finite, half))
    return b.select(b.fcmp_ordered(">", x, e.splat(0.0)), upper, b.fmul(x, half))


@cache
def finish(form: Format, columns: int, epilogue: str) -> Any:
    """Numba function (sums, out, n, height, width, bias): bias or residual, activation, rounding, edges.

    sums: one register tile of accumulators; out: address of its first element in [m, n]; height and width:
    how much of the tile lies inside; bias: address of the tile's first, residual: of its first element in [m, n].
    """
    integer = form.accumulator == "int32"

    def emit(e: Emit, sums: Value, out: Value, n: Value, height: Value, width: Value, bias: Value) -> None:
        b = e.builder

        def result(value: Value, chunk: Chunk, added: Value) -> Value:
            if integer:
                return value
            if epilogue != "none":
                value = b.fadd(value, chunk.load(added, form.dtype))
            if epilogue == "bias_relu":
                value = b.select(b.fcmp_ordered("<", value, e.splat(0.0)), e.splat(0.0), value)
            return gelu(e, value) if epilogue == "bias_gelu" else value

        stored = "fp32" if integer else form.dtype

        def row(i: Value, visit: Callable[[Callable[[Chunk, State], State]], Any]) -> State:
            source = e.offset(sums, i, columns * 4)
            target = e.offset(out, b.mul(i, n), ITEM[stored])
            added = e.offset(bias, b.mul(i, n), ITEM[stored]) if epilogue == "residual" else bias

            def body(chunk: Chunk, _: State) -> State:
                chunk.store(result(chunk.load(source, "fp32"), chunk, added), target, stored, short_nans=True)
                return []

            visit(body)
            return []

        def whole(body: Callable[[Chunk, State], State]) -> None:
            for first in range(0, columns, e.width):
                body(Chunk(e, e.index(first), None), [])

        def rows_by(visit: Callable[[Callable[[Chunk, State], State]], Any]) -> State:
            e.loop(e.index(0), height, 1, [], lambda i, _: row(i, visit))
            return []

        inside = b.icmp_signed("==", width, e.index(columns))
        e.branch(inside, lambda: rows_by(whole), lambda: rows_by(lambda body: e.row(width, [], body)))

    return intrinsic([types.int64] * 6, emit)


@cache
def column_sums(columns: int) -> Any:
    """Numba function (panel, words, target): -128 times the sums of the columns of a packed int8 panel, with which the
    sums of products with a + 128 begin."""

    def emit(e: Emit, panel: Value, words: Value, target: Value) -> None:
        b = e.builder
        ones = ir.Constant(e.ints, [0x01010101] * e.width)
        parts = [e.index(first * 4) for first in range(0, columns, e.width)]

        def step(k: Value, state: State) -> State:
            row = e.offset(panel, k, columns * 4)
            words_of_b = [e.load_raw(b.add(row, part), e.ints, 4) for part in parts]
            return [int8_fours(e, total, ones, word) for total, word in zip(state, words_of_b, strict=True)]

        _, sums = e.loop(e.index(0), words, 1, [ir.Constant(e.ints, [0] * e.width)] * len(parts), step)
        for part, total in zip(parts, sums, strict=True):
            e.store_raw(b.neg(b.shl(total, e.int_splat(7))), b.add(target, part), 4)

    return intrinsic([types.int64] * 3, emit)
