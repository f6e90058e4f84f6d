"""Scores in fixed point: what has no scale spoils them, and where their error may show is found."""

# ruff: noqa: E402  # nothing below can be imported where numba or torch is missing
from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest

MISSING = [name for name in ("torch", "numba") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed", allow_module_level=True)

import numba
import numpy as np
from numba.core import types

from rooftune.kernels.common import numba as vectors
from rooftune.kernels.common import numba_fixed as fixed
from rooftune.kernels.common import numba_scores as scores
from rooftune.kernels.common import numba_split as split


def _of_sixteen(function: Any, signature: list[Any], returns: Any = types.void) -> Any:
    """As for a CPU with AVX-512 and no instruction of its own, whatever runs it."""
    return vectors.intrinsic(
        signature, lambda e, *given: function.emit(vectors.Emit(e.builder, 16, ()), *given), returns
    )


def test_what_has_no_scale_is_nan_and_a_row_of_zeros_is_not() -> None:
    spoil = _of_sixteen(scores.unscaled(), [types.int64])

    @numba.njit("void(int64)")
    def call(head):  # type: ignore[no-untyped-def]
        spoil(head)

    head = np.zeros((3, 16), np.float32)
    head[0, 2:], head[1, 2:] = 8.0, 0.125
    head[2].view(np.int32)[1:] = -1  # row 0: zeros; row 1: no scale
    call(head.ctypes.data)
    assert head[1, 0] == 0
    assert np.isnan(head[1, 1])
    assert (head[1, 2:] == 0.125).all()


def test_the_widest_row_counts_unless_it_is_nan() -> None:
    widest = _of_sixteen(scores.widest(), [types.int64], types.float32)

    @numba.njit("float32(int64)")
    def call(head):  # type: ignore[no-untyped-def]
        return widest(head)

    head = np.zeros((3, 16), np.float32)
    head[1] = np.arange(16)
    head[1, 15] = math.nan
    assert call(head.ctypes.data) == 14


@pytest.mark.parametrize(
    ("largest", "found"), [(0.0, True), (-3.0, True), (-5.0, False), (5.0, False), (-math.inf, False)]
)
def test_an_error_may_show_beside_small_scores(largest: float, found: bool) -> None:
    """Of a query: 4 standard deviations against what fp32 may have, 2^-22 (1 + largest score)."""
    uneven = _of_sixteen(scores.uneven(), [types.int64, types.int64, types.float32, types.float32], types.int64)

    @numba.njit("int64(int64, int64, float32, float32)")
    def call(head, maxima, top, bound):  # type: ignore[no-untyped-def]
        return uneven(head, maxima, top, bound)

    head, maxima = np.full((3, 16), 1e-9, np.float32), np.full(16, 1e3, np.float32)
    head[1, 5], maxima[5] = 1e-4, largest / math.log(2)
    d = 100
    top = 5 * 2.0**-22 / (4 * 31) * math.sqrt(d) / 1e-4  # met from scores of 4 on
    assert bool(call(head.ctypes.data, maxima.ctypes.data, top, scores.BOUND * math.sqrt(d))) == found


def test_panels_fit_where_those_of_split_numbers_lie() -> None:
    for d in range(scores.LEAST, 257):
        steps = -(-d // fixed.STEP)
        assert fixed.HEAD + steps * fixed.THICK <= 16 * scores.apart.py_func(d) == split.panel.py_func(16, d)
