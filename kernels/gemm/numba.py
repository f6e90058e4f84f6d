"""Matrix product in Numba: packed panels, register tiles of LLVM vectors, fused epilogue."""

from __future__ import annotations

from collections.abc import Callable
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
    LINE,
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
from rooftune.kernels.common.numba_tile import Format, dot_formats, dot_is_fast, format_of, pack, tile, touch

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")

TILES = {  # rows x columns of the register tile, by lanes of a vector; the first is the default
    16: ("14x32", "8x48", "12x32", "6x64", "28x16", "4x64", "1x128"),
    8: ("6x16", "4x24", "12x8", "1x64"),
    4: ("6x8", "4x12", "8x8", "1x32"),
}
SWEEP = 32  # words of k packed at a time where k is not contiguous


def _default(problem: Problem) -> Config:
    tiles = TILES[vector_width()]
    dtype = problem.precision
    return {
        "tile": tiles[-1] if problem["m"] == 1 else tiles[0],
        "block_m": 168,
        "block_k": 512,
        "unroll": 1,
        "prefetch": "next",
        "multiply": "dot" if dtype in dot_formats() and dot_is_fast(dtype) else "widen",
    }


SPACE = Space(
    axes={
        "tile": TILES[vector_width()],
        "block_m": (56, 84, 112, 168, 224, 336),  # rows of a that one task multiplies with every panel of b
        "block_k": (128, 256, 384, 512, 768, 1024, 4096),  # steps after which sums go to memory and back
        "unroll": (1, 2, 4),  # steps of k in a round of the innermost loop
        "prefetch": ("none", "next"),  # next: a share of the next panel of b and the lines of the output
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

        def row(i: Value, visit: Callable[[Callable[[Chunk, State], State]], Any]) -> State:
            source = e.offset(sums, i, columns * 4)
            target = e.offset(out, b.mul(i, n), ITEM[stored])

            def body(chunk: Chunk, _: State) -> State:
                chunk.store(result(chunk.load(source, "fp32"), chunk), target, stored)
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
def compiled(form: Format, transpose: str, epilogue: str, rows: int, columns: int, unroll: int, ahead: bool) -> Any:
    """Numba function of addresses (a, b, bias, out, packed a, packed b, correction, sums) and sizes.

    `height`: panels of a in a task, `depth`: words of k in a block, `split`: tasks that share these panels,
    `room`: register tiles of sums that a slot keeps; a slot does its tasks one after the other, in the same
    memory, so that packed panels of a never leave the L2 cache.
    """
    a_along_k, b_along_k = transpose[0] == "n", transpose[1] == "t"
    pack_a = pack(form, rows, a_along_k, flip=form.unsigned_a)
    pack_b = pack(form, columns, b_along_k)
    multiply, end = tile(form, rows, columns, unroll=unroll), finish(form, columns, epilogue)
    fetch, claim = touch(), touch(write=True)
    sum_columns, corrected = column_sums(columns), form.unsigned_a  # not compiled where `corrected` is False
    item, steps, area = ITEM[form.dtype], form.steps, rows * columns * 4
    out_item = 4 if form.accumulator == "int32" else item
    sweep = SWEEP * steps

    @jit("void(" + ", ".join(["int64"] * 16) + ")")
    def product(  # type: ignore[no-untyped-def]
        a, b, bias, out, a_pack, b_pack, correction, sums, m, n, k, height, depth, split, room, slots
    ):
        words = (k + steps - 1) // steps
        a_panels, b_panels = (m + rows - 1) // rows, (n + columns - 1) // columns
        if b_along_k:
            for j in prange(b_panels):
                first = j * columns
                pack_b(b + first * k * item, b_pack + first * words * 4, min(columns, n - first), k, k)
        else:  # whole lines of memory, some rows at a time: their pages are few enough for the TLB
            for s in prange((k + sweep - 1) // sweep):
                some, source = min(sweep, k - s * sweep), b + s * sweep * n * item
                target = b_pack + s * SWEEP * columns * 4
                for j in range(b_panels):
                    first = j * columns
                    pack_b(source + first * item, target + first * words * 4, min(columns, n - first), n, some)
        if corrected:
            for j in prange(b_panels):
                sum_columns(b_pack + j * columns * words * 4, words, correction + j * columns * 4)
        tasks = (a_panels + height - 1) // height * split
        line = columns * out_item + (LINE if n * out_item % LINE else 0)
        for slot in prange(slots):
            own, totals = a_pack + slot * height * rows * depth * 4, sums + slot * room * area
            for task in range(slot * tasks // slots, (slot + 1) * tasks // slots):
                begin, part = task // split * height, task % split
                stop = min(begin + height, a_panels)
                from_panel, to_panel = part * b_panels // split, (part + 1) * b_panels // split
                for w in range(0, words, depth):
                    some = min(depth, words - w)
                    final = w + depth >= words
                    left, wide = min(some * steps, k - w * steps), some * rows * 4  # wide: bytes of a packed panel
                    for i in range(begin, stop):
                        if a_along_k:
                            source = a + (i * rows * k + w * steps) * item
                            pack_a(source, own + (i - begin) * wide, min(rows, m - i * rows), k, left)
                    if not a_along_k:
                        for at in range(0, some, SWEEP):
                            for i in range(begin, stop):
                                source = a + ((w + at) * steps * m + i * rows) * item
                                target = own + (i - begin) * wide + at * rows * 4
                                pack_a(source, target, min(rows, m - i * rows), m, min(sweep, left - at * steps))
                    share = (some * columns * 4 // (stop - begin) + LINE - 1) // LINE * LINE
                    for j in range(from_panel, to_panel):
                        right = b_pack + (j * words + w) * columns * 4
                        coming = right + words * columns * 4
                        for i in range(begin, stop):
                            number = (j - from_panel) * height + i - begin if room > 1 else 0
                            place = totals + number * area
                            target = out + (i * rows * n + j * columns) * out_item
                            if ahead:
                                fetch(coming + (i - begin) * share, share)
                                if final:
                                    for r in range(min(rows, m - i * rows)):
                                        claim(target + r * n * out_item, line)
                            multiply(own + (i - begin) * wide, right, place, some, w)
                            if final:
                                end(
                                    place,
                                    target,
                                    n,
                                    min(rows, m - i * rows),
                                    min(columns, n - j * columns),
                                    bias + j * columns * item,
                                    correction + j * columns * 4,
                                )

    return product


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], a, b[, bias]), all contiguous, stored as the flag transpose says.

    Loops after Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008): task of
    block_m rows (and a share of the columns, where rows alone do not occupy the threads), block of k, panel
    of b, panel of a. A tile of sums is finished as soon as its last block of k is done.
    """
    require(problem.precision)
    m, n, k = problem["m"], problem["n"], problem["k"]
    rows, columns = (int(side) for side in config["tile"].split("x"))
    form = format_of(problem.precision, config["multiply"] == "dot")
    flags = problem.flag("transpose", "nn"), problem.flag("epilogue", "none")
    kernel = compiled(form, *flags, rows, columns, config["unroll"], config["prefetch"] == "next")

    words = -(-k // form.steps)
    a_panels, b_panels = -(-m // rows), -(-n // columns)
    height = max(1, min(config["block_m"] // rows, -(-a_panels // threads())))  # panels of a in a task
    depth = min(words, config["block_k"] // form.steps)
    blocks = -(-a_panels // height)
    split = max(1, min(b_panels, -(-threads() // blocks)))
    slots = min(threads(), blocks * split)
    room = -(-b_panels // split) * height if words > depth else 1
    workspace = [
        torch.empty(size, dtype=torch.int32)
        for size in (
            slots * height * rows * depth,
            b_panels * columns * words,
            b_panels * columns if FORMATS[problem.precision].exact else 1,
            slots * room * rows * columns,
        )
    ]

    def run(out: Any, a: Any, b: Any, bias: Any = None) -> None:
        places = [space.data_ptr() for space in workspace]
        address = 0 if bias is None else bias.data_ptr()
        kernel(a.data_ptr(), b.data_ptr(), address, out.data_ptr(), *places, m, n, k, height, depth, split, room, slots)

    return run
