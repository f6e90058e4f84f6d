"""Fused attention: out = softmax(q k^T / sqrt(d)) v; q, out: [b, h, sq, d], k, v: [b, hkv, sk, d].

`causal` masks keys after the query, aligned at the *bottom right* when sq != sk (FlashAttention's
convention); a row that may see no key at all is 0. Grouped heads: query head i reads key head i*hkv/h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rooftune.core import PRECISIONS, Op, Problem, Reference, Tolerance, UsageError
from rooftune.kernels.common.data import normal


def inputs(problem: Problem, generator: Any, device: str = "cpu", kind: str = "normal") -> tuple[Any, ...]:
    """q, k, v. Kinds: normal, large (scores to about 1e3), equal (all keys alike: the mean of v), nan (in q)."""
    b, h, hkv, d = (problem[x] for x in ("b", "h", "hkv", "d"))
    if h % hkv:
        raise UsageError(f"{problem}: h must be a multiple of hkv")
    q = normal((b, h, problem["sq"], d), problem.precision, generator, device)
    k = normal((b, hkv, problem["sk"], d), problem.precision, generator, device)
    v = normal((b, hkv, problem["sk"], d), problem.precision, generator, device)
    if kind == "large":
        q.mul_(16.0)
        k.mul_(16.0)
    elif kind == "equal":
        k.fill_(1.0)
    elif kind == "nan":
        q[0, 0, -1, 0] = math.nan
    return q, k, v


def reference(problem: Problem, tensors: Sequence[Any], rows: Sequence[int] | None = None) -> Reference:
    """float64 attention of rows of the flattened [b*h*sq, d] output, one (batch, head) at a time."""
    import torch

    q, k, v = tensors
    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    wanted = torch.arange(b * h * sq) if rows is None else torch.as_tensor(list(rows))
    value = torch.zeros(len(wanted), d, dtype=torch.float64)
    scale_in, scale_acc = torch.zeros_like(value), torch.zeros_like(value)
    head = wanted // sq
    for bh in head.unique().tolist():
        where = (head == bh).nonzero()[:, 0]
        i, kv = wanted[where] % sq, (bh // h, bh % h * hkv // h)
        s = q[bh // h, bh % h, i].double() @ k[kv].double().t() / math.sqrt(d)
        if problem.flag("causal"):
            s.masked_fill_(torch.arange(sk)[None, :] > i[:, None] + (sk - sq), -math.inf)
        top = s.amax(-1, keepdim=True).nan_to_num(neginf=0.0, nan=math.nan)
        e = (s - top).exp()
        p = e / e.sum(-1, keepdim=True).where(e.sum(-1, keepdim=True) != 0, torch.ones(()).double())
        vd = v[kv].double()
        value[where] = p @ vd
        scale_in[where] = p @ vd.abs()
        if problem.precision == "tf32":  # rounded q and k move the scores themselves, by u_in times this
            terms = q[bh // h, bh % h, i].double().square() @ k[kv].double().square().t() / d
            scale_in[where] *= 1 + terms.sqrt().amax(-1, keepdim=True)
        largest = s.nan_to_num(neginf=0.0).abs().amax(-1, keepdim=True)
        scale_acc[where] = (p @ vd.abs()) * (1 + largest)
    return Reference(value, scale_in, scale_acc)


def tolerance(problem: Problem) -> Tolerance:
    """16-bit kernels round the probabilities before the second product (kernels.md section 4: 4e-3 for bf16)."""
    p = PRECISIONS[problem.precision]
    rel_fro = {"bf16": 4e-3, "fp16": 8e-4, "tf32": 1.2e-3}.get(problem.precision, 4e-6)
    u_in = {"bf16": 2**-8, "fp16": 2**-11, "tf32": 2**-10}.get(problem.precision, 0.0)
    growth = math.sqrt(problem["d"]) + math.sqrt(problem["sk"]) / 4
    return Tolerance(rel_fro, p.u_out, u_in, 2**-24, growth, p.tiny)


def _keys_per_query(p: Problem) -> float:
    """Mean number of keys a query reads; causal by FlashAttention's convention, half a square."""
    if not p.flag("causal"):
        return float(p["sk"])
    return (max(0, p["sk"] - p["sq"]) + p["sk"]) / 2


def _bytes(p: Problem) -> float:
    rows = p["b"] * p["h"] * p["sq"]
    return (2.0 * rows + 2.0 * p["b"] * p["hkv"] * p["sk"]) * p["d"] * PRECISIONS[p.precision].bytes_in


def ragged(problem: Problem) -> Sequence[Problem]:
    sizes = ((1, 2, 1, 1, 1), (1, 2, 2, 67, 67), (2, 4, 2, 5, 131), (1, 2, 1, 33, 17))
    return [problem.replace(b=b, h=h, hkv=g, sq=sq, sk=sk) for b, h, g, sq, sk in sizes]


OP = Op(
    name="attention",
    summary="fused attention forward, q: [b, h, sq, d], k and v: [b, hkv, sk, d]",
    dims=("b", "h", "hkv", "sq", "sk", "d"),
    precisions=("fp32", "tf32", "fp16", "bf16"),
    bound="compute",
    inputs=inputs,
    output=lambda p: ((p["b"], p["h"], p["sq"], p["d"]), PRECISIONS[p.precision].out),
    reference=reference,
    flops=lambda p: 4.0 * p["b"] * p["h"] * p["sq"] * _keys_per_query(p) * p["d"],
    bytes=_bytes,
    tolerance=tolerance,
    ragged=ragged,
    small=lambda precision: [
        Problem.make("attention", precision, {"causal": "1"}, b=1, h=2, hkv=1, sq=70, sk=100, d=64),
    ],
    adversarial=("large", "equal", "nan"),
    defaults={"hkv": lambda s: s["h"], "sk": lambda s: s["sq"]},
    flags={"causal": ("", "1")},
)
