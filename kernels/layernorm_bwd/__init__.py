"""Backward of layer norm over rows of [m, n], from what its forward saved; one output of m + 2 rows of n:

rows 0..m-1 are dx, row m is dweight = sum_i dy * xhat, row m+1 is dbias = sum_i dy; with xhat = (x - mean) *
rstd and g = dy * weight, dx = rstd * (g - mean_j(g) - xhat * mean_j(g * xhat)). With the flag `rms` it is the
backward of the RMS norm: no mean, no mean_j(g), no dbias, so m + 1 rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rooftune.core import PRECISIONS, Op, Problem, Reference, Tolerance
from rooftune.kernels.common.data import normal
from rooftune.kernels.layernorm import EPS

CHUNK_VALUES = 2**20  # of the float64 sums over rows: 8 MiB a temporary


def inputs(problem: Problem, generator: Any, device: str = "cpu", kind: str = "normal") -> tuple[Any, ...]:
    """dy, x: [m, n], weight: [n], mean, rstd: [m] fp32 as the forward computes them (no mean with `rms`).

    Kinds: normal, large_mean (of x, 100 at a deviation of 1), equal (x without variance), constant (dy is the
    same everywhere: dx cancels to nothing for weights of 1), nan (in dy).
    """
    m, n = problem["m"], problem["n"]
    dy, x = (normal((m, n), problem.precision, generator, device) for _ in range(2))
    weight = normal((n,), problem.precision, generator, device)
    if kind == "large_mean":
        x.add_(100.0)
    elif kind == "equal":
        x.fill_(3.0)
    elif kind == "constant":
        dy.fill_(3.0)
        weight.fill_(1.0)
    elif kind == "nan":
        dy[0, -1] = math.nan
    values = x.float()
    if problem.flag("rms"):
        return dy, x, weight, (values.square().mean(-1) + EPS).rsqrt()
    mean = values.mean(-1)
    return dy, x, weight, mean, ((values - mean[:, None]).square().mean(-1) + EPS).rsqrt()


def _growth(terms: int) -> float:
    """How the rounding errors of a sum grow with its terms."""
    return 4 + math.sqrt(terms) / 4


def reference(problem: Problem, tensors: Sequence[Any], rows: Sequence[int] | None = None) -> Reference:
    """float64; scales hold the growth of their own sum: n terms for dx, m for dweight and dbias."""
    import torch

    m, n = problem["m"], problem["n"]
    total = m + len(_parts(problem)) - 1
    wanted = torch.arange(total) if rows is None else torch.as_tensor(list(rows))
    value = torch.empty(len(wanted), n, dtype=torch.float64)
    scale = torch.empty_like(value)
    inner = wanted[wanted < m]
    value[wanted < m], scale[wanted < m] = _dx(problem, tensors, inner)
    if len(inner) < len(wanted):
        sums, errors = _sums(problem, tensors)
        value[wanted >= m], scale[wanted >= m] = sums[wanted[wanted >= m] - m], errors[wanted[wanted >= m] - m]
    return Reference(value, 0.0 * value, scale)


def _rows(problem: Problem, tensors: Sequence[Any], rows: Any) -> tuple[Any, Any, Any, Any]:
    """dy, xhat, the size xhat's rounding is relative to, and rstd, of some rows in float64."""
    dy, x, rstd = tensors[0][rows].double(), tensors[1][rows].double(), tensors[-1][rows].double()[:, None]
    mean = 0.0 * rstd if problem.flag("rms") else tensors[3][rows].double()[:, None]
    return dy, (x - mean) * rstd, (x.abs() + mean.abs()) * rstd, rstd


def _dx(problem: Problem, tensors: Sequence[Any], rows: Any) -> tuple[Any, Any]:
    """dx and its error scale."""
    dy, xhat, size, rstd = _rows(problem, tensors, rows)
    g = dy * tensors[2].double()
    slope = (g * xhat).mean(-1, keepdim=True)
    value = g - xhat * slope
    error = g.abs() + size * (g * xhat).abs().mean(-1, keepdim=True) + xhat.abs() * (g.abs() * size).mean(-1, True)
    if not problem.flag("rms"):
        value, error = value - g.mean(-1, keepdim=True), error + g.abs().mean(-1, keepdim=True)
    return rstd * value, rstd * error * _growth(problem["n"])


def _sums(problem: Problem, tensors: Sequence[Any]) -> tuple[Any, Any]:
    """dweight and dbias below one another, and the errors: of a sum, sqrt(m) times the root of its squares."""
    import torch

    m, n = problem["m"], problem["n"]
    value, square = torch.zeros(2, n, dtype=torch.float64), torch.zeros(2, n, dtype=torch.float64)
    step = max(1, CHUNK_VALUES // n)
    for start in range(0, m, step):
        dy, xhat, size, _ = _rows(problem, tensors, slice(start, start + step))
        value += torch.stack([(dy * xhat).sum(0), dy.sum(0)])
        square += torch.stack([(dy * size).square().sum(0), dy.square().sum(0)])
    return value, (value.abs() + square.sqrt()) * math.sqrt(m)


def _parts(problem: Problem) -> Mapping[str, int]:
    parts = {"dx": problem["m"], "dweight": 1}
    return parts if problem.flag("rms") else {**parts, "dbias": 1}


def tolerance(problem: Problem) -> Tolerance:
    """The growth of errors is in the reference's scales, which have sums of two lengths."""
    p = PRECISIONS[problem.precision]
    return Tolerance(p.rel_fro, p.u_out, p.u_in, 2**-24, 1.0, p.tiny)


def ragged(problem: Problem) -> Sequence[Problem]:
    return [problem.replace(m=m, n=n) for m, n in ((1, 1), (3, 37), (5, 1021), (67, 130), (2, 4099))]


def _bytes(p: Problem) -> float:
    """dy, x, dx and the vectors once; mean and rstd in fp32."""
    rms = bool(p.flag("rms"))
    size = PRECISIONS[p.precision].bytes_in
    return 3.0 * p["m"] * p["n"] * size + (2 if rms else 3) * p["n"] * size + (4 if rms else 8) * p["m"]


OP = Op(
    name="layernorm_bwd",
    summary="backward of layer norm (flag rms: RMS norm): dx, dweight, dbias; dy and x: [m, n]",
    dims=("m", "n"),
    precisions=("fp32", "fp16", "bf16"),
    bound="memory",
    inputs=inputs,
    output=lambda p: ((p["m"] + len(_parts(p)) - 1, p["n"]), PRECISIONS[p.precision].out),
    reference=reference,
    flops=lambda p: (9.0 if p.flag("rms") else 14.0) * p["m"] * p["n"],
    bytes=_bytes,
    tolerance=tolerance,
    ragged=ragged,
    small=lambda precision: [Problem.make("layernorm_bwd", precision, m=8, n=500)],
    adversarial=("large_mean", "equal", "constant", "nan"),
    flags={"rms": ("", "1")},
    parts=_parts,
)
