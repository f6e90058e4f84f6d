"""16-bit tiles in shared memory for Numba-CUDA's tensor-core kernels: swizzle, copies, fragments.

A tile has `outer` rows of `inner` contiguous elements, in chunks of 8 (16 bytes). Chunk c of row r lies at
place c ^ f(r) of its row, so that the 8 rows an `ldmatrix` reads fall into different banks without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rooftune.kernels.common.numba_cuda import copy16, cuda, device, ldmatrix, ldmatrix_t

CHUNK = 8
ZERO_BITS = np.uint16(0)


@dataclass(frozen=True)
class Tile:
    """A tile and the matrix it is cut from: element (o, i) at o * stride + i, inside if o < outer_end etc."""

    outer: int
    inner: int
    stride: int
    outer_end: int
    inner_end: int
    threads: int

    @property
    def elements(self) -> int:
        return self.outer * self.inner

    @property
    def whole_chunks(self) -> bool:
        """Whether every 16-byte chunk is aligned and lies inside or outside as a whole."""
        return self.stride % CHUNK == 0 and self.inner_end % CHUNK == 0


def _fold(inner: int) -> Any:
    """A device function f(r): what the chunk numbers of row r are xor-ed with; its period is at most 8 rows."""
    per_row = inner // CHUNK
    mask = min(per_row & -per_row, 8) - 1  # the largest power of two that divides a row keeps c ^ f inside it
    shift = {2: 2, 4: 1}.get(mask + 1, 0)  # rows that share 128 bytes of banks share f

    @device
    def fold(r: Any) -> Any:
        return (r >> shift) & mask

    return fold


def filler(tile: Tile) -> Any:
    """A device function fill(shared, base, matrix, start, o0, i0): begin to copy the tile at (o0, i0).

    Outside the matrix the tile is zero. `start` is where the matrix begins in its array. Copies are asynchronous
    (a group is still to be committed) where chunks are whole, else element by element.
    """
    inner, stride, outer_end, inner_end = tile.inner, tile.stride, tile.outer_end, tile.inner_end
    threads, per_row, whole = tile.threads, tile.inner // CHUNK, tile.whole_chunks
    chunks = tile.outer * per_row
    turns = -(-chunks // threads)
    even = chunks % threads == 0
    outer_exact, inner_exact = outer_end % tile.outer == 0, inner_end % inner == 0
    # The thread's chunks lie a fixed number of rows apart, a multiple of the swizzle's period: their addresses
    # differ by constants. Without saying so every chunk keeps its own registers (fp16 attention then spills).
    steady = threads % (8 * per_row) == 0
    rows_apart = threads // per_row
    fold = _fold(inner)

    @device
    def put(shared: Any, to: Any, matrix: Any, start: Any, o: Any, i: Any) -> None:
        if whole:
            inside = (outer_exact | (o < outer_end)) & (inner_exact | (i < inner_end))
            copy16(shared, to, matrix, start + o * stride + i, inside)
        else:
            for e in range(CHUNK):
                if o < outer_end and i + e < inner_end:
                    shared[to + e] = matrix[start + o * stride + i + e]
                else:
                    shared[to + e] = ZERO_BITS

    @device
    def fill_steady(shared: Any, base: Any, matrix: Any, start: Any, o0: Any, i0: Any) -> None:
        r = cuda.threadIdx.x // per_row
        c = cuda.threadIdx.x % per_row
        to = base + r * inner + (c ^ fold(r)) * CHUNK
        for q in range(turns):
            if even or q * threads + cuda.threadIdx.x < chunks:
                put(shared, to + q * rows_apart * inner, matrix, start, o0 + r + q * rows_apart, i0 + c * CHUNK)

    @device
    def fill(shared: Any, base: Any, matrix: Any, start: Any, o0: Any, i0: Any) -> None:
        for q in range(turns):
            chunk = q * threads + cuda.threadIdx.x
            if even or chunk < chunks:
                r = chunk // per_row
                c = chunk % per_row
                put(shared, base + r * inner + (c ^ fold(r)) * CHUNK, matrix, start, o0 + r, i0 + c * CHUNK)

    return fill_steady if steady else fill


def _reader(inner: int, k_inner: bool, second_is_row: bool) -> Any:
    """A device function read(fragment, at, shared, base, x, k): four 8x8 tiles at outer index x and k.

    x and k are multiples of 16. Lanes 0-7, 8-15, 16-23, 24-31 give the rows of the four tiles, in the order
    the operand wants: x is the faster index of the tiles if `second_is_row`, else k is. Tiles stored [k][x]
    are transposed on the way.
    """
    fold = _fold(inner)
    # Does bit 3 of the lane (the second tile) move along the stored rows? Bit 4 then moves along the chunks.
    low_bit_is_row = second_is_row == k_inner

    @device
    def read(fragment: Any, at: Any, shared: Any, base: Any, x: Any, k: Any) -> None:
        lane = cuda.threadIdx.x % 32
        r = lane % 16 if low_bit_is_row else lane % 8 + lane // 16 * 8
        c = lane // 16 if low_bit_is_row else lane // 8 % 2
        # All that depends on the lane is one number; x and k only add to it or flip its bits.
        mine = r * inner
        flip = c ^ fold(r)
        if k_inner:
            ldmatrix(fragment, at, shared, base + x * inner + mine + ((k // CHUNK) ^ flip) * CHUNK)
        else:
            ldmatrix_t(fragment, at, shared, base + k * inner + mine + ((x // CHUNK) ^ flip) * CHUNK)

    return read


def reader_a(inner: int, k_inner: bool) -> Any:
    """read(fragment, at, shared, base, m, k): the 16x16 A operand. `k_inner`: the tile holds [m][k], else [k][m].

    Register order: (m 0-7, k 0-7), (m 8-15, k 0-7), (m 0-7, k 8-15), (m 8-15, k 8-15).
    """
    return _reader(inner, k_inner, True)


def reader_b(inner: int, k_inner: bool) -> Any:
    """read(fragment, at, shared, base, n, k): two 16x8 B operands. `k_inner`: the tile holds [n][k], else [k][n].

    Register order: (n 0-7, k 0-7), (n 0-7, k 8-15), (n 8-15, k 0-7), (n 8-15, k 8-15).
    """
    return _reader(inner, k_inner, False)
