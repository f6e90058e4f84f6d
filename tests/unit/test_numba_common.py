"""The vector intrinsics and register tiles of the Numba CPU competitors, against numpy in float64."""

# ruff: noqa: E402  # nothing below can be imported where numba or torch is missing
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

MISSING = [name for name in ("torch", "numba") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed", allow_module_level=True)

import numba
import numpy as np
import torch
from numba import types

from rooftune import check, registry
from rooftune.core import UsageError
from rooftune.kernels.common import numba as vectors
from rooftune.kernels.common import numba_cpu as cpu
from rooftune.kernels.common import numba_dot as dots
from rooftune.kernels.common import numba_tile as tiles

WIDTHS = [4, 8, 16]  # LLVM splits vectors that are wider than the CPU's


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(vectors, "vector_width", lambda: request.param)
    return int(request.param)


def compiled(function: Any, count: int) -> Callable[..., None]:
    """An intrinsic of `count` whole numbers as something Python can call with arrays and numbers."""
    names = ", ".join(f"a{i}" for i in range(count))
    scope = {"function": function}
    exec(f"def call({names}):\n    function({names})", scope)
    ready = numba.njit("void(" + ", ".join(["int64"] * count) + ")")(scope["call"])
    return lambda *given: ready(*(x.ctypes.data if isinstance(x, np.ndarray) else x for x in given))


def element_wise(body: Callable[[Any, Any], Any], dtype: str = "fp32") -> Callable[..., None]:
    """(x fp32, out of dtype, n): body on every element."""

    def emit(e: Any, x: Any, out: Any, n: Any) -> None:
        def visit(chunk: Any, state: Any) -> list[Any]:
            chunk.store(body(e, chunk.load(x, "fp32")), out, dtype)
            return []

        e.row(n, [], visit, 2)

    return compiled(vectors.intrinsic([types.int64] * 3, emit), 3)


def test_exp2_is_within_one_ulp_and_keeps_special_values(width: int) -> None:
    power = element_wise(lambda e, x: e.exp2(x))
    x = np.concatenate([np.linspace(-126, 127, 200_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    out = np.empty_like(x)
    power(x, out, x.size)
    exact = np.exp2(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(out - exact) / ulp).max() <= 1.0
    special = np.array([0, 1, -3, -127, -200, -np.inf, np.nan], np.float32)
    power(special, out, special.size)
    np.testing.assert_array_equal(out[: special.size], np.array([1, 2, 0.125, 0, 0, 0, np.nan], np.float32))


@pytest.mark.parametrize(("degree", "error"), [(3, 1.1e-4), (4, 4e-6), (5, 2e-7)])
def test_a_shorter_exp2_keeps_its_bound_and_special_values(width: int, degree: int, error: float) -> None:
    power = element_wise(lambda e, x: e.exp2(x, degree))
    x = np.concatenate([np.linspace(-125, 0, 200_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    out = np.empty_like(x)
    power(x, out, x.size)
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(out - exact) / exact).max() <= error
    special = np.array([-127, -200, -3e38, -np.inf, np.nan], np.float32)
    power(special, out, special.size)
    np.testing.assert_array_equal(out[: special.size], np.array([0, 0, 0, 0, np.nan], np.float32))


@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 67, 128])
def test_a_row_is_visited_once_whatever_its_length(width: int, n: int) -> None:
    def emit(e: Any, x: Any, out: Any, n: Any) -> None:
        def body(chunk: Any, state: Any) -> list[Any]:
            value = chunk.load(x, "fp32")
            chunk.store(value, out, "fp32")
            return [e.builder.fadd(state[0], chunk.only_new(value)), e.max(value, state[1])]

        sums, largest = e.row(n, [0.0, float("-inf")], body, 2)
        total, top = e.total(sums), e.reduce(e.tree(largest, e.max), e.max)
        end = e.builder.add(out, e.builder.mul(n, e.index(4)))
        e.store_raw(total, end, 4)
        e.store_raw(top, e.builder.add(end, e.index(4)), 4)

    visit = compiled(vectors.intrinsic([types.int64] * 3, emit), 3)
    x = np.random.default_rng(n).integers(-50, 50, n).astype(np.float32)
    out = np.full(n + 3, 77, np.float32)
    visit(x, out, n)
    np.testing.assert_array_equal(out, [*x, x.sum(), x.max(), 77])


def test_max_takes_the_second_operand_if_one_is_nan(width: int) -> None:
    against = element_wise(lambda e, x: e.max(x, e.splat(1.0)))
    x = np.array([0, 2, np.nan, np.inf, -np.inf], np.float32)
    out = np.empty_like(x)
    against(x, out, x.size)
    np.testing.assert_array_equal(out, np.array([1, 2, 1, np.inf, 1], np.float32))


def test_bf16_rounds_to_nearest_even_as_torch_does(width: int) -> None:
    narrow = element_wise(lambda e, x: x, "bf16")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32)
    bits[::5] = (bits[::5] & 0xFFFF0000) | 0x8000  # halfway cases
    x = bits.view(np.float32)
    out = np.empty(x.size, np.uint16)
    narrow(x, out, x.size)
    want = torch.from_numpy(x).bfloat16()
    got = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()], want[~want.isnan()])


FORMATS = [("fp32", False), ("bf16", False), ("int8", False), ("bf16", True), ("int8", True)]


@pytest.mark.parametrize("along_k", [True, False])
@pytest.mark.parametrize(("dtype", "dot"), FORMATS)
def test_packed_panels_multiply_to_the_product(dtype: str, dot: bool, along_k: bool) -> None:
    form, lanes, k, valid = tiles.format_of(dtype, dot), cpu.vector_width(), 37, 3
    rows, columns, words = 4, 2 * lanes, -(-k // form.steps)
    generator = torch.Generator().manual_seed(1)
    stored = torch.randint(-100, 100, (valid, k), generator=generator).to(torch.int8)
    other = torch.randint(-100, 100, (columns, k), generator=generator).to(torch.int8)
    if dtype != "int8":
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        stored, other = (stored / 64).to(kind), (other / 64).to(kind)
    a_pack, b_pack = np.full((rows, words), -1, np.int32), np.full((columns, words), -1, np.int32)
    for source, target, size, flip in ((stored, a_pack, rows, form.unsigned_a), (other, b_pack, columns, False)):
        laid = source if along_k else source.t().contiguous()
        stride = k if along_k else len(source)
        pack = compiled(tiles.pack(form, size, along_k, flip), 5)
        pack(laid.data_ptr(), target, len(source), stride, k)
    sums = np.zeros((rows, columns), np.int32 if dtype == "int8" else np.float32)
    multiply = compiled(tiles.tile(form, rows, columns), 5)
    multiply(a_pack, b_pack, sums, words - 1, 0)
    half = a_pack.reshape(-1)[(words - 1) * rows :], b_pack.reshape(-1)[(words - 1) * columns :]
    multiply(*half, sums, 1, 1)  # the rest of k is added to what is there
    want = stored.double() @ other.double().t()
    if form.unsigned_a:
        want = want + 128 * other.double().sum(1)
    np.testing.assert_allclose(sums[:valid], want.numpy(), rtol=0, atol=0 if dtype == "int8" else 2e-5)


@pytest.mark.parametrize(("dtype", "dot"), [("fp32", False), ("int8", False)])
@pytest.mark.parametrize("past", [False, True])
def test_a_tile_is_placed_between_what_is_there(dtype: str, dot: bool, past: bool) -> None:
    form, lanes, k = tiles.format_of(dtype, dot), cpu.vector_width(), 24
    rows, columns, words = 3, 2 * lanes, -(-k // form.steps)
    kind = np.int32 if dtype == "int8" else np.float32
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-9, 9, (rows, k), generator=generator).to(torch.int8 if dtype == "int8" else torch.float32)
    b = torch.randint(-9, 9, (k, columns), generator=generator).to(a.dtype)
    a_pack, b_pack = np.zeros((rows, words), np.int32), np.zeros((columns, words), np.int32)
    compiled(tiles.pack(form, rows, True), 5)(a.data_ptr(), a_pack, rows, k, k)
    compiled(tiles.pack(form, columns, False), 5)(b.data_ptr(), b_pack, columns, columns, k)
    space = np.full(5 * columns * rows + 16, 7, kind)
    out = space[-space.ctypes.data % 64 // 4 :][: 5 * columns * rows].reshape(rows, 5 * columns)  # begins with a line
    first = np.arange(columns).astype(kind)
    multiply = compiled(tiles.tile(form, rows, columns, placed=True), 8)
    multiply(a_pack, b_pack, out[:, columns:], words, 0, 5 * columns * 4, first.ctypes.data, past)
    want = (a.double() @ b.double()).numpy() + first
    assert (out[:, columns : 2 * columns] == want).all()
    assert (out[:, :columns] == 7).all()
    assert (out[:, 2 * columns :] == 7).all()
    multiply(a_pack, b_pack, out[:, columns:], words, 0, 5 * columns * 4, 0, past)
    assert (out[:, columns : 2 * columns] == want - first).all()
    multiply(a_pack, b_pack, out[:, columns:], words, 1, 5 * columns * 4, first.ctypes.data, past)
    assert (out[:, columns : 2 * columns] == 2 * (want - first)).all()


def words_of(rng: np.random.Generator, special: bool) -> tuple[np.ndarray, np.ndarray]:
    """Words of two bf16, and the same as fp32 [words, (upper, lower)]; special: with NaN, infinities, subnormals."""
    halves = (rng.standard_normal((64, 2)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    if special:
        halves.reshape(-1)[::7] = np.array(
            [np.nan, np.inf, -np.inf, 2.0**-130, -(2.0**-127), 2.0**120, 0] * 3, np.float32
        )[:19]
    upper, lower = halves.view(np.uint32).T
    return (upper | (lower >> 16)).astype(np.uint32), halves


def three_vectors(combine: Callable[..., Any], accumulator: str) -> Callable[..., None]:
    """(total, x, y, out, n): combine on words, n a multiple of the lanes."""

    def emit(e: Any, total: Any, x: Any, y: Any, out: Any, n: Any) -> None:
        def body(at: Any, _: Any) -> list[Any]:
            kind = e.vector if accumulator == "fp32" else e.ints
            sums = e.load_raw(e.offset(total, at, 4), kind, 4)
            words = [e.load_raw(e.offset(base, at, 4), e.ints, 4) for base in (x, y)]
            e.store_raw(combine(e, sums, *words), e.offset(out, at, 4), 4)
            return []

        e.loop(e.index(0), n, e.width, [], body)

    return compiled(vectors.intrinsic([types.int64] * 5, emit), 5)


@pytest.mark.parametrize("special", [False, True])
def test_a_dot_product_of_bf16_takes_two_fused_steps_without_subnormals(width: int, special: bool) -> None:
    rng = np.random.default_rng(3)
    (x, left), (y, right) = words_of(rng, special), words_of(rng, False)
    total = rng.standard_normal(64).astype(np.float32)
    out = np.empty_like(total)
    three_vectors(dots.bf16_pairs, "fp32")(total, x, y, out, 64)
    tiny, want = 2.0**-126, total
    with np.errstate(invalid="ignore", over="ignore"):
        for step in range(2):
            pair = [np.where(np.abs(h[:, step]) < tiny, 0, h[:, step]).astype(np.float64) for h in (left, right)]
            want = (want.astype(np.float64) + pair[0] * pair[1]).astype(np.float32)
    np.testing.assert_array_equal(out, want)
    assert bool(np.isfinite(want).all()) != special


@pytest.mark.parametrize("dot", [dots.int8_fours, dots.int16_pairs], ids=["vpdpbusd", "pmaddwd"])
def test_dot_products_of_integers_are_exact(width: int, dot: Callable[..., Any]) -> None:
    rng = np.random.default_rng(4)
    x, y, total = (rng.integers(-(2**31), 2**31, 64).astype(np.int32) for _ in range(3))
    x[0], y[0] = -1, -(2**31) + 0x808080  # 255 times -128, four times
    out = np.empty_like(total)
    three_vectors(dot, "int32")(total, x, y, out, 64)
    kinds = (np.uint8, np.int8) if dot is dots.int8_fours else (np.int16, np.int16)
    parts = (v.view(kind).reshape(64, -1).astype(np.int64) for v, kind in zip((x, y), kinds, strict=True))
    want = total + np.prod(list(parts), axis=0).sum(1)
    np.testing.assert_array_equal(out, want.astype(np.int32))


def _pairs(rounding: Callable[..., Any], first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> Any:
    """The lower and the upper halves of rounded words, as fp32."""

    def pack(e: Any, first: Any, second: Any, _: Any) -> Any:
        return rounding(e, first, e.builder.bitcast(second, e.vector))

    out = np.empty(64, np.uint32)
    three_vectors(pack, "fp32")(first, second.view(np.int32), second, out, 64)
    return [half.astype(np.uint32).view(np.float32) for half in (out << 16, out & 0xFFFF0000)]


def test_pairs_of_probabilities_are_rounded_to_the_nearest_bf16(width: int) -> None:
    rng = np.random.default_rng(5)
    values = rng.random((2, 64), np.float32) * 256
    values[:, 0], values[:, 1], values[:, 2] = np.nan, 0, 256
    for value, half in zip(values, _pairs(dots.round_pairs, *values), strict=True):
        np.testing.assert_array_equal(half, torch.from_numpy(value).bfloat16().float().numpy())


def test_pairs_are_rounded_to_nearest_even(width: int) -> None:
    rng = np.random.default_rng(6)
    values = rng.standard_normal((2, 64)).astype(np.float32)
    values[:, :6] = np.nan, np.inf, -np.inf, -0.0, 3.3961774e38, -3.3961774e38  # the last two round to infinity
    halves = values.view(np.uint32)  # halfway between two bf16, whose last bit is even, or odd
    halves[:, 6:8] = 0x3F808000, 0x3F818000
    for value, half in zip(values, _pairs(dots.nearest_pairs, *values), strict=True):
        np.testing.assert_array_equal(half, torch.from_numpy(value).bfloat16().float().numpy())


def test_a_square_is_transposed(width: int) -> None:
    def emit(e: Any, x: Any, out: Any) -> None:
        rows = [e.load_raw(e.builder.add(x, e.index(i * width * 4)), e.ints, 4) for i in range(width)]
        for i, row in enumerate(tiles.transpose(e, rows)):
            e.store_raw(row, e.builder.add(out, e.index(i * width * 4)), 4)

    x = np.arange(width * width, dtype=np.int32).reshape(width, width)
    out = np.empty_like(x)
    compiled(vectors.intrinsic([types.int64] * 2, emit), 2)(x, out)
    np.testing.assert_array_equal(out, x.T)


def test_fp16_is_refused_without_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "native", lambda: frozenset({"sse2"}))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(UsageError, match="F16C"):
        cpu.require("fp16")
    cpu.require("bf16")


def test_norms_pass_the_gate_on_this_cpu() -> None:
    p = registry.problem("layernorm[m=8,n=500,fp32]")
    module = registry.impl("layernorm/numba").load()
    config = module.SPACE.default_for(p)
    verdict = check.check(registry.op(p.op), p, config, module.build, seed=1, valid=module.SPACE.valid)
    assert verdict.ok, verdict
