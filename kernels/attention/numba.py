"""Fused attention in Numba: queries in vector lanes, online softmax, scores never leave the caches."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import numba
import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.attention import without_lse
from rooftune.kernels.common import numba_scores, numba_split, numba_tmul
from rooftune.kernels.common.numba import ITEM, LINE, LOG2E, threads
from rooftune.kernels.common.numba_cpu import dot_formats, dot_is_fast, require, tile_formats, vector_width, zen
from rooftune.kernels.common.numba_online import KEPT, begin, end, soften
from rooftune.kernels.common.numba_parallel import Job, arguments_of, call, job, parallel, slots
from rooftune.kernels.common.numba_tile import Format, pack, tile, touch

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16")

TILES = {  # rows (keys, or columns of v) x queries of the register tile, by lanes of a vector
    16: ("8x48", "12x32", "8x32", "4x96", "28x16", "8x16"),
    8: ("4x16", "4x24", "6x16", "12x8", "8x8"),
    4: ("4x12", "6x8", "4x8", "8x4"),
}
AMX_TILES = ("16x32", "32x16", "32x32", "16x16")
SPLIT_TILES = ("16x32", "32x16", "16x16")
AMX = ("amx", "fixed")
AGAIN = 8  # rows of the tile for what `numba_split` cannot multiply


def _amx_tiles(precision: str) -> tuple[str, ...]:
    if "bf16" not in tile_formats():
        return ()
    return {"bf16": AMX_TILES, "fp32": SPLIT_TILES}.get(precision, ())


def _default(problem: Problem) -> Config:
    tiles, dtype = TILES[vector_width()], problem.precision
    lanes = problem["sq"] * problem["h"] // problem["hkv"]
    few = lanes <= vector_width()
    if dtype in tile_formats():  # a block's scores, keys and values fit the L1 cache, or there are fewer blocks
        small = few or problem["d"] <= 64
        return {
            "tile": "32x16" if small else "16x32",
            "block_k": 96 if small else 256,
            "query_tiles": 32,
            "multiply": "amx",
        }
    if dtype == "fp32" and _amx_tiles(dtype) and not few:
        whole = -problem["d"] % 64 < 32  # else steps of 64 numbers are more padding than those of 32
        # 16x16: at 268 queries 1.08 times as fast (1.18 where the matrix unit is shared), 512 0.95 (1.07), 2048 0.9
        return {
            "tile": "16x32" if lanes > 512 else "16x16",
            "block_k": 128 if lanes > 512 else 64,  # 64 with 16x16: 1.03 to 1.08 times as fast
            "query_tiles": 32,
            "multiply": "fixed" if problem["d"] >= numba_scores.LEAST and whole else "amx",
        }
    zen4 = vector_width() == 16 and zen(4)  # one FMA a cycle: 8 sums hide its latency; less padding, shorter diagonals
    return {
        "tile": "8x16" if zen4 else tiles[-2] if few else tiles[0],  # 1.04 to 1.16 times as fast as 8x48
        "block_k": 128 if vector_width() == 16 else 256,  # 16: 1.02 to 1.04 times as fast; others not measured
        "query_tiles": 32,
        "multiply": "dot" if dtype in dot_formats() and dot_is_fast(dtype) else "widen",
    }


SPACE = Space(
    axes={
        "tile": tuple(dict.fromkeys((*TILES[vector_width()], *_amx_tiles("bf16"), *_amx_tiles("fp32")))),
        "block_k": (32, 64, 96, 128, 192, 256, 512),  # keys whose scores are held at once
        "query_tiles": (1, 2, 4, 8, 16, 32, 64),  # tiles of queries that share a packed block of k and v
        # of both products. dot: vdpbf16ps, with probabilities rounded to bf16 (on Intel half as fast as fp32); amx:
        # tdpbf16ps, likewise, and six of them for one product of fp32 (1.4 to 1.9 times as fast as FMA on a Xeon, 1.1
        # to 1.3 in spells in which the matrix unit is shared); fixed: of fp32, the first product in fixed point by AMX
        # (heads of 128: 1.02 to 1.08 times as fast as amx, 1.13 to 1.18 in such spells; heads of 64: 0.95 to 1.0)
        "multiply": ("widen", "dot", "amx", "fixed"),
    },
    where=(
        lambda config, problem: config["multiply"] != "dot" or problem.precision in dot_formats(),
        lambda config, problem: (
            config["tile"] in _amx_tiles(problem.precision)
            if config["multiply"] in AMX
            else config["tile"] in TILES[vector_width()]
        ),
        lambda config, problem: (
            config["multiply"] != "fixed"
            or (problem.precision == "fp32" and problem["d"] >= numba_scores.LEAST and config["tile"][:2] == "16")
        ),
    ),
    default=_default,
)
# addresses of q, k, v, out, scratch; size, count, period, sk, d, beyond, block, tiles; addresses of the jobs that
# compute a task again, by AMX in parts of bf16 and by FMA; factor
ARGUMENTS = (*("int64",) * 15, "float32")


def _split(problem: Problem, config: Config) -> bool:
    """Whether products of fp32 are made of those of bf16 (`numba_split`)."""
    return problem.precision == "fp32" and config["multiply"] in AMX


def _steps(multiply: str) -> int:
    return 1 if multiply == "widen" else 2


@numba.njit
def nothing() -> None:
    """What must be done before and after products that are not AMX's."""


@cache
def scoring(multiply: Any) -> Any:
    """Numba functions (keys, queries, scores, words, d, spare): products of a register tile; `widest`, `uneven`: of
    `numba_scores`, where scores are as exact as the format is."""

    @numba.njit(error_model="numpy")
    def product(keys, queries, scores, words, _d, _spare):  # type: ignore[no-untyped-def]
        multiply(keys, queries, scores, words, 0)

    @numba.njit
    def widest(_head):  # type: ignore[no-untyped-def]
        return 0.0

    @numba.njit
    def uneven(_head, _maxima, _top, _bound):  # type: ignore[no-untyped-def]
        return 0

    return product, widest, uneven


@cache
def compiled(dtype: str, rows: int, queries: int, multiply_by: str) -> Job:
    """A task: some tiles of queries of one head, in its slot's part of the scratch memory."""
    form, item = Format(dtype, _steps(multiply_by)), ITEM[dtype]
    form = numba_tmul.FORMATS[dtype] if multiply_by in AMX else form
    planes, split = form.planes, form.planes > 1
    degree = 5 if dtype == "fp32" else 4 if form.steps == 1 else 3  # of exp2: 3 where its values are rounded to bf16
    panel = max(rows, vector_width()) if vector_width() % rows == 0 else rows  # whole vectors are packed fastest
    if multiply_by in AMX:
        deep, multiply = numba_tmul.SIDE, numba_tmul.tile_of_packed(form, rows, queries)
        pack_k, pack_v = (
            numba_split.pack(panel, along_k, left=True) if split else numba_tmul.pack(form, panel, along_k)
            for along_k in (True, False)
        )
        enter, leave = numba_tmul.configure(), numba_tmul.release()
    else:
        deep, multiply = 1, tile(form, rows, queries, panel)
        pack_k, pack_v = (pack(form, panel, along_k) for along_k in (True, False))
        enter, leave = nothing, nothing
    most, steps, fetch = deep * form.steps, form.steps, touch()
    pack_q = numba_split.pack(queries, True, left=False) if split else pack(form, queries, True, deep=deep)
    start, finish = begin(queries), end(queries, dtype)
    softmax, arguments = soften(queries, degree, steps == 2, deep, split), arguments_of(*ARGUMENTS)
    lost, side = numba_split.spoiled(), numba_tmul.SIDE
    score, widest, uneven = scoring(multiply)
    if fixed := multiply_by == "fixed":
        pack_q, pack_k = numba_scores.rows(queries, False), numba_scores.rows(rows, True)
        score, widest, uneven = numba_scores.products(queries), numba_scores.widest(), numba_scores.uneven()
    bound = numba_scores.BOUND

    @job
    def attention(given, task, slot):  # type: ignore[no-untyped-def]
        q, k, v, out, scratch, size, count, period, sk, d, beyond, block, tiles, amx, fma, factor = arguments(given)
        every = (count + queries - 1) // queries
        parts = (every + tiles - 1) // tiles
        columns, tall = (d + panel - 1) // panel * panel, (block + panel - 1) // panel * panel
        words = (d + most - 1) // most * deep
        each = (words * planes + columns + KEPT) * queries * 4
        own = scratch + slot * size
        scores = own + tiles * each
        k_pack = scores + tall * queries * 4
        v_pack = k_pack + tall * words * planes * 4
        softened = v_pack + columns * ((block + most - 1) // most * deep) * planes * 4 if split else scores
        head = task // parts
        part = parts - 1 - task % parts  # under a causal mask the last see most keys: long tasks first, short ones last
        begin_tile = part * tiles
        end_tile = min(begin_tile + tiles, every)
        enter()
        stop, top = 0, 0.0
        for t in range(begin_tile, end_tile):
            first, packed = t * queries, own + (t - begin_tile) * each
            valid, query = min(queries, count - first), first % period
            pack_q(q + (head * count + first) * d * item, packed, valid, d, d)
            start(packed + words * planes * queries * 4, d * queries, query, period, beyond, valid)
            stop = max(stop, min(query + valid, period) + beyond)
        stop = min(stop, sk)
        for key in range(0, stop, block):
            keys = min(block, stop - key)
            thick = (keys + most - 1) // most * deep  # words of a packed panel of v
            here = (head * sk + key) * d * item
            for r in range(0, keys, panel):
                pack_k(k + here + r * d * item, k_pack + r * words * planes * 4, min(panel, keys - r), d, d)
                top = max(top, widest(k_pack + r * words * planes * 4))
            for c in range(0, columns, panel):
                pack_v(v + here + c * item, v_pack + c * thick * planes * 4, min(panel, d - c), d, keys)
            ahead = block * d * item if key + block < stop else 0
            share = (ahead // (end_tile - begin_tile) + LINE - 1) // LINE * LINE
            for t in range(begin_tile, end_tile):
                fetch(k + here + ahead + (t - begin_tile) * share, share)
                fetch(v + here + ahead + (t - begin_tile) * share, share)
                first = t * queries
                valid, query = min(queries, count - first), first % period
                turns = query + valid > period  # to the next head: its first query is among them
                seen = min(keys, min(query + valid, period) + beyond - key)  # by any
                clear = (0 if turns else query) + beyond + 1 - key  # seen by all
                if seen > 0:
                    packed = own + (t - begin_tile) * each
                    sums = packed + words * planes * queries * 4
                    for r in range(0, seen, rows):
                        left = k_pack + (r // panel * panel * words * planes + r % panel) * 4
                        score(left, packed, scores + r * queries * 4, words, d, softened)
                    softmax(scores, seen, sums, d, key, clear, factor, softened)
                    for c in range(0, d, rows):
                        left = v_pack + (c // panel * panel * thick * planes + c % panel) * 4
                        multiply(left, softened, sums + (c + KEPT) * queries * 4, (seen + most - 1) // most * deep, 1)
        leave()
        for t in range(begin_tile, end_tile):
            first = t * queries
            packed = own + (t - begin_tile) * each
            sums = packed + words * planes * queries * 4
            doubt = split and (lost(sums + queries * 4, queries) or lost(sums + KEPT * queries * 4, d * queries))
            for lane in range(0, queries, side) if split else range(0):
                doubt = doubt or uneven(packed + lane * words * planes * 4, sums + lane * 4, top, bound * math.sqrt(d))
            if doubt:  # a total or a number of the output is not finite, or the error of a score may show
                call(amx if fixed else fma, given, task, slot)
                return
            finish(sums, d, out + (head * count + first) * d * item, min(queries, count - first))

    return attention


def build(problem: Problem, config: Config) -> Run:
    """run(out: [b, h, sq, d], q: [b, h, sq, d], k, v: [b, hkv, sk, d]), all contiguous.

    One task: `query_tiles` tiles of queries of the heads that share k and v, one head after the other, against all
    keys. With queries in lanes, k and v are read one number for all lanes, and maximum, total and rescaling need no
    sums across lanes. A block of k and v is packed (and widened, if `multiply` says so) once for all tiles of the task.
    A task of fp32 by AMX whose result is not finite is computed again by FMA (`numba_split` says why); one whose scores
    fixed point may change by more than fp32 does (`numba_scores`), by `amx`.
    """
    require(problem.precision)
    without_lse(problem, "attention/numba")
    heads, period, sk, d = problem["b"] * problem["hkv"], problem["sq"], problem["sk"], problem["d"]
    count = period * problem["h"] // problem["hkv"]
    causal = bool(problem.flag("causal")) and period > 1  # bottom right: a single query sees every key
    beyond = sk - period if causal else sk
    rows, queries = (int(side) for side in config["tile"].split("x"))
    tiled, split = config["multiply"] in AMX, _split(problem, config)
    block, every = min(config["block_k"], sk), -(-count // queries)
    tiles = min(config["query_tiles"], -(-every // -(-threads() // heads)))

    def room(rows: int, steps: int, deep: int, planes: int) -> int:
        """Bytes of a slot's scratch memory, whole cache lines."""
        columns, tall = (-(-size // rows) * rows + vector_width() for size in (d, block))  # padded panels fit
        words, thick = (-(-size // (steps * deep)) * deep * planes for size in (d, block))
        space = tiles * (words + columns + KEPT) * queries + tall * (queries + words) + columns * thick
        return -(-(space + (queries * thick if planes > 1 else 0)) // 16) * LINE

    planes = numba_split.SPLIT.planes if split else 1
    size = room(rows, _steps(config["multiply"]), numba_tmul.SIDE if tiled else 1, planes)
    if split:
        size = max(size, room(AGAIN, 1, 1, 1))
    tasks = heads * -(-every // tiles)
    scratch = torch.empty((slots(tasks) * size + LINE) // 4, dtype=torch.float32)
    place = -(-scratch.data_ptr() // LINE) * LINE
    factor = LOG2E / math.sqrt(d)
    make = partial(compiled, problem.precision)
    kernel = parallel(ARGUMENTS, (make(rows, queries, config["multiply"]), tasks))
    amx = make(rows, queries, "amx").address if config["multiply"] == "fixed" else 0
    fma = make(AGAIN, queries, "widen").address if split else 0

    def run(out: Any, q: Any, k: Any, v: Any, keep: Any = scratch) -> None:
        kernel(
            *(t.data_ptr() for t in (q, k, v, out)),
            *(place, size, count, period, sk, d, beyond, block, tiles, amx, fma, factor),
        )

    return run
