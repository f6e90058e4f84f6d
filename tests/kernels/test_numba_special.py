"""NaN, infinities and rows without a key in the Numba CPU competitors, against what the float64 references say.

A special value may change its own row (or column), in the way of the reference, and nothing else. An infinity in v has
no agreed answer where its key is masked (0 times infinity): under a causal mask only the key that all see gets one.
"""

# ruff: noqa: E402  # nothing below can be imported where numba or torch is missing
from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest

MISSING = [name for name in ("torch", "numba") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed", allow_module_level=True)
pytestmark = pytest.mark.slow

import numba
import torch

from rooftune import check, registry
from rooftune.core import Config

VALUES = (math.nan, math.inf, -math.inf)
Change = Callable[..., None]  # (value, *tensors): put the value in


def _rows(value: float, x: Any, *vectors: Any) -> None:
    """In the first, a middle and the last column; all of a row but one, and all of it."""
    x[1, 3], x[2, -1], x[4, 0] = value, value, value
    x[5, :-1], x[6] = value, value
    for place, vector in enumerate(vectors, 7):
        vector[place] = value


def _product(value: float, a: Any, b: Any, *bias: Any) -> None:
    a[2, 5], a[-1, -1], b[1, 7], b[-1, 3] = value, value, value, value
    for vector in bias:
        vector[11] = value


def _queries(value: float, q: Any, k: Any, v: Any) -> None:
    q[0, 0, 2, 0], q[0, -1, -1, -1] = value, value


def _keys(value: float, q: Any, k: Any, v: Any) -> None:
    """One of the last keys of a head, and every key of another: all of its scores are infinite (or NaN)."""
    k[0, 0, -2, 1] = value
    k[0, -1, :, 0] = value


def _values(value: float, q: Any, k: Any, v: Any) -> None:
    v[0, 0, 0, 3] = value


def agree(text: str, config: Config, change: Change, value: float, name: str = "numba") -> None:
    """Run on inputs with the value in them, and judge every number of the output; then once more for the same bits."""
    problem = registry.problem(text)
    op, module = registry.op(problem.op), registry.impl(f"{problem.op}/{name}").load()
    config = {**module.SPACE.default_for(problem), **config}
    assert module.SPACE.valid(config, problem), config
    tensors = op.inputs(problem, check.generator("cpu", 5))
    change(value, *tensors)
    reference = op.reference(problem, tensors)
    assert not bool(reference.value.isfinite().all()), "the value changes nothing: nothing is tested"
    assert bool(reference.value.isfinite().any())
    shape, dtype = op.output(problem)
    outs = [torch.full(shape, 9.0, dtype=getattr(torch, dtype)) for _ in range(2)]
    run = module.build(problem, config)
    for out in outs:
        run(out, *tensors)
    flat = outs[0].reshape(-1, shape[-1])
    wrong, _ = check.judge(op, problem, flat, reference, "special")
    assert not wrong, f"{problem} {config}, {value}: {wrong}"
    assert torch.equal(*(out.view(torch.uint8) for out in outs)), "other bits the second time"


FEW = {"read_b": "direct", "block_m": 168, "unroll": 1, "prefetch": "next", "multiply": "widen"}
PACKED = {"read_b": "packed", "block_m": 168, "block_k": 64, "unroll": 1, "prefetch": "next", "multiply": "widen"}
SHARED = {"block_k": 32, "query_tiles": 2}
HEADS = "attention[b=1,h=6,hkv=3,sq=37,sk=70,d=20"
CASES: dict[str, tuple[str, Config, tuple[Change, ...]]] = {
    "softmax": ("softmax[m=9,n=45]", {"rows": 4, "unroll": 2, "store": "stream"}, (_rows,)),
    "softmax of pairs": ("softmax[m=9,n=46,bf16]", {"rows": 4, "unroll": 1, "store": "stream"}, (_rows,)),
    "layernorm": ("layernorm[m=9,n=45,bf16]", {}, (_rows,)),
    "layernorm of pairs": ("layernorm[m=9,n=46,bf16]", {}, (_rows,)),
    "rmsnorm": ("layernorm[m=9,n=45,rms]", {}, (_rows,)),
    "product": ("gemm[m=33,n=70,k=90,transpose=nt,epilogue=bias_relu]", PACKED, (_product,)),
    "few rows": ("gemm[m=17,n=70,k=90,bf16]", {**FEW, "block_k": 8}, (_product,)),
    "attention": (f"{HEADS}]", SHARED, (_queries, _keys, _values)),
    "causal": (f"{HEADS},causal]", SHARED, (_queries, _keys, _values)),
    "blind": ("attention[b=1,h=6,hkv=3,sq=80,sk=50,d=20,causal]", SHARED, (_queries, _keys)),  # 30 see no key
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", CASES)
def test_special_values_stay_in_their_rows(name: str, value: float) -> None:
    text, config, changes = CASES[name]
    for change in changes:
        agree(text, config, change, value)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("flags", ["", ",causal"])
def test_special_values_stay_in_their_rows_where_keys_are_split(flags: str, value: float) -> None:
    for change in (_queries, _keys, _values):
        config: Config = {"block_k": 32, "rows": 2, "num_splits": 2}
        agree(f"{HEADS}{flags}]", config, change, value, "numba_decode")


def test_rows_that_see_no_key_are_zero_whatever_is_in_them() -> None:
    problem = registry.problem("attention[b=1,h=2,sq=80,sk=50,d=20,causal]")
    module = registry.impl("attention/numba").load()
    q, k, v = registry.op("attention").inputs(problem, check.generator("cpu", 6))
    q[:, :, 3] = math.nan
    out = torch.full_like(q, 9.0)
    module.build(problem, {**module.SPACE.default_for(problem), **SHARED})(out, q, k, v)
    assert bool((out[:, :, :30] == 0).all())
    assert bool((out[:, :, 30:] != 0).all())


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    text, changed, _ = CASES[name]
    problem = registry.problem(text)
    op, module = registry.op(problem.op), registry.impl(f"{problem.op}/numba").load()
    config = {**module.SPACE.default_for(problem), **changed}
    tensors, (shape, dtype) = op.inputs(problem, check.generator("cpu", 8)), op.output(problem)
    most, found = numba.config.NUMBA_NUM_THREADS, []
    if most < 2:
        pytest.skip("one thread is all there is")
    for count in (1, 2, 2):
        numba.set_num_threads(count)
        try:
            out = torch.full(shape, 9, dtype=getattr(torch, dtype))
            module.build(problem, config)(out, *tensors)
        finally:
            numba.set_num_threads(most)
        found.append(out)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1e4, 1e12, 3e38])
def test_softmax_of_huge_numbers(size: float, precision: str) -> None:
    """Where a product with log2(e) has no digits left, or overflows; two largest numbers share a row."""
    problem = registry.problem(f"softmax[m=5,n=46,{precision}]")
    op, module = registry.op("softmax"), registry.impl("softmax/numba").load()
    rows = torch.rand(5, 46, generator=check.generator("cpu", 7)) * 2 - 1
    rows[:, 11], rows[:3, 30] = 1.0, 1.0
    rows[4] -= 2.0  # all below 0
    tensors = [(rows * size).clamp(-size, size).to(getattr(torch, op.output(problem)[1]))]
    out = torch.empty_like(tensors[0])
    module.build(problem, module.SPACE.default_for(problem))(out, *tensors)
    wrong, _ = check.judge(op, problem, out, op.reference(problem, tensors), "huge")
    assert not wrong, wrong
