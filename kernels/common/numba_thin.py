"""Dot products of rows for matrix products with few rows: both operands are read along k, nothing is packed."""

from __future__ import annotations

from functools import cache
from typing import Any

from numba.core import types

from rooftune.kernels.common.numba import ITEM, Chunk, Emit, State, Value, intrinsic
from rooftune.kernels.common.numba_cpu import vector_width

SUMS = {16: 24, 8: 12, 4: 12}  # vectors of sums that leave registers for the operands, by lanes
# rows of b read side by side: a Xeon reads 4096 x 4096 in fp32 at 9.7 GB/s by one, 11.8 by 2, 13.2 by 4, 14 by 8 to 24
STREAMS = {16: 8, 8: 4, 4: 4}


def columns_at_once(rows: int, columns: int) -> int:
    """How many rows of b meet `rows` rows of a in one pass: a divisor of `columns`, at most STREAMS."""
    most = min(STREAMS[vector_width()], SUMS[vector_width()] // rows)
    return max(c for c in range(1, max(1, most) + 1) if columns % c == 0)


@cache
def dots(dtype: str, rows: int, group: int, columns: int) -> Any:
    """Numba function (a, b, c, k, valid): c = a b^T for `rows` rows of a and `group` rows of b.

    a: fp32 [rows][k]; b: [..., k] of a precision, of which rows from `valid` on are not read (the last valid
    one again); c: fp32, `columns` a row.
    """

    def emit(e: Emit, a: Value, b_rows: Value, c: Value, k: Value, valid: Value) -> None:
        b, last = e.builder, e.builder.sub(valid, e.index(1))
        left = [e.offset(a, b.mul(k, e.index(i)), 4) for i in range(rows)]
        own = [b.select(b.icmp_signed("<", e.index(j), last), e.index(j), last) for j in range(group)]
        right = [e.offset(b_rows, b.mul(j, k), ITEM[dtype]) for j in own]

        def step(chunk: Chunk, sums: State) -> State:
            y = [chunk.only_new(chunk.load(row, dtype)) for row in right]
            out = []
            for i, row in enumerate(left):
                x = chunk.only_new(chunk.load(row, "fp32"))
                out += [e.fma(x, y[j], sums[i * group + j]) for j in range(group)]
            return out

        sums = e.row(k, [0.0] * (rows * group), step, max(1, 8 // (rows * group)))  # 8 cover the latency of an FMA
        for i in range(rows):
            for j in range(group):
                e.store_raw(e.total(sums[i * group + j]), b.add(c, e.index((i * columns + j) * 4)), 4)

    return intrinsic([types.int64] * 5, emit)
