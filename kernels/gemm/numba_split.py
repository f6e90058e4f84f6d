"""Matrix product in Numba of fp32 by AMX: six products of bf16 for each, as exact as fp32's own (`numba_split`)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space, UsageError
from rooftune.kernels.common.numba import LINE, threads
from rooftune.kernels.common.numba_cpu import tile_formats
from rooftune.kernels.common.numba_epilogue import finish
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel, slots
from rooftune.kernels.common.numba_split import SPLIT, again, pack, spoiled
from rooftune.kernels.common.numba_tile import SWEEP, Format, pack_panels, touch
from rooftune.kernels.common.numba_tmul import ROW, SIDE, configure, release, tile

DEVICES = ("cpu",)
PRECISIONS = ("fp32",)

PAIR = 4 * SPLIT.planes  # bytes of two numbers
STEP = 2 * SIDE  # numbers of k that a tile takes
SMALL = 4 << 20  # bytes of both operands packed up to which blocks of b are packed anew for each block of a


def _default(problem: Problem) -> Config:
    small = (problem["m"] + problem["n"]) * problem["k"] * PAIR // 2 <= SMALL
    return {
        "tile": "16x32",
        "block_m": 512 if small or threads() == 1 else 256,  # two tasks a thread: 2.02 times as fast as one, not 1.74
        "block_n": 512 if small else 4096,
        "block_k": 128 if small else 256,
        "pack_b": "block" if small else "whole",
    }


SPACE = Space(
    axes={
        "tile": ("16x32", "32x16", "16x16"),
        "block_m": (128, 256, 512, 1024),  # rows of a packed at a time
        "block_n": (128, 256, 512, 4096),  # columns of b that they are multiplied with before the next rows
        "block_k": (128, 256, 512, 1024),  # numbers of k before sums go to memory and back
        "pack_b": ("whole", "block"),  # once, past the caches, or as much as the L2 cache holds
    },
    where=(lambda config, problem: config["pack_b"] == "block" or config["block_n"] == 4096,),
    default=_default,
)
# of a job: addresses of a, b, bias, out, packed a, packed b, sums; m, n, k, height, group, depth, split
ARGUMENTS = ("int64",) * 14


@cache
def packing(columns: int, b_along_k: bool) -> Job:
    """All panels of b: one a task where b lies along k, otherwise SWEEP words of each."""
    one, arguments = pack(columns, b_along_k, left=False, stream=True), arguments_of(*ARGUMENTS)

    @job
    def panels(given, task, _):  # type: ignore[no-untyped-def]
        _, b, _, _, _, b_pack, _, _, n, k, _, _, _, _ = arguments(given)
        wide = (k + STEP - 1) // STEP * SIDE * columns * PAIR
        if b_along_k:
            first = task * columns
            one(b + first * k * 4, b_pack + task * wide, min(columns, n - first), k, k)
        else:
            row = task * 2 * SWEEP
            for j in range((n + columns - 1) // columns):
                first, target = j * columns, b_pack + j * wide + task * SWEEP * columns * PAIR
                one(b + (row * n + first) * 4, target, min(columns, n - first), n, min(2 * SWEEP, k - row))

    return panels


@cache
def compiled(transpose: str, epilogue: str, rows: int, columns: int, by_block: bool) -> Job:
    """A task: `height` panels of a against one of `split` parts of b's panels, `group` of these at a time.

    Blocks of `depth` words of k of these panels of a, and of b if `by_block`, are packed in the slot's memory.
    """
    a_along_k, b_along_k = transpose[0] == "n", transpose[1] == "t"
    pack_a = pack_panels(pack(rows, a_along_k, left=True), SPLIT, rows, a_along_k)
    pack_b = pack_panels(pack(columns, b_along_k, left=False), SPLIT, columns, b_along_k)
    multiply, end = tile(SPLIT, rows, columns, stream=True), finish(Format("fp32", 1), columns, epilogue)
    enter, leave, arguments, fetch = configure(), release(), arguments_of(*ARGUMENTS), touch()
    area, step = rows * columns * 4, rows * ROW * SPLIT.planes
    lost, repair = spoiled(), again(columns, a_along_k, b_along_k)
    rows_added = rows if epilogue == "residual" else 0  # a bias is the same for all rows

    @job
    def product(given, task, slot):  # type: ignore[no-untyped-def]
        a, b, bias, out, a_pack, b_pack, sums, m, n, k, height, group, depth, split = arguments(given)
        words = (k + STEP - 1) // STEP * SIDE
        a_panels, b_panels = (m + rows - 1) // rows, (n + columns - 1) // columns
        left, totals = a_pack + slot * height * rows * depth * PAIR, sums + slot * height * group * area
        own = b_pack + slot * group * columns * depth * PAIR
        begin, part = task // split * height, task % split
        stop = min(begin + height, a_panels)
        from_panel, to_panel = part * b_panels // split, (part + 1) * b_panels // split
        stride_a, stride_b = k if a_along_k else m, k if b_along_k else n
        enter()
        for first in range(from_panel, to_panel, group):
            behind = min(first + group, to_panel)
            for w in range(0, words, depth):
                some = min(depth, words - w)
                pack_a(a, left, begin, stop, m, k, w, some)
                if by_block:
                    pack_b(b, own, first, behind, n, k, w, some)
                share = (some * columns * PAIR // (stop - begin) + LINE - 1) // LINE * LINE
                for j in range(first, behind):
                    right = own + (j - first) * some * columns * PAIR
                    if not by_block:
                        right = b_pack + (j * words + w) * columns * PAIR
                    for i in range(begin, stop):
                        if not by_block:
                            fetch(right + words * columns * PAIR + (i - begin) * share, share)
                        place = totals + ((j - first) * height + i - begin) * area
                        multiply(left + (i - begin) * some * rows * PAIR, right, place, some, w, step, ROW)
                        if w + depth >= words:
                            tall, wide = min(rows, m - i * rows), min(columns, n - j * columns)
                            if lost(place, rows * columns):
                                from_a = a + i * rows * (k if a_along_k else 1) * 4
                                from_b = b + j * columns * (k if b_along_k else 1) * 4
                                repair(from_a, from_b, place, tall, wide, stride_a, stride_b, k)
                            added = bias + (i * rows_added * n + j * columns) * 4
                            end(place, out + (i * rows * n + j * columns) * 4, n, tall, wide, added, 0)
        leave()

    return product


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], a, b[, bias or residual]), all contiguous, stored as the flag transpose says.

    Loops as in `gemm/numba`. Register tiles of 16x32 do 240 GFLOP/s from the L2 cache on a virtual Xeon, those of 16x16
    205 and FMA 123; in spells in which the matrix unit is shared 122, 139 and 108. A tile of sums that is not finite is
    computed again from the numbers as given, at a fiftieth of that: so long take whole operands of infinities, or of
    numbers below 2^-110.

    Raises:
        UsageError: this CPU has no AMX, or its system does not let a process use it.
    """
    if "bf16" not in tile_formats():
        raise UsageError(
            "split fp32 needs a CPU with AMX (Intel Xeon since 2023) and a system that lets a process use it"
        )
    m, n, k = problem["m"], problem["n"], problem["k"]
    rows, columns = (int(side) for side in config["tile"].split("x"))
    flags, by_block = (problem.flag("transpose", "nn"), problem.flag("epilogue", "none")), config["pack_b"] == "block"
    words = -(-k // STEP) * SIDE
    depth = -(-words // -(-words // (config["block_k"] // 2)) // SIDE) * SIDE  # blocks of k alike
    a_panels, b_panels = -(-m // rows), -(-n // columns)
    height = max(1, min(config["block_m"] // rows, -(-a_panels // threads())))
    blocks = -(-a_panels // height)
    if blocks > threads():  # as many for each thread
        height = -(-a_panels // (-(-blocks // threads()) * threads()))
        blocks = -(-a_panels // height)
    split = max(1, min(b_panels, -(-threads() // blocks)))
    group = max(1, min(config["block_n"] // columns, -(-b_panels // split)))
    tasks = blocks * split
    kept = (group * columns * depth * slots(tasks)) if by_block else b_panels * columns * words
    sizes = (
        slots(tasks) * height * rows * depth * SPLIT.planes,
        kept * SPLIT.planes,
        slots(tasks) * height * group * rows * columns,
    )
    # lines of 64 bytes: a tile's row that crosses one takes twice as long
    workspace = [torch.empty(size + LINE // 4, dtype=torch.int32) for size in sizes]
    places = [-(-space.data_ptr() // LINE) * LINE for space in workspace]
    b_along_k = flags[0][1] == "t"
    jobs = [(compiled(*flags, rows, columns, by_block), tasks)]
    if not by_block:
        jobs.insert(0, (packing(columns, b_along_k), b_panels if b_along_k else -(-words // SWEEP)))
    kernel = parallel(ARGUMENTS, *jobs)

    def run(out: Any, a: Any, b: Any, bias: Any = None, keep: Any = workspace) -> None:
        address = 0 if bias is None else bias.data_ptr()
        kernel(a.data_ptr(), b.data_ptr(), address, out.data_ptr(), *places, m, n, k, height, group, depth, split)

    return run
