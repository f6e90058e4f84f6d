"""torch's own backward of layer_norm and rms_norm: what autograd calls, without the forward."""

from __future__ import annotations

from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space, UsageError
from rooftune.kernels.common.torch import device

DEVICES = ("cpu", "cuda", "rocm")
PRECISIONS = ("fp32", "fp16", "bf16")
BASELINE = True

CALLS = {  # call -> whether it is for the RMS norm
    "layer_norm_backward": False,
    "layer_norm_backward_fp32": False,
    "rms_norm_backward": True,
    "rms_norm_autograd": True,
}
WIDE = "layer_norm_backward_fp32"  # for 16-bit problems


def _default(problem: Problem) -> Config:
    if problem.flag("rms"):
        return {"call": "rms_norm_autograd"}
    return {"call": WIDE if device() == "cpu" and problem.precision != "fp32" else "layer_norm_backward"}


SPACE = Space(
    axes={"call": tuple(CALLS)},
    where=(
        lambda config, problem: CALLS[config["call"]] == bool(problem.flag("rms")),
        lambda config, problem: config["call"] != WIDE or problem.precision != "fp32",
    ),
    default=_default,
    entrants="call",
)


def rms_backward(dy: Any, x: Any, weight: Any, rstd: Any) -> tuple[Any, Any]:
    """The operations autograd does for rms_norm, which outside of CUDA has no backward of its own."""
    scale = rstd[:, None]
    dy, xhat = dy.float(), x.float() * scale
    g = dy * weight.float()
    dx = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * scale
    return dx.to(x.dtype), (dy * xhat).sum(0).to(x.dtype)


def build(problem: Problem, config: Config) -> Run:
    """run(out, dy: [m, n], x: [m, n], weight: [n], mean, rstd: [m]) -> (dx, dweight, dbias); see the operator.

    The calls allocate their results and return them. torch 2.13 on a CPU sums dweight of 16-bit rows in 16
    bits (relative error 9e-3 in bf16 for 70 rows): there the call on operands widened to fp32 stands in.

    Raises:
        UsageError: the call does not exist here, or is that one.
    """
    call, shape, here = config["call"], [problem["n"]], device()
    torch.set_grad_enabled(False)
    if call == "rms_norm_autograd":
        return lambda out, dy, x, weight, rstd: rms_backward(dy, x, weight, rstd)
    if call == "rms_norm_backward":
        if here != "cuda" or not hasattr(torch.ops.aten, "_fused_rms_norm_backward"):
            raise UsageError("rms_norm_backward exists on CUDA only, and not in torch before 2.9")
        rms = torch.ops.aten._fused_rms_norm_backward.default
        return lambda out, dy, x, weight, rstd: rms(dy, x, shape, rstd[:, None], weight, [True, True])
    layer = torch.ops.aten.native_layer_norm_backward.default
    mask = [True, True, True]
    if call == WIDE:

        def run_wide(out: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any) -> Any:
            wide = weight.float()
            found = layer(dy.float(), x.float(), shape, mean[:, None], rstd[:, None], wide, wide, mask)
            return tuple(t.to(x.dtype) for t in found)

        return run_wide
    if here == "cpu" and problem.precision != "fp32":
        raise UsageError("torch's CPU kernel sums dweight of 16-bit rows in 16 bits, which is too inexact")
    return lambda out, dy, x, weight, mean, rstd: layer(
        dy, x, shape, mean[:, None], rstd[:, None], weight, weight, mask
    )
