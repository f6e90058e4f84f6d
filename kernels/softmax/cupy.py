"""CUDA C++: 16-byte loads, rows in registers, warp shuffles; long rows in two passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources
from rooftune.kernels.common import cupy as cuda
from rooftune.kernels.common import cupy_rows as rows

DEVICES = ("cuda",)
PRECISIONS = ("fp32", "fp16", "bf16")
SPACE = rows.SPACE


def _kernel(problem: Problem, config: Config) -> cuda.Kernel:
    return rows.kernel(Path(__file__).with_suffix(".cu"), "softmax_kernel", problem, config)


def _runner(problem: Problem, config: Config, compiled: Callable[[cuda.Kernel], cuda.Launch]) -> Run:
    """run(y: [m, n], x: [m, n])."""
    launch, grid = compiled(_kernel(problem, config)), rows.grid(problem, config)

    def run(out: Any, x: Any) -> None:
        launch(grid, out, x, problem["m"], problem["n"])

    return run


def build(problem: Problem, config: Config) -> Run:
    """On the current GPU; clusters from compute capability 9.0 on."""
    return _runner(problem, rows.compilable(config, cuda.current_arch()), cuda.device)


def emulate(problem: Problem, config: Config) -> Run:
    """The same source on CPU tensors, one fiber per thread."""
    return _runner(problem, config, cuda.host)


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """What the machine code takes."""
    return cuda.resources(_kernel(problem, rows.compilable(config, arch)), arch)
