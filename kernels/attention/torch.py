"""torch.nn.functional.scaled_dot_product_attention, one entrant a backend; with lse the call behind a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from rooftune.check import Run
from rooftune.core import Config, Problem, Space, UsageError
from rooftune.kernels.common.torch import device, set_matmul_precision

DEVICES = ("cpu", "cuda", "rocm")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
BASELINE = True

# call -> which of (flash, efficient, math, cudnn) may run
BACKENDS = {
    "sdpa_default": (True, True, True, True),
    "sdpa_math": (False, False, True, False),
    "sdpa_flash": (True, False, False, False),
    "sdpa_efficient": (False, True, False, False),
    "sdpa_cudnn": (False, False, False, True),
}
WITH_LSE = ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn")  # what autograd calls: they give the logarithms too
SPACE = Space(
    axes={"call": tuple(BACKENDS)},
    where=(
        lambda config, problem: not (problem.precision in ("fp32", "tf32") and config["call"] == "sdpa_cudnn"),
        lambda config, problem: not problem.flag("lse") or config["call"] in WITH_LSE,
    ),
    default=lambda problem: {"call": "sdpa_flash" if problem.flag("lse") else "sdpa_default"},
    entrants="call",
)


def _allow(call: str) -> None:
    """Let SDPA choose among these backends only. Four C calls, under a microsecond; the context manager
    `sdpa_kernel` does the same and costs about ten."""
    flash, efficient, math, cudnn = BACKENDS[call]
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_math_sdp(math)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def _arguments(problem: Problem) -> dict[str, Any]:
    """The mask: torch's own causal mask is aligned at the top left, ours at the bottom right."""
    sq, sk = problem["sq"], problem["sk"]
    options: dict[str, Any] = {"enable_gqa": True} if problem["h"] != problem["hkv"] else {}
    if not problem.flag("causal"):
        return options
    if sq == sk:
        return options | {"is_causal": True}
    if device() == "cuda" and sk > sq:  # reaches the flash kernel, which takes no explicit mask
        from torch.nn.attention.bias import causal_lower_right

        return options | {"attn_mask": causal_lower_right(sq, sk)}
    seen = torch.ones(sq, sk, dtype=torch.bool, device=device()).tril(sk - sq)
    return options | {"attn_mask": seen}


def build(problem: Problem, config: Config) -> Run:
    """run(out: see the operator, q: [b, h, sq, d], k, v: [b, hkv, sk, d]).

    SDPA has no form that fills a given output: every call allocates its result and returns it.
    A trial on zeros (one batch, one group of heads) finds backends that refuse.

    Raises:
        UsageError: the backend does not exist on this device or refuses the problem.
    """
    set_matmul_precision(problem)
    torch.set_grad_enabled(False)
    call, options = config["call"], _arguments(problem)
    if device() == "cpu" and call in ("sdpa_efficient", "sdpa_cudnn"):
        raise UsageError(f"{call} exists on GPUs only")
    blind = max(0, problem["sq"] - problem["sk"]) if problem.flag("causal") else 0  # rows that see no key
    if problem.flag("lse"):
        return _with_lse(problem, call, blind)

    def run(out: Any, q: Any, k: Any, v: Any) -> Any:
        _allow(call)
        result = scaled_dot_product_attention(q, k, v, **options)
        if blind:
            result[:, :, :blind] = 0
        return result

    _try(problem, call, options)
    return run


def _with_lse(problem: Problem, call: str, blind: int) -> Run:
    """run(out, q, k, v) -> (out, lse), by the call that autograd makes for a backend.

    Raises:
        UsageError: the backend cannot do this problem.
    """
    aten, sq, sk = torch.ops.aten, problem["sq"], problem["sk"]
    causal, grouped = bool(problem.flag("causal")), problem["h"] != problem["hkv"]
    call_with: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # a call, what follows q, k and v
    if device() == "cpu":
        if problem.precision in ("fp16", "bf16"):  # off by up to 4.7e-5 at sk=14, where fp32 sums are by 2.4e-7
            raise UsageError("sdpa_flash on a CPU exponentiates too coarsely in 16 bits for lse in fp32")
        mask = None
        if causal and sq != sk:  # its own causal mask is aligned at the top left, ours at the bottom right
            hidden = torch.ones(sq, sk).triu(sk - sq + 1).bool()
            mask = torch.zeros(sq, sk).masked_fill_(hidden, -torch.inf)
        cpu = aten._scaled_dot_product_flash_attention_for_cpu.default
        call_with = cpu, (0.0, causal and mask is None), {"attn_mask": mask}
    elif call == "sdpa_flash":
        if problem.precision in ("fp32", "tf32") or (causal and sq > sk):
            raise UsageError("sdpa_flash with lse takes 16-bit operands, and under a causal mask sq <= sk")
        call_with = aten._scaled_dot_product_flash_attention.default, (0.0, causal), {}
    elif grouped or (causal and sq != sk):
        raise UsageError(f"{call} with lse has neither grouped heads nor a causal mask at the bottom right")
    elif call == "sdpa_cudnn":
        call_with = aten._scaled_dot_product_cudnn_attention.default, (None, True, 0.0, causal), {}
    else:
        call_with = aten._scaled_dot_product_efficient_attention.default, (None, True, 0.0, causal), {}
    attend, more, options = call_with

    def run(out: Any, q: Any, k: Any, v: Any) -> Any:
        result, lse = attend(q, k, v, *more, **options)[:2]
        lse = lse.reshape(*lse.shape[:2], -1)[:, :, :sq]  # efficient attention's is padded, cuDNN's has a fourth size
        if blind:
            result[:, :, :blind], lse[:, :, :blind] = 0, torch.inf
        return result, lse

    return run


def _try(problem: Problem, call: str, options: dict[str, Any]) -> None:
    """One call on zeros of the problem's own lengths: backends decide by head size, mask and type."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(problem.precision, torch.float32)
    groups = problem["h"] // problem["hkv"]
    q = torch.zeros(1, groups, problem["sq"], problem["d"], dtype=dtype, device=device())
    kv = torch.zeros(1, 1, problem["sk"], problem["d"], dtype=dtype, device=device())
    _allow(call)
    try:
        scaled_dot_product_attention(q, kv, kv, **options)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        raise UsageError(f"{call} refuses this problem here: {reason}") from error
