"""torch.compile of the product with its epilogue: Inductor fuses what comes after the sum."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import gelu

from rooftune.check import Run
from rooftune.core import Config, Problem, Space, UsageError
from rooftune.kernels.common.torch import device
from rooftune.kernels.common.torch_compile import MODES, compile_body

DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")
PER_SHAPE = True
SPACE = Space(axes={"mode": MODES}, default={"mode": "default"})


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], a, b[, scale_a, scale_b][, bias or residual]), stored as the flag transpose says.

    Raises:
        UsageError: tf32 on a CPU; a 16-bit gelu on a CPU (the sum would be rounded before it); sizes that
            torch._int_mm and torch._scaled_mm refuse.
    """
    a_stored, b_stored = tuple(problem.flag("transpose", "nn"))
    epilogue, precision = problem.flag("epilogue", "none"), problem.precision
    wide = precision in ("fp16", "bf16") and epilogue == "bias_gelu"
    m, n, k = problem["m"], problem["n"], problem["k"]
    if wide and device() != "cuda":
        raise UsageError("gelu of a 16-bit product: torch.compile rounds the sum first on a CPU")
    if device() == "cuda" and precision == "int8" and (m <= 16 or n % 8 or k % 8):
        raise UsageError("torch._int_mm on a GPU wants m > 16 and n, k multiples of 8")
    if device() == "cuda" and precision == "fp8" and (n % 16 or k % 16):
        raise UsageError("torch._scaled_mm on a GPU wants n and k multiples of 16")

    def activate(total: Any) -> Any:
        if epilogue == "bias_relu":
            return torch.relu(total)
        return gelu(total) if epilogue == "bias_gelu" else total

    def product(out: Any, a: Any, b: Any, bias: Any = None) -> None:
        left, right = a if a_stored == "n" else a.t(), b if b_stored == "n" else b.t()
        if precision == "int8":
            out.copy_(torch._int_mm(left, right))
        elif epilogue == "none":
            out.copy_(torch.mm(left, right))
        elif wide:
            out.copy_(activate(torch.mm(left, right, out_dtype=torch.float32) + bias))
        else:
            out.copy_(activate(torch.addmm(bias, left, right)))

    def scaled(out: Any, a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any = None) -> None:
        total = torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.float32)
        out.copy_(activate(total if bias is None else total + bias))

    return compile_body(problem, config["mode"], scaled if precision == "fp8" else product)
