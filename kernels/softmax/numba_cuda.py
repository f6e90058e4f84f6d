"""Numba-CUDA softmax: rows in registers, 16-byte accesses, warp shuffles; online passes for long rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources
from rooftune.kernels.common import numba_cuda as common
from rooftune.kernels.common import numba_cuda_rows as rows
from rooftune.kernels.common.numba_cuda import cuda, exp2, float32, fmax

DEVICES = ("cuda",)
PRECISIONS = ("fp32", "fp16", "bf16")
SPACE = rows.SPACE

LOG2E = np.float32(math.log2(math.e))
F0, F1, NEG_INF = rows.F0, np.float32(1), rows.NEG_INF


def _kept(shape: rows.Layout) -> Any:
    """One read, one write: maximum, sum and result from registers."""
    M, N, V, CHUNKS = shape.m, shape.n, shape.vector, shape.chunks
    THREADS, ROWS, VALUES = shape.threads_per_row, shape.rows, shape.chunks * shape.vector
    SLOTS = shape.rows * shape.warps
    load, store = rows.loader(shape)
    largest, total = rows.reducer(shape, fmax), rows.reducer(shape, rows.add)

    def softmax(y: Any, x: Any) -> None:
        scratch = cuda.shared.array(SLOTS, float32)
        v = cuda.local.array(VALUES, float32)
        t = cuda.threadIdx.x % THREADS
        row = cuda.blockIdx.x * ROWS + cuda.threadIdx.x // THREADS
        start = min(row, M - 1) * N  # threads past the last row repeat it: all must reach the barriers
        top = NEG_INF
        for c in range(CHUNKS):
            column = (c * THREADS + t) * V
            if column < N:
                load(x, start + column, v, c * V)
            else:
                for e in range(V):
                    v[c * V + e] = NEG_INF
            for e in range(V):
                top = fmax(top, v[c * V + e])
        top = largest(top, scratch)
        s = F0
        for c in range(CHUNKS):
            inside = (c * THREADS + t) * V < N
            for e in range(V):
                # The maximum goes first: 1e4 * log2(e) would lose the last bits of the difference.
                v[c * V + e] = exp2((v[c * V + e] - top) * LOG2E)
                s += v[c * V + e] if inside else F0  # padding of an all -inf row is NaN here
        s = F1 / total(s, scratch)
        if row < M:
            for c in range(CHUNKS):
                column = (c * THREADS + t) * V
                for e in range(V):
                    v[c * V + e] *= s
                if column < N:
                    store(y, start + column, v, c * V)

    return softmax


def _online(shape: rows.Layout) -> Any:
    """Rows too long for registers: running maximum and sum, then a second read (Milakov, Gimelshein 2018)."""
    M, N, V, CHUNKS = shape.m, shape.n, shape.vector, shape.chunks
    THREADS, ROWS = shape.threads_per_row, shape.rows
    SLOTS = shape.rows * shape.warps
    load, store = rows.loader(shape)
    largest, total = rows.reducer(shape, fmax), rows.reducer(shape, rows.add)

    def softmax(y: Any, x: Any) -> None:
        scratch = cuda.shared.array(SLOTS, float32)
        v = cuda.local.array(V, float32)
        t = cuda.threadIdx.x % THREADS
        row = cuda.blockIdx.x * ROWS + cuda.threadIdx.x // THREADS
        start = min(row, M - 1) * N
        top = NEG_INF
        s = F0
        for c in range(CHUNKS):
            column = (c * THREADS + t) * V
            if column < N:
                load(x, start + column, v, 0)
                before = top
                for e in range(V):
                    top = fmax(top, v[e])
                shift = F0 if top == NEG_INF else top  # -inf - -inf would poison the sum
                s *= exp2((before - shift) * LOG2E)
                for e in range(V):
                    s += exp2((v[e] - shift) * LOG2E)
        mine = top
        top = largest(top, scratch)
        shift = F0 if top == NEG_INF else top
        s = F1 / total(s * exp2((mine - shift) * LOG2E), scratch)
        if row < M:
            for c in range(CHUNKS):
                column = (c * THREADS + t) * V
                if column < N:
                    load(x, start + column, v, 0)
                    for e in range(V):
                        v[e] = exp2((v[e] - top) * LOG2E) * s  # a row of -inf: NaN, as torch
                    store(y, start + column, v, 0)

    return softmax


def _launch(problem: Problem, config: Config) -> common.Launch:
    shape = rows.layout(problem, config)
    function = _kept(shape) if shape.kept else _online(shape)
    blocks = common.ceil_div(shape.m, shape.rows)
    return common.Launch(function, blocks, shape.threads, (problem.precision,) * 2, shape.max_registers)


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n]), both contiguous, on torch's current stream."""
    return common.build(_launch(problem, config))


def emulate(problem: Problem, config: Config) -> Run:
    """The same kernel on CPU tensors."""
    return common.emulate(_launch(problem, config))


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """Machine code without a GPU."""
    return common.resources(_launch(problem, config), arch)
