"""Building blocks of the torch.compile competitors: compile once, for one problem, before anything is timed."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch

from rooftune import registry
from rooftune.check import Run, generator
from rooftune.core import Problem
from rooftune.kernels.common.torch import device, set_matmul_precision

REQUIRES = ("torch",)
# Compile in this process: a pool of compiler processes would outlive the worker's deadline.
ENV = {"native": {"TORCHINDUCTOR_COMPILE_THREADS": "1"}}
MODES = ("default", "max-autotune-no-cudagraphs")

_compiled: dict[tuple[Problem, str], Run] = {}  # a check builds the same small problem for each kind of input


def compile_body(problem: Problem, mode: str, body: Callable[..., None]) -> Run:
    """Compile body(out, *inputs) for the sizes of the problem, and run it once on inputs of these
    sizes: 2-6 s of a core each, so a check with four ragged relatives takes about half a minute.

    Each compiled function gets a code object of its own: Dynamo keeps what it compiled there and falls back
    to eager execution, silently, at the ninth size of one code object.
    """
    if (problem, mode) in _compiled:
        return _compiled[problem, mode]
    set_matmul_precision(problem)
    torch.set_grad_enabled(False)
    code = body.__code__.replace()
    fresh = types.FunctionType(code, body.__globals__, body.__name__, body.__defaults__, body.__closure__)
    run: Run = torch.compile(fresh, mode=mode, dynamic=False, fullgraph=True)
    op = registry.op(problem.op)
    shape, dtype = op.output(problem)
    out = torch.empty(shape, dtype=getattr(torch, dtype), device=device())
    run(out, *op.inputs(problem, generator(device(), 0), device(), "normal"))
    _compiled[problem, mode] = run
    return run
