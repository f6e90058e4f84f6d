"""AMX's tiles in Numba: packed and multiplied, by the instructions where they are and spelled out everywhere."""

# ruff: noqa: E402  # nothing below can be imported where numba or torch is missing
from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

MISSING = [name for name in ("torch", "numba") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed", allow_module_level=True)

import llvmlite.binding
import numba
import numpy as np
import torch
from numba.core import types

from rooftune.kernels.common import numba as vectors
from rooftune.kernels.common import numba_cpu as cpu
from rooftune.kernels.common import numba_tile as tiles
from rooftune.kernels.common import numba_tmul as tmul

HERE = "amx-tile" in cpu.native()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not HERE, reason="this CPU has no AMX"))])
def real(request: pytest.FixtureRequest) -> bool:
    """Whether the instructions themselves run."""
    return bool(request.param)


def _as(function: Any, count: int, real: bool) -> Any:
    instructions = cpu.native() if real else ()
    return vectors.intrinsic(
        [types.int64] * count, lambda e, *given: function.emit(vectors.Emit(e.builder, 16, instructions), *given)
    )


def packer(function: Any) -> Callable[..., None]:
    made = _as(function, 5, False)

    @numba.njit("void(int64, int64, int64, int64, int64)")
    def call(source, target, valid, stride, k):  # type: ignore[no-untyped-def]
        made(source, target, valid, stride, k)

    return lambda source, target, *sizes: call(source.data_ptr(), target.ctypes.data, *sizes)


def multiplier(form: Any, rows: int, columns: int, real: bool, **how: Any) -> Callable[..., None]:
    """(a, b, c, words, add[, bytes to the next step of a, and to the next row]) with the tiles configured for it."""
    enter, leave = _as(tmul.configure(), 0, real), _as(tmul.release(), 0, real)
    product = _as(tmul.tile(form, rows, columns, **how), 7, real)

    @numba.njit("void(int64, int64, int64, int64, int64, int64, int64)")
    def call(a, b, c, words, add, step, stride):  # type: ignore[no-untyped-def]
        enter()
        product(a, b, c, words, add, step, stride)
        leave()

    def multiply(
        a: Any, b: Any, c: Any, words: int, add: int, step: int = rows * tmul.ROW * form.planes, row: int = tmul.ROW
    ) -> None:
        call(a.ctypes.data, b.ctypes.data, c.ctypes.data, words, add, step, row)

    return multiply


def operands(dtype: str, rows: int, columns: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8) for n in (rows, columns))
    return (a, b) if dtype == "int8" else ((a / 64).bfloat16(), (b / 64).bfloat16())


@pytest.mark.parametrize("along_k", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (16, 64), (16, 32), (32, 16)])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_packed_panels_multiply_to_the_product(dtype: str, rows: int, columns: int, along_k: bool, real: bool) -> None:
    form, valid = tmul.FORMATS[dtype], rows - 3
    k = 37 * form.steps + 1  # two whole steps of 16 words, and some of a third
    words = -(-k // (16 * form.steps)) * 16
    a, b = operands(dtype, valid, columns, k)
    a_pack, b_pack = np.full((rows, words), -1, np.int32), np.full((columns, words), -1, np.int32)  # NaN, if read
    for source, target, pack in (
        (a, a_pack, tmul.pack(form, rows, along_k)),
        (b, b_pack, tiles.pack(form, columns, along_k, deep=16)),
    ):
        laid = source if along_k else source.t().contiguous()
        packer(pack)(laid, target, len(source), k if along_k else len(source), k)
    sums = np.full((rows, columns), 7, np.int32 if dtype == "int8" else np.float32)
    multiply = multiplier(form, rows, columns, real, stream="b")
    multiply(a_pack, b_pack, sums, words - 16, 0)  # what was there does not count
    rest = a_pack.reshape(-1)[(words - 16) * rows :], b_pack.reshape(-1)[(words - 16) * columns :]
    multiply(*rest, sums, 16, 1)  # and here it is added to
    want = a.double() @ b.double().t()
    np.testing.assert_allclose(sums[:valid], want.numpy(), rtol=0, atol=0 if dtype == "int8" else 1e-4)
    np.testing.assert_array_equal(sums[valid:], np.broadcast_to(sums[valid - 1], (3, columns)))  # the last row again


@pytest.mark.parametrize(("rows", "columns"), [(32, 16), (16, 32)])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_is_multiplied_where_it_lies(dtype: str, rows: int, columns: int, real: bool) -> None:
    form = tmul.FORMATS[dtype]
    k = 48 * form.steps
    a, b = operands(dtype, rows, columns, k)
    b_pack, sums = np.zeros((columns, 48), np.int32), np.zeros((rows, columns), np.int32)
    packer(tiles.pack(form, columns, True, deep=16))(b, b_pack, columns, k, k)
    sums = sums if dtype == "int8" else sums.astype(np.float32)
    laid = a.contiguous().view(torch.int8).numpy()
    multiplier(form, rows, columns, real)(laid, b_pack, sums, 48, 0, tmul.ROW, laid.shape[1])
    want = (a.double() @ b.double().t()).numpy()
    np.testing.assert_allclose(sums, want, rtol=0, atol=0 if dtype == "int8" else 1e-4)


def test_rows_of_a_tile_are_16_words_in_a_line() -> None:
    """So that a tile is 1 KB of memory, whatever the panel's rows are."""
    a, _ = operands("int8", 32, 1, 128)
    packed = np.zeros((2, 32, 64), np.int8)
    packer(tmul.pack(tmul.FORMATS["int8"], 32, True))(a, packed, 32, 128, 128)
    np.testing.assert_array_equal(packed, a.numpy().reshape(32, 2, 64).transpose(1, 0, 2))


@pytest.mark.skipif(not HERE, reason="this CPU has no AMX")
@pytest.mark.parametrize("dtype", ["fp32", "fixed", "bf16", "int8"])
def test_what_is_spelled_out_has_the_bits_of_the_instructions(dtype: str) -> None:
    rng, form = np.random.default_rng(5), tmul.FORMATS[dtype]
    rows, columns, integer = 16 if form.planes > 1 else 32, 16 if dtype == "fixed" else 32, form.accumulator == "int32"
    sizes = (rows, 64 * form.planes), (columns, 64 * form.planes)
    a, b = (rng.integers(-(2**31), 2**31, size, dtype=np.int64).astype(np.int32) for size in sizes)
    if not integer:  # products near the end of the range, subnormal ones, infinities and NaN
        for words in (a, b):
            halves = rng.standard_normal((*words.shape, 2)).astype(np.float32)
            halves *= np.float32(2.0) ** rng.integers(-70, 60, halves.shape)
            halves.reshape(-1)[::997] = np.resize(
                np.array([np.nan, np.inf, 2.0**-130, 3e38], np.float32), halves.reshape(-1)[::997].size
            )
            words.view(np.uint16).reshape(halves.shape)[:] = halves.view(np.uint32) >> 16
    found = []
    for real in (True, False):
        before = rng.standard_normal((3 if dtype == "fixed" else 1, rows, columns)).astype(np.float32)
        before = found[0][0].copy() if found else before
        c = before.copy()
        multiplier(form, rows, columns, real)(a, b, c, 64, 1)
        found.append((before, c))
    first, second = (c for _, c in found)
    nan = np.zeros_like(first, bool) if integer else np.isnan(first)
    assert integer or (0 < nan.sum() < nan.size)
    np.testing.assert_array_equal(first.view(np.int32)[~nan], second.view(np.int32)[~nan])
    assert integer or np.isnan(second[nan]).all()


def test_a_tile_that_needs_more_registers_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="48x32 takes more than 8"):
        tmul.tile(tmul.FORMATS["bf16"], 48, 32)


@pytest.fixture
def fresh() -> Iterator[None]:
    cpu.native.cache_clear()
    yield
    cpu.native.cache_clear()


@pytest.mark.parametrize("given", [True, False], ids=["by the user", "found"])
@pytest.mark.parametrize("allowed", [True, False])
def test_tiles_count_only_where_the_system_allows_them(
    monkeypatch: pytest.MonkeyPatch, fresh: None, allowed: bool, given: bool
) -> None:
    """Used without asking they are an illegal instruction, however numba came to know of them."""
    names = ("avx512f", "amx-tile", "amx-bf16", "amx-int8")
    found = {} if given else dict.fromkeys(names, True)
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: found)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", ",".join(f"+{n}" for n in names) if given else None)
    monkeypatch.setattr(cpu, "_tiles_allowed", lambda: allowed)
    assert cpu.native() == (frozenset(names) if allowed else {"avx512f"})
    assert cpu.tile_formats() == (("bf16", "int8") if allowed else ())


def test_only_linux_is_asked_for_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    assert not cpu._tiles_allowed()
