"""Matrix product in Numba: packed panels, register tiles of LLVM vectors, fused epilogue."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.numba import ITEM, LINE, threads
from rooftune.kernels.common.numba_cpu import dot_formats, dot_is_fast, require, vector_width, zen
from rooftune.kernels.common.numba_epilogue import column_sums, finish
from rooftune.kernels.common.numba_few import FEW, build_few, readable
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel, slots
from rooftune.kernels.common.numba_tile import SWEEP, Format, format_of, pack, pack_panels, tile, touch

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")

TILES = {  # rows x columns of the register tile, by lanes of a vector; the first is the default
    16: ("28x16", "8x48", "14x32", "12x32", "6x64", "4x64", "1x128"),
    8: ("6x16", "4x24", "12x8", "2x32", "1x64"),
    4: ("6x8", "4x12", "8x8", "2x16", "1x32"),
}
MOST = 4096  # the longest block of k
STREAM = 8 << 20  # bytes of the output from which on it is written past the caches
NEAR = 4 << 20  # bytes of all operands as fp32 up to which prefetching costs more than it saves
# of a job: addresses of a, b, bias, out, packed a, packed b, correction, sums; m, n, k, height, depth, split, room
ARGUMENTS = ("int64",) * 15


def _default(problem: Problem) -> Config:
    wide, dtype = vector_width() == 16, problem.precision
    tiles, m = TILES[vector_width()], problem["m"]
    dot = dtype in dot_formats() and dot_is_fast(dtype)
    lean = tiles[-1] if m == 1 else "4x64" if wide and (dot or zen()) else tiles[1]  # a tile for a few rows
    read = {"tile": lean, "block_m": 168, "block_k": 8, "unroll": 1, "prefetch": "next", "read_b": "direct"}
    if dot and problem.flag("transpose", "nn")[1] == "n" and readable(problem, dot):
        if lines := _lines(problem):
            return {**read, **lines, "multiply": "dot"}
    # Zen 4, m = 4, b as [2048, 1024]: 3.2x torch in int8 and 2.4x in bf16, where packed it is 1.8x and 1.0x
    elif m <= (16 if dot else 4 if dtype == "int8" else FEW) and readable(problem, dot):
        return {**read, "multiply": "dot" if dot else "widen"}
    if m <= 4 and readable(problem, dot=False):
        return {**read, "multiply": "widen"}
    multiply, late = "dot" if dot else "widen", problem["k"] <= MOST and m <= (672 if zen() else FEW)
    if wide and (zen() or (dot and late)):
        n, few = problem["n"], m <= FEW  # tall: 3 % slower, but a panel of 64 columns may be half empty
        tall = not few and -(-n // 64) * 64 > 1.04 * (-(-n // 16) * 16)
        shape = {"tile": "28x16" if tall else "4x64", "block_m": 672, "block_k": MOST, "unroll": 2, "prefetch": "next"}
        return {**shape, "multiply": multiply, "read_b": "late" if late else "packed"}
    near = (m * problem["n"] + m * problem["k"] + problem["n"] * problem["k"]) * 4 <= NEAR
    # with AVX-512 a round of 4 is 1.4 KB of instructions: 0.83x of torch where 2 is 0.91x, now and then 0.39x
    block_m, block_k, unroll = (336, 512, 2) if wide else (168, 512 if near else 256, 4)
    shape = {"tile": tiles[0], "block_m": block_m, "block_k": block_k, "unroll": unroll}
    return {**shape, "prefetch": "none" if near else "next", "multiply": multiply, "read_b": "packed"}


def _lines(problem: Problem) -> Config:
    """How few rows meet b along n where it lies, in words; nothing if it is better packed.

    Zen 4, one thread, of torch, packed -> so. int8, 4096 x 4096: m = 1 0.6 -> 3.3, 4 0.7 -> 2.6, 12 2.0, 24 0.8 -> 1.5;
    2048 x 1024: m = 16 0.99 -> 1.25. bf16, 4096 x 4096: m = 4 3.1 (widened 2.4), 16 1.1 -> 1.8, 32 1.0 -> 1.3. A sweep
    of `block_k` rows of b stays in a cache, and the sums come and go once for each.
    """
    m, n = problem["m"], problem["n"]
    if m == 1:
        return {"tile": TILES[16][-1]}
    if problem.precision == "int8" and m <= 32:
        twelve = 8 < m <= 12 or (16 < m <= 24 and n > 2048)  # rows a tile: as few panels as 8 make, or fewer
        lines = m <= 8 and n > (2048 if m <= 4 else 4096)
        return {"tile": "4x64" if m <= 4 else "12x32" if twelve else "8x48", "block_k": 16 if lines else 256}
    if problem.precision == "bf16" and m <= (32 if n > 2048 else 16):
        return {"tile": "4x64"} if m <= 4 or n > 2048 else {"tile": "8x48", "block_k": 32}
    return {}


SPACE = Space(
    axes={
        "tile": TILES[vector_width()],
        "block_m": (56, 84, 112, 168, 224, 336, 672),  # rows of a that one task multiplies with every panel of b
        "block_k": (8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, MOST),  # steps before sums go to memory and back
        "unroll": (1, 2, 4),  # steps of k in a round of the innermost loop
        "prefetch": ("none", "next"),  # next: a share of the next panel of b and the lines of the output
        "multiply": ("widen", "dot"),  # dot: vdpbf16ps and vpdpbusd
        # late: packed panel by panel by the task that uses it; direct: where it lies, for a few rows of a
        "read_b": ("packed", "late", "direct"),
    },
    where=(
        lambda config, problem: config["multiply"] == "widen" or problem.precision in dot_formats(),
        lambda config, problem: config["read_b"] != "direct" or readable(problem, config["multiply"] == "dot"),
        lambda config, problem: config["read_b"] != "late" or config["block_k"] >= problem["k"],
        # axes that the direct path does not have stay at one value, so that no config is measured twice
        lambda config, problem: (
            config["read_b"] != "direct"
            or (config["block_m"], config["unroll"], config["prefetch"]) == (168, 1, "next")
        ),
        lambda config, problem: config["read_b"] == "direct" or config["block_k"] >= 64,
    ),
    default=_default,
)


@cache
def packing(form: Format, columns: int, b_along_k: bool) -> Job:
    """Panels of b: one a task where b lies along k. Otherwise some rows of all: whole lines of memory, whose pages
    are few enough for the TLB. The last panel holds the last columns: some of the one before once more, whose results
    are the same, instead of a part of a vector (m = 16, n = 2000, int8: 0.9 of torch with a part)."""
    pack_b, arguments = pack(form, columns, b_along_k), arguments_of(*ARGUMENTS)
    item, steps, sweep = ITEM[form.dtype], form.steps, SWEEP * form.steps

    @job
    def panels(given, task, _):  # type: ignore[no-untyped-def]
        _, b, _, _, _, b_pack, _, _, _, n, k, _, _, _, _ = arguments(given)
        words = (k + steps - 1) // steps
        if b_along_k:
            first = min(task * columns, max(n - columns, 0))
            pack_b(b + first * k * item, b_pack + task * columns * words * 4, min(columns, n - first), k, k)
        else:
            some, source = min(sweep, k - task * sweep), b + task * sweep * n * item
            target = b_pack + task * SWEEP * columns * 4
            for j in range((n + columns - 1) // columns):
                first = min(j * columns, max(n - columns, 0))
                pack_b(source + first * item, target + j * columns * words * 4, min(columns, n - first), n, some)

    return panels


@cache
def correcting(form: Format, columns: int) -> Job:
    """From column sums of a panel of packed b, what sums of products with a + 128 begin with."""
    sum_columns, arguments, steps = column_sums(columns), arguments_of(*ARGUMENTS), form.steps

    @job
    def panel(given, task, _):  # type: ignore[no-untyped-def]
        _, _, _, _, _, b_pack, correction, _, _, _, k, _, _, _, _ = arguments(given)
        words = (k + steps - 1) // steps
        sum_columns(b_pack + task * columns * words * 4, words, correction + task * columns * 4)

    return panel


@cache
def compiled(
    form: Format, transpose: str, epilogue: str, rows: int, columns: int, unroll: int, ahead: bool, late: bool
) -> Job:
    """A slot: its tasks one after the other, in the same memory, so that packed panels of a never leave the L2 cache.

    `height`: panels of a in a task, `depth`: words of k in a block, `split`: tasks that share these panels,
    `room`: register tiles of sums that a slot keeps. `late`: b is packed here, a panel at a time; k is one block.
    """
    a_along_k, b_along_k, arguments = transpose[0] == "n", transpose[1] == "t", arguments_of(*ARGUMENTS)
    pack_a = pack_panels(pack(form, rows, a_along_k, flip=form.unsigned_a), form, rows, a_along_k)
    multiply, end = tile(form, rows, columns, unroll=unroll, placed=True), finish(form, columns, epilogue)
    pack_b, sum_columns = pack(form, columns, b_along_k), column_sums(columns)
    fetch, claim = touch(), touch(write=True)
    item, steps, area = ITEM[form.dtype], form.steps, rows * columns * 4
    rows_added = rows if epilogue == "residual" else 0  # a bias is the same for all rows
    out_item = 4 if form.accumulator == "int32" else item
    plain, corrected = epilogue == "none" and out_item == 4, form.unsigned_a  # plain: sums are the result

    @job
    def product(given, task, slot):  # type: ignore[no-untyped-def]
        a, b, bias, out, a_pack, b_pack, correction, sums, m, n, k, height, depth, split, room = arguments(given)
        words = (k + steps - 1) // steps
        a_panels, b_panels = (m + rows - 1) // rows, (n + columns - 1) // columns
        line = columns * out_item + (LINE if n * out_item % LINE else 0)
        own, totals = a_pack + slot * height * rows * depth * 4, sums + slot * room * area
        begin, part = task // split * height, task % split
        stop = min(begin + height, a_panels)
        from_panel, to_panel = part * b_panels // split, (part + 1) * b_panels // split
        past = words <= depth and m * n * 4 >= STREAM and (out | n * 4) % LINE == 0
        for w in range(0, words, depth):
            some = min(depth, words - w)
            final = w + depth >= words
            wide = some * rows * 4  # bytes of a packed panel
            pack_a(a, own, begin, stop, m, k, w, some)
            share = (some * columns * 4 // (stop - begin) + LINE - 1) // LINE * LINE
            for j in range(from_panel, to_panel):
                first = min(j * columns, max(n - columns, 0))  # as they were packed
                right = b_pack + ((slot if late else j) * words + w) * columns * 4
                coming = right + words * columns * 4
                start = correction + (slot if late else j) * columns * 4 if corrected else 0
                if late:
                    source = b + first * (k if b_along_k else 1) * item
                    pack_b(source, right, min(columns, n - first), k if b_along_k else n, k)
                    if corrected:
                        sum_columns(right, words, start)
                for i in range(begin, stop):
                    target = out + (i * rows * n + first) * out_item
                    if ahead:
                        if not late:
                            fetch(coming + (i - begin) * share, share)
                        if final and not past:
                            for r in range(min(rows, m - i * rows)):
                                claim(target + r * n * out_item, line)
                    left = own + (i - begin) * wide
                    number = (j - from_panel) * height + i - begin if room > 1 else 0
                    place, apart = totals + number * area, columns * 4
                    straight = plain and words <= depth and (i + 1) * rows <= m and first + columns <= n
                    if straight:
                        place, apart = target, n * 4
                    multiply(left, right, place, some, w, apart, start, straight and past)
                    if final and not straight:
                        end(
                            place,
                            target,
                            n,
                            min(rows, m - i * rows),
                            min(columns, n - first),
                            bias + (i * rows_added * n + first) * item,
                        )

    return product


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
        return build_few(problem, config, rows, columns)
    form = format_of(problem.precision, config["multiply"] == "dot")
    flags = problem.flag("transpose", "nn"), problem.flag("epilogue", "none")

    words = -(-k // form.steps)
    a_panels, b_panels = -(-m // rows), -(-n // columns)
    late = config["read_b"] == "late"
    height = max(1, min(config["block_m"] // rows, -(-a_panels // (1 if late else threads()))))  # panels of a in a task
    depth = min(words, config["block_k"] // form.steps)
    blocks = -(-a_panels // height)
    if blocks > threads():  # as many for each thread: 7 blocks on 2 threads would take as long as 8
        height = -(-a_panels // (-(-blocks // threads()) * threads()))
        blocks = -(-a_panels // height)
    split = max(1, min(b_panels, -(-threads() // blocks)))
    room = -(-b_panels // split) * height if words > depth else 1
    tasks = blocks * split
    kept = slots(tasks) if late else b_panels  # packed panels of b: a slot's own may be more than b has
    b_along_k = flags[0][1] == "t"
    jobs = []
    if not late:
        jobs.append((packing(form, columns, b_along_k), b_panels if b_along_k else -(-words // SWEEP)))
        if form.unsigned_a:
            jobs.append((correcting(form, columns), b_panels))
    product = compiled(form, *flags, rows, columns, config["unroll"], config["prefetch"] == "next", late)
    kernel = parallel(ARGUMENTS, *jobs, (product, tasks))
    workspace = [
        torch.empty(size, dtype=torch.int32)
        for size in (
            slots(tasks) * height * rows * depth,
            kept * columns * words,
            kept * columns if FORMATS[problem.precision].exact else 1,
            slots(tasks) * room * rows * columns,
        )
    ]

    def run(out: Any, a: Any, b: Any, bias: Any = None) -> None:
        places = [space.data_ptr() for space in workspace]
        address = 0 if bias is None else bias.data_ptr()
        kernel(a.data_ptr(), b.data_ptr(), address, out.data_ptr(), *places, m, n, k, height, depth, split, room)

    return run
