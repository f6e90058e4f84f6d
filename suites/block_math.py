"""The arithmetic of a layer in torch: its random weights, the glue between operators, the float64 reference.

Used inside a worker only. Names of weights are those of the plan: `w_qkv`, `b_qkv`, `w_norm1`...
"""

from __future__ import annotations

import math
from typing import Any

from rooftune import check, registry
from rooftune.core import PRECISIONS
from rooftune.suites.block_plan import Shape, Step

NORM_EPS = 1e-5
Tensors = dict[str, Any]


def weights(shape: Shape, steps: list[Step], seed: int, device: str) -> Tensors:
    """Weights, biases and the cache's past keys and values, in the storage format; the same for the same seed.

    Linear weights are N(0, 1/fan-in): activations keep their size through the layer. Biases and the
    parameters of norms are far enough from 0 and 1 that leaving one out shows.
    """
    import torch

    made: Tensors = {}
    generator = check.generator(device, seed)

    def normal(size: tuple[int, ...], scale: float, mean: float = 0.0) -> Any:
        drawn = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
        return drawn.mul_(scale).add_(mean).to(dtype(shape))

    for step in steps:
        if not step.problem:
            continue
        problem = registry.problem(step.problem)
        for name in step.reads:
            if name.startswith("w_"):
                linear = problem.op == "gemm"
                size = (problem["n"], problem["k"]) if linear else (problem["n"],)
                made[name] = normal(size, problem["k"] ** -0.5) if linear else normal(size, 0.2, 1.0)
            elif name.startswith("b_"):
                made[name] = normal((problem["n"],), 0.5 if problem.op == "gemm" else 0.2)
    if shape.phase == "decode":
        m = shape.sizes
        for name in ("past_k", "past_v"):
            made[name] = normal((shape.batch, m.hkv, shape.seq, m.hd), 1.0)
    return made


def dtype(shape: Shape) -> Any:
    """What the layer's tensors are stored in."""
    import torch

    return getattr(torch, PRECISIONS[shape.precision].storage)


def rotation(shape: Shape, device: str) -> tuple[Any, Any]:
    """Cosines and sines of the rotary embedding for the new tokens, float64 [new, hd / 2]."""
    import torch

    half = shape.sizes.hd // 2
    frequency = (shape.sizes.rope or 1.0) ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    first = shape.keys - shape.new
    angle = torch.arange(first, shape.keys, dtype=torch.float64, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


class Glue:
    """The steps that belong to no operator, in torch: the same code in every composition.

    Arithmetic is fp32 and rounded once to the storage format.
    """

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.m = shape, shape.sizes
        self.cos, self.sin = (t.float() for t in rotation(shape, device))

    def _heads(self, qkv: Any) -> tuple[Any, Any, Any]:
        """Views [b, heads, new, hd] of q, k, v in [tokens, (h + 2 hkv) hd]."""
        m = self.m
        whole = qkv.view(self.shape.batch, self.shape.new, m.h + 2 * m.hkv, m.hd).transpose(1, 2)
        return whole[:, : m.h], whole[:, m.h : m.h + m.hkv], whole[:, m.h + m.hkv :]

    def split(self, qkv: Any, q: Any, k: Any, v: Any) -> None:
        """Heads apart; keys and values go to the end of the cache."""
        new = self.shape.new
        for target, source in zip((q, k[:, :, -new:], v[:, :, -new:]), self._heads(qkv), strict=True):
            target.copy_(source)

    def split_rope(self, qkv: Any, q: Any, k: Any, v: Any) -> None:
        """`split` with q and k rotated: element i is paired with i + hd/2."""
        new = self.shape.new
        sources = self._heads(qkv)
        for target, source in zip((q, k[:, :, -new:]), sources, strict=False):
            low, high = source.float().chunk(2, dim=-1)
            to_low, to_high = target.chunk(2, dim=-1)
            to_low.copy_((low * self.cos).addcmul_(high, self.sin, value=-1.0))
            to_high.copy_((high * self.cos).addcmul_(low, self.sin))
        v[:, :, -new:].copy_(sources[2])

    def merge(self, heads: Any, out: Any) -> None:
        out.view(self.shape.batch, self.shape.new, self.m.h, self.m.hd).copy_(heads.transpose(1, 2))

    def swiglu(self, gate_up: Any, out: Any) -> None:
        """silu(gate) * up; the gate is the first half of a row."""
        import torch

        gate, up = gate_up.chunk(2, dim=-1)
        out.copy_(torch.nn.functional.silu(gate.float()).mul_(up))

    def add1(self, x: Any, y: Any, out: Any) -> None:
        import torch

        torch.add(x, y, out=out)

    add2 = add1


def reference(shape: Shape, w: Tensors, x: Any) -> Any:
    """The layer in float64, written down once more without the plan: [tokens, d] of x: [tokens, d].

    `w` as `weights` makes it. Heads are taken one at a time: the scores of all would not fit.
    """
    import torch

    m, b, new = shape.sizes, shape.batch, shape.new

    def linear(name: str, a: Any) -> Any:
        y = a @ w[f"w_{name}"].double().t()
        return y + w[f"b_{name}"].double() if m.bias else y

    def norm(name: str, a: Any) -> Any:
        gain = w[f"w_{name}"].double()
        if m.norm == "rms":
            return a / (a.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * gain
        centred = a - a.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * gain + w[f"b_{name}"].double()

    turn = torch.complex(*rotation(shape, str(x.device)))

    def rotate(t: Any) -> Any:
        if m.rope is None:
            return t
        turned = torch.complex(t[..., : m.hd // 2], t[..., m.hd // 2 :]) * turn[:, None]
        return torch.cat((turned.real, turned.imag), dim=-1)

    def attend(a: Any) -> Any:
        q, k, v = linear("qkv", a).view(b, new, -1, m.hd).split([m.h, m.hkv, m.hkv], dim=2)
        q, k = rotate(q), rotate(k)
        out = torch.empty(b, new, m.h, m.hd, dtype=torch.float64, device=x.device)
        for i in range(b):
            for head in range(m.h):
                group = head // (m.h // m.hkv)
                keys, values = k[i, :, group], v[i, :, group]
                if shape.phase == "decode":
                    keys = torch.cat((w["past_k"][i, group].double(), keys))
                    values = torch.cat((w["past_v"][i, group].double(), values))
                scores = q[i, :, head] @ keys.t() / math.sqrt(m.hd)
                if m.causal and shape.phase == "prefill":
                    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
                out[i, :, head] = scores.softmax(-1) @ values
        return linear("o", out.reshape(b * new, m.h * m.hd))

    def mlp(a: Any) -> Any:
        up = linear("up", a)
        if m.activation == "swiglu":
            gate, value = up[:, : m.dff], up[:, m.dff :]
            return linear("down", gate * torch.sigmoid(gate) * value)
        return linear("down", up.clamp_min(0) if m.activation == "relu" else up * 0.5 * (1 + torch.erf(up / 2**0.5)))

    x = x.double()
    if m.place == "pre":
        y = x + attend(norm("norm1", x))
        return y + mlp(norm("norm2", y))
    y = norm("norm1", x + attend(x))
    return norm("norm2", y + mlp(y))
