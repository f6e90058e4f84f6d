"""torch.nn.functional.scaled_dot_product_attention, one entrant a backend."""

from __future__ import annotations

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
SPACE = Space(
    axes={"call": tuple(BACKENDS)},
    where=(lambda config, problem: not (problem.precision in ("fp32", "tf32") and config["call"] == "sdpa_cudnn"),),
    default={"call": "sdpa_default"},
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
    """run(out: [b, h, sq, d], q: [b, h, sq, d], k, v: [b, hkv, sk, d]).

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

    def run(out: Any, q: Any, k: Any, v: Any) -> Any:
        _allow(call)
        result = scaled_dot_product_attention(q, k, v, **options)
        if blind:
            result[:, :, :blind] = 0
        return result

    _try(problem, call, options)
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
