"""Fused attention: out = softmax(q k^T / sqrt(d)) v; q, out: [b, h, sq, d], k, v: [b, hkv, sk, d].

`causal` masks keys after the query, aligned at the *bottom right* when sq != sk (FlashAttention's
convention); a row that may see no key at all is 0. Grouped heads: query head i reads key head i*hkv/h.
`lse` asks for what a backward pass needs beside out: the natural logarithm of each row's sum of exponentials, fp32
in any precision, infinite for a row that sees no key. Their bits lie behind out, as rows of d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rooftune.core import PRECISIONS, Op, Problem, Reference, Tolerance, UsageError
from rooftune.kernels.common.data import normal


def inputs(problem: Problem, generator: Any, device: str = "cpu", kind: str = "normal") -> tuple[Any, ...]:
    """q, k, v. Kinds: normal, large (scores to about 1e3), equal (all keys alike: the mean of v), nan (in q).

    The large scores of the last head are all below 0: who begins the maximum at 0 divides 0 by 0 there.
    """
    b, h, hkv, d = (problem[x] for x in ("b", "h", "hkv", "d"))
    if h % hkv:
        raise UsageError(f"{problem}: h must be a multiple of hkv")
    if problem.flag("lse") and d % 2:
        raise UsageError(f"{problem}: lse wants an even d, so that fp32 fits into rows of any format")
    q = normal((b, h, problem["sq"], d), problem.precision, generator, device)
    k = normal((b, hkv, problem["sk"], d), problem.precision, generator, device)
    v = normal((b, hkv, problem["sk"], d), problem.precision, generator, device)
    if kind == "large":
        q.mul_(16.0)
        k.mul_(16.0)
        q[:, -1].abs_()
        k[:, -1].abs_().neg_()
    elif kind == "equal":
        k.fill_(1.0)
    elif kind == "nan":
        q[0, 0, -1, 0] = math.nan
    return q, k, v


def _lse_columns(problem: Problem) -> int:
    """Logarithms that fit into a row of the output."""
    return problem["d"] * PRECISIONS[problem.precision].bytes_out // 4


def _parts(problem: Problem) -> Mapping[str, int]:
    if not problem.flag("lse"):
        return {}
    rows = problem["b"] * problem["h"] * problem["sq"]
    return {"out": rows, "lse": -(-rows // _lse_columns(problem))}


def results(problem: Problem, out: Any) -> tuple[Any, Any]:
    """The parts of an output: out: [b, h, sq, d], and lse: [b * h * sq], or None if it is not asked for."""
    import torch

    if not problem.flag("lse"):
        return out, None
    rows = problem["b"] * problem["h"] * problem["sq"]
    behind = out[rows:].view(-1).view(torch.float32)
    if len(behind) > rows:
        behind[rows:] = 0
    return out[:rows].view(*(problem[x] for x in ("b", "h", "sq", "d"))), behind[:rows]


def without_lse(problem: Problem, who: str) -> None:
    """Raises UsageError if it is asked for."""
    if problem.flag("lse"):
        raise UsageError(f"{who} does not give the logarithms of the rows' sums")


def _scores(problem: Problem, tensors: Sequence[Any], head: int, i: Any) -> tuple[Any, Any]:
    """Masked scores of queries `i` of a head in float64, and by how much rounding of q and k would move them."""
    import torch

    h, hkv, sq, sk, d = (problem[x] for x in ("h", "hkv", "sq", "sk", "d"))
    q, k = tensors[0][head // h, head % h, i].double(), tensors[1][head // h, head % h * hkv // h].double()
    s = q @ k.t() / math.sqrt(d)
    if problem.flag("causal"):
        s.masked_fill_(torch.arange(sk)[None, :] > i[:, None] + (sk - sq), -math.inf)
    if problem.precision != "tf32":
        return s, torch.zeros(len(s), 1, dtype=torch.float64)
    return s, (q.square() @ k.square().t() / d).sqrt().amax(-1, keepdim=True)


def reference(problem: Problem, tensors: Sequence[Any], rows: Sequence[int] | None = None) -> Reference:
    """float64 attention of rows of the flattened [b*h*sq, d] output, one (batch, head) at a time; then of lse's."""
    import torch

    b, h, hkv, sq, d = (problem[x] for x in ("b", "h", "hkv", "sq", "d"))
    total = sum(_parts(problem).values()) or b * h * sq
    wanted = torch.arange(total) if rows is None else torch.as_tensor(list(rows))
    value = torch.zeros(len(wanted), d, dtype=torch.float64)
    scale_in, scale_acc = torch.zeros_like(value), torch.zeros_like(value)
    head = wanted // sq
    for bh in head[wanted < b * h * sq].unique().tolist():
        where = ((head == bh) & (wanted < b * h * sq)).nonzero()[:, 0]
        s, moved = _scores(problem, tensors, bh, wanted[where] % sq)
        top = s.amax(-1, keepdim=True).nan_to_num(neginf=0.0, nan=math.nan)
        e = (s - top).exp()
        p = e / e.sum(-1, keepdim=True).where(e.sum(-1, keepdim=True) != 0, torch.ones(()).double())
        vd = tensors[2][bh // h, bh % h * hkv // h].double()
        value[where] = p @ vd
        scale_in[where] = (p @ vd.abs()) * (1 + moved)  # rounded q and k move the scores themselves, by u_in times this
        largest = s.nan_to_num(neginf=0.0).abs().amax(-1, keepdim=True)
        scale_acc[where] = (p @ vd.abs()) * (1 + largest)
    behind = (wanted >= b * h * sq).nonzero()[:, 0]
    if len(behind):
        at = (wanted[behind] - b * h * sq)[:, None] * _lse_columns(problem) + torch.arange(_lse_columns(problem))
        found = torch.zeros(3, *at.shape, dtype=torch.float64)  # values, scales
        for bh in (at[at < b * h * sq] // sq).unique().tolist():
            here = at // sq == bh
            s, moved = _scores(problem, tensors, bh, at[here] % sq)
            lse = s.logsumexp(-1)
            found[0, here] = lse.where(lse != -math.inf, torch.tensor(math.inf, dtype=torch.float64))
            found[1, here] = moved[:, 0]
            found[2, here] = 1 + s.nan_to_num(neginf=0.0).abs().amax(-1)
        for target, source in zip((value, scale_in, scale_acc), found, strict=True):
            target[behind, : source.shape[1]] = source
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
    values = (2.0 * rows + 2.0 * p["b"] * p["hkv"] * p["sk"]) * p["d"]
    return values * PRECISIONS[p.precision].bytes_in + (4.0 * rows if p.flag("lse") else 0.0)


def ragged(problem: Problem) -> Sequence[Problem]:
    sizes = ((1, 2, 1, 1, 1), (1, 2, 2, 67, 67), (2, 4, 2, 5, 131), (1, 2, 1, 33, 17))
    return [problem.replace(b=b, h=h, hkv=g, sq=sq, sk=sk) for b, h, g, sq, sk in sizes]


def _output(p: Problem) -> tuple[tuple[int, ...], str]:
    shape = (sum(_parts(p).values()), p["d"]) if p.flag("lse") else (p["b"], p["h"], p["sq"], p["d"])
    return shape, PRECISIONS[p.precision].out


OP = Op(
    name="attention",
    summary="fused attention forward, q: [b, h, sq, d], k and v: [b, hkv, sk, d]",
    dims=("b", "h", "hkv", "sq", "sk", "d"),
    precisions=("fp32", "tf32", "fp16", "bf16"),
    bound="compute",
    inputs=inputs,
    output=_output,
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
    flags={"causal": ("", "1"), "lse": ("", "1")},
    parts=_parts,
    stored=lambda p: {"lse": "float32"} if p.flag("lse") else {},
)
