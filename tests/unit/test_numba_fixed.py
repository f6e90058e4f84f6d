"""fp32 in fixed point: digits and how they are packed, scales, what their products add up to, and the check of it."""

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
from rooftune.kernels.common import numba_fixed as fixed
from rooftune.kernels.common import numba_suits as look

Array = np.ndarray[Any, Any]
WEIGHTS = np.array([65536.0, 256.0, 1.0])


def _of_sixteen(function: Any, count: int, returns: Any = types.void) -> Any:
    """As for a CPU with AVX-512 and no instruction of its own, whatever runs it."""
    return vectors.intrinsic(
        [types.int64] * count, lambda e, *given: function.emit(vectors.Emit(e.builder, 16, ()), *given), returns
    )


@cache
def _packer(along_k: bool, left: bool, stream: bool) -> Any:
    several = fixed.panels_by(
        _of_sixteen(fixed.largest(along_k), 6),
        _of_sixteen(fixed.settle(), 1),
        _of_sixteen(fixed.pack(along_k, left, stream), 7),
        along_k,
    )

    @numba.njit("void(int64, int64, int64, int64, int64, int64, int64, int64)")
    def call(source, target, first, stop, count, k, start, numbers):  # type: ignore[no-untyped-def]
        several(source, target, first, stop, count, k, start, numbers)

    return call


def packed(x: torch.Tensor, along_k: bool, left: bool, start: int, stream: bool = False) -> tuple[Array, Array, Array]:
    """Of a matrix [rows, k], numbers of k from `start` on: heads [panels, 3, 16], digits [panels, 16, steps, 64, 3] and
    sizes [panels, 16, looks, 64]."""
    count, k = x.shape
    laid = x.contiguous() if along_k else x.t().contiguous()
    panels, numbers = -(-count // 16), k - start
    steps, wide = -(-numbers // 64), fixed.panel.py_func(16, numbers)
    space = np.full(panels * wide + 128, 0x55, np.uint8)
    begin = -space.ctypes.data % 64
    _packer(along_k, left, stream)(laid.data_ptr(), space.ctypes.data + begin, 0, panels, count, k, start, numbers)
    assert (space[:begin] == 0x55).all()
    assert (space[begin + panels * wide :] == 0x55).all()
    shaped = space[begin : begin + panels * wide].reshape(panels, wide)
    heads = shaped[:, :192].copy().view(np.float32).reshape(panels, 3, 16)

    def unfold(blocks: Array) -> Array:
        """[..., 1 KB] to [..., 16 rows, 64 numbers of k in their order]."""
        words = blocks.reshape(*blocks.shape[:-1], 16, 16, 4)
        words = words if left else words.swapaxes(-3, -2)
        return words.transpose(*range(words.ndim - 2), -1, -2)[..., [0, 2, 1, 3], :].reshape(*words.shape[:-2], 64)

    tiles = shaped[:, fixed.HEAD :].copy().view(np.int8).reshape(panels, -1, 1024)
    digits = unfold(tiles[:, : 3 * steps].reshape(panels, steps, 3, 1024))
    return heads, digits.transpose(0, 3, 1, 4, 2), unfold(tiles[:, 3 * steps :]).swapaxes(1, 2)


@pytest.mark.parametrize(("rows", "k", "start"), [(32, 640, 0), (37, 333, 64), (1, 1, 0), (17, 64, 0), (21, 200, 192)])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("along_k", [True, False])
def test_three_digits_are_the_number(along_k: bool, left: bool, rows: int, k: int, start: int) -> None:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(4))
    heads, digits, sizes = packed(x, along_k, left, start, stream=rows == 32)
    panels, steps = len(digits), digits.shape[2]
    scale, reciprocal, marks = (heads[:, i].reshape(-1).astype(np.float64) for i in range(3))
    own = x[:, start:].double().numpy()
    most = np.abs(own).max(axis=1) * scale[:rows]
    assert (most <= 127 * 256).all()
    assert (most > 127 * 256 * 8 / 9).all()  # four bits of a scale
    np.testing.assert_array_equal(scale[:rows] * 2.0 ** (3 - np.floor(np.log2(scale[:rows]))) % 1, 0)
    np.testing.assert_allclose(reciprocal[:rows] * scale[:rows], 1, rtol=1e-7)
    assert (heads[:, 2].view(np.int32).reshape(-1)[:rows] == -1).all()
    whole = (digits.astype(np.float64) @ WEIGHTS).reshape(panels * 16, steps * 64)
    error = np.abs(whole[:rows, : k - start] - own * scale[:rows, None] * 256)
    assert (error <= 0.5 + 127 * 65536 * 2.0**-24).all()  # rounded to a whole number, the product before it to fp32
    assert not whole[:, k - start :].any()
    behind = np.broadcast_to(whole[rows - 1], (panels * 16 - rows, steps * 64))
    np.testing.assert_array_equal(whole[rows:], behind if along_k else np.zeros_like(behind))
    looked = digits[:, :, :: max(1, steps // fixed.LOOKS), :, 0]
    np.testing.assert_array_equal(sizes, np.abs(looked.astype(np.int16)))
    assert marks.shape == (panels * 16,)


def test_small_whole_numbers_stay_exact() -> None:
    x = torch.randint(-900, 901, (16, 64), generator=torch.Generator().manual_seed(4)).float() / 32
    heads, digits, _ = packed(x, True, True, 0)
    whole = (digits.astype(np.float64) @ WEIGHTS).reshape(16, 64) / heads[0, 0].astype(np.float64)[:, None] / 256
    np.testing.assert_array_equal(whole, x.double().numpy())


@pytest.mark.parametrize("along_k", [True, False])
def test_a_row_has_a_scale_or_is_marked(along_k: bool) -> None:
    x = torch.ones(8, 70)
    for i, value in enumerate((0.0, math.nan, math.inf, -math.inf, 2.0**-49, 2.0**-48, 2.0**75, 2.0**76)):
        x[i] = 0.0
        x[i, 65] = value
    heads, digits, _ = packed(x, along_k, True, 0)
    scales, marks = heads[0, :2, :8], heads.view(np.int32)[0, 2, :8]
    there = np.array([False, False, False, False, False, True, True, False])
    assert (scales[:, there] > 0).all()
    assert not scales[:, ~there].any()
    np.testing.assert_array_equal(marks, [0, -1, -1, -1, -1, -1, -1, -1])
    assert digits[0, 5:7, 1, 1, 0].min() > 100
    assert not digits[0, 0].any()


@cache
def _resulter() -> Any:
    made = _of_sixteen(fixed.results(), 6)

    @numba.njit("void(int64, int64, int64, int64, int64, int64)")
    def call(sums, a, b, c, enough, add):  # type: ignore[no-untyped-def]
        made(sums, a, b, c, enough, add)

    return call


def resulted(sums: Array, a: Array, b: Array, enough: int, before: Array | None = None) -> Array:
    """Of sums [4, 16, 16] and heads [3, 16]."""
    c = np.full((16, 16), 7.0, np.float32) if before is None else before.copy()
    given = [np.ascontiguousarray(x) for x in (sums.astype(np.int32), a.view(np.int32), b.view(np.int32))]
    _resulter()(*(x.ctypes.data for x in given), c.ctypes.data, enough, before is not None)
    return c


def head(scales: Array, marks: int = -1) -> Array:
    scales = scales.astype(np.float32)
    return np.stack([scales, (1 / scales).astype(np.float32), np.full(16, marks, np.int32).view(np.float32)])


def test_sums_are_divided_by_both_scales_to_the_last_bit() -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.integers(8, 16, 16) * 2.0 ** rng.integers(-30, 30, 16) for _ in range(2))
    sums = rng.integers(-(2**24), 2**24, (4, 16, 16))
    sums[1:3] = 0  # of one digit: the quotient has an exact nearest number
    sums[3] = 100
    want = sums[0] * 65536.0 / np.outer(a, b)
    np.testing.assert_array_equal(resulted(sums, head(a), head(b), 100), want.astype(np.float32))
    sums[1:3] = rng.integers(-(2**20), 2**20, (2, 16, 16))
    want = (WEIGHTS @ sums[:3].reshape(3, -1)).reshape(16, 16) / np.outer(a, b)
    found = resulted(sums, head(a), head(b), 100)
    np.testing.assert_allclose(found, want, rtol=2.0**-22)
    before = rng.standard_normal((16, 16)).astype(np.float32)
    np.testing.assert_array_equal(resulted(sums, head(a), head(b), 100, before), before + found)


def test_a_result_whose_terms_are_small_is_nan_unless_its_row_is_zero() -> None:
    sums, ones = np.full((4, 16, 16), 50), head(np.full(16, 1.0))
    sums[3, 4, 9] = 49
    expected = np.zeros((16, 16), bool)
    expected[4, 9] = True
    np.testing.assert_array_equal(np.isnan(resulted(sums, ones, ones, 50)), expected)
    for a, b in ((head(np.full(16, 1.0), 0), ones), (ones, head(np.full(16, 1.0), 0))):
        assert np.isfinite(resulted(sums, a, b, 50)).all()


@cache
def _suitor(a_along_k: bool, b_along_k: bool) -> Any:
    evenness = {x: _of_sixteen(look.evenness(x), 4, types.float32) for x in (True, False)}
    suits = look.suits_by(evenness[a_along_k], evenness[b_along_k], a_along_k, b_along_k)

    @numba.njit("int64(int64, int64, int64, int64, int64, int64)")
    def call(a, b, m, n, k, block):  # type: ignore[no-untyped-def]
        return suits(a, b, m, n, k, block)

    return call


CASES = {  # rows of a from rows of N(0, 1)
    "normal": (lambda x: x, True),
    "uniform": (torch.sigmoid, True),
    "half of it zero": (torch.relu, False),
    "large in some columns": (lambda x: x * (1 + 30 * (torch.arange(x.shape[1]) % 64 == 0)), False),
    "powers": (lambda x: x * 2.0 ** (torch.arange(x.shape[1]) % 24), False),
    "zero": (torch.zeros_like, False),
    "some of it nan": (lambda x: x.masked_fill(x > 3, math.nan), False),
    "infinite": (lambda x: torch.full_like(x, math.inf), False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("along_k", [True, False])
def test_a_look_at_some_rows_tells_whether_fixed_point_suits(case: str, along_k: bool) -> None:
    change, suits = CASES[case]
    generator = torch.Generator().manual_seed(8)
    even, odd = torch.randn(40, 512, generator=generator), change(torch.randn(50, 512, generator=generator))
    laid = [x.contiguous() if along_k else x.t().contiguous() for x in (even, odd)]
    call = _suitor(along_k, along_k)
    for a, b in (laid, laid[::-1]):
        m, n = (x.numel() // 512 for x in (a, b))
        assert bool(call(a.data_ptr(), b.data_ptr(), m, n, 512, 512)) == suits
    few = torch.randn(3, 512, generator=generator)  # fewer than 16
    few = few if along_k else few.t().contiguous()
    assert call(few.data_ptr(), laid[0].data_ptr(), 3, 40, 512, 512)
