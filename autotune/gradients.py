"""Gradients of the operators, by torch: the formula is written in torch's own calls and differentiated.

The forward that ran was a competitor's; its backward runs torch's forward again and differentiates that, so
that it needs nothing but the inputs. An operator without a formula here uses its float64 reference: right,
and slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rooftune import registry
from rooftune.core import Problem, UsageError

Formula = Callable[[Problem, Sequence[Any]], Any]


def gradients(problem: Problem, inputs: Sequence[Any], gradient: Any) -> list[Any]:
    """Gradient of every input; zeros where an input has none.

    Raises:
        UsageError: the precision has no gradient (fp8 and int8 round their inputs to a grid), or attention's lse.
    """
    import torch

    if problem.precision in ("fp8", "int8"):
        raise UsageError(f"{problem} has no gradient: {problem.precision} is for inference")
    if problem.flag("lse"):
        raise UsageError(f"{problem} has no gradient: its output holds the bits of two results")
    formula = FORMULAS.get(problem.op, _reference)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        result = formula(problem, leaves)
    wanted = [t for t in leaves if t.requires_grad]
    found = iter(torch.autograd.grad(result, wanted, gradient.to(result.dtype), allow_unused=True))
    taken = [next(found) if t.requires_grad else None for t in leaves]
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, taken, strict=True)]


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


def _reference(problem: Problem, inputs: Sequence[Any]) -> Any:
    shape, _ = registry.op(problem.op).output(problem)
    return registry.op(problem.op).reference(problem, inputs, None).value.reshape(shape)


FORMULAS: dict[str, Formula] = {
    "attention": _attention,
    "gemm": _gemm,
    "layernorm": _layernorm,
    "softmax": _softmax,
}
