"""Matrix product in Numba: packed panels, register tiles of LLVM vectors, fused epilogue."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import prange, types

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.numba import (
    ITEM,
    LOG2E,
    Chunk,
    Emit,
    State,
    Value,
    intrinsic,
    jit,
    require,
    threads,
    vector_width,
)
from rooftune.kernels.common.numba_tile import Format, dot_formats, dot_is_fast, format_of, pack, tile

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")

TILES = {  # rows x columns of the register tile, by lanes of a vector; the first is the default
    16: ("14x32", "8x48", "12x32", "6x64", "28x16", "4x64", "1x128"),
    8: ("6x16", "4x24", "12x8", "1x64"),
    4: ("6x8", "4x12", "8x8", "1x32"),
}


def _default(problem: Problem) -> Config:
    tiles = TILES[vector_width()]
    dtype = problem.precision
    return {
        "tile": tiles[-1] if problem["m"] == 1 else tiles[0],
        "block_m": 168,
        "block_k": 512,
        "multiply": "dot" if dtype in dot_formats() and dot_is_fast(dtype) else "widen",
    }


SPACE = Space(
    axes={
        "tile": TILES[vector_width()],
        "block_m": (56, 84, 112, 168, 224, 336),  # rows of a that one task multiplies with every panel of b
        "block_k": (128, 256, 384, 512, 768, 1024, 4096),  # steps after which sums go to memory and back
        "multiply": ("widen", "dot"),  # dot: vdpbf16ps and vpdpbusd
    },
    where=(lambda config, problem: config["multiply"] == "widen" or problem.precision in dot_formats(),),
    default=_default,
)


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
    """Numba function (sums, out, n, height, width, bias, correction): bias, activation, rounding, edges.

    sums: one register tile of accumulators; out: address of its first element in [m, n]; height and width:
    how much of the tile lies inside; correction: 128 times the column sums of b for unsigned a.
    """
    integer = form.accumulator == "int32"

    def emit(
        e: Emit, sums: Value, out: Value, n: Value, height: Value, width: Value, bias: Value, correction: Value
    ) -> None:
        b = e.builder

        def result(value: Value, chunk: Chunk) -> Value:
            if integer:
                if not form.unsigned_a:
                    return value
                behind = b.bitcast(chunk.load(correction, "fp32"), e.ints)
                return b.bitcast(b.sub(b.bitcast(value, e.ints), behind), e.vector)
            if epilogue != "none":
                value = b.fadd(value, chunk.load(bias, form.dtype))
            if epilogue == "bias_relu":
                value = b.select(b.fcmp_ordered("<", value, e.splat(0.0)), e.splat(0.0), value)
            return gelu(e, value) if epilogue == "bias_gelu" else value

        stored = "fp32" if integer else form.dtype

        def row(i: Value, _: State) -> State:
            source = e.offset(sums, i, columns * 4)
            target = e.offset(out, b.mul(i, n), ITEM[stored])

            def body(chunk: Chunk, _: State) -> State:
                chunk.store(result(chunk.load(source, "fp32"), chunk), target, stored)
                return []

            e.row(width, [], body)
            return []

        e.loop(e.index(0), height, 1, [], row)

    return intrinsic([types.int64] * 7, emit)


@cache
def column_sums(columns: int) -> Any:
    """Numba function (panel, words, target): 128 times the sums of the columns of a packed int8 panel."""

    def emit(e: Emit, panel: Value, words: Value, target: Value) -> None:
        b = e.builder
        ones = ir.Constant(e.ints, [0x01010101] * e.width)
        for first in range(0, columns, e.width):

            def step(k: Value, state: State, first: int = first) -> State:
                bytes_of_b = e.load_raw(b.add(e.offset(panel, k, columns * 4), e.index(first * 4)), e.ints, 4)
                return [e.call("llvm.x86.avx512.vpdpbusd.512", e.ints, (state[0], ones, bytes_of_b))]

            _, sums = e.loop(e.index(0), words, 1, [ir.Constant(e.ints, [0] * e.width)], step)
            e.store_raw(b.shl(sums[0], e.int_splat(7)), b.add(target, e.index(first * 4)), 4)

    return intrinsic([types.int64] * 3, emit)


@cache
def compiled(form: Format, transpose: str, epilogue: str, rows: int, columns: int) -> Any:
    """Numba function of addresses (a, b, bias, out, packed a, packed b, correction, sums) and sizes."""
    a_along_k, b_along_k = transpose[0] == "n", transpose[1] == "t"
    pack_a = pack(form, rows, a_along_k, flip=form.unsigned_a)
    pack_b = pack(form, columns, b_along_k)
    multiply, end = tile(form, rows, columns), finish(form, columns, epilogue)
    sum_columns, corrected = column_sums(columns), form.unsigned_a  # not compiled where `corrected` is False
    item, steps = ITEM[form.dtype], form.steps
    out_item = 4 if form.accumulator == "int32" else item

    @jit("void(" + ", ".join(["int64"] * 14) + ")")
    def product(  # type: ignore[no-untyped-def]
        a, b, bias, out, a_pack, b_pack, correction, sums, m, n, k, height, depth, split
    ):
        words = (k + steps - 1) // steps
        a_panels, b_panels = (m + rows - 1) // rows, (n + columns - 1) // columns
        for i in prange(a_panels):
            first = i * rows
            source = a + first * (k if a_along_k else 1) * item
            pack_a(source, a_pack + first * words * 4, min(rows, m - first), k if a_along_k else m, k)
        for j in prange(b_panels):
            first = j * columns
            source, target = b + first * (k if b_along_k else 1) * item, b_pack + first * words * 4
            pack_b(source, target, min(columns, n - first), k if b_along_k else n, k)
            if corrected:
                sum_columns(target, words, correction + first * 4)
        blocks = (a_panels + height - 1) // height
        for task in prange(blocks * split):
            begin, part = task // split * height, task % split
            stop = min(begin + height, a_panels)
            place = sums + task * height * rows * columns * 4
            for j in range(part * b_panels // split, (part + 1) * b_panels // split):
                for w in range(0, words, depth):
                    some = min(depth, words - w)
                    right = b_pack + (j * words + w) * columns * 4
                    for i in range(begin, stop):
                        left = a_pack + (i * words + w) * rows * 4
                        multiply(left, right, place + (i - begin) * rows * columns * 4, some, 0, 0, w)
                for i in range(begin, stop):
                    end(
                        place + (i - begin) * rows * columns * 4,
                        out + (i * rows * n + j * columns) * out_item,
                        n,
                        min(rows, m - i * rows),
                        min(columns, n - j * columns),
                        bias + j * columns * item,
                        correction + j * columns * 4,
                    )

    return product


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], a, b[, bias]), all contiguous, stored as the flag transpose says.

    Loops after Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), with the
    order: task of block_m rows (and a share of the columns, where rows alone do not occupy the threads),
    panel of b, block of k, panel of a. The sums of one panel of b stay in the L1 or L2 cache.
    """
    require(problem.precision)
    m, n, k = problem["m"], problem["n"], problem["k"]
    rows, columns = (int(side) for side in config["tile"].split("x"))
    form = format_of(problem.precision, config["multiply"] == "dot")
    kernel = compiled(form, problem.flag("transpose", "nn"), problem.flag("epilogue", "none"), rows, columns)

    words = -(-k // form.steps)
    a_panels, b_panels = -(-m // rows), -(-n // columns)
    height = max(1, min(config["block_m"] // rows, -(-a_panels // threads())))  # panels of a in a task
    depth = max(1, config["block_k"] // form.steps)
    blocks = -(-a_panels // height)
    split = min(b_panels, -(-2 * threads() // blocks)) if blocks < 2 * threads() else 1
    workspace = [
        torch.empty(size, dtype=torch.int32)
        for size in (
            a_panels * rows * words,
            b_panels * columns * words,
            b_panels * columns if FORMATS[problem.precision].exact else 1,
            blocks * split * height * rows * columns,
        )
    ]

    def run(out: Any, a: Any, b: Any, bias: Any = None) -> None:
        places = [space.data_ptr() for space in workspace]
        address = 0 if bias is None else bias.data_ptr()
        kernel(a.data_ptr(), b.data_ptr(), address, out.data_ptr(), *places, m, n, k, height, depth, split)

    return run
