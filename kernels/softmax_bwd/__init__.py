"""Backward of row softmax: dx = y * (dy - sum_j y * dy), from the result y = softmax(x); dy, y -> dx, all [m, n]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rooftune.core import PRECISIONS, Op, Problem, Reference, Tolerance
from rooftune.kernels.common.data import normal, take


def inputs(problem: Problem, generator: Any, device: str = "cpu", kind: str = "normal") -> tuple[Any, ...]:
    """dy, y: [m, n], in torch's order of arguments; y is the softmax of N(0,1).

    Kinds: normal, large (of logits to 1e4: a row is 0 but for a one), constant (dy is the same everywhere:
    the sum cancels to nothing), neg_inf (masked entries are 0, and a row of nothing else is NaN), nan (in dy).
    """
    shape = (problem["m"], problem["n"])
    dy = normal(shape, problem.precision, generator, device)
    x = normal(shape, problem.precision, generator, device)
    if kind == "large":
        x.mul_(2500.0)
    elif kind == "constant":
        dy.fill_(3.0)
    elif kind == "neg_inf":
        x[:, ::3] = -math.inf
        x[-1] = -math.inf
    elif kind == "nan":
        dy[0, -1] = math.nan
    return dy, x.float().softmax(-1).to(x.dtype)


def reference(problem: Problem, tensors: Sequence[Any], rows: Sequence[int] | None = None) -> Reference:
    """float64; the error is relative to what cancels, dy and the sum."""
    dy, y = (take(t, rows).double() for t in tensors)
    terms = y * dy
    value = y * (dy - terms.sum(-1, keepdim=True))
    return Reference(value, 0.0 * value, y.abs() * (dy.abs() + terms.abs().sum(-1, keepdim=True)))


def tolerance(problem: Problem) -> Tolerance:
    p = PRECISIONS[problem.precision]
    return Tolerance(p.rel_fro, p.u_out, p.u_in, 2**-24, 4 + math.sqrt(problem["n"]) / 4, p.tiny)


def ragged(problem: Problem) -> Sequence[Problem]:
    return [problem.replace(m=m, n=n) for m, n in ((1, 1), (3, 37), (5, 1021), (2, 4099))]


OP = Op(
    name="softmax_bwd",
    summary="backward of softmax over the last dimension, dy and y: [m, n]",
    dims=("m", "n"),
    precisions=("fp32", "fp16", "bf16"),
    bound="memory",
    inputs=inputs,
    output=lambda p: ((p["m"], p["n"]), PRECISIONS[p.precision].out),
    reference=reference,
    flops=lambda p: 4.0 * p["m"] * p["n"],
    bytes=lambda p: 3.0 * p["m"] * p["n"] * PRECISIONS[p.precision].bytes_in,
    tolerance=tolerance,
    ragged=ragged,
    small=lambda precision: [Problem.make("softmax_bwd", precision, m=8, n=500)],
    adversarial=("large", "constant", "neg_inf", "nan"),
)
