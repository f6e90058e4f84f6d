"""Matrix products of a few rows in Numba: b is not packed, each number of it is read from memory once, as it lies."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import Config, Problem
from rooftune.kernels.common.numba import ITEM, threads
from rooftune.kernels.common.numba_cpu import vector_width
from rooftune.kernels.common.numba_epilogue import finish
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel
from rooftune.kernels.common.numba_thin import columns_at_once, dots, word_dots
from rooftune.kernels.common.numba_tile import Format, format_of, pack, row_sums, tile

WIDEST = 128  # columns of a tile for one row
FEW = 64  # rows of a up to which it pays: 1.25x torch instead of 0.84x at 32, 1.12x instead of 0.96x at 64
# of a job: addresses of a, b, bias, out, packed a, packed b, sums; m, n, k, depth, parts
ARGUMENTS = ("int64",) * 12


def readable(problem: Problem, dot: bool) -> bool:
    """Whether b can be read where it lies: as fp32 numbers, as words along k, of which a row fills a vector, or as
    words of numbers from several rows, of which one fills the widest tile."""
    form = format_of(problem.precision, dot)
    if problem["m"] > 2 * FEW:
        return False
    if form.steps == 1 and form.accumulator == "fp32":
        return True
    if problem.flag("transpose", "nn")[1] == "t":
        return problem["k"] >= form.steps * vector_width()
    return dot and problem["n"] >= WIDEST


@cache
def compiled_thin(form: Format, transpose: str, epilogue: str, rows: int, columns: int) -> tuple[Job, Job]:
    """Packing, and one of `parts` of the columns: all rows of a against b where it lies, each number of which is
    read from memory once.

    b along k: dot products of rows. Otherwise `depth` rows of b at a time, line by line, added to all sums; the last
    panel holds the last columns, some of the one before once more. Only where n does not fill one it is packed.
    """
    a_along_k, b_along_k = transpose[0] == "n", transpose[1] == "t"
    fp32, group, arguments = Format("fp32", 1), columns_at_once(rows, columns), arguments_of(*ARGUMENTS)
    words, unsigned = form.steps > 1 or form.accumulator == "int32", form.unsigned_a
    pack_a, pack_b = pack(form, 1 if b_along_k else rows, a_along_k), pack(form, columns, False)
    multiply = tile(form if words else fp32, rows, columns, direct=form.dtype)
    packed, begin = tile(fp32, rows, columns), row_sums(rows)
    inner = word_dots(form, rows, group, columns) if words else dots(form.dtype, rows, group, columns)
    end, item, steps = finish(form, columns, epilogue), ITEM[form.dtype], form.steps
    out_item = 4 if form.accumulator == "int32" else item
    tall, area = 1 if b_along_k else rows, rows * columns * 4
    rows_added = rows if epilogue == "residual" else 0

    @job
    def packing(given, _, __):  # type: ignore[no-untyped-def]
        a, b, _, _, a_pack, b_pack, _, m, n, k, _, _ = arguments(given)
        row = (k + steps - 1) // steps * 4
        for i in range((m + rows - 1) // rows * (rows // tall)):
            first = min(i * tall, m - 1)
            source = a + first * (k if a_along_k else 1) * item
            pack_a(source, a_pack + i * tall * row, min(tall, m - first), k if a_along_k else m, k)
            if unsigned and not b_along_k:
                begin(a_pack + i * tall * row, row // 4, b_pack + i * tall * 4)
        if not words and not b_along_k and n < columns:
            pack_b(b, b_pack, n, n, k)

    @job
    def product(given, part, _):  # type: ignore[no-untyped-def]
        _, b, bias, out, a_pack, b_pack, sums, m, n, k, depth, parts = arguments(given)
        a_panels, b_panels = (m + rows - 1) // rows, (n + columns - 1) // columns
        from_panel, to_panel = part * b_panels // parts, (part + 1) * b_panels // parts
        own, row = sums + from_panel * a_panels * area, (k + steps - 1) // steps * 4
        if b_along_k:
            for j in range(from_panel, to_panel):
                width = min(columns, n - j * columns)
                for g in range(0, width, group):
                    for i in range(a_panels):
                        place = own + ((j - from_panel) * a_panels + i) * area + g * 4
                        right = b + (j * columns + g) * k * item
                        inner(a_pack + i * rows * row, right, place, k, width - g)
        else:
            for w in range(0, k, depth):
                some = min(depth, k - w)
                for j in range(from_panel, to_panel):
                    for i in range(a_panels):
                        left = a_pack + (i * row // 4 + w // steps) * rows * 4
                        place = own + ((j - from_panel) * a_panels + i) * area
                        if words:
                            first, starts = min(j * columns, n - columns), b_pack + i * rows * 4
                            source, count = b + (w * n + first) * item, (some + steps - 1) // steps
                            multiply(left, source, place, count, w, n * item, some, starts)
                        elif n < columns:
                            packed(left, b_pack + w * columns * 4, place, some, w)
                        else:
                            first = min(j * columns, n - columns)
                            multiply(left, b + (w * n + first) * item, place, some, w, n * item)
        for j in range(from_panel, to_panel):
            first = j * columns if b_along_k else min(j * columns, max(n - columns, 0))
            for i in range(a_panels):
                end(
                    own + ((j - from_panel) * a_panels + i) * area,
                    out + (i * rows * n + first) * out_item,
                    n,
                    min(rows, m - i * rows),
                    min(columns, n - first),
                    bias + (i * rows_added * n + first) * item,
                )

    return packing, product


def build_few(problem: Problem, config: Config, rows: int, columns: int) -> Run:
    """As a competitor's `build`, for a tile of `rows` x `columns`; the config's `block_k` is the depth of a sweep."""
    m, n, k = problem["m"], problem["n"], problem["k"]
    flags = problem.flag("transpose", "nn"), problem.flag("epilogue", "none")
    a_panels, b_panels = -(-m // rows), -(-n // columns)
    sizes = a_panels * rows * k, max(columns * k, a_panels * rows), a_panels * b_panels * rows * columns
    workspace = [torch.empty(size, dtype=torch.float32) for size in sizes]
    parts = min(threads(), b_panels)
    form = format_of(problem.precision, config["multiply"] == "dot")
    pack_both, product = compiled_thin(form, *flags, rows, columns)
    kernel = parallel(ARGUMENTS, (pack_both, 1), (product, parts))

    def run(out: Any, a: Any, b: Any, bias: Any = None) -> None:
        places = [space.data_ptr() for space in workspace]
        address = 0 if bias is None else bias.data_ptr()
        kernel(a.data_ptr(), b.data_ptr(), address, out.data_ptr(), *places, m, n, k, config["block_k"], parts)

    return run
