"""torch's matrix products: matmul, addmm, _addmm_activation, oneDNN linear, fp32 detour, _int_mm, _scaled_mm."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Space, UsageError
from rooftune.kernels.common.torch import device, set_matmul_precision

DEVICES = ("cpu", "cuda", "rocm")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")
BASELINE = True

FLOATS = ("fp32", "tf32", "fp16", "bf16")
WIDE = ("fp32", "tf32")


@cache
def _onednn_lacks(precision: str) -> str:
    """Why oneDNN's linear does not do a format on this CPU, or nothing: in 16 bits AVX2 CPUs have no primitive."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    dtype = getattr(torch, FORMATS[precision].storage)
    a, bias = torch.zeros(2, 32, dtype=dtype), torch.zeros(32, dtype=dtype)
    try:
        torch.ops.mkldnn._linear_pointwise.default(a, torch.zeros(32, 32, dtype=dtype), bias, "none", [], "")
    except RuntimeError as error:
        return f"oneDNN has no {precision} linear for this CPU: {str(error).partition('.')[0]}"
    return ""


Applies = Callable[[str, str], bool]  # (precision, epilogue)
CALLS: dict[str, Applies] = {
    "matmul": lambda p, e: p in FLOATS and e == "none",
    # CPU: with a new output, as most users write it; not in formats that torch's matmul is 60 times slower in
    "matmul_new": lambda p, e: (
        e == "none" and device() == "cpu" and (p == "fp32" or (p in ("fp16", "bf16") and not _onednn_lacks(p)))
    ),
    # gelu of a sum that was rounded to 16 bits is up to 1.2x beyond the tolerance, hence not for those
    "addmm": lambda p, e: p in FLOATS and e != "none" and (p in WIDE or e != "bias_gelu"),
    "addmm_activation": lambda p, e: p in FLOATS and e == "bias_relu",  # its gelu is the tanh form on CUDA
    "mm_fp32": lambda p, e: p in ("fp16", "bf16") and e == "bias_gelu",  # CUDA
    # CPUs whose oneDNN lacks 16-bit products: matmul takes 202 ms at 512^3 in bf16 on a Zen 3 core, this 3.1 ms
    "upcast": lambda p, e: p in ("fp16", "bf16"),
    # CPU; its relu turns NaN into 0, hence not for that
    "onednn_linear": lambda p, e: p in ("fp32", "fp16", "bf16") and e in ("bias", "bias_gelu"),
    "int_mm": lambda p, e: p == "int8",
    "scaled_mm": lambda p, e: p == "fp8",
    "scaled_mm_fast": lambda p, e: p == "fp8",
}


def _applies(config: Config, problem: Problem) -> bool:
    return CALLS[config["call"]](problem.precision, problem.flag("epilogue", "none"))


def _default(problem: Problem) -> Config:
    epilogue = problem.flag("epilogue", "none")
    if problem.precision in ("int8", "fp8"):
        return {"call": {"int8": "int_mm", "fp8": "scaled_mm"}[problem.precision]}
    if epilogue == "bias_gelu" and problem.precision not in WIDE:
        on_cpu = "upcast" if _onednn_lacks(problem.precision) else "onednn_linear"
        return {"call": "mm_fp32" if device() == "cuda" else on_cpu}
    return {"call": "matmul" if epilogue == "none" else "addmm"}


SPACE = Space(axes={"call": tuple(CALLS)}, where=(_applies,), default=_default, entrants="call")


def _activate(epilogue: str) -> Callable[[Any], Any]:
    """The part of an epilogue after the bias, in place."""
    if epilogue == "bias_relu":
        return torch.relu_
    if epilogue == "bias_gelu":
        return torch.ops.aten.gelu_
    return lambda out: out


def _views(problem: Problem) -> Callable[[Any, Any], tuple[Any, Any]]:
    """op(a): [m, k] and op(b): [k, n] as views of what is stored."""
    ta, tb = tuple(problem.flag("transpose", "nn"))
    return lambda a, b: (a if ta == "n" else a.t(), b if tb == "n" else b.t())


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], a, b[, scale_a, scale_b][, bias or residual]), stored as the flag transpose says.

    Three calls can only allocate and return their result: `onednn_linear` (what torch.compile with frozen
    weights calls on a CPU: bias and activation fused into the product), and `mm_fp32` and `upcast`, rounded at
    the end; the latter converts its operands in every call, as they come in 16 bits.

    Raises:
        UsageError: the call does not exist on this device or for these sizes.
    """
    set_matmul_precision(problem)
    torch.set_grad_enabled(False)
    call, epilogue = config["call"], problem.flag("epilogue", "none")
    views, activate = _views(problem), _activate(epilogue)

    def matmul(out: Any, a: Any, b: Any) -> None:
        torch.matmul(*views(a, b), out=out)

    def matmul_new(out: Any, a: Any, b: Any) -> Any:
        return torch.matmul(*views(a, b))

    def addmm(out: Any, a: Any, b: Any, bias: Any) -> None:
        torch.addmm(bias, *views(a, b), out=out)
        activate(out)

    def addmm_activation(out: Any, a: Any, b: Any, bias: Any) -> None:
        torch._addmm_activation(bias, *views(a, b), use_gelu=False, out=out)

    def mm_fp32(out: Any, a: Any, b: Any, bias: Any) -> Any:
        return activate(torch.mm(*views(a, b), out_dtype=torch.float32).add_(bias)).to(out.dtype)

    def upcast(out: Any, a: Any, b: Any, bias: Any = None) -> Any:
        left, right = (view.float() for view in views(a, b))
        product = torch.mm(left, right) if bias is None else torch.addmm(bias.float(), left, right)
        return activate(product).to(out.dtype)

    def int_mm(out: Any, a: Any, b: Any) -> None:
        torch._int_mm(*views(a, b), out=out)

    if call == "onednn_linear":
        return _onednn_linear(problem)
    if call.startswith("scaled_mm"):
        return _scaled_mm(problem, call == "scaled_mm_fast", activate)
    if call == "mm_fp32" and device() != "cuda":
        raise UsageError("torch.mm with another output type exists on GPUs only")
    if call == "upcast" and device() != "cpu":
        raise UsageError("a GPU multiplies 16-bit numbers itself")
    if call == "int_mm" and device() == "cuda" and (problem["m"] <= 16 or problem["n"] % 8 or problem["k"] % 8):
        raise UsageError("torch._int_mm on a GPU wants m > 16 and n, k multiples of 8")
    runs: dict[str, Run] = {
        "matmul": matmul,
        "matmul_new": matmul_new,
        "addmm": addmm,
        "addmm_activation": addmm_activation,
        "mm_fp32": mm_fp32,
        "upcast": upcast,
        "int_mm": int_mm,
    }
    return runs[call]


def _onednn_linear(problem: Problem) -> Run:
    if device() != "cpu":
        raise UsageError("oneDNN linear exists on CPUs only")
    if lacks := _onednn_lacks(problem.precision):
        raise UsageError(lacks)
    views = _views(problem)
    attr, algorithm = ("gelu", "none") if problem.flag("epilogue") == "bias_gelu" else ("none", "")
    linear = torch.ops.mkldnn._linear_pointwise.default

    def run(out: Any, a: Any, b: Any, bias: Any) -> Any:
        left, right = views(a, b)
        return linear(left, right.t(), bias, attr, [], algorithm)

    return run


def _scaled_mm(problem: Problem, fast: bool, activate: Callable[[Any], Any]) -> Run:
    if device() == "cuda" and (problem["n"] % 16 or problem["k"] % 16):
        raise UsageError("torch._scaled_mm on a GPU wants n and k multiples of 16")
    if device() != "cuda" and fast:
        raise UsageError("fast accumulation exists on GPUs only")

    def run(out: Any, a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any = None) -> None:
        torch._scaled_mm(a, b.t(), scale_a, scale_b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast, out=out)
        activate(out)

    def add(out: Any, a: Any, b: Any, scale_a: Any, scale_b: Any, residual: Any) -> Any:
        total = torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.float32, use_fast_accum=fast)
        return total.add_(residual).to(out.dtype)  # a product rounded before the sum is rounded twice

    return add if problem.flag("epilogue") == "residual" else run
