"""torch.softmax into a given output: the call a user writes."""

from __future__ import annotations

from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space

DEVICES = ("cpu", "cuda", "rocm")
PRECISIONS = ("fp32", "fp16", "bf16")
BASELINE = True
SPACE = Space(axes={"call": ("softmax_out",)}, default={"call": "softmax_out"}, entrants="call")


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n]).

    `F.softmax` runs the same kernel but allocates its result, so it is no entrant of its own.
    """

    def run(out: Any, x: Any) -> None:
        torch.softmax(x, -1, out=out)

    return run
