"""Matrix product in Numba with AMX: b packed block by block, tiles of a loaded where they lie if they are whole."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space, UsageError
from rooftune.kernels.common.numba import ITEM, LINE, threads
from rooftune.kernels.common.numba_cpu import tile_formats
from rooftune.kernels.common.numba_epilogue import finish
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel, slots
from rooftune.kernels.common.numba_tile import pack, pack_panels
from rooftune.kernels.common.numba_tmul import FORMATS, ROW, SIDE, configure, release, tile
from rooftune.kernels.common.numba_tmul import pack as pack_tiles

DEVICES = ("cpu",)
PRECISIONS = ("bf16", "int8")

PACKED = 1 << 20  # bytes of b: half of an L2 cache
BLOCKS = {  # rows of a and columns of b packed at a time, steps of k before sums go to memory and back
    "m": (64, 128, 256, 512, 1024, 2048, 4096),
    "n": (64, 128, 256, 512, 1024),
    "k": (256, 512, 1024, 2048, 4096),
}


def _blocks(axis: str, size: int) -> list[int]:
    """Up to the first that holds the whole size: those beyond are the same config."""
    return [block for block in BLOCKS[axis] if block < 2 * size or block == BLOCKS[axis][0]]


def _in_place(problem: Problem) -> bool:
    """Whether tiles are loaded from a as it lies: rows of it that are whole steps of 16 words."""
    return problem.flag("transpose", "nn")[0] == "n" and problem["k"] % (SIDE * FORMATS[problem.precision].steps) == 0


def _default(problem: Problem) -> Config:
    k, few, along_k = problem["k"], problem["m"] <= SIDE, problem.flag("transpose", "nn")[1] == "t"
    deep = 4096 if few or _in_place(problem) else 2048
    wide = PACKED // (min(k, deep) * ITEM[problem.precision])
    # b is packed once for all rows of a block of a, and a is not packed, or stays in the L2 cache with the sums
    tall = 4096 if _in_place(problem) and k <= deep else 1024
    wanted = {"m": tall, "n": 64 if few else max(64, min(wide, 512)), "k": deep}
    return {
        "tile": "16x32" if not few or along_k else "16x64",
        **{f"block_{x}": max(b for b in _blocks(x, problem[x]) if b <= most) for x, most in wanted.items()},
    }


SPACE = Space(
    axes={
        "tile": ("32x32", "16x64", "16x32"),  # of eight tiles of 16 x 16: 4 (4, 2) for sums
        **{f"block_{x}": blocks for x, blocks in BLOCKS.items()},
    },
    where=(lambda config, problem: all(config[f"block_{x}"] in _blocks(x, problem[x]) for x in BLOCKS),),
    default=_default,
)
# of a job: addresses of a, b, bias, out, packed a, packed b, sums; m, n, k, height, group, depth, split, room
ARGUMENTS = ("int64",) * 15


@cache
def compiled(dtype: str, transpose: str, epilogue: str, rows: int, columns: int) -> Job:
    """A task: `height` panels of a against one of `split` parts of b's panels, `group` of these at a time.

    b is packed in the slot's own memory, where it stays in the L2 cache until it is used up, and so is a where tiles
    cannot be loaded from it as it lies; words of k in a block: `depth`; register tiles of sums kept from block to
    block: `room`.
    """
    form = FORMATS[dtype]
    a_along_k, b_along_k = transpose[0] == "n", transpose[1] == "t"
    pack_a = pack_panels(pack_tiles(form, rows, a_along_k), form, rows, a_along_k)
    pack_b = pack_panels(pack(form, columns, b_along_k, deep=SIDE), form, columns, b_along_k)
    multiply, end = tile(form, rows, columns, stream="b"), finish(form, columns, epilogue)
    enter, leave = configure(), release()
    item, steps, area, arguments = ITEM[dtype], form.steps, rows * columns * 4, arguments_of(*ARGUMENTS)
    rows_added = rows if epilogue == "residual" else 0  # a bias is the same for all rows
    out_item = 4 if dtype == "int8" else item

    @job
    def product(given, task, slot):  # type: ignore[no-untyped-def]
        a, b, bias, out, a_pack, b_pack, sums, m, n, k, height, group, depth, split, room = arguments(given)
        words = (k + SIDE * steps - 1) // (SIDE * steps) * SIDE
        a_panels, b_panels = (m + rows - 1) // rows, (n + columns - 1) // columns
        in_place = a_along_k and k % (SIDE * steps) == 0
        left = a_pack + slot * (1 if in_place else height) * rows * depth * 4
        right = b_pack + slot * group * columns * depth * 4
        totals = sums + slot * room * area
        begin, part = task // split * height, task % split
        stop = min(begin + height, a_panels)
        from_panel, to_panel = part * b_panels // split, (part + 1) * b_panels // split
        packed = min(stop, m // rows) if in_place else begin  # panels of a from here on are: a ragged last one
        enter()
        for first in range(from_panel, to_panel, group):
            behind = min(first + group, to_panel)
            for w in range(0, words, depth):
                some = min(depth, words - w)
                final = w + depth >= words
                tall, wide = some * rows * 4, some * columns * 4  # bytes of packed panels
                pack_b(b, right, first, behind, n, k, w, some)
                if packed < stop and (words > depth or first == from_panel):
                    pack_a(a, left, packed, stop, m, k, w, some)
                for i in range(begin, stop):
                    source, step, stride = left + (i - packed) * tall, rows * ROW, ROW
                    if i < packed:
                        source, step, stride = a + (i * rows * k + w * steps) * item, ROW, k * item
                    for j in range(first, behind):
                        number = (i - begin) * group + j - first if room > 1 else 0
                        place = totals + number * area
                        target = out + (i * rows * n + j * columns) * out_item
                        multiply(source, right + (j - first) * wide, place, some, w, step, stride)
                        if final:
                            end(
                                place,
                                target,
                                n,
                                min(rows, m - i * rows),
                                min(columns, n - j * columns),
                                bias + (i * rows_added * n + j * columns) * item,
                            )
        leave()

    return product


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], a, b[, bias or residual]), all contiguous, stored as the flag transpose says.

    Raises:
        UsageError: this CPU has no AMX, or its system does not let a process use it.
    """
    if problem.precision not in tile_formats():
        raise UsageError(
            f"{problem.precision} needs a CPU with AMX (Intel Xeon since 2023) and a system that lets a process use it"
        )
    m, n, k = problem["m"], problem["n"], problem["k"]
    rows, columns = (int(side) for side in config["tile"].split("x"))
    flags, dtype = (problem.flag("transpose", "nn"), problem.flag("epilogue", "none")), problem.precision
    steps = FORMATS[dtype].steps
    words = -(-k // (SIDE * steps)) * SIDE
    depth = min(words, config["block_k"] // steps)
    a_panels, b_panels = -(-m // rows), -(-n // columns)
    # threads share a's rows, or b's columns where a is not packed and b is large: then no two pack the same part of b
    # (two threads: 1.73 times as fast as one, not 1.62, at 1024; 1.54, not 1.60, at 2048 x 256)
    by_columns = _in_place(problem) and n >= m and b_panels >= threads()
    height = max(1, min(config["block_m"] // rows, -(-a_panels // (1 if by_columns else threads()))))
    blocks = -(-a_panels // height)
    height = -(-a_panels // blocks)  # even ones
    split = max(1, min(b_panels, -(-threads() // blocks)))
    group = max(1, min(config["block_n"] // columns, -(-b_panels // split)))
    room = height * group if words > depth else 1
    tasks = blocks * split
    kept = 1 if _in_place(problem) else height
    sizes = (kept * rows * depth, group * columns * depth, room * rows * columns)
    # lines of 64 bytes: a tile's row that crosses one takes twice as long
    workspace = [torch.empty(slots(tasks) * size + LINE // 4, dtype=torch.int32) for size in sizes]
    places = [-(-space.data_ptr() // LINE) * LINE for space in workspace]
    product = compiled(dtype, *flags, rows, columns)
    kernel = parallel(ARGUMENTS, (product, tasks))

    def run(out: Any, a: Any, b: Any, bias: Any = None, keep: Any = workspace) -> None:
        address = 0 if bias is None else bias.data_ptr()
        kernel(
            *(a.data_ptr(), b.data_ptr(), address, out.data_ptr(), *places, m, n, k, height, group, depth, split, room)
        )

    return run
