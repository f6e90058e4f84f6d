"""Attention of few queries in Numba: keys and values are read once, as they lie, in parts that threads share."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.attention import without_lse
from rooftune.kernels.common.numba import F32, I32, ITEM, LOG2E, Chunk, Emit, State, Value, intrinsic, threads
from rooftune.kernels.common.numba_cpu import require, vector_width
from rooftune.kernels.common.numba_parallel import Job, arguments_of, job, parallel, slots
from rooftune.kernels.common.numba_thin import columns_at_once, dots
from rooftune.kernels.common.numba_tile import touch

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "fp16", "bf16")

SPLITS = (1, 2, 4, 8, 16, 32, 64)
ROWS = (1, 2, 4)
CHAINS = 4  # sums that the latency of an FMA leaves room for
KEPT = 3  # numbers of a query beside its output: maximum, total, what earlier sums are scaled by


def _default(problem: Problem) -> Config:
    wanted = max(1, 2 * threads() // (problem["b"] * problem["hkv"])) if threads() > 1 else 1
    splits = max(s for s in SPLITS if s == 1 or (s <= wanted and s * 128 <= problem["sk"]))
    queries = problem["sq"] * problem["h"] // problem["hkv"]
    return {"block_k": 64, "rows": max(r for r in ROWS if r <= queries), "num_splits": splits}


SPACE = Space(
    axes={
        "block_k": (32, 64, 128, 256, 512),  # keys whose scores are held at once
        "rows": ROWS,  # queries that share what is loaded
        "num_splits": SPLITS,  # parts of the keys, whose results are combined in a second step
    },
    where=(
        lambda config, problem: config["num_splits"] == 1 or config["num_splits"] * config["block_k"] <= problem["sk"],
    ),
    default=_default,
)
ARGUMENTS = (*("int64",) * 13, "float32")


@cache
def scale(dtype: str) -> Any:
    """Numba function (source, target, count, factor): numbers of a precision as fp32, times a factor."""

    def emit(e: Emit, source: Value, target: Value, count: Value, factor: Value) -> None:
        def step(chunk: Chunk, _: State) -> State:
            chunk.store(e.builder.fmul(chunk.load(source, dtype), e.splat(factor)), target, "fp32")
            return []

        e.row(count, [], step)

    return intrinsic([types.int64] * 3 + [types.float32], emit)


@cache
def begin() -> Any:
    """Numba function (state, sums, d): a query that has seen no key."""

    def emit(e: Emit, state: Value, sums: Value, d: Value) -> None:
        for i, value in enumerate((-math.inf, 0.0, 1.0)):
            e.store_raw(ir.Constant(F32, value), e.offset(state, e.index(i), 4), 4)

        def clear(chunk: Chunk, _: State) -> State:
            chunk.store(e.splat(0.0), sums, "fp32")
            return []

        e.row(d, [], clear)

    return intrinsic([types.int64] * 3, emit)


@cache
def weigh() -> Any:
    """Numba function (scores, seen, keys, state): scores of one query, in powers of 2, to probabilities.

    Online softmax (Milakov and Gimelshein, 2018): `state` holds the maximum so far, the total of the probabilities and
    what sums before must be multiplied by. Keys from `seen` on, up to a whole vector, get 0. A query that has seen no
    key yet has the maximum -inf and 0 is subtracted instead; a NaN is no maximum but makes the total NaN.
    """

    def emit(e: Emit, scores: Value, seen: Value, keys: Value, state: Value) -> None:
        b, minus = e.builder, e.splat(-math.inf)
        lanes = ir.Constant(e.ints, list(range(e.width)))
        padded = b.mul(b.sdiv(b.add(keys, e.index(e.width - 1)), e.index(e.width)), e.index(e.width))
        limit = e.broadcast(b.trunc(seen, I32), e.width)

        def mask(at: Value, tops: State) -> State:
            place = e.offset(scores, at, 4)
            number = b.add(e.broadcast(b.trunc(at, I32), e.width), lanes)
            score = b.select(b.icmp_signed("<", number, limit), e.load(place, "fp32"), minus)
            e.store(score, place, "fp32")
            return [e.max(score, tops[0])]

        _, tops = e.loop(e.index(0), padded, e.width, [minus], mask)
        old, before = (e.load_raw(e.offset(state, e.index(i), 4), F32, 4) for i in range(2))
        new = e.max(e.splat(e.reduce(tops[0], e.max)), e.splat(old))
        safe = b.select(b.fcmp_ordered("==", new, minus), e.splat(0.0), new)

        def exponential(at: Value, totals: State) -> State:
            place = e.offset(scores, at, 4)
            p = e.exp2(b.fsub(e.load(place, "fp32"), safe), 5)
            e.store(p, place, "fp32")
            return [b.fadd(totals[0], p)]

        _, totals = e.loop(e.index(0), padded, e.width, [e.splat(0.0)], exponential)
        shrink = b.extract_element(e.exp2(b.fsub(e.splat(old), safe), 5), ir.Constant(I32, 0))
        total = b.fadd(b.fmul(before, shrink), e.total(totals))
        for i, value in enumerate((b.extract_element(new, ir.Constant(I32, 0)), total, shrink)):
            e.store_raw(value, e.offset(state, e.index(i), 4), 4)

    return intrinsic([types.int64] * 4, emit)


@cache
def add_values(dtype: str, rows: int, apart: int) -> Any:
    """Numba function (p, v, old, new, state, keys, d): new = old, scaled down, + p v, for some queries.

    p: [rows][apart]; v: [keys][d] of a precision; old, new: [rows][d], not the same memory (a row's last vector may
    overlap the one before); state: as `weigh` leaves it.
    """

    def emit(e: Emit, p: Value, v: Value, old: Value, new: Value, state: Value, keys: Value, d: Value) -> None:
        b, together = e.builder, max(1, CHAINS // rows)

        def columns(chunk: Chunk, _: State) -> State:
            def some(key: Value, sums: State, count: int = together) -> State:
                out = list(sums)
                for u in range(count):
                    number = b.add(key, e.index(u))
                    value = chunk.load(e.offset(v, b.mul(number, d), ITEM[dtype]), dtype)
                    for i in range(rows):
                        weight = e.load_raw(e.offset(p, b.add(number, e.index(i * apart)), 4), F32, 4)
                        out[u * rows + i] = e.fma(e.splat(weight), value, out[u * rows + i])
                return out

            start = []
            for i in range(rows):
                shrink = e.load_raw(e.offset(state, e.index(i * KEPT + 2), 4), F32, 4)
                before = chunk.load(e.offset(old, b.mul(d, e.index(i)), 4), "fp32")
                start.append(b.fmul(before, e.splat(shrink)))
            start += [e.splat(0.0)] * (rows * (together - 1))
            at, sums = e.loop(e.index(0), keys, together, start, some)
            _, first = e.loop(at, keys, 1, sums[:rows], lambda key, s: some(key, s, 1))
            for i in range(rows):
                total = e.tree([first[i], *sums[rows + i :: rows]], b.fadd)
                chunk.store(total, e.offset(new, b.mul(d, e.index(i)), 4), "fp32")
            return []

        e.row(d, [], columns)

    return intrinsic([types.int64] * 7, emit)


@cache
def divide(dtype: str) -> Any:
    """Numba function (sums, total, out, d): what a query gets, rounded; 0 if it saw no key. total: an address."""

    def emit(e: Emit, sums: Value, total: Value, out: Value, d: Value) -> None:
        b, all_lanes = e.builder, e.splat(e.load_raw(total, F32, 4))
        none = b.fcmp_ordered("==", all_lanes, e.splat(0.0))
        factor = b.select(none, e.splat(0.0), b.fdiv(e.splat(1.0), all_lanes))

        def step(chunk: Chunk, _: State) -> State:
            chunk.store(b.fmul(chunk.load(sums, "fp32"), factor), out, dtype)
            return []

        e.row(d, [], step)

    return intrinsic([types.int64] * 4, emit)


@cache
def compiled(dtype: str, rows: int, block: int) -> tuple[Job, Job]:
    """Two jobs. The first: the queries that share keys against one part of these; the second: a query's parts."""
    group, item = columns_at_once(rows, block), ITEM[dtype]
    multiply, softmax, add = dots(dtype, rows, group, block), weigh(), add_values(dtype, rows, block)
    widen, start, finish, arguments = scale(dtype), begin(), divide(dtype), arguments_of(*ARGUMENTS)
    copy, one = scale("fp32"), np.float32(1)
    fetch = touch()
    combine, most = add_values("fp32", 1, 1), max(SPLITS)

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
            widen(source, queries + r * d * 4, d, factor)
            start(state + r * KEPT * 4, old + r * d * 4, d)
        end = (part + 1) * sk // splits
        for key in range(part * sk // splits, end, block):
            keys = min(block, end - key)
            here = (head * sk + key) * d * item
            fetch(v + here, keys * d * item)  # 1.25 times as fast beyond the caches (fp32), 0.94 at worst
            for r in range(0, padded, rows):
                for j in range(0, keys, group):
                    multiply(queries + r * d * 4, k + here + j * d * item, scores + j * 4, d, min(group, keys - j))
                for i in range(rows):
                    seen = min(keys, min(r + i, count - 1) % period + beyond + 1 - key)
                    softmax(scores + i * block * 4, seen, keys, state + (r + i) * KEPT * 4)
                if r == 0 and key + block < end:
                    fetch(k + here + block * d * item, min(block, end - key - block) * d * item)
                add(scores, v + here, old + r * d * 4, new + r * d * 4, state + r * KEPT * 4, keys, d)
            old, new = new, old
        for r in range(count):
            if splits == 1:
                finish(old + r * d * 4, state + (r * KEPT + 1) * 4, out + (head * count + r) * d * item, d)
            else:  # maxima of all parts, then of each part its sums and, as one more of these, its total
                own = parts + (head * count + r) * (most + splits * (d + 1)) * 4
                sums = own + (most + part * (d + 1)) * 4
                copy(state + r * KEPT * 4, own + part * 4, 1, one)
                copy(old + r * d * 4, sums, d, one)
                copy(state + (r * KEPT + 1) * 4, sums + d * 4, 1, one)

    @job
    def join(given, task, slot):  # type: ignore[no-untyped-def]
        _, _, _, out, scratch, parts, size, _, _, _, d, _, splits, _ = arguments(given)
        own = parts + task * (most + splits * (d + 1)) * 4
        state = scratch + slot * size
        zeros = state + KEPT * 4
        sums = zeros + (d + 1) * 4
        start(state, zeros, d + 1)
        softmax(own, splits, splits, state)
        combine(own, own + most * 4, zeros, sums, state, splits, d + 1)
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
    attend, join = compiled(problem.precision, rows, block)
    steps = [(attend, tasks), *([(join, heads * count)] if splits > 1 else [])]
    kernel = parallel(ARGUMENTS, *steps)
    factor = LOG2E / math.sqrt(d)

    def run(out: Any, q: Any, k: Any, v: Any) -> None:
        kernel(
            *(t.data_ptr() for t in (q, k, v, out, scratch, parts)),
            *(size, count, period, sk, d, beyond, splits, factor),
        )

    return run
