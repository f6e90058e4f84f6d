"""Numba-CUDA layer norm and RMS norm: two-pass variance from registers, 16-byte accesses, warp shuffles."""

from __future__ import annotations

from typing import Any

import numpy as np

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources
from rooftune.kernels.common import numba_cuda as common
from rooftune.kernels.common import numba_cuda_rows as rows
from rooftune.kernels.common.numba_cuda import cuda, device, float32, rsqrt
from rooftune.kernels.layernorm import EPS

DEVICES = ("cuda",)
PRECISIONS = ("fp32", "fp16", "bf16")
SPACE = rows.SPACE

F0 = rows.F0


def _norm(shape: rows.Layout, rms: bool) -> tuple[Any, Any]:
    """Kernels (y, x, weight, bias) and, for the RMS norm, (y, x, weight).

    A row that fits in registers is read once; a longer one is read again (from cache) by each pass.
    """
    M, N, V, CHUNKS, KEPT = shape.m, shape.n, shape.vector, shape.chunks, shape.kept
    THREADS, ROWS, SLOTS = shape.threads_per_row, shape.rows, shape.rows * shape.warps
    STEP = V if KEPT else 0  # registers of chunk c begin at c * STEP
    VALUES = CHUNKS * V if KEPT else V
    INVERSE, SMALL = np.float32(1 / N), np.float32(EPS)
    load, store = rows.loader(shape)
    total = rows.reducer(shape, rows.add)

    @device
    def statistics(x: Any, start: Any, t: Any, v: Any, scratch: Any) -> Any:
        """(mean, 1 / deviation) of a row; leaves it in v if it fits."""
        mean = F0
        if KEPT or not rms:
            s = F0
            for c in range(CHUNKS):
                column = (c * THREADS + t) * V
                if column < N:
                    load(x, start + column, v, c * STEP)
                    for e in range(V):
                        s += v[c * STEP + e]
            if not rms:
                mean = total(s, scratch) * INVERSE
        s = F0
        for c in range(CHUNKS):
            column = (c * THREADS + t) * V
            if column < N:
                if not KEPT:
                    load(x, start + column, v, 0)
                for e in range(V):
                    centred = v[c * STEP + e] - mean
                    s += centred * centred
        return mean, rsqrt(total(s, scratch) * INVERSE + SMALL)

    def layernorm(y: Any, x: Any, weight: Any, bias: Any) -> None:
        scratch = cuda.shared.array(SLOTS, float32)
        v = cuda.local.array(VALUES, float32)
        w = cuda.local.array(V, float32)
        b = cuda.local.array(V, float32)
        t = cuda.threadIdx.x % THREADS
        row = cuda.blockIdx.x * ROWS + cuda.threadIdx.x // THREADS
        start = min(row, M - 1) * N  # threads past the last row repeat it: all must reach the barriers
        mean, scale = statistics(x, start, t, v, scratch)
        if row < M:
            for c in range(CHUNKS):
                column = (c * THREADS + t) * V
                if column < N:
                    if not KEPT:
                        load(x, start + column, v, 0)
                    load(weight, column, w, 0)
                    load(bias, column, b, 0)
                    for e in range(V):
                        v[c * STEP + e] = (v[c * STEP + e] - mean) * scale * w[e] + b[e]
                    store(y, start + column, v, c * STEP)

    def rmsnorm(y: Any, x: Any, weight: Any) -> None:
        scratch = cuda.shared.array(SLOTS, float32)
        v = cuda.local.array(VALUES, float32)
        w = cuda.local.array(V, float32)
        t = cuda.threadIdx.x % THREADS
        row = cuda.blockIdx.x * ROWS + cuda.threadIdx.x // THREADS
        start = min(row, M - 1) * N
        _, scale = statistics(x, start, t, v, scratch)
        if row < M:
            for c in range(CHUNKS):
                column = (c * THREADS + t) * V
                if column < N:
                    if not KEPT:
                        load(x, start + column, v, 0)
                    load(weight, column, w, 0)
                    for e in range(V):
                        v[c * STEP + e] = v[c * STEP + e] * scale * w[e]
                    store(y, start + column, v, c * STEP)

    return layernorm, rmsnorm


def _launch(problem: Problem, config: Config) -> common.Launch:
    shape = rows.layout(problem, config)
    rms = bool(problem.flag("rms"))
    arrays = (problem.precision,) * (3 if rms else 4)
    blocks = common.ceil_div(shape.m, shape.rows)
    return common.Launch(_norm(shape, rms)[rms], blocks, shape.threads, arrays, shape.max_registers)


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n], weight: [n], bias: [n]), no bias with `rms`; all contiguous."""
    return common.build(_launch(problem, config))


def emulate(problem: Problem, config: Config) -> Run:
    """The same kernel on CPU tensors."""
    return common.emulate(_launch(problem, config))


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """Machine code without a GPU."""
    return common.resources(_launch(problem, config), arch)
