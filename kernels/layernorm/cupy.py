"""CUDA C++: layer and RMS norm, two-pass variance on rows in registers, 16-byte loads, warp shuffles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources
from rooftune.kernels.common import cupy as cuda
from rooftune.kernels.common import cupy_rows as rows
from rooftune.kernels.layernorm import EPS

DEVICES = ("cuda",)
PRECISIONS = ("fp32", "fp16", "bf16")
SPACE = rows.SPACE


def _kernel(problem: Problem, config: Config) -> cuda.Kernel:
    source, rms = Path(__file__).with_suffix(".cu"), int(problem.flag("rms") == "1")
    beside = 36 if problem.precision == "fp32" else 32  # 16-byte loads of weight and bias; at 32 it spilled 16 bytes
    return rows.kernel(source, "layernorm_kernel", problem, config, beside, RMS=rms)


def _runner(problem: Problem, config: Config, compiled: Callable[[cuda.Kernel], cuda.Launch]) -> Run:
    """run(y: [m, n], x: [m, n], weight: [n][, bias: [n]])."""
    launch, grid = compiled(_kernel(problem, config)), rows.grid(problem, config)

    def run(out: Any, x: Any, weight: Any, bias: Any = None) -> None:
        launch(grid, out, x, weight, bias, problem["m"], problem["n"], EPS)

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
