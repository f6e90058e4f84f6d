"""torch's layer_norm and rms_norm: the calls a user writes; they allocate their result and return it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import layer_norm, rms_norm

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.layernorm import EPS

DEVICES = ("cpu", "cuda", "rocm")
PRECISIONS = ("fp32", "fp16", "bf16")
BASELINE = True

CALLS = {  # call -> whether it is for the RMS norm
    "layer_norm": False,
    "rms_norm": True,
}
SPACE = Space(
    axes={"call": tuple(CALLS)},
    where=(lambda config, problem: CALLS[config["call"]] == bool(problem.flag("rms")),),
    default={"call": "layer_norm"},
    entrants="call",
)


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n], weight: [n], bias: [n]); no bias with the flag rms.

    torch has no norm that fills a given output: the `.out` overload of native_layer_norm is generated
    from the allocating one plus three copies (2.2x the time of the call alone at 4096x1024). So both
    entrants allocate their result and return it, as their users get it.
    """
    shape = (problem["n"],)

    def run_layer(out: Any, x: Any, weight: Any, bias: Any) -> Any:
        return layer_norm(x, shape, weight, bias, EPS)

    def run_rms(out: Any, x: Any, weight: Any) -> Any:
        return rms_norm(x, shape, weight, EPS)

    torch.set_grad_enabled(False)
    return run_rms if problem.flag("rms") else run_layer
