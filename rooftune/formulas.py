"""The operators' forward in torch's own calls: differentiated for gradients, and a second opinion on outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rooftune.core import Problem

Formula = Callable[[Problem, Sequence[Any]], Any]


def _softmax(problem: Problem, inputs: Sequence[Any]) -> Any:
    import torch

    return torch.softmax(inputs[0], -1)


def _layernorm(problem: Problem, inputs: Sequence[Any]) -> Any:
    from torch.nn import functional

    from rooftune.kernels.layernorm import EPS

    shape = (problem["n"],)
    if problem.flag("rms"):
        return functional.rms_norm(inputs[0], shape, inputs[1], EPS)
    return functional.layer_norm(inputs[0], shape, inputs[1], inputs[2], EPS)


def _attention(problem: Problem, inputs: Sequence[Any]) -> Any:
    """The causal mask is aligned at the bottom right; a query that sees no key has output and gradient 0."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = inputs
    sq, sk = problem["sq"], problem["sk"]
    options: dict[str, Any] = {"enable_gqa": True} if problem["h"] != problem["hkv"] else {}
    if not problem.flag("causal"):
        return scaled_dot_product_attention(q, k, v, **options)
    if sq == sk:
        return scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    blind = max(0, sq - sk)  # rows that see no key: SDPA would give NaN, and NaN gradients
    seen = torch.ones(sq - blind, sk, dtype=torch.bool, device=q.device).tril(sk - sq + blind)
    rest = scaled_dot_product_attention(q[:, :, blind:], k, v, attn_mask=seen, **options)
    return torch.cat((torch.zeros_like(q[:, :, :blind]), rest), 2) if blind else rest


def _gemm(problem: Problem, inputs: Sequence[Any]) -> Any:
    import torch

    ta, tb = tuple(problem.flag("transpose", "nn"))
    a = inputs[0] if ta == "n" else inputs[0].t()
    b = inputs[1] if tb == "n" else inputs[1].t()
    epilogue = problem.flag("epilogue", "none")
    if epilogue == "none":
        return a @ b
    sums = torch.addmm(inputs[2], a, b)
    return {"bias_relu": torch.relu, "bias_gelu": torch.nn.functional.gelu}.get(epilogue, lambda x: x)(sums)


FORMULAS: dict[str, Formula] = {
    "attention": _attention,
    "gemm": _gemm,
    "layernorm": _layernorm,
    "softmax": _softmax,
}
