"""torch.softmax into a given output, and on a CPU also as most users write it, with a new one."""

from __future__ import annotations

from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.torch import device

DEVICES = ("cpu", "cuda", "rocm")
PRECISIONS = ("fp32", "fp16", "bf16")
BASELINE = True
SPACE = Space(
    axes={"call": ("softmax_out", "softmax")},
    where=(lambda config, problem: config["call"] == "softmax_out" or device() == "cpu",),
    default={"call": "softmax_out"},
    entrants="call",
)


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n]).

    `softmax` runs the same kernel but allocates its result, which costs nothing on a GPU (a pool) and on a CPU
    a page fault every 4 KiB from 32 MiB on (2048 x 4096 in fp32 on a Zen 5 core: 19.3 instead of 4.2 ms).
    """

    def fill(out: Any, x: Any) -> None:
        torch.softmax(x, -1, out=out)

    def allocate(out: Any, x: Any) -> Any:
        return torch.softmax(x, -1)

    return fill if config["call"] == "softmax_out" else allocate
