"""torch.compile of the softmax formula: one fused kernel by Inductor."""

from __future__ import annotations

from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.torch_compile import MODES, compile_body

DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32", "fp16", "bf16")
PER_SHAPE = True
SPACE = Space(axes={"mode": MODES}, default={"mode": "default"})


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n])."""

    def softmax(out: Any, x: Any) -> None:
        out.copy_(torch.softmax(x, -1))

    return compile_body(problem, config["mode"], softmax)
