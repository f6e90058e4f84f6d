"""torch.compile of layer_norm and rms_norm: one fused kernel by Inductor, written straight into out."""

from __future__ import annotations

from typing import Any

from torch.nn.functional import layer_norm, rms_norm

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.torch_compile import MODES, compile_body
from rooftune.kernels.layernorm import EPS

DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32", "fp16", "bf16")
PER_SHAPE = True
SPACE = Space(axes={"mode": MODES}, default={"mode": "default"})


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n], weight: [n], bias: [n]); no bias with the flag rms."""
    shape = (problem["n"],)

    def layer(out: Any, x: Any, weight: Any, bias: Any) -> None:
        out.copy_(layer_norm(x, shape, weight, bias, EPS))

    def rms(out: Any, x: Any, weight: Any) -> None:
        out.copy_(rms_norm(x, shape, weight, EPS))

    return compile_body(problem, config["mode"], rms if problem.flag("rms") else layer)
