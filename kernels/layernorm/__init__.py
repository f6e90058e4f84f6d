"""Layer norm over rows: y = (x - mean) / sqrt(var + eps) * weight + bias; x: [m, n] -> y: [m, n].

With the flag `rms` it is the RMS norm: y = x / sqrt(mean(x^2) + eps) * weight, and there is no bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rooftune.core import PRECISIONS, Op, Problem, Reference, Tolerance
from rooftune.kernels.common.data import normal, take

EPS = 1e-5


def inputs(problem: Problem, generator: Any, device: str = "cpu", kind: str = "normal") -> tuple[Any, ...]:
    """x: [m, n], weight: [n], bias: [n] (no bias with `rms`), all of the problem's precision.

    Kinds: normal, large_mean (mean 100, deviation 1: a one-pass variance loses here), small (a variance of 1.5 EPS:
    16 bits do not show another EPS beside a variance of 1), equal, nan.
    """
    m, n = problem["m"], problem["n"]
    x = normal((m, n), problem.precision, generator, device)
    weight = normal((n,), problem.precision, generator, device)
    bias = normal((n,), problem.precision, generator, device)
    if kind == "large_mean":
        x.add_(100.0)
    elif kind == "small":
        x.mul_(2.0**-8)
    elif kind == "equal":
        x.fill_(3.0)
    elif kind == "nan":
        x[0, -1] = math.nan
    return (x, weight) if problem.flag("rms") else (x, weight, bias)


def reference(problem: Problem, tensors: Sequence[Any], rows: Sequence[int] | None = None) -> Reference:
    """float64 norm of the rows."""
    import torch

    x, weight = take(tensors[0], rows).double(), tensors[1].double()
    mean = torch.zeros_like(x[:, :1]) if problem.flag("rms") else x.mean(-1, keepdim=True)  # 0 * inf would be NaN
    centred = x - mean
    rstd = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    y = centred * rstd * weight
    scale = x.abs() * rstd * weight.abs()
    if not problem.flag("rms"):
        # A mean errs by a share of what is summed, also where that cancels: relative to the mean itself, torch was
        # called wrong in 7 of 25 checks of 16 columns, by a number near a mean of nearly 0.
        scale = scale + x.abs().mean(-1, keepdim=True) * rstd * weight.abs()
        bias = tensors[2].double()
        y, scale = y + bias, scale + bias.abs()
    return Reference(y, 0.0 * y, scale)


def tolerance(problem: Problem) -> Tolerance:
    p = PRECISIONS[problem.precision]
    return Tolerance(p.rel_fro, p.u_out, p.u_in, 2**-24, 4 + math.sqrt(problem["n"]) / 4, p.tiny)


def ragged(problem: Problem) -> Sequence[Problem]:
    return [problem.replace(m=m, n=n) for m, n in ((1, 1), (3, 37), (5, 1021), (2, 4099))]


def _bytes(p: Problem) -> float:
    vectors = 1 if p.flag("rms") else 2
    return (2.0 * p["m"] * p["n"] + vectors * p["n"]) * PRECISIONS[p.precision].bytes_in


OP = Op(
    name="layernorm",
    summary="layer norm (flag rms: RMS norm) over the last dimension, x: [m, n]",
    dims=("m", "n"),
    precisions=("fp32", "fp16", "bf16"),
    bound="memory",
    inputs=inputs,
    output=lambda p: ((p["m"], p["n"]), PRECISIONS[p.precision].out),
    reference=reference,
    flops=lambda p: (4.0 if p.flag("rms") else 8.0) * p["m"] * p["n"],
    bytes=_bytes,
    tolerance=tolerance,
    ragged=ragged,
    small=lambda precision: [Problem.make("layernorm", precision, m=8, n=500)],
    adversarial=("large_mean", "small", "equal", "nan"),
    flags={"rms": ("", "1")},
)
