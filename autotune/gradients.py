"""Gradients of the operators, by torch: the formula is written in torch's own calls and differentiated.

The forward that ran was a competitor's; its backward runs torch's forward again and differentiates that, so
that it needs nothing but the inputs. An operator without a formula here uses its float64 reference: right,
and slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rooftune import registry
from rooftune.core import Problem, UsageError
from rooftune.formulas import FORMULAS


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


def _reference(problem: Problem, inputs: Sequence[Any]) -> Any:
    shape, _ = registry.op(problem.op).output(problem)
    return registry.op(problem.op).reference(problem, inputs, None).value.reshape(shape)
