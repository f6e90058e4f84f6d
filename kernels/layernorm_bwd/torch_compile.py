"""torch.compile of the backward of layer_norm and rms_norm: Inductor's fused kernels, written straight into out."""

from __future__ import annotations

from typing import Any

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.common.torch_compile import MODES, compile_body

DEVICES = ("cuda",)
PRECISIONS = ("fp32", "fp16", "bf16")
PER_SHAPE = True
SPACE = Space(axes={"mode": MODES}, default={"mode": "default"})


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m + 2, n], dy: [m, n], x: [m, n], weight: [n], mean, rstd: [m]); with rms no mean, m + 1 rows."""
    m = problem["m"]

    def rms(out: Any, dy: Any, x: Any, weight: Any, rstd: Any) -> None:
        slope, scale = dy.float(), rstd[:, None]
        xhat = x.float() * scale
        g = slope * weight.float()
        out[:m].copy_((g - xhat * (g * xhat).mean(-1, keepdim=True)) * scale)
        out[m].copy_((slope * xhat).sum(0))

    def layer(out: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any) -> None:
        slope, scale = dy.float(), rstd[:, None]
        xhat = (x.float() - mean[:, None]) * scale
        g = slope * weight.float()
        out[:m].copy_((g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * scale)
        out[m].copy_((slope * xhat).sum(0))
        out[m + 1].copy_(slope.sum(0))

    return compile_body(problem, config["mode"], rms if problem.flag("rms") else layer)
