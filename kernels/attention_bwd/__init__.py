"""Backward of fused attention from what its forward saved; one output of rows of d: dq, then dk, then dv.

dout, q, out: [b, h, sq, d]; k, v: [b, hkv, sk, d]; lse: [b, h, sq], the natural logarithm of each row's sum of
exponentials (fp32), infinite for a row that sees no key. With s = q k^T / sqrt(d) and p = exp(s - lse):
ds = p * (dout v^T - sum_j dout * out), dq = ds k / sqrt(d), dk = ds^T q / sqrt(d), dv = p^T dout; query heads
that share a key head add up. Masks and heads are those of `attention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rooftune.core import PRECISIONS, Op, Problem, Reference, Tolerance, UsageError
from rooftune.kernels import attention
from rooftune.kernels.common.data import normal


def inputs(problem: Problem, generator: Any, device: str = "cpu", kind: str = "normal") -> tuple[Any, ...]:
    """dout, q, k, v, out, lse, in torch's order of arguments; the forward in fp32, one head at a time.

    Kinds: normal, large (scores to about 1e3), equal (all keys alike), nan (in dout).
    """
    import torch

    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    if h % hkv:
        raise UsageError(f"{problem}: h must be a multiple of hkv")
    q, k, v = attention.inputs(problem, generator, device, kind if kind in ("large", "equal") else "normal")
    dout = normal(q.shape, problem.precision, generator, device)
    if kind == "nan":
        dout[0, 0, -1, 0] = math.nan
    out = torch.empty_like(q)
    lse = torch.empty(b, h, sq, dtype=torch.float32, device=device)
    for i in range(b * h):
        at, kv = (i // h, i % h), (i // h, i % h * hkv // h)
        s = q[at].float() @ k[kv].float().t() / math.sqrt(d)
        if problem.flag("causal"):
            s.masked_fill_(torch.ones_like(s, dtype=torch.bool).triu(sk - sq + 1), -math.inf)
        lse[at] = s.logsumexp(-1)
        out[at] = ((s - lse[at][:, None].nan_to_num(neginf=0.0)).exp() @ v[kv].float()).to(out.dtype)
    lse[lse == -math.inf] = math.inf  # so that exp(s - lse) of such a row is 0, as FlashAttention has it
    return dout, q, k, v, out, lse


def _parts(problem: Problem) -> Mapping[str, int]:
    keys = problem["b"] * problem["hkv"] * problem["sk"]
    return {"dq": problem["b"] * problem["h"] * problem["sq"], "dk": keys, "dv": keys}


class _Head:
    """Some queries and keys of one query head in float64: weights, their slopes, and the errors of both."""

    def __init__(self, problem: Problem, tensors: Sequence[Any], head: int, i: Any, j: Any) -> None:
        import torch

        h, hkv, sq, sk = (problem[x] for x in ("h", "hkv", "sq", "sk"))
        at, kv = (head // h, head % h), (head // h, head % h * hkv // h)
        dout, q, k, v, out, lse = tensors
        self.scale = 1 / math.sqrt(problem["d"])
        self.q, self.dout = q[at][i].double(), dout[at][i].double()
        self.k, self.v = k[kv][j].double(), v[kv][j].double()
        level = lse[at][i].double()[:, None]
        s = self.q @ self.k.t() * self.scale
        if problem.flag("causal"):
            s.masked_fill_(torch.arange(sk)[j][None, :] > torch.arange(sq)[i][:, None] + (sk - sq), -math.inf)
        self.p = (s - level).exp()
        terms = self.dout * out[at][i].double()
        slope = self.dout @ self.v.t() - terms.sum(-1, keepdim=True)
        self.ds = self.p * slope
        # A score errs as its terms do, also where they cancel: torch was called wrong in 2 of 60 checks of large ones.
        terms_of_s = (self.q.square() @ self.k.square().t()).sqrt() * self.scale
        spread = 1 + terms_of_s + s.abs().nan_to_num(posinf=0.0) + level.abs().nan_to_num(posinf=0.0)
        self.p_error = self.p * spread
        size = self.dout.abs() @ self.v.abs().t() + terms.abs().sum(-1, keepdim=True)
        self.ds_error = self.p_error * size


def reference(problem: Problem, tensors: Sequence[Any], rows: Sequence[int] | None = None) -> Reference:
    """float64 rows of dq, dk and dv, a head at a time. Roundings of p and ds are independent: they add as squares."""
    import torch

    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    n_q, n_k = b * h * sq, b * hkv * sk
    wanted = torch.arange(n_q + 2 * n_k) if rows is None else torch.as_tensor(list(rows))
    value, square, error = (torch.zeros(len(wanted), d, dtype=torch.float64) for _ in range(3))
    owner = torch.where(wanted < n_q, wanted // sq, b * h + (wanted - n_q) // sk)  # a head of dq, dk or dv
    for which in owner.unique().tolist():
        here = (owner == which).nonzero()[:, 0]
        if which < b * h:
            f = _Head(problem, tensors, which, wanted[here] % sq, slice(None))
            value[here] = f.ds @ f.k * f.scale
            square[here] = f.ds.square() @ f.k.square() * f.scale**2
            error[here] = f.ds_error @ f.k.abs() * f.scale
            continue
        kv, is_dv = (which - b * h) % (b * hkv), which >= b * h + b * hkv
        first = kv // hkv * h + kv % hkv * (h // hkv)
        for head in range(first, first + h // hkv):
            f = _Head(problem, tensors, head, slice(None), (wanted[here] - n_q) % sk)
            weight, slip = (f.p, f.p_error) if is_dv else (f.ds * f.scale, f.ds_error * f.scale)
            other = f.dout if is_dv else f.q
            value[here] += weight.t() @ other
            square[here] += weight.square().t() @ other.square()
            error[here] += slip.t() @ other.abs()
    return Reference(value, square.sqrt(), error)


def tolerance(problem: Problem) -> Tolerance:
    """16-bit kernels round p, ds and the result (torch's CPU kernel also each head of a group): twice 2.9e-3 in bf16.

    A weight below the smallest normal number may count as 0; in dk it is multiplied by slopes and large queries.
    """
    p = PRECISIONS[problem.precision]
    rel_fro = {"bf16": 5.8e-3, "fp16": 7.2e-4}.get(problem.precision, 4e-6)
    u_in = {"bf16": 2**-8, "fp16": 2**-11}.get(problem.precision, 0.0)
    longest = max(problem["sk"], problem["sq"] * problem["h"] // problem["hkv"])
    growth, tiny = math.sqrt(problem["d"]) + math.sqrt(longest) / 4, 2**-16 if problem.precision == "fp16" else 2**-112
    return Tolerance(rel_fro, p.u_out, u_in, 2**-24, growth, tiny)


def _forward(problem: Problem) -> Problem:
    return Problem("attention", problem.dims, problem.precision, problem.flags)


def _bytes(p: Problem) -> float:
    """q, dout, out, dq; k, v, dk, dv; and lse in fp32."""
    queries, keys = p["b"] * p["h"] * p["sq"], p["b"] * p["hkv"] * p["sk"]
    return 4.0 * (queries + keys) * p["d"] * PRECISIONS[p.precision].bytes_in + 4.0 * queries


def ragged(problem: Problem) -> Sequence[Problem]:
    """No single key: its weight is 1, so ds is the rounding error of 0."""
    sizes = ((1, 2, 1, 1, 9), (1, 2, 2, 67, 67), (2, 4, 2, 5, 131), (1, 2, 1, 33, 17))
    return [problem.replace(b=b, h=h, hkv=g, sq=sq, sk=sk) for b, h, g, sq, sk in sizes]


OP = Op(
    name="attention_bwd",
    summary="backward of fused attention: dq, dk, dv; dout, q, out: [b, h, sq, d], k and v: [b, hkv, sk, d]",
    dims=attention.OP.dims,
    precisions=("fp32", "fp16", "bf16"),
    bound="compute",
    inputs=inputs,
    output=lambda p: ((sum(_parts(p).values()), p["d"]), PRECISIONS[p.precision].out),
    reference=reference,
    flops=lambda p: 2.5 * attention.OP.flops(_forward(p)),  # five products where the forward has two
    bytes=_bytes,
    tolerance=tolerance,
    ragged=ragged,
    small=lambda precision: [
        Problem.make("attention_bwd", precision, {"causal": "1"}, b=1, h=2, hkv=1, sq=70, sk=100, d=64),
    ],
    adversarial=("large", "equal", "nan"),
    defaults=attention.OP.defaults,
    flags={"causal": ("", "1")},
    parts=_parts,
)
