"""Matrix product in Numba of fp32 by AMX: numbers in three parts of int8 or bf16, six products of parts for each.

See `numba_fixed` and `numba_split` of the common building blocks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space, UsageError
from rooftune.kernels.common import numba_fixed, numba_split
from rooftune.kernels.common.numba import LINE, threads
from rooftune.kernels.common.numba_cpu import tile_formats
from rooftune.kernels.common.numba_epilogue import finish
from rooftune.kernels.common.numba_parallel import Job, arguments_of, call, job, parallel, slots, write
from rooftune.kernels.common.numba_split import AGAIN, SPARE, Recipe, again, spoiled
from rooftune.kernels.common.numba_suits import suits
from rooftune.kernels.common.numba_tile import Format, touch
from rooftune.kernels.common.numba_tmul import configure, release

DEVICES = ("cpu",)
PRECISIONS = ("fp32",)

FEW = 128  # rows up to which no other block of a needs what is packed of b
DEEP = 256  # numbers of k from which on most terms pass the check of `numba_fixed`
PANELS = 16  # of b that a task packs where all of it is packed once
NAMES = ("bf16", "int8")  # of parts, by what `choosing` finds


def _default(problem: Problem) -> Config:
    few, deep = problem["m"] <= FEW, problem["k"] >= DEEP
    return {
        "parts": "int8" if deep else "bf16",
        "tile": "16x16" if deep else "16x32",
        "block_m": 512 if threads() == 1 else 256,  # two tasks a thread: 2.02 times as fast as one, not 1.74
        "block_n": 512 if few else 4096,
        "block_k": 512,
        "pack_b": "block" if few else "whole",  # 64 rows x 4096 x 4096: 1.05 to 1.4 times as fast
    }


SPACE = Space(
    axes={
        "parts": ("int8", "bf16"),  # int8: where the numbers suit them, else bf16
        "tile": ("16x32", "32x16", "16x16"),
        "block_m": (128, 256, 512, 1024),  # rows of a packed at a time
        "block_n": (128, 256, 512, 4096),  # columns of b that they are multiplied with before the next rows
        "block_k": (128, 256, 512, 1024),  # numbers of k before sums go to memory and back
        "pack_b": ("whole", "block"),  # once, past the caches, or as much as the L2 cache holds
    },
    where=(
        lambda config, problem: config["pack_b"] == "block" or config["block_n"] == 4096,
        lambda config, problem: config["parts"] == "bf16" or config["tile"] == "16x16",
    ),
    default=_default,
)
# of a job: addresses of a, b, bias, out, packed a, packed b, sums, spare; m, n, k, height, group, depth, split
ARGUMENTS = ("int64",) * 15


@cache
def recipe(parts: str, transpose: str, rows: int, columns: int, by_block: bool) -> Recipe:
    """Of numbers in parts of int8 or bf16."""
    flags = transpose[0] == "n", transpose[1] == "t", not by_block
    return numba_fixed.recipe(*flags) if parts == "int8" else numba_split.recipe(rows, columns, *flags)


@cache
def choosing(transpose: str) -> Job:
    """Whether numbers suit parts of int8, to where the spare memory begins."""
    a_along_k, b_along_k = transpose[0] == "n", transpose[1] == "t"
    look, arguments = suits(a_along_k, b_along_k), arguments_of(*ARGUMENTS)

    @job
    def choose(given, _task, _slot):  # type: ignore[no-untyped-def]
        a, b, _, _, _, _, _, spare, m, n, k, _, _, depth, _ = arguments(given)
        write(spare, look(a, b, m, n, k, depth))

    return choose


def either(*jobs: Job) -> Job:
    """The job of the parts that were chosen."""
    first, second = (made.address for made in jobs)
    arguments, read = arguments_of(*ARGUMENTS), arguments_of("int64")

    @job
    def chosen(given, task, slot):  # type: ignore[no-untyped-def]
        call(second if read(arguments(given)[7])[0] else first, given, task, slot)

    return chosen


@cache
def packing(parts: str, transpose: str, rows: int, columns: int) -> Job:
    """All of b: a task is a block of k of PANELS panels."""
    made, arguments = recipe(parts, transpose, rows, columns, False), arguments_of(*ARGUMENTS)
    pack_b, panel = made.pack_b, made.panel

    @job
    def panels(given, task, _):  # type: ignore[no-untyped-def]
        _, b, _, _, _, b_pack, _, _, _, n, k, _, _, depth, _ = arguments(given)
        every = (n + columns - 1) // columns
        shares = (every + PANELS - 1) // PANELS
        w, first = task // shares * depth, task % shares * PANELS
        some = min(depth, k - w)
        target = b_pack + w // depth * every * panel(columns, depth) + first * panel(columns, some)
        pack_b(b, target, first, min(first + PANELS, every), n, k, w, some)

    return panels


@cache
def compiled(parts: str, transpose: str, epilogue: str, rows: int, columns: int, by_block: bool) -> Job:
    """A task: `height` panels of a against one of `split` parts of b's panels, `group` of these at a time.

    Blocks of `depth` numbers of k of these panels of a, and of b if `by_block`, are packed in the slot's memory.
    """
    a_along_k, b_along_k = transpose[0] == "n", transpose[1] == "t"
    made = recipe(parts, transpose, rows, columns, by_block)
    pack_a, pack_b, multiply, panel = made.pack_a, made.pack_b, made.multiply, made.panel
    area = rows * columns * 4
    enter, leave, arguments, fetch = configure(), release(), arguments_of(*ARGUMENTS), touch()
    near = touch(write=True)
    lost, repair = spoiled(), again(rows, columns, a_along_k, b_along_k)
    end, own = finish(Format("fp32", 1), columns, epilogue), SPARE + AGAIN * (rows + columns) * 4
    rows_added = rows if epilogue == "residual" else 0  # a bias is the same for all rows

    @job
    def product(given, task, slot):  # type: ignore[no-untyped-def]
        a, b, bias, out, a_pack, b_pack, sums, spare, m, n, k, height, group, depth, split = arguments(given)
        a_panels, b_panels = (m + rows - 1) // rows, (n + columns - 1) // columns
        spare += LINE + slot * own
        left, totals = (
            a_pack + slot * height * panel(rows, depth),
            sums + slot * (height * group if k > depth else 1) * area,
        )
        packed = b_pack + slot * group * panel(columns, depth)
        begin, part = task // split * height, task % split
        stop = min(begin + height, a_panels)
        from_panel, to_panel = part * b_panels // split, (part + 1) * b_panels // split
        stride_a, stride_b = k if a_along_k else m, k if b_along_k else n
        enter()
        for first in range(from_panel, to_panel, group):
            behind = min(first + group, to_panel)
            for w in range(0, k, depth):
                some = min(depth, k - w)
                final = w + depth >= k
                tall, wide = panel(rows, some), panel(columns, some)
                right = packed - first * wide
                if not by_block:
                    right = b_pack + w // depth * b_panels * panel(columns, depth)
                if k > depth or first == from_panel:
                    pack_a(a, left, begin, stop, m, k, w, some)
                if by_block:
                    pack_b(b, packed, first, behind, n, k, w, some)
                share = (wide // (stop - begin) + LINE - 1) // LINE * LINE
                for j in range(first, behind):
                    for i in range(begin, stop):
                        if not by_block:
                            fetch(right + (j + 1) * wide + (i - begin) * share, share)
                        place = totals + ((j - first) * height + i - begin if k > depth else 0) * area
                        target = out + (i * rows * n + j * columns) * 4
                        inside, width = min(rows, m - i * rows), min(columns, n - j * columns)
                        if final:
                            for row in range(inside):
                                near(target + row * n * 4, width * 4)
                        multiply(left + (i - begin) * tall, right + j * wide, place, some, w, spare)
                        if final:
                            if lost(place, rows * columns):
                                from_a = a + i * rows * (k if a_along_k else 1) * 4
                                from_b = b + j * columns * (k if b_along_k else 1) * 4
                                repair(from_a, from_b, place, inside, width, stride_a, stride_b, k, spare + SPARE)
                            added = bias + (i * rows_added * n + j * columns) * 4
                            end(place, target, n, inside, width, added)
        leave()

    return product


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], a, b[, bias or residual]), all contiguous, stored as the flag transpose says.

    Parts of int8 are for numbers that suit them: where a look at some rows says that they do not, parts of bf16 are
    taken (0.8 to 1.0 of torch's time on a virtual Xeon, one thread). A tile of sums that is not finite is computed
    again, by FMA, from the numbers as given. Register tiles of int8 do some 500 GFLOP/s there from the L2 cache, those
    of bf16 290 and FMA 123; in spells in which the matrix unit is shared 240, 130 and 108. The errors (relative,
    Frobenius) are 3.9e-7 with int8, 1.8e-7 to 3.5e-7 with bf16 at 512 to 2048; torch's are 2.9e-7 to 3.5e-7.

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
    names = NAMES if config["parts"] == "int8" else NAMES[:1]
    made = [recipe(name, flags[0], rows, columns, by_block) for name in names]
    depth = -(-k // -(-k // config["block_k"]))  # blocks of k alike
    depth = -(-depth // made[-1].step) * made[-1].step
    a_panels, b_panels = -(-m // rows), -(-n // columns)
    height = max(1, min(config["block_m"] // rows, -(-a_panels // threads())))
    blocks = -(-a_panels // height)
    if blocks > threads():  # as many for each thread
        height = -(-a_panels // (-(-blocks // threads()) * threads()))
        blocks = -(-a_panels // height)
    split = max(1, min(b_panels, -(-threads() // blocks)))
    group = max(1, min(config["block_n"] // columns, -(-b_panels // split)))
    tasks = blocks * split
    kept = group * slots(tasks) if by_block else b_panels * -(-k // depth)
    sizes = (
        slots(tasks) * height * max(one.panel.py_func(rows, depth) for one in made),
        kept * max(one.panel.py_func(columns, depth) for one in made),
        slots(tasks) * (height * group if k > depth else 1) * rows * columns * 4,
        slots(tasks) * (SPARE + AGAIN * (rows + columns) * 4) + LINE,
    )
    # lines of 64 bytes: a tile's row that crosses one takes twice as long
    workspace = [torch.empty(size // 4 + LINE // 4, dtype=torch.int32) for size in sizes]
    places = [-(-space.data_ptr() // LINE) * LINE for space in workspace]
    jobs = [([compiled(name, *flags, rows, columns, by_block) for name in names], tasks)]
    if not by_block:
        packs = [packing(name, flags[0], rows, columns) for name in names]
        jobs.insert(0, (packs, -(-k // depth) * -(-b_panels // PANELS)))
    steps = [(both[0] if len(both) == 1 else either(*both), count) for both, count in jobs]
    if len(names) > 1:
        steps.insert(0, (choosing(flags[0]), 1))
    kernel = parallel(ARGUMENTS, *steps)

    def run(out: Any, a: Any, b: Any, bias: Any = None, keep: Any = workspace) -> None:
        address = 0 if bias is None else bias.data_ptr()
        kernel(a.data_ptr(), b.data_ptr(), address, out.data_ptr(), *places, m, n, k, height, group, depth, split)

    return run
