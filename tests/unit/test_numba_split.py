"""fp32 as three bf16: the parts, how they are packed, and what their products add up to."""

# ruff: noqa: E402  # nothing below can be imported where numba or torch is missing
from __future__ import annotations

import importlib.util
import math
from functools import cache
from typing import Any

import pytest

MISSING = [name for name in ("torch", "numba") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed", allow_module_level=True)

import numba
import numpy as np
import torch
from numba.core import types

from rooftune.kernels.common import numba as vectors
from rooftune.kernels.common import numba_split as split
from rooftune.kernels.common import numba_tmul as tmul

STEP = 32  # numbers of k


def _of_sixteen(emit: Any, count: int, returns: Any = types.void) -> Any:
    """As for a CPU with AVX-512 and no instruction of its own, whatever runs it."""
    return vectors.intrinsic(
        [types.int64] * count, lambda e, *given: emit(vectors.Emit(e.builder, 16, ()), *given), returns
    )


@cache
def _splitter() -> Any:
    def emit(e: Any, source: Any, target: Any) -> None:
        b = e.builder
        given = [e.load(b.add(source, e.index(64 * i)), "fp32") for i in range(2)]
        for i, word in enumerate(split.parts(e, *given)):
            e.store_raw(word, b.add(target, e.index(64 * i)), 4)

    made = _of_sixteen(emit, 2)

    @numba.njit("void(int64, int64)")
    def call(source, target):  # type: ignore[no-untyped-def]
        made(source, target)

    return call


def _parts(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[3, n] in float64: the parts of fp32 numbers, 32 at a time."""
    out = np.zeros((3, x.size), np.float32)
    for start in range(0, x.size, 32):
        own, words = np.ascontiguousarray(x[start : start + 32], np.float32), np.zeros((3, 16, 2), np.uint16)
        _splitter()(own.ctypes.data, words.ctypes.data)
        bits = words.transpose(0, 2, 1).reshape(3, 32).astype(np.uint32) << 16  # the first vector in lower halves
        out[:, start : start + 32] = bits.view(np.float32)
    return out.astype(np.float64)


def test_three_bf16_are_the_number() -> None:
    rng = np.random.default_rng(3)
    x = (rng.uniform(1, 2, 3200) * 2.0 ** rng.integers(-109, 127, 3200)).astype(np.float32)
    x[::2] *= -1
    x[:6] = (0.0, 2.0**-110 * 1.0000001, -1.0, 1 - 2.0**-24, 1 + 2.0**-23, 255.5)
    parts = _parts(x)
    np.testing.assert_array_equal(parts.sum(axis=0), x.astype(np.float64))
    size = np.abs(x.astype(np.float64))
    assert (np.abs(parts[1]) <= size * 2.0**-8).all()
    assert (np.abs(parts[2]) <= size * 2.0**-16).all()


@pytest.mark.parametrize(
    "bits",
    [
        *(0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF80ABCD),  # NaN, with payloads that rounding would wrap
        *(0x7F800000, 0xFF800000, 0x7F7F8000, 0xFF7FFFFF),  # infinite, and what bf16 rounds to it
        *(0x087FFFFF, 0x807FFFFF, 0x00800000, 0x80000001),  # below 2^-110, and subnormal
    ],
)
def test_what_has_no_three_parts_makes_a_sum_nan(bits: int) -> None:
    x = np.ones(32, np.float32)
    x.view(np.uint32)[[3, 20]] = bits
    with np.errstate(invalid="ignore"):
        parts = _parts(x)
        assert np.isnan(parts.sum(axis=0)[[3, 20]]).all()
    others = np.delete(parts, [3, 20, 3 + 16, 20 - 16], axis=1)  # the other number of a pair is spoiled with it
    np.testing.assert_array_equal(others, np.tile([[1.0], [0.0], [0.0]], 28))


def test_the_largest_and_the_smallest_that_have_parts() -> None:
    x = np.full(32, np.array(0x7F7F7FFF, np.uint32).view(np.float32))
    x[::2] = 2.0**-110
    np.testing.assert_array_equal(_parts(x).sum(axis=0), x.astype(np.float64))


@cache
def _packer(size: int, along_k: bool, left: bool, stream: bool) -> Any:
    made = _of_sixteen(split.pack(size, along_k, left, stream).emit, 5)

    @numba.njit("void(int64, int64, int64, int64, int64)")
    def call(source, target, valid, stride, k):  # type: ignore[no-untyped-def]
        made(source, target, valid, stride, k)

    return call


def packed(
    size: int, along_k: bool, left: bool, valid: int, k: int, stream: bool = False
) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """A random matrix [valid, k], and its panel as float64 [steps, parts, size, 32]."""
    x = torch.randn(valid, k, generator=torch.Generator().manual_seed(4))
    laid = x.contiguous() if along_k else x.t().contiguous()
    steps = -(-k // STEP)
    space = np.full(steps * 3 * size * 64 + 128, 0xFF, np.uint8)
    start = -space.ctypes.data % 64
    call = _packer(size, along_k, left, stream)
    call(laid.data_ptr(), space.ctypes.data + start, valid, k if along_k else valid, k)
    assert (space[start + steps * 3 * size * 64 :] == 0xFF).all()
    assert (space[:start] == 0xFF).all()
    words = space[start : start + steps * 3 * size * 64].view(np.uint16)
    shaped = (
        words.reshape(steps, 3, size, 16, 2) if left else words.reshape(steps, 3, 16, size, 2).transpose(0, 1, 3, 2, 4)
    )
    return x, (shaped.astype(np.uint32) << 16).view(np.float32).astype(np.float64).reshape(steps, 3, size, STEP)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("valid", "k"), [(32, 64), (29, 77), (1, 1), (17, 31)])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("along_k", [True, False])
def test_panels_hold_the_matrix_and_what_does_no_harm_behind_it(
    along_k: bool, left: bool, valid: int, k: int, stream: bool
) -> None:
    x, panel = packed(32, along_k, left, valid, k, stream)
    whole = panel.sum(axis=1).transpose(1, 0, 2).reshape(32, -1)
    np.testing.assert_array_equal(whole[:valid, :k], x.double().numpy())
    again = np.broadcast_to(whole[valid - 1], (32 - valid, whole.shape[1]))
    np.testing.assert_array_equal(whole[valid:], again if along_k else np.zeros_like(again))
    assert not whole[:, k:].any()


def test_the_six_largest_products_are_those_multiplied() -> None:
    largest = [(i, j) for i in range(3) for j in range(3) if i + j < 3]
    assert sorted(tmul.turns(split.SPLIT)) == [(i, j, 0) for i, j in largest]
    assert sorted(tmul.turns(tmul.FORMATS["fixed"])) == [(i, j, i + j) for i, j in largest]


@pytest.mark.parametrize("place", [0, 17, 31])
@pytest.mark.parametrize(("value", "found"), [(math.nan, True), (-math.inf, True), (3.4e38, False)])
def test_a_tile_is_spoiled_by_what_is_not_finite(value: float, found: bool, place: int) -> None:
    lost = split.spoiled()

    @numba.njit("int64(int64, int64)")
    def call(sums, count):  # type: ignore[no-untyped-def]
        return lost(sums, count)

    sums = np.ones(32, np.float32)
    sums[place] = value
    assert bool(call(sums.ctypes.data, 32)) == found


@pytest.mark.parametrize("a_along_k", [True, False])
@pytest.mark.parametrize("b_along_k", [True, False])
def test_a_tile_is_computed_again_from_the_numbers(a_along_k: bool, b_along_k: bool) -> None:
    again, k = split.again(16, 32, a_along_k, b_along_k), split.AGAIN + 9

    @numba.njit("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
    def call(a, b, c, height, width, stride_a, stride_b, k, spare):  # type: ignore[no-untyped-def]
        again(a, b, c, height, width, stride_a, stride_b, k, spare)

    a, b = torch.randn(11, k), torch.randn(21, k)
    a[3, 2] = math.inf
    laid = [x.contiguous() if along else x.t().contiguous() for x, along in ((a, a_along_k), (b, b_along_k))]
    c, spare = np.full((17, 32), 7.0, np.float32), np.full(split.AGAIN * 48 + 16, 7.0, np.float32)
    strides = (k if a_along_k else 11, k if b_along_k else 21)
    call(laid[0].data_ptr(), laid[1].data_ptr(), c.ctypes.data, 11, 21, *strides, k, spare.ctypes.data)
    np.testing.assert_allclose(c[:11, :21], (a.double() @ b.double().t()).numpy(), rtol=1e-5, atol=1e-4)
    assert (c[16:] == 7.0).all()
    assert (spare[split.AGAIN * 48 :] == 7.0).all()
