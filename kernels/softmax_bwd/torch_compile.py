"""torch.compile of softmax's backward: one fused kernel by Inductor."""

from __future__ import annotations

from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.torch_compile import MODES, compile_body

DEVICES = ("cuda",)
PRECISIONS = ("fp32", "fp16", "bf16")
PER_SHAPE = True
SPACE = Space(axes={"mode": MODES}, default={"mode": "default"})


def build(problem: Problem, config: Config) -> Run:
    """run(dx: [m, n], dy: [m, n], y: [m, n])."""

    def softmax_backward(out: Any, dy: Any, y: Any) -> None:
        out.copy_(torch.ops.aten._softmax_backward_data(dy, y, -1, y.dtype))

    return compile_body(problem, config["mode"], softmax_backward)
