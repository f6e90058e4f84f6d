"""torch's layer_norm and rms_norm, which allocate their result and return it; on a CPU the form that fills one too."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import layer_norm, rms_norm

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.torch import device
from rooftune.kernels.layernorm import EPS

DEVICES = ("cpu", "cuda", "rocm")
PRECISIONS = ("fp32", "fp16", "bf16")
BASELINE = True

CALLS = {  # call -> whether it is for the RMS norm
    "layer_norm": False,
    "rms_norm": True,
    "native_layer_norm_out": False,  # CPU
}
SPACE = Space(
    axes={"call": tuple(CALLS)},
    where=(
        lambda config, problem: CALLS[config["call"]] == bool(problem.flag("rms")),
        lambda config, problem: config["call"] != "native_layer_norm_out" or device() == "cpu",
    ),
    default={"call": "layer_norm"},
    entrants="call",
)


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], x: [m, n], weight: [n], bias: [n]); no bias with the flag rms.

    torch has no norm that writes into a given output: the `.out` overload of native_layer_norm is generated
    from the allocating one plus three copies (2.2x the time of the call alone at 4096x1024 on a Zen 3 core; it
    races so that both forms are on record). The others allocate their result and return it, as users get it.
    """
    shape = (problem["n"],)
    torch.set_grad_enabled(False)
    if config["call"] == "native_layer_norm_out":
        return _into(problem)

    def run_layer(out: Any, x: Any, weight: Any, bias: Any) -> Any:
        return layer_norm(x, shape, weight, bias, EPS)

    def run_rms(out: Any, x: Any, weight: Any) -> Any:
        return rms_norm(x, shape, weight, EPS)

    return run_rms if problem.flag("rms") else run_layer


def _into(problem: Problem) -> Run:
    m, n = problem["m"], problem["n"]
    dtype = getattr(torch, FORMATS[problem.precision].storage)
    row, vector = torch.zeros(1, n, dtype=dtype), torch.zeros(n, dtype=dtype)
    kept = torch.ops.aten.native_layer_norm.default(row, (n,), vector, vector, EPS)[1].dtype  # of mean and rstd
    mean, rstd = (torch.empty(m, 1, dtype=kept) for _ in range(2))
    call = torch.ops.aten.native_layer_norm.out

    def run(out: Any, x: Any, weight: Any, bias: Any) -> None:
        call(x, (n,), weight, bias, EPS, out0=out, out1=mean, out2=rstd)

    return run
