"""torch's own backward of softmax: the operator that autograd calls, into a given output."""

from __future__ import annotations

from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space

DEVICES = ("cpu", "cuda", "rocm")
PRECISIONS = ("fp32", "fp16", "bf16")
BASELINE = True
SPACE = Space(axes={"call": ("softmax_backward",)}, default={"call": "softmax_backward"}, entrants="call")


def build(problem: Problem, config: Config) -> Run:
    """run(dx: [m, n], dy: [m, n], y: [m, n])."""
    backward = torch.ops.aten._softmax_backward_data.out
    torch.set_grad_enabled(False)

    def run(out: Any, dy: Any, y: Any) -> None:
        backward(dy, y, -1, y.dtype, grad_input=out)

    return run
