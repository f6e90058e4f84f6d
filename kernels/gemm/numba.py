"""Matrix product in Numba: packed panels, register tiles of LLVM vectors, fused epilogue."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.numba import ITEM, LINE, threads
from rooftune.kernels.common.numba_cpu import dot_formats, dot_is_fast, require, vector_width
from rooftune.kernels.common.numba_epilogue import column_sums, finish
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel, slots
from rooftune.kernels.common.numba_thin import columns_at_once, dots
from rooftune.kernels.common.numba_tile import SWEEP, Format, format_of, pack, pack_panels, tile, touch

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")

TILES = {  # rows x columns of the register tile, by lanes of a vector; the first is the default
    16: ("28x16", "8x48", "14x32", "12x32", "6x64", "4x64", "1x128"),
    8: ("6x16", "4x24", "12x8", "2x32", "1x64"),
    4: ("6x8", "4x12", "8x8", "2x16", "1x32"),
}
FEW = 64  # rows of a up to which b is not packed: 1.25x torch instead of 0.84x at 32, 1.12x instead of 0.96x at 64
NEAR = 4 << 20  # bytes of all operands as fp32 up to which prefetching costs more than it saves
# of a job: addresses of a, b, bias, out, packed a, packed b, correction, sums; m, n, k, height, depth, split, room
ARGUMENTS = ("int64",) * 15
THIN_ARGUMENTS = ("int64",) * 12  # addresses of a, b, bias, out, packed a, packed b, sums; m, n, k, depth, parts


def _default(problem: Problem) -> Config:
    tiles, dtype = TILES[vector_width()], problem.precision
    m, n, k = problem["m"], problem["n"], problem["k"]
    few, near = m <= FEW and dtype != "int8", (m * n + m * k + n * k) * 4 <= NEAR
    wide = vector_width() == 16
    return {
        "tile": tiles[-1] if m == 1 else tiles[1] if few else tiles[0],
        "block_m": 336 if wide and not few else 168,
        "block_k": 8 if few else 512 if near or wide else 256,
        # with AVX-512 a round of 4 is 1.4 KB of instructions: 0.83x of torch where 2 is 0.91x, now and then 0.39x
        "unroll": 1 if few else 2 if wide else 4,
        "prefetch": "next" if few or not near else "none",
        "multiply": "dot" if dtype in dot_formats() and dot_is_fast(dtype) and not few else "widen",
        "read_b": "direct" if few else "packed",
    }


SPACE = Space(
    axes={
        "tile": TILES[vector_width()],
        "block_m": (56, 84, 112, 168, 224, 336),  # rows of a that one task multiplies with every panel of b
        "block_k": (8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 4096),  # steps before sums go to memory and back
        "unroll": (1, 2, 4),  # steps of k in a round of the innermost loop
        "prefetch": ("none", "next"),  # next: a share of the next panel of b and the lines of the output
        "multiply": ("widen", "dot"),  # dot: vdpbf16ps and vpdpbusd
        "read_b": ("packed", "direct"),  # direct: where it lies, for a few rows of a
    },
    where=(
        lambda config, problem: config["multiply"] == "widen" or problem.precision in dot_formats(),
        lambda config, problem: (
            config["read_b"] == "packed"
            or (problem["m"] <= 2 * FEW and problem.precision != "int8" and config["multiply"] == "widen")
        ),
        # axes that the direct path does not have stay at one value, so that no config is measured twice
        lambda config, problem: (
            config["read_b"] == "packed"
            or (config["block_m"], config["unroll"], config["prefetch"]) == (168, 1, "next")
        ),
        lambda config, problem: config["read_b"] == "direct" or config["block_k"] >= 64,
    ),
    default=_default,
)


@cache
def packing(form: Format, columns: int, b_along_k: bool) -> Job:
    """Panels of b: one a task where b lies along k. Otherwise some rows of all: whole lines of memory, whose pages
    are few enough for the TLB."""
    pack_b, arguments = pack(form, columns, b_along_k), arguments_of(*ARGUMENTS)
    item, steps, sweep = ITEM[form.dtype], form.steps, SWEEP * form.steps

    @job
    def panels(given, task, _):  # type: ignore[no-untyped-def]
        _, b, _, _, _, b_pack, _, _, _, n, k, _, _, _, _ = arguments(given)
        words = (k + steps - 1) // steps
        if b_along_k:
            first = task * columns
            pack_b(b + first * k * item, b_pack + first * words * 4, min(columns, n - first), k, k)
        else:
            some, source = min(sweep, k - task * sweep), b + task * sweep * n * item
            target = b_pack + task * SWEEP * columns * 4
            for j in range((n + columns - 1) // columns):
                first = j * columns
                pack_b(source + first * item, target + first * words * 4, min(columns, n - first), n, some)

    return panels


@cache
def correcting(form: Format, columns: int) -> Job:
    """Column sums of a panel of packed b, by which products with a + 128 are too large."""
    sum_columns, arguments, steps = column_sums(columns), arguments_of(*ARGUMENTS), form.steps

    @job
    def panel(given, task, _):  # type: ignore[no-untyped-def]
        _, _, _, _, _, b_pack, correction, _, _, _, k, _, _, _, _ = arguments(given)
        words = (k + steps - 1) // steps
        sum_columns(b_pack + task * columns * words * 4, words, correction + task * columns * 4)

    return panel


@cache
def compiled(form: Format, transpose: str, epilogue: str, rows: int, columns: int, unroll: int, ahead: bool) -> Job:
    """A slot: its tasks one after the other, in the same memory, so that packed panels of a never leave the L2 cache.

    `height`: panels of a in a task, `depth`: words of k in a block, `split`: tasks that share these panels,
    `room`: register tiles of sums that a slot keeps.
    """
    a_along_k, arguments = transpose[0] == "n", arguments_of(*ARGUMENTS)
    pack_a = pack_panels(pack(form, rows, a_along_k, flip=form.unsigned_a), form, rows, a_along_k)
    multiply, end = tile(form, rows, columns, unroll=unroll), finish(form, columns, epilogue)
    fetch, claim = touch(), touch(write=True)
    item, steps, area = ITEM[form.dtype], form.steps, rows * columns * 4
    rows_added = rows if epilogue == "residual" else 0  # a bias is the same for all rows
    out_item = 4 if form.accumulator == "int32" else item

    @job
    def product(given, task, slot):  # type: ignore[no-untyped-def]
        a, _, bias, out, a_pack, b_pack, correction, sums, m, n, k, height, depth, split, room = arguments(given)
        words = (k + steps - 1) // steps
        a_panels, b_panels = (m + rows - 1) // rows, (n + columns - 1) // columns
        line = columns * out_item + (LINE if n * out_item % LINE else 0)
        own, totals = a_pack + slot * height * rows * depth * 4, sums + slot * room * area
        begin, part = task // split * height, task % split
        stop = min(begin + height, a_panels)
        from_panel, to_panel = part * b_panels // split, (part + 1) * b_panels // split
        for w in range(0, words, depth):
            some = min(depth, words - w)
            final = w + depth >= words
            wide = some * rows * 4  # bytes of a packed panel
            pack_a(a, own, begin, stop, m, k, w, some)
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
                            bias + (i * rows_added * n + j * columns) * item,
                            correction + j * columns * 4,
                        )

    return product


@cache
def compiled_thin(form: Format, transpose: str, epilogue: str, rows: int, columns: int) -> tuple[Job, Job]:
    """Packing, and one of `parts` of the columns: all rows of a against b where it lies, each number of which is
    read from memory once.

    b along k: dot products of rows. Otherwise `depth` rows of b at a time, line by line, added to all sums;
    only the last panel is packed, where n does not fill it.
    """
    a_along_k, b_along_k = transpose[0] == "n", transpose[1] == "t"
    fp32, group, arguments = Format("fp32", 1), columns_at_once(rows, columns), arguments_of(*THIN_ARGUMENTS)
    pack_a, pack_b = pack(form, 1 if b_along_k else rows, a_along_k), pack(form, columns, False)
    multiply, last = tile(fp32, rows, columns, direct=form.dtype), tile(fp32, rows, columns)
    inner, end = dots(form.dtype, rows, group, columns), finish(form, columns, epilogue)
    item, tall, area = ITEM[form.dtype], 1 if b_along_k else rows, rows * columns * 4
    rows_added = rows if epilogue == "residual" else 0

    @job
    def packing(given, _, __):  # type: ignore[no-untyped-def]
        a, b, _, _, a_pack, b_pack, _, m, n, k, _, _ = arguments(given)
        for i in range((m + rows - 1) // rows * (rows // tall)):
            first = min(i * tall, m - 1)
            source = a + first * (k if a_along_k else 1) * item
            pack_a(source, a_pack + i * tall * k * 4, min(tall, m - first), k if a_along_k else m, k)
        if not b_along_k and n % columns > 0:
            pack_b(b + n // columns * columns * item, b_pack, n % columns, n, k)

    @job
    def product(given, part, _):  # type: ignore[no-untyped-def]
        _, b, bias, out, a_pack, b_pack, sums, m, n, k, depth, parts = arguments(given)
        a_panels, b_panels = (m + rows - 1) // rows, (n + columns - 1) // columns
        ragged = not b_along_k and n % columns > 0
        from_panel, to_panel = part * b_panels // parts, (part + 1) * b_panels // parts
        own = sums + from_panel * a_panels * area
        if b_along_k:
            for j in range(from_panel, to_panel):
                width = min(columns, n - j * columns)
                for g in range(0, width, group):
                    for i in range(a_panels):
                        place = own + ((j - from_panel) * a_panels + i) * area + g * 4
                        right = b + (j * columns + g) * k * item
                        inner(a_pack + i * rows * k * 4, right, place, k, width - g)
        else:
            for w in range(0, k, depth):
                some = min(depth, k - w)
                for j in range(from_panel, to_panel):
                    for i in range(a_panels):
                        left = a_pack + (i * k + w) * rows * 4
                        place = own + ((j - from_panel) * a_panels + i) * area
                        if ragged and j == b_panels - 1:
                            last(left, b_pack + w * columns * 4, place, some, w)
                        else:
                            multiply(left, b + (w * n + j * columns) * item, place, some, w, n * item)
        for j in range(from_panel, to_panel):
            for i in range(a_panels):
                end(
                    own + ((j - from_panel) * a_panels + i) * area,
                    out + (i * rows * n + j * columns) * item,
                    n,
                    min(rows, m - i * rows),
                    min(columns, n - j * columns),
                    bias + (i * rows_added * n + j * columns) * item,
                    0,
                )

    return packing, product


def _build_thin(problem: Problem, config: Config, rows: int, columns: int) -> Run:
    m, n, k = problem["m"], problem["n"], problem["k"]
    flags = problem.flag("transpose", "nn"), problem.flag("epilogue", "none")
    a_panels, b_panels = -(-m // rows), -(-n // columns)
    sizes = a_panels * rows * k, columns * k, a_panels * b_panels * rows * columns
    workspace = [torch.empty(size, dtype=torch.float32) for size in sizes]
    parts = min(threads(), b_panels)
    pack_both, product = compiled_thin(Format(problem.precision, 1), *flags, rows, columns)
    kernel = parallel(THIN_ARGUMENTS, (pack_both, 1), (product, parts))

    def run(out: Any, a: Any, b: Any, bias: Any = None) -> None:
        places = [space.data_ptr() for space in workspace]
        address = 0 if bias is None else bias.data_ptr()
        kernel(a.data_ptr(), b.data_ptr(), address, out.data_ptr(), *places, m, n, k, config["block_k"], parts)

    return run


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], a, b[, bias or residual]), all contiguous, stored as the flag transpose says.

    Loops after Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008): task of
    block_m rows (and a share of the columns, where rows alone do not occupy the threads), block of k, panel
    of b, panel of a. A tile of sums is finished as soon as its last block of k is done.
    """
    require(problem.precision)
    m, n, k = problem["m"], problem["n"], problem["k"]
    rows, columns = (int(side) for side in config["tile"].split("x"))
    if config["read_b"] == "direct":
        return _build_thin(problem, config, rows, columns)
    form = format_of(problem.precision, config["multiply"] == "dot")
    flags = problem.flag("transpose", "nn"), problem.flag("epilogue", "none")

    words = -(-k // form.steps)
    a_panels, b_panels = -(-m // rows), -(-n // columns)
    height = max(1, min(config["block_m"] // rows, -(-a_panels // threads())))  # panels of a in a task
    depth = min(words, config["block_k"] // form.steps)
    blocks = -(-a_panels // height)
    if blocks > threads():  # as many for each thread: 7 blocks on 2 threads would take as long as 8
        height = -(-a_panels // (-(-blocks // threads()) * threads()))
        blocks = -(-a_panels // height)
    split = max(1, min(b_panels, -(-threads() // blocks)))
    room = -(-b_panels // split) * height if words > depth else 1
    b_along_k = flags[0][1] == "t"
    jobs = [(packing(form, columns, b_along_k), b_panels if b_along_k else -(-words // SWEEP))]
    if form.unsigned_a:
        jobs.append((correcting(form, columns), b_panels))
    product = compiled(form, *flags, rows, columns, config["unroll"], config["prefetch"] == "next")
    kernel = parallel(ARGUMENTS, *jobs, (product, blocks * split))
    workspace = [
        torch.empty(size, dtype=torch.int32)
        for size in (
            slots(blocks * split) * height * rows * depth,
            b_panels * columns * words,
            b_panels * columns if FORMATS[problem.precision].exact else 1,
            slots(blocks * split) * room * rows * columns,
        )
    ]

    def run(out: Any, a: Any, b: Any, bias: Any = None) -> None:
        places = [space.data_ptr() for space in workspace]
        address = 0 if bias is None else bias.data_ptr()
        kernel(a.data_ptr(), b.data_ptr(), address, out.data_ptr(), *places, m, n, k, height, depth, split, room)

    return run
