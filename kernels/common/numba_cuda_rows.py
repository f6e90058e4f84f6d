"""Row-wise kernels in Numba-CUDA: how threads share a row, how they load it, how they reduce over it.

A block works on `block_rows` rows, `num_warps` warps each. A row is read in chunks: chunk c of thread t
begins at column (c * threads_per_row + t) * vector. Vectors are 16 bytes where rows are multiples of that,
else single elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.numba_cuda import (
    ACCESS,
    MAX_THREADS,
    ceil_div,
    cuda,
    device,
    per_vector,
    register_limit,
    shfl_xor,
)

KEPT = 64  # fp32 values of a row one thread may keep in registers; half in blocks above 512 threads (64 registers)

F0 = np.float32(0)
NEG_INF = np.float32(-np.inf)


@dataclass(frozen=True)
class Layout:
    """Sizes of one row-wise kernel, constants of its code."""

    m: int
    n: int
    rows: int  # per block
    warps: int  # per row
    vector: int  # elements per access
    precision: str

    @property
    def threads_per_row(self) -> int:
        return 32 * self.warps

    @property
    def threads(self) -> int:
        return self.rows * self.threads_per_row

    @property
    def max_registers(self) -> int:
        """So many that the block can be launched at all: the compiler does not know how many threads it has."""
        return register_limit(self.threads, 1)

    @property
    def chunks(self) -> int:
        return ceil_div(self.n, self.threads_per_row * self.vector)

    @property
    def kept(self) -> bool:
        """Whether a thread keeps its part of the row in registers, so that memory is read once."""
        limit = KEPT if self.threads <= 512 else KEPT // 2
        return self.chunks * self.vector <= limit


def layout(problem: Problem, config: Config) -> Layout:
    """The sizes for a problem with dims m, n and a config of `SPACE`."""
    wide = per_vector(problem.precision)
    vector = wide if problem["n"] % wide == 0 else 1
    return Layout(problem["m"], problem["n"], config["block_rows"], config["num_warps"], vector, problem.precision)


def _default(problem: Problem) -> Config:
    """As many values a thread as it can keep, and at least 4 warps a block: with 16 values a thread rows of 16384 had
    half of the speed on an H200."""
    warps = 1
    while warps < 16 and warps * 32 * KEPT < problem["n"]:
        warps *= 2
    return {"num_warps": warps, "block_rows": max(1, 4 // warps)}


SPACE = Space(
    axes={"num_warps": (1, 2, 4, 8, 16, 32), "block_rows": (1, 2, 4, 8)},
    where=(lambda config, problem: 32 * config["num_warps"] * config["block_rows"] <= MAX_THREADS,),
    default=_default,
)


def loader(shape: Layout) -> tuple[Any, Any]:
    """Device functions load(array, i, local, at) and store(array, i, local, at) of one chunk."""
    load, store, load16, store16, _ = ACCESS[shape.precision]
    if shape.vector > 1:
        return load16, store16

    @device
    def load_one(array: Any, i: Any, local: Any, at: Any) -> None:
        local[at] = load(array, i)

    @device
    def store_one(array: Any, i: Any, local: Any, at: Any) -> None:
        store(array, i, local[at])

    return load_one, store_one


@device
def add(a: Any, b: Any) -> Any:
    return a + b


def reducer(shape: Layout, combine: Any) -> Any:
    """A device function reduce(value, scratch): the combination of `value` over the threads of a row.

    Shuffles inside the warp, then one slot of shared memory (`scratch`: float32[rows * warps]) a warp. Every
    thread of the block must call it.
    """
    warps = shape.warps

    @device
    def within_warp(value: Any) -> Any:
        value = combine(value, shfl_xor(value, 16))
        value = combine(value, shfl_xor(value, 8))
        value = combine(value, shfl_xor(value, 4))
        value = combine(value, shfl_xor(value, 2))
        return combine(value, shfl_xor(value, 1))

    if warps == 1:

        @device
        def reduce_row(value: Any, scratch: Any) -> Any:
            return within_warp(value)

    else:

        @device
        def reduce_row(value: Any, scratch: Any) -> Any:
            warp = cuda.threadIdx.x // 32
            first = warp // warps * warps
            value = within_warp(value)
            cuda.syncthreads()  # the slots may still be read from the reduction before
            if cuda.threadIdx.x % 32 == 0:
                scratch[warp] = value
            cuda.syncthreads()
            value = scratch[first]
            for w in range(1, warps):
                value = combine(value, scratch[first + w])
            return value

    return reduce_row
