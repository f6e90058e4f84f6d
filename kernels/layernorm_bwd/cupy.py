"""CUDA C++: one pass over rows in registers for dx, dweight and dbias, partial sums added by a second kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources, Space
from rooftune.kernels.common import cupy as cuda
from rooftune.kernels.common import cupy_rows as rows
from rooftune.kernels.common.resources import worst

DEVICES = ("cuda",)
PRECISIONS = ("fp32", "fp16", "bf16")
HELD = 4  # values for each place of a row: dy * weight, xhat and two sums
BESIDE = 40  # registers apart from them
ADD_THREADS = 256


def _spread(config: Config, problem: Problem) -> bool:
    """Not more blocks than there are rows for."""
    groups = config["num_threads"] // config["threads_per_row"]
    return bool(config["blocks"] == 32 or config["blocks"] // config["cluster"] * groups <= problem["m"])


def _space() -> Space:
    """That of rows, and how many blocks walk over them: the count of partial sums, in clusters times their size."""
    base = rows.space(HELD)

    def default(problem: Problem) -> Config:
        config = base.default_for(problem)
        if config["threads_per_row"] > 512:  # 1024 threads have 64 registers each: not even 8 places
            config |= {"threads_per_row": 512, "num_threads": 512}
        groups = config["num_threads"] // config["threads_per_row"]
        blocks = max((b for b in (128, 256, 512) if b * groups <= problem["m"]), default=32)
        return {**config, "blocks": blocks}

    axes = {**base.axes, "blocks": (32, 128, 256, 512, 1024)}
    return Space(axes=axes, where=(*base.where, _spread), default=default)


SPACE = _space()


@dataclass(frozen=True)
class _Plan:
    """The kernels of a problem, their grids, and the number of partial rows."""

    kernels: tuple[cuda.Kernel, ...]  # rows, [sums over rows,] adding up
    grids: tuple[int, ...]
    partial: int


def _plan(problem: Problem, config: Config) -> _Plan:
    m, n, rms = problem["m"], problem["n"], int(problem.flag("rms") == "1")
    source = Path(__file__).with_suffix(".cu")
    main = rows.kernel(source, "rows_kernel", problem, config, BESIDE, HELD, RMS=rms, KERNEL=0)
    main = replace(main, shared_bytes=2 * main.shared_bytes)
    settings = {**dict(main.macros), "BLOCK_THREADS": ADD_THREADS, "ROW_THREADS": ADD_THREADS, "ITEMS": 0, "RMS": rms}
    settings |= {"CLUSTER_SIZE": 1}
    plain = tuple((settings | {"VEC": 1, "RMS": 0, "KERNEL": 2}).items())  # one binary for every shape
    add = cuda.Kernel(source, "add_kernel", plain, ADD_THREADS, ADD_THREADS * 4)
    add_grid = -(-n // 32) * (1 if rms else 2)
    if dict(main.macros)["ITEMS"]:
        groups, cluster = config["num_threads"] // config["threads_per_row"], config["cluster"]
        walkers = min(config["blocks"] // cluster, -(-m // groups))
        return _Plan((main, add), (walkers * cluster, add_grid), walkers * groups)
    sums = cuda.Kernel(source, "sums_kernel", tuple((settings | {"KERNEL": 1}).items()), ADD_THREADS)
    across = -(-n // (ADD_THREADS * settings["VEC"]))
    splits = max(1, min(m, config["blocks"] * 4 // across))
    return _Plan((main, sums, add), (rows.grid(problem, config), across * splits, add_grid), splits)


def _runner(problem: Problem, config: Config, compiled: Callable[[cuda.Kernel], cuda.Launch], device: str) -> Run:
    """run(out: [m + 2, n], dy, x: [m, n], weight: [n], mean, rstd: [m]); with rms no mean, and m + 1 rows."""
    import torch

    m, n = problem["m"], problem["n"]
    plan = _plan(problem, config)
    launches = [compiled(kernel) for kernel in plan.kernels]
    parts = torch.empty((1 if problem.flag("rms") else 2) * plan.partial * n, device=device)

    def run(out: Any, dy: Any, x: Any, weight: Any, *stats: Any) -> None:
        mean, rstd = stats if len(stats) == 2 else (None, stats[0])
        launches[0](plan.grids[0], out, parts, dy, x, weight, mean, rstd, m, n)
        if len(launches) == 3:
            launches[1](plan.grids[1], parts, dy, x, mean, rstd, m, n, plan.partial)
        launches[-1](plan.grids[-1], out, parts, m, n, plan.partial)

    return run


def build(problem: Problem, config: Config) -> Run:
    """On the current GPU; clusters from compute capability 9.0 on."""
    return _runner(problem, rows.compilable(config, cuda.current_arch()), cuda.device, "cuda")


def emulate(problem: Problem, config: Config) -> Run:
    """The same source on CPU tensors, one fiber per thread."""
    return _runner(problem, config, cuda.host, "cpu")


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """What the machine code takes: of several kernels, the most that one of them does."""
    return worst([cuda.resources(kernel, arch) for kernel in _plan(problem, rows.compilable(config, arch)).kernels])
