"""One transformer layer as a list of steps: operators that competitors fill in, and glue that torch does.

Standard library only: the parent plans and prices with it, the worker executes it (`block_worker`).
Sizes are those of the models' published configurations; T = batch * (seq in prefill, 1 in decode) tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from rooftune import registry
from rooftune.core import PRECISIONS, Problem, UsageError, unknown

CPU_FLOPS = 5e9  # a pass that takes 50 ms at 100 GFLOP/s: many passes fit into seconds on two cores
CPU_BYTES = 2.5e8  # ... or 25 ms at 10 GB/s
CPU_TOKENS = 512
MIN_HEAD = 32  # attention kernels do heads of 32 to 256 in multiples of 16
ROW_FACTOR = 4.0  # a row of the output may be so much worse than the whole


@dataclass(frozen=True)
class Model:
    """A layer's sizes: width d, h query and hkv key heads of hd, inner width dff.

    `norm` is layer or rms, `place` pre or post (of the residual), `activation` relu, gelu (exact, with
    erf) or swiglu. `bias`: linear layers have one. `decodes`: generates token by token; a Transformer
    decodes with its decoder's self-attention and feed-forward parts. `seq`: tokens it was made for.
    """

    name: str
    d: int
    h: int
    hkv: int
    hd: int
    dff: int
    layers: int
    norm: str
    place: str
    activation: str
    causal: bool
    bias: bool
    rope: float | None  # base of the rotary embedding's frequencies
    decodes: bool
    seq: int

    def scaled(self, factor: int) -> Model:
        """Every width divided by about `factor`: heads first, then their size in multiples of 16."""
        if factor < 1:
            raise UsageError(f"the scale of the dims must be at least 1, not {factor}")
        if factor == 1:
            return self
        heads = max(1, self.h // factor)
        groups = max(g for g in range(1, max(1, self.hkv // factor) + 1) if heads % g == 0)
        head = min(self.hd, max(MIN_HEAD, round(self.d / factor / heads / 16) * 16))
        width = heads * head
        inner = max(16, round(self.dff * width / self.d / 16) * 16)
        return replace(self, d=width, h=heads, hkv=groups, hd=head, dff=inner)


MODELS = {
    m.name: m
    for m in (
        # Vaswani et al. 2017; Devlin et al. 2018; Radford et al. 2019; Llama Team 2024
        Model("transformer-base", 512, 8, 8, 64, 2048, 6, "layer", "post", "relu", False, True, None, True, 512),
        Model("bert-base", 768, 12, 12, 64, 3072, 12, "layer", "post", "gelu", False, True, None, False, 512),
        Model("gpt2", 768, 12, 12, 64, 3072, 12, "layer", "pre", "gelu", True, True, None, True, 1024),
        Model("llama3-8b", 4096, 32, 8, 128, 14336, 32, "rms", "pre", "swiglu", True, False, 5e5, True, 4096),
    )
}


@dataclass(frozen=True)
class Step:
    """One call. An operator has a `problem`, glue has none; `reads` and `writes` name tensors.

    `writes` pairs each name with its shape; a competitor writes exactly one tensor. `rounds`: glue
    that rounds its result to the precision (a copy does not).
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[tuple[str, tuple[int, ...]], ...]
    problem: str = ""
    rounds: bool = True


@dataclass(frozen=True)
class Shape:
    """Which layer, on how much: plain values, so that it travels to a worker as JSON.

    seq: prefill: tokens of a sequence; decode: keys already in the cache, beside one new token.
    scale: the model's widths are divided by it.
    """

    model: str
    phase: str
    precision: str
    batch: int
    seq: int
    scale: int = 1

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise unknown("model", self.model, list(MODELS))
        if self.phase not in ("prefill", "decode"):
            raise unknown("phase", self.phase, ["prefill", "decode"])
        if self.phase == "decode" and not MODELS[self.model].decodes:
            able = ", ".join(m.name for m in MODELS.values() if m.decodes)
            raise UsageError(f"{self.model} is an encoder: it has no decode phase; models that have: {able}")
        if self.precision not in (legal := registry.op("attention").precisions):
            raise unknown("precision of a block", self.precision, legal)
        for name in ("batch", "seq", "scale"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} of a block must be positive, not {getattr(self, name)}")

    @cached_property
    def sizes(self) -> Model:
        """The model with its widths divided."""
        return MODELS[self.model].scaled(self.scale)

    @property
    def new(self) -> int:
        """Tokens of a sequence that are computed."""
        return self.seq if self.phase == "prefill" else 1

    @property
    def keys(self) -> int:
        """Keys that the last token of a sequence sees."""
        return self.seq if self.phase == "prefill" else self.seq + 1

    @property
    def tokens(self) -> int:
        return self.batch * self.new

    def of(self, op: str) -> str:
        """The precision an operator works in: tf32 exists for products only, norms are fp32 then."""
        return self.precision if self.precision in registry.op(op).precisions else "fp32"

    def __str__(self) -> str:
        m = self.sizes
        scaled = f" / {self.scale}" if self.scale > 1 else ""
        work = f"{self.seq} tokens" if self.phase == "prefill" else f"1 token after {self.seq}"
        widths = f"d={m.d}, {m.h} heads ({m.hkv} key) of {m.hd}, dff={m.dff}"
        return f"{self.model}{scaled} {self.phase} {self.precision}: batch {self.batch}, {work}, {widths}"


def shape(
    model: str,
    phase: str = "prefill",
    precision: str = "fp32",
    device_kind: str = "cpu",
    batch: int = 1,
    seq: int | None = None,
    scale: int | None = None,
) -> Shape:
    """A shape with the gaps filled: on a GPU the model itself, on a CPU one that runs in seconds.

    Decode stands before the 1024th token unless told otherwise, or the model's last if it has fewer.

    Raises:
        UsageError: unknown model, phase or precision; a size that is not positive.
    """
    found = Shape(model, phase, precision, batch, seq or 1, scale or 1)
    limit = MODELS[model].seq if device_kind != "cpu" else min(CPU_TOKENS, MODELS[model].seq)
    if seq is None:
        found = replace(found, seq=limit if phase == "prefill" else min(MODELS[model].seq, 1024) - 1)
    while scale is None and device_kind == "cpu" and found.scale < 64 and _slow(plan(found)):
        found = replace(found, scale=found.scale * 2)
    return found


def _slow(steps: list[Step]) -> bool:
    return flops(steps) > CPU_FLOPS or traffic(steps) > CPU_BYTES


class _Plan:
    """Collects steps; the result of the last one is what the next one reads."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.model, self.steps = shape, shape.sizes, list[Step]()

    def gemm(self, name: str, source: str, n: int, k: int, epilogue: str = "bias") -> str:
        biased = self.model.bias
        flags = {"transpose": "nt"} | ({"epilogue": epilogue} if biased else {})
        problem = Problem.make("gemm", self.shape.of("gemm"), flags, m=self.shape.tokens, n=n, k=k)
        return self.operator(name, problem, (source, f"w_{name}", *([f"b_{name}"] if biased else ())))

    def norm(self, name: str, source: str) -> str:
        rms = self.model.norm == "rms"
        problem = Problem.make(
            "layernorm", self.shape.of("layernorm"), {"rms": "1"} if rms else {}, m=self.shape.tokens, n=self.model.d
        )
        return self.operator(name, problem, (source, f"w_{name}", *([] if rms else [f"b_{name}"])))

    def operator(self, name: str, problem: Problem, reads: tuple[str, ...]) -> str:
        problem = registry.problem(problem)
        dims = registry.op(problem.op).output(problem)[0]
        self.steps.append(Step(name, reads, ((name, dims),), str(problem)))
        return name

    def glue(self, name: str, reads: tuple[str, ...], *writes: tuple[str, tuple[int, ...]], rounds: bool = True) -> str:
        self.steps.append(Step(name, reads, writes, rounds=rounds))
        return writes[0][0]


def plan(shape: Shape) -> list[Step]:
    """The layer's steps in order; `x` is its input, the last step writes its output.

    post: norm(x + attention(x)), then norm(y + mlp(y)). pre: x + attention(norm(x)), then y + mlp(norm(y)).
    Glue is named after what it does: split, split_rope, merge, swiglu, add1, add2.
    """
    p, m = _Plan(shape), shape.sizes
    rows = (shape.tokens, m.d)
    pre = m.place == "pre"
    qkv = p.gemm("qkv", p.norm("norm1", "x") if pre else "x", (m.h + 2 * m.hkv) * m.hd, m.d)
    cache = (shape.batch, m.hkv, shape.keys, m.hd)
    heads = (("q", (shape.batch, m.h, shape.new, m.hd)), ("k", cache), ("v", cache))
    p.glue("split_rope" if m.rope else "split", (qkv,), *heads, rounds=m.rope is not None)
    flags = {"causal": "1"} if m.causal and shape.phase == "prefill" else {}
    sizes = {"b": shape.batch, "h": m.h, "hkv": m.hkv, "sq": shape.new, "sk": shape.keys, "d": m.hd}
    p.operator("attention", Problem.make("attention", shape.of("attention"), flags, **sizes), ("q", "k", "v"))
    merged = p.glue("merge", ("attention",), ("merged", (shape.tokens, m.h * m.hd)), rounds=False)
    o = p.gemm("o", merged, m.d, m.h * m.hd)
    y = p.glue("add1", ("x", o), ("add1", rows))
    if not pre:
        y = p.norm("norm1", y)
    inner = p.norm("norm2", y) if pre else y
    if m.activation == "swiglu":
        up = p.gemm("up", inner, 2 * m.dff, m.d)
        up = p.glue("swiglu", (up,), ("swiglu", (shape.tokens, m.dff)))
    else:
        up = p.gemm("up", inner, m.dff, m.d, f"bias_{m.activation}")
    z = p.glue("add2", (y, p.gemm("down", up, m.d, m.dff)), ("add2", rows))
    if not pre:
        p.norm("norm2", z)
    return p.steps


def problems(steps: list[Step]) -> list[Problem]:
    """The operators' problems without repetition, in order: what to race before mixing."""
    return list(dict.fromkeys(registry.problem(s.problem) for s in steps if s.problem))


def flops(steps: list[Step]) -> float:
    """Model FLOP of products and attention; norms and glue, a thousandth of it, are not counted."""
    found = [registry.problem(s.problem) for s in steps if s.problem]
    return sum(registry.op(p.op).flops(p) for p in found if registry.op(p.op).bound == "compute")


def traffic(steps: list[Step]) -> float:
    """Bytes that the operators move at least; what glue moves could be fused away, so it is not counted."""
    found = [registry.problem(s.problem) for s in steps if s.problem]
    return sum(registry.op(p.op).bytes(p) for p in found)


def error_bound(shape: Shape, steps: list[Step]) -> tuple[float, str]:
    """The relative Frobenius error a right layer stays below, and the model in words.

    Every step that rounds adds a relative error of at most its operator's tolerance (1.5-2 times the pure
    rounding floor). Random weights scaled by 1/sqrt(fan-in) pass an error on at its size, and errors of
    different steps are independent, so they add in squares. Residual paths only dilute them.
    """
    rounding = [s for s in steps if s.problem or s.rounds]
    glue = PRECISIONS[shape.of("layernorm")].rel_fro  # fp32 arithmetic rounded once to the storage format
    squares = 0.0
    for step in rounding:
        if step.problem:
            problem = registry.problem(step.problem)
            squares += registry.op(problem.op).tolerance(problem).rel_fro ** 2
        else:
            squares += glue**2
    bound = math.sqrt(squares)
    return bound, f"root of the summed squares of {len(rounding)} roundings' tolerances"
