"""Building blocks of the torch competitors: which device they run on, and how exactly fp32 is computed."""

from __future__ import annotations

import torch

from rooftune.core import Problem, UsageError

REQUIRES = ("torch",)


def device() -> str:
    """The device type this process serves: a worker for the CPU is started with its GPUs hidden."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def set_matmul_precision(problem: Problem) -> None:
    """Make fp32 problems run in fp32 and tf32 problems in tf32, and 16-bit ones accumulate in fp32.

    Raises:
        UsageError: tf32 was asked for on a CPU.
    """
    if problem.precision == "tf32" and device() != "cuda":
        raise UsageError("tf32 exists on GPUs only")
    torch.set_float32_matmul_precision("high" if problem.precision == "tf32" else "highest")
    if device() == "cuda":  # split-K partial sums in 16 bits lose what the tolerance of the operator allows
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
