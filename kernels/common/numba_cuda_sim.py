"""What Numba-CUDA kernels call, on a CPU: a scheduler for one thread block, and warp operations on it.

Numba's own simulator has no warp operations and no inline PTX, and its polling costs about 5 ms per barrier
of 128 threads. Here every CUDA thread is an OS thread, exactly one of which runs at a time and hands over at
a barrier or warp operation (about 1 ms per barrier of 128 threads), so the Python code of a kernel runs
*unchanged*, tensor-core fragments and asynchronous copies included. It is strict where a GPU is lenient:

- a barrier or a warp operation that not every thread reaches is an error, never a hang;
- shared memory starts as NaNs and local arrays as None: reading before writing shows;
- an index outside an array is an error, negative ones included;
- an asynchronous copy lands only when it is waited for;
- launches alternate between forward and reverse thread order: a missing barrier changes the result.

Not modelled: launch limits, registers, bank conflicts, alignment, races inside one scheduling step, and the
last bits of `exp2`, `rsqrt` and of the sum inside a tensor-core instruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rooftune.kernels.common.numba_cuda_block import WARP, cuda, lane_number, launch, running, warp

__all__ = ["ACCESS", "MMA", "PACK", "SHARED_ACCESS", "cuda", "device", "launch"]  # and the operations


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that kernels call: here, itself."""
    return function


float32, uint16, uint32 = np.float32, np.uint16, np.uint32


# --- numbers -----------------------------------------------------------------------------------------


def bf16_to_f32(bits: Any) -> Any:
    """bfloat16 bits (uint16) to float32: the upper half of the same number."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: Any) -> Any:
    """float32 to bfloat16 bits (uint16): to nearest, ties to even; a NaN stays one (quiet, 0x7fff as the hardware)."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f16_to_f32(bits: Any) -> Any:
    """float16 bits (uint16) to float32."""
    return np.asarray(bits, np.uint16).view(np.float16).astype(np.float32)


def f32_to_f16(value: Any) -> Any:
    """float32 to float16 bits (uint16), to nearest, ties to even."""
    return np.asarray(value, np.float32).astype(np.float16).view(np.uint16)


def fmax(a: Any, b: Any) -> Any:
    """The larger; of a number and a NaN, the number (PTX max.f32)."""
    return b if a != a or b > a else a


def exp2(x: Any) -> Any:
    return np.exp2(np.float32(x))


def rsqrt(x: Any) -> Any:
    return np.float32(1) / np.sqrt(np.float32(x))


# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error 1.5e-7.
ERF_P = 0.3275911
ERF_A = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def erf(x: Any) -> Any:
    """The error function, absolute error below 5e-7 in fp32."""
    a = np.abs(np.float32(x))
    t = np.float32(1) / np.float32(np.float32(ERF_P) * a + np.float32(1))
    p = np.float32(ERF_A[0])
    for c in ERF_A[1:]:
        p = np.float32(p * t + np.float32(c))
    p = p * t * np.exp2(a * a * np.float32(-math.log2(math.e)))
    return np.copysign(np.float32(1) - p, np.float32(x))


def gelu(x: Any) -> Any:
    """x * (1 + erf(x / sqrt 2)) / 2."""
    half = np.float32(0.5) * np.float32(x)
    return half + half * erf(np.float32(x) * np.float32(math.sqrt(0.5)))


def fma(a: Any, b: Any, c: Any) -> Any:
    return a * b + c


# --- memory ------------------------------------------------------------------------------------------


def _span(array: Any, i: int, count: int) -> slice:
    if i < 0 or i + count > array.size:
        raise IndexError(f"elements {i} to {i + count - 1} of an array of {array.size}")
    return slice(i, i + count)


def _access(decode: Callable[[Any], Any], encode: Callable[[Any], Any], count: int) -> tuple[Any, ...]:
    """load, store (one element), load16, store16 (16 bytes at once), store2 for one number format."""

    def load(array: Any, i: int) -> Any:
        return np.float32(decode(array[_span(array, i, 1)])[0])

    def store(array: Any, i: int, value: Any) -> None:
        array[_span(array, i, 1)] = encode(np.float32(value))

    def load16(array: Any, i: int, local: Any, at: int) -> None:
        local[at : at + count] = list(decode(array[_span(array, i, count)]))

    def store16(array: Any, i: int, local: Any, at: int) -> None:
        array[_span(array, i, count)] = encode(np.array(local[at : at + count], np.float32))

    def store2(array: Any, i: int, low: Any, high: Any) -> None:
        array[_span(array, i, 2)] = encode(np.array([low, high], np.float32))

    return load, store, load16, store16, store2


def _plain_access() -> tuple[Any, ...]:
    """The same for fp32, which needs no decoding: half of an emulated fp32 kernel's time is spent here."""
    _, _, _, store16, store2 = _access(np.asarray, np.asarray, 4)

    def load(array: Any, i: int) -> Any:
        return array[i] if i >= 0 else array[_span(array, i, 1)]

    def store(array: Any, i: int, value: Any) -> None:
        array[i if i >= 0 else _span(array, i, 1)] = value

    def load16(array: Any, i: int, local: Any, at: int) -> None:
        local[at : at + 4] = array[_span(array, i, 4)]

    return load, store, load16, store16, store2


ACCESS = {
    "fp32": _plain_access(),
    "fp16": _access(f16_to_f32, f32_to_f16, 8),
    "bf16": _access(bf16_to_f32, f32_to_bf16, 8),
}
SHARED_ACCESS = ACCESS["fp32"]


def copy16(target: Any, i: int, source: Any, j: int, inside: bool) -> None:
    """Begin to copy 16 bytes from global to shared memory; zeros if not inside (PTX cp.async)."""
    count = 16 // target.itemsize
    running().now.copies.append((target, i, source, j, count, bool(inside)))


def copy_commit() -> None:
    """Close the group of copies begun since the last one."""
    me = running().now
    me.groups.append(me.copies)
    me.copies = []


def copy_wait(newest: int) -> Callable[[], None]:
    """Make wait(): wait for this thread's groups of copies, except the `newest` ones."""

    def wait() -> None:
        groups = running().now.groups
        while len(groups) > newest:
            for target, i, source, j, count, inside in groups.popleft():
                target[_span(target, i, count)] = source[_span(source, j, count)] if inside else 0

    return wait


# --- warp operations ---------------------------------------------------------------------------------


def shfl_xor(value: Any, mask: int) -> Any:
    """The value of the lane whose number differs in the bits of the mask."""
    lane = lane_number()
    return warp(value, dict)[lane ^ mask]


def _ldmatrix(local: Any, at: int, array: Any, i: int, transposed: bool) -> None:
    def gather(rows: dict[int, Any]) -> Any:
        tiles = np.stack([rows[lane] for lane in range(WARP)]).reshape(4, 8, 8)  # lane 8j+r gives row r of matrix j
        tiles = np.ascontiguousarray(tiles.transpose(0, 2, 1)) if transposed else tiles
        words = tiles.reshape(4, WARP, 2).view(np.uint32)[..., 0]  # lane 4r+t receives columns 2t, 2t+1 of row r
        return words.T.tolist()

    lane = lane_number()
    local[at : at + 4] = warp(array[_span(array, i, 8)], gather)[lane]


def ldmatrix(local: Any, at: int, array: Any, i: int) -> None:
    """Four 8x8 tiles of 16-bit numbers from shared memory into 4 registers (PTX ldmatrix.x4)."""
    _ldmatrix(local, at, array, i, False)


def ldmatrix_t(local: Any, at: int, array: Any, i: int) -> None:
    """The same, each tile transposed (PTX ldmatrix.x4.trans)."""
    _ldmatrix(local, at, array, i, True)


def _mma(decode: Callable[[Any], Any]) -> Callable[..., None]:
    def mma(acc: Any, c: int, a: Any, ai: int, b: Any, bi: int, count: int) -> None:
        def multiply(given: dict[int, Any]) -> Any:
            words = np.array([given[lane][0] for lane in range(WARP)], np.uint32)
            left = decode(words[:, :4].copy().view(np.uint16)).reshape(8, 4, 2, 2, 2)  # g, t, k half, row half, e
            right = decode(words[:, 4:].copy().view(np.uint16)).reshape(8, 4, count, 2, 2)  # g, t, tile, k half, e
            rows = left.transpose(3, 0, 2, 1, 4).reshape(16, 16)
            columns = right.transpose(3, 1, 4, 2, 0).reshape(16, count * 8)
            sums = np.array([given[lane][1] for lane in range(WARP)], np.float32).reshape(8, 4, count, 2, 2)
            product = (rows @ columns).reshape(2, 8, count, 4, 2)  # row half, g, tile, t, e
            return (sums + product.transpose(1, 3, 2, 0, 4)).reshape(WARP, count * 4)

        lane = lane_number()
        mine = (a[ai : ai + 4] + b[bi : bi + 2 * count], acc[c : c + 4 * count])
        acc[c : c + 4 * count] = list(warp(mine, multiply)[lane])

    mma.__doc__ = "acc += a @ b for one 16x16 tile against `count` 16x8 tiles (PTX mma.sync.m16n8k16)."
    return mma


MMA = {"fp16": _mma(f16_to_f32), "bf16": _mma(bf16_to_f32)}


def _pack(encode: Callable[[Any], Any]) -> Callable[[Any, Any], int]:
    def pack(low: Any, high: Any) -> int:
        return int(encode(np.array([low, high], np.float32)).view(np.uint32)[0])

    return pack


PACK = {"fp16": _pack(f32_to_f16), "bf16": _pack(f32_to_bf16)}


# --- whole accumulators: see numba_cuda_mma.py for the order of the sums -------------------------------


def grid_mma(precision: str, mt: int, nt: int) -> Callable[..., None]:
    """Make mma(acc, a, b): all tiles, from mt A operands (4 words each) and nt B operands (2 words each)."""
    one = MMA[precision]

    def mma(acc: Any, a: Any, b: Any) -> None:
        for i in range(mt):
            one(acc, i * nt * 4, a, 4 * i, b, 0, nt)

    return mma


def grid_finish(epilogue: str, mt: int, nt: int) -> Callable[..., None]:
    """Make finish(acc, bias): add bias[2j + e] to every sum, then nothing, `relu` or `gelu`."""

    def finish(acc: Any, bias: Any) -> None:
        for x in range(mt * nt * 4):
            value = acc[x] + bias[x // 4 % nt * 2 + x % 2]
            if epilogue == "bias_relu":
                value = np.float32(0) if value < 0 else value
            elif epilogue == "bias_gelu":
                value = gelu(value)
            acc[x] = value

    return finish


def grid_add(precision: str, mt: int, nt: int, m: int, n: int) -> Callable[..., None]:
    """Make add(acc, matrix, row, column): add to every sum its element of a 16-bit matrix [m, n]."""
    load = ACCESS[precision][0]

    def add(acc: Any, matrix: Any, row: int, column: int) -> None:
        for x in range(mt * nt * 4):
            r, s = row + x // 4 // nt * 16 + x // 2 % 2 * 8, column + x // 4 % nt * 8 + x % 2
            acc[x] = acc[x] + load(matrix, r * n + s if r < m and s < n else 0)

    return add


def grid_store(precision: str, mt: int, nt: int, m: int, n: int, exact: bool) -> Callable[..., None]:
    """Make store(c, acc, row, column): round the sums to 16 bits and write those inside c: [m, n]."""
    put = ACCESS[precision][1]

    def store(c: Any, acc: Any, row: int, column: int) -> None:
        for x in range(mt * nt * 4):
            r = row + x // 4 // nt * 16 + x // 2 % 2 * 8
            s = column + x // 4 % nt * 8 + x % 2
            if exact or (r < m and s < n):
                put(c, r * n + s, acc[x])

    return store
