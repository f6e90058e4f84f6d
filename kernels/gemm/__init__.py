"""Matrix product c = epilogue(op(a) @ op(b)); c: [m, n], accumulated in fp32 (int8: int32).

`transpose` names the storage of a and b: `n` is [m, k] / [k, n], `t` is [k, m] / [n, k]; `nt` is what
torch's linear layers hold. fp8 (e4m3, one scale per tensor, bf16 out) exists as `nt` only, as in torch.
The epilogue adds a bias: [n], with an activation or without, or a residual: [m, n], of c's format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rooftune.core import PRECISIONS, Op, Problem, Reference, Tolerance, UsageError
from rooftune.kernels.common.data import normal, take

EPILOGUES = ("none", "bias", "bias_relu", "bias_gelu", "residual")


def inputs(problem: Problem, generator: Any, device: str = "cpu", kind: str = "normal") -> tuple[Any, ...]:
    """a, b as stored; then scale_a, scale_b: [1] fp32 for fp8; then what the epilogue adds, if it adds anything.

    Nothing for inf with bias_gelu: torch's own gelu(inf) is NaN on some CPUs, so there is no agreed answer.
    Kinds: normal, integers (small whole numbers, for which every right kernel is exact; int8: -128 and 127 only,
    at which sums of two products leave 16 bits), nan (one NaN in a), inf (one infinity in a). fp8 with a bias or a
    residual holds it in bf16, and its scales are drawn too: one that was remembered is another at the next call.
    """
    import torch

    if kind == "inf" and problem.flag("epilogue") == "bias_gelu":
        return ()
    m, n, k = problem["m"], problem["n"], problem["k"]
    ta, tb = tuple(problem.flag("transpose", "nn"))
    if problem.precision == "fp8" and ta + tb != "nt":
        raise UsageError(f"{problem}: fp8 exists with transpose=nt only, as in torch._scaled_mm")
    if problem.precision == "int8" and problem.flag("epilogue", "none") != "none":
        raise UsageError(f"{problem}: int8 accumulates to int32 and has no epilogue")
    shape_a, shape_b = (m, k) if ta == "n" else (k, m), (k, n) if tb == "n" else (n, k)
    a = normal(shape_a, problem.precision, generator, device)
    b = normal(shape_b, problem.precision, generator, device)
    added = (m, n) if problem.flag("epilogue") == "residual" else (n,)
    more = normal(added, "bf16" if problem.precision == "fp8" else problem.precision, generator, device)
    if kind == "integers":
        for t in (a, b, more):
            whole = torch.randint(-2, 3, t.shape, generator=generator, device=device)
            t.copy_(torch.where(whole < 0, -128, 127) if t.dtype == torch.int8 else whole)
    elif kind in ("nan", "inf"):
        a[0, 0] = math.nan if kind == "nan" else math.inf
    out: tuple[Any, ...] = (a, b)
    if problem.precision == "fp8":
        out += tuple(2.0 ** torch.randint(-2, 2, (1,), generator=generator, device=device) for _ in range(2))
    if problem.flag("epilogue", "none") != "none":
        out += (more,)
    return out


def reference(problem: Problem, tensors: Sequence[Any], rows: Sequence[int] | None = None) -> Reference:
    """float64 product of the rows, and the root-mean-square size of a sum of its terms."""
    import torch

    ta, tb = tuple(problem.flag("transpose", "nn"))
    a = tensors[0] if ta == "n" else tensors[0].t()
    a = (a if rows is None else a[list(rows)]).double()
    b = (tensors[1] if tb == "n" else tensors[1].t()).double()
    scale = float(tensors[2]) * float(tensors[3]) if problem.precision == "fp8" else 1.0
    value = (a @ b) * scale
    size = (a.square() @ b.square()).sqrt() * abs(scale)
    epilogue = problem.flag("epilogue", "none")
    if epilogue != "none":
        more = (take(tensors[-1], rows) if epilogue == "residual" else tensors[-1]).double()
        value, size = value + more, size + more.abs()
    spread = value.abs() + size
    if epilogue == "bias_relu":
        value = value.clamp_min(0)
    elif epilogue == "bias_gelu":
        value = torch.nn.functional.gelu(value)
    return Reference(value, size, spread)


def tolerance(problem: Problem) -> Tolerance:
    """fp8: torch's CPU path and fast accumulation keep fewer bits than fp32, hence u_acc of 2^-13."""
    p = PRECISIONS[problem.precision]
    u_acc = 0.0 if p.exact else 2**-13 if problem.precision == "fp8" else 2**-24
    return Tolerance(p.rel_fro, p.u_out, p.u_in, u_acc, math.sqrt(problem["k"]), p.tiny)


def ragged(problem: Problem) -> Sequence[Problem]:
    sizes: tuple[tuple[int, int, int], ...] = ((1, 1, 1), (17, 33, 65), (67, 129, 31), (1, 96, 257), (48, 112, 80))
    if problem.precision in ("fp8", "int8"):  # torch's own calls want multiples of 16 (m: more than 16)
        sizes = ((32, 48, 80), (48, 16, 144))
    return [problem.replace(m=m, n=n, k=k) for m, n, k in sizes]


def _bytes(p: Problem) -> float:
    f = PRECISIONS[p.precision]
    m, n, k = p["m"], p["n"], p["k"]
    results = 2 if p.flag("epilogue") == "residual" else 1
    return float(f.bytes_in * (m * k + k * n) + f.bytes_out * m * n * results)


OP = Op(
    name="gemm",
    summary="matrix product with epilogue, c: [m, n] = a: [m, k] @ b: [k, n]",
    dims=("m", "n", "k"),
    precisions=("fp32", "tf32", "fp16", "bf16", "fp8", "int8"),
    bound="compute",
    inputs=inputs,
    output=lambda p: ((p["m"], p["n"]), PRECISIONS[p.precision].out),
    reference=reference,
    flops=lambda p: 2.0 * p["m"] * p["n"] * p["k"],
    bytes=_bytes,
    tolerance=tolerance,
    ragged=ragged,
    small=lambda precision: [
        Problem.make("gemm", precision, {"transpose": "nt"} if precision == "fp8" else {}, m=64, n=96, k=64),
    ],
    adversarial=("integers", "nan", "inf"),
    flags={"transpose": ("nn", "nt", "tn", "tt"), "epilogue": EPILOGUES},
)
