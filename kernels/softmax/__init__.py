"""Row softmax: y[i, j] = exp(x[i, j] - max_j x) / sum_j exp(x[i, j] - max_j x); x: [m, n] -> y: [m, n]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rooftune.core import PRECISIONS, Op, Problem, Reference, Tolerance
from rooftune.kernels.common.data import normal, take


def inputs(problem: Problem, generator: Any, device: str = "cpu", kind: str = "normal") -> tuple[Any, ...]:
    """x: [m, n]. Kinds: normal, large (logits to 1e4), equal, neg_inf (masked entries and one whole row), nan.

    Equal ones are -300: who begins the maximum at 0, not at minus infinity, divides 0 by 0.
    """
    x = normal((problem["m"], problem["n"]), problem.precision, generator, device)
    if kind == "large":
        x.mul_(2500.0)
    elif kind == "equal":
        x.fill_(-300.0)
    elif kind == "neg_inf":
        x[:, ::3] = -math.inf
        x[-1] = -math.inf
    elif kind == "nan":
        x[0, -1] = math.nan
    return (x,)


def reference(problem: Problem, tensors: Sequence[Any], rows: Sequence[int] | None = None) -> Reference:
    """float64 softmax of the rows; the arithmetic's error grows with the distance from the maximum."""
    x = take(tensors[0], rows).double()
    shifted = x - x.amax(-1, keepdim=True)
    e = shifted.exp()
    y = e / e.sum(-1, keepdim=True)
    distance = shifted.abs().nan_to_num(posinf=0.0)
    return Reference(y, 0.0 * y, y * (1 + distance))


def tolerance(problem: Problem) -> Tolerance:
    p = PRECISIONS[problem.precision]
    return Tolerance(p.rel_fro, p.u_out, p.u_in, 2**-24, 4 + math.sqrt(problem["n"]) / 4, p.tiny)


def ragged(problem: Problem) -> Sequence[Problem]:
    return [problem.replace(m=m, n=n) for m, n in ((1, 1), (3, 37), (5, 1021), (2, 4099))]


OP = Op(
    name="softmax",
    summary="softmax over the last dimension, x: [m, n]",
    dims=("m", "n"),
    precisions=("fp32", "fp16", "bf16"),
    bound="memory",
    inputs=inputs,
    output=lambda p: ((p["m"], p["n"]), PRECISIONS[p.precision].out),
    reference=reference,
    flops=lambda p: 5.0 * p["m"] * p["n"],
    bytes=lambda p: 2.0 * p["m"] * p["n"] * PRECISIONS[p.precision].bytes_in,
    tolerance=tolerance,
    ragged=ragged,
    small=lambda precision: [Problem.make("softmax", precision, m=8, n=500)],
    adversarial=("large", "equal", "neg_inf", "nan"),
)
