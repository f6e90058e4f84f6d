"""Fused attention in Numba: queries in vector lanes, online softmax, scores never leave the caches."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.attention import without_lse
from rooftune.kernels.common import numba_tmul
from rooftune.kernels.common.numba import ITEM, LINE, LOG2E, threads
from rooftune.kernels.common.numba_cpu import dot_formats, dot_is_fast, require, tile_formats, vector_width
from rooftune.kernels.common.numba_online import begin, end, soften
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel, slots
from rooftune.kernels.common.numba_tile import Format, pack, tile, touch

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16")

TILES = {  # rows (keys, or columns of v) x queries of the register tile, by lanes of a vector
    16: ("8x48", "12x32", "8x32", "4x96", "28x16", "8x16"),
    8: ("4x16", "4x24", "6x16", "12x8", "8x8"),
    4: ("4x12", "6x8", "4x8", "8x4"),
}
AMX_TILES = ("32x32", "16x64")  # the sums of both are four of the eight tiles


def _default(problem: Problem) -> Config:
    tiles, dtype = TILES[vector_width()], problem.precision
    few = problem["sq"] * problem["h"] // problem["hkv"] <= vector_width()
    square = dtype in tile_formats() and not few
    return {
        "tile": AMX_TILES[0] if square else tiles[-2] if few else tiles[0],
        "block_k": 256,
        "query_tiles": 32,
        "multiply": "amx" if square else "dot" if dtype in dot_formats() and dot_is_fast(dtype) else "widen",
    }


SPACE = Space(
    axes={
        "tile": (*TILES[vector_width()], *(AMX_TILES if tile_formats() else ())),
        "block_k": (32, 64, 96, 128, 192, 256, 512),  # keys whose scores are held at once
        "query_tiles": (1, 2, 4, 8, 16, 32, 64),  # tiles of queries that share a packed block of k and v
        # for both products, with probabilities rounded to bf16; dot: vdpbf16ps (on Intel half as fast as fp32), amx:
        # tdpbf16ps (2.6 times as fast as widened, 1.3 to 2.6 times as torch, which uses it too; measured on a Xeon)
        "multiply": ("widen", "dot", "amx"),
    },
    where=(
        lambda config, problem: config["multiply"] != "dot" or problem.precision in dot_formats(),
        lambda config, problem: config["multiply"] != "amx" or problem.precision in tile_formats(),
        lambda config, problem: (config["multiply"] == "amx") == (config["tile"] in AMX_TILES),
    ),
    default=_default,
)
ARGUMENTS = (*("int64",) * 13, "float32")


def _steps(multiply: str) -> int:
    return 1 if multiply == "widen" else 2


@numba.njit
def nothing() -> None:
    """What must be done before and after products that are not AMX's."""


@cache
def compiled(dtype: str, rows: int, queries: int, multiply_by: str) -> Job:
    """A task: some tiles of queries of one head, in its slot's part of the scratch memory."""
    form, item, degree = Format(dtype, _steps(multiply_by)), ITEM[dtype], 5 if dtype == "fp32" else 4
    panel = max(rows, vector_width()) if vector_width() % rows == 0 else rows  # whole vectors are packed fastest
    if multiply_by == "amx":
        deep, multiply = numba_tmul.SIDE, numba_tmul.tile(form, rows, queries, ahead=1)
        pack_k, pack_v = (numba_tmul.pack(form, panel, along_k) for along_k in (True, False))
        enter, leave = numba_tmul.configure(), numba_tmul.release()
    else:
        deep, multiply = 1, tile(form, rows, queries, panel)
        pack_k, pack_v = (pack(form, panel, along_k) for along_k in (True, False))
        enter, leave = nothing, nothing
    most, steps, fetch = deep * form.steps, form.steps, touch()
    pack_q, start, finish = pack(form, queries, True, deep=deep), begin(queries), end(queries, dtype)
    softmax, arguments = soften(queries, degree, steps == 2, deep), arguments_of(*ARGUMENTS)

    @job
    def attention(given, task, slot):  # type: ignore[no-untyped-def]
        q, k, v, out, scratch, size, group, sq, sk, d, causal, block, tiles, factor = arguments(given)
        every = (sq + queries - 1) // queries
        parts = (every + tiles - 1) // tiles
        columns, tall = (d + panel - 1) // panel * panel, (block + panel - 1) // panel * panel
        words = (d + most - 1) // most * deep
        each = (words + columns + 2) * queries * 4
        own = scratch + slot * size
        scores = own + tiles * each
        k_pack = scores + tall * queries * 4
        v_pack = k_pack + tall * words * 4
        head, part = task // parts, task % parts
        if causal:  # the last queries see most keys: long tasks first, short ones fill the end
            part = parts - 1 - part
        begin_tile = part * tiles
        enter()
        end_tile = min(begin_tile + tiles, every)
        for t in range(begin_tile, end_tile):
            first, packed = t * queries, own + (t - begin_tile) * each
            pack_q(q + (head * sq + first) * d * item, packed, min(queries, sq - first), d, d)
            start(packed + words * queries * 4, d * queries)
        stop = max(0, min(sk, min(end_tile * queries, sq) + sk - sq)) if causal else sk
        for key in range(0, stop, block):
            keys = min(block, stop - key)
            thick = (keys + most - 1) // most * deep  # words of a packed panel of v
            here = (head // group * sk + key) * d * item
            for r in range(0, keys, panel):
                pack_k(k + here + r * d * item, k_pack + r * words * 4, min(panel, keys - r), d, d)
            for c in range(0, columns, panel):
                pack_v(v + here + c * item, v_pack + c * thick * 4, min(panel, d - c), d, keys)
            ahead = block * d * item if key + block < stop else 0
            share = (ahead // (end_tile - begin_tile) + LINE - 1) // LINE * LINE
            for t in range(begin_tile, end_tile):
                fetch(k + here + ahead + (t - begin_tile) * share, share)
                fetch(v + here + ahead + (t - begin_tile) * share, share)
                first = t * queries
                limit = first + sk - sq - key if causal else keys  # the last key that lane 0 sees
                last = limit + min(queries, sq - first) - 1 if causal else keys
                seen = min(keys, last + 1)
                if seen > 0:
                    packed = own + (t - begin_tile) * each
                    sums = packed + words * queries * 4
                    for r in range(0, seen, rows):
                        left = k_pack + (r // panel * panel * words + r % panel) * 4
                        multiply(left, packed, scores + r * queries * 4, words, 0)
                    softmax(scores, seen, sums, d, limit, last, factor)
                    for c in range(0, d, rows):
                        left = v_pack + (c // panel * panel * thick + c % panel) * 4
                        multiply(left, scores, sums + (c + 2) * queries * 4, (seen + most - 1) // most * deep, 1)
        leave()
        for t in range(begin_tile, end_tile):
            first = t * queries
            sums = own + (t - begin_tile) * each + words * queries * 4
            finish(sums, d, out + (head * sq + first) * d * item, min(queries, sq - first))

    return attention


def build(problem: Problem, config: Config) -> Run:
    """run(out: [b, h, sq, d], q: [b, h, sq, d], k, v: [b, hkv, sk, d]), all contiguous.

    One task: `query_tiles` tiles of queries of one head against all keys. With queries in lanes, k and v are
    read one number for all lanes, and maximum, total and rescaling need no sums across lanes. A block of k
    and v is packed (and widened, if `multiply` says so) once for all tiles of the task.
    """
    require(problem.precision)
    without_lse(problem, "attention/numba")
    heads, group = problem["b"] * problem["h"], problem["h"] // problem["hkv"]
    sq, sk, d = problem["sq"], problem["sk"], problem["d"]
    causal = int(bool(problem.flag("causal")) and sq > 1)  # bottom right: a single query sees every key
    if not causal:  # the heads that share k and v lie one after the other: more queries of one head
        heads, group, sq = heads // group, 1, sq * group
    rows, queries = (int(side) for side in config["tile"].split("x"))
    steps, deep = _steps(config["multiply"]), numba_tmul.SIDE if config["multiply"] == "amx" else 1
    block, every = min(config["block_k"], sk), -(-sq // queries)
    tiles = min(config["query_tiles"], -(-every // -(-threads() // heads)))
    columns, tall = (-(-size // rows) * rows + vector_width() for size in (d, block))  # padded panels fit
    words, thick = (-(-size // (steps * deep)) * deep for size in (d, block))
    space = tiles * (words + columns + 2) * queries + tall * (queries + words) + columns * thick
    size = -(-space // 16) * 64  # bytes, whole cache lines
    tasks = heads * -(-every // tiles)
    scratch = torch.empty(slots(tasks) * size // 4, dtype=torch.float32)
    factor = LOG2E / math.sqrt(d)
    kernel = parallel(ARGUMENTS, (compiled(problem.precision, rows, queries, config["multiply"]), tasks))

    def run(out: Any, q: Any, k: Any, v: Any) -> None:
        kernel(
            *(t.data_ptr() for t in (q, k, v, out, scratch)),
            *(size, group, sq, sk, d, causal, block, tiles, factor),
        )

    return run
