"""Attention of few queries in Numba: keys and values are read once, as they lie, in parts that threads share."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.attention import without_lse
from rooftune.kernels.common.numba import ITEM, LOG2E, threads
from rooftune.kernels.common.numba_cpu import dot_formats, dot_is_fast, require, vector_width
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel, slots
from rooftune.kernels.common.numba_thin import columns_at_once, dots, word_dots
from rooftune.kernels.common.numba_tile import Format, touch
from rooftune.kernels.common.numba_weigh import KEPT, add_pairs, add_values, begin, convert, divide, weigh

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16")

SPLITS = (1, 2, 4, 8, 16, 32, 64)
ROWS = (1, 2, 4)


def _default(problem: Problem) -> Config:
    wanted = max(1, 2 * threads() // (problem["b"] * problem["hkv"])) if threads() > 1 else 1
    splits = max(s for s in SPLITS if s == 1 or (s <= wanted and s * 128 <= problem["sk"]))
    queries = problem["sq"] * problem["h"] // problem["hkv"]
    multiply = "dot" if _words(problem) and dot_is_fast(problem.precision) else "widen"
    return {"block_k": 128, "rows": max(r for r in ROWS if r <= queries), "num_splits": splits, "multiply": multiply}


def _words(problem: Problem) -> bool:
    """Whether this CPU multiplies pairs of numbers, and a row of pairs fills a vector."""
    even = problem["d"] % 2 == 0 and problem["d"] >= 2 * vector_width()
    return problem.precision == "bf16" and "bf16" in dot_formats() and even


SPACE = Space(
    axes={
        "block_k": (32, 64, 128, 256, 512),  # keys whose scores are held at once
        "rows": ROWS,  # queries that share what is loaded
        "num_splits": SPLITS,  # parts of the keys, whose results are combined in a second step
        "multiply": ("widen", "dot"),  # of both products. dot: vdpbf16ps, with probabilities rounded to bf16
    },
    where=(
        lambda config, problem: config["multiply"] == "widen" or _words(problem),
        lambda config, problem: config["num_splits"] == 1 or config["num_splits"] * config["block_k"] <= problem["sk"],
    ),
    default=_default,
)
ARGUMENTS = (*("int64",) * 13, "float32")


@cache
def compiled(dtype: str, rows: int, block: int, pairs: bool) -> tuple[Job, Job]:
    """Two jobs. The first: the queries that share keys against one part of these; the second: a query's parts."""
    group, item = columns_at_once(rows, block), ITEM[dtype]
    shape = rows, group, block, False  # the step before has asked for the keys
    multiply = word_dots(Format(dtype, 2), *shape) if pairs else dots(dtype, *shape)
    softmax, add = weigh(pairs), add_pairs(rows, block) if pairs else add_values(dtype, rows, block)
    start, finish, arguments = begin(), divide(dtype, pairs), arguments_of(*ARGUMENTS)
    copy, one, fetch = convert("fp32"), np.float32(1), touch()
    widen, each = (copy, 2) if pairs else (convert(dtype), 1)  # each: numbers of a query in 4 bytes
    combine, weigh_parts, most = add_values("fp32", 1, 1), weigh(), max(SPLITS)

    @job
    def attend(given, task, slot):  # type: ignore[no-untyped-def]
        q, k, v, out, scratch, parts, size, count, period, sk, d, beyond, splits, factor = arguments(given)
        head, part = task // splits, task % splits
        padded = (count + rows - 1) // rows * rows
        queries = scratch + slot * size
        scores = queries + padded * d * 4
        state = scores + rows * block * 4
        old = state + padded * KEPT * 4
        new = old + padded * d * 4
        for r in range(padded):
            source = q + (head * count + min(r, count - 1)) * d * item
            widen(source, queries + r * (d // each) * 4, d // each)
            start(state + r * KEPT * 4, old + r * d * 4, d)
        end = (part + 1) * sk // splits
        for key in range(part * sk // splits, end, block):
            keys = min(block, end - key)
            here = (head * sk + key) * d * item
            for r in range(0, padded, rows):
                for j in range(0, keys, group):
                    some, place = min(group, keys - j), here + j * d * item
                    multiply(queries + r * (d // each) * 4, k + place, scores + j * 4, d, some)
                    if r == 0:
                        fetch(v + place, some * d * item)
                for i in range(rows):
                    seen = min(keys, min(r + i, count - 1) % period + beyond + 1 - key)
                    softmax(scores + i * block * 4, seen, keys, state + (r + i) * KEPT * 4, factor)
                row, following = r * d * 4, k + here + keys * d * item
                add(scores, v + here, old + row, new + row, state + r * KEPT * 4, keys, d, following)
            old, new = new, old
        for r in range(count):
            if splits == 1:
                finish(old + r * d * 4, state + (r * KEPT + 1) * 4, out + (head * count + r) * d * item, d)
            else:  # maxima of all parts, then of each part its sums and, as one more of these, its total
                own = parts + (head * count + r) * (most + splits * (d + 1)) * 4
                sums = own + (most + part * (d + 1)) * 4
                copy(state + r * KEPT * 4, own + part * 4, 1)
                copy(old + r * d * 4, sums, d)
                copy(state + (r * KEPT + 1) * 4, sums + d * 4, 1)

    @job
    def join(given, task, slot):  # type: ignore[no-untyped-def]
        _, _, _, out, scratch, parts, size, _, _, _, d, _, splits, _ = arguments(given)
        own = parts + task * (most + splits * (d + 1)) * 4
        state = scratch + slot * size
        zeros = state + KEPT * 4
        sums = zeros + (d + 1) * 4
        start(state, zeros, d + 1)
        weigh_parts(own, splits, splits, state, one)
        combine(own, own + most * 4, zeros, sums, state, splits, d + 1, zeros)
        finish(sums, sums + d * 4, out + task * d * item, d)

    return attend, join


def build(problem: Problem, config: Config) -> Run:
    """run(out: [b, h, sq, d], q: [b, h, sq, d], k, v: [b, hkv, sk, d]), all contiguous.

    Right for any number of queries, meant for few: each group of `rows` of them reads the keys of a block again.
    Several threads may share the keys of a head (Dao et al., "Flash-Decoding for long-context inference", 2023).
    """
    require(problem.precision)
    without_lse(problem, "attention/numba_decode")
    heads, period, sk, d = problem["b"] * problem["hkv"], problem["sq"], problem["sk"], problem["d"]
    count = period * problem["h"] // problem["hkv"]
    causal = bool(problem.flag("causal")) and period > 1  # bottom right: a single query sees every key
    beyond = sk - period if causal else sk
    rows, block, splits = config["rows"], config["block_k"], config["num_splits"]
    tasks, padded = heads * splits, -(-count // rows) * rows
    space = padded * (3 * d + KEPT) + rows * block + 2 * (d + 1) + KEPT + vector_width()
    size = -(-space // 16) * 64  # bytes, whole cache lines
    scratch = torch.empty(max(slots(tasks), slots(heads * count)) * size // 4, dtype=torch.float32)
    parts = torch.empty(heads * count * (max(SPLITS) + splits * (d + 1)) if splits > 1 else 1, dtype=torch.float32)
    attend, join = compiled(problem.precision, rows, block, config["multiply"] == "dot")
    steps = [(attend, tasks), *([(join, heads * count)] if splits > 1 else [])]
    kernel = parallel(ARGUMENTS, *steps)
    factor = LOG2E / math.sqrt(d)

    def run(out: Any, q: Any, k: Any, v: Any) -> None:
        kernel(
            *(t.data_ptr() for t in (q, k, v, out, scratch, parts)),
            *(size, count, period, sk, d, beyond, splits, factor),
        )

    return run
