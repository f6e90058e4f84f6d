"""torch's backward of scaled_dot_product_attention, one entrant a backend: what autograd calls, without the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rooftune.check import Run
from rooftune.core import Config, Problem, Space, UsageError
from rooftune.kernels.common.torch import device, set_matmul_precision

DEVICES = ("cpu", "cuda", "rocm")
PRECISIONS = ("fp32", "fp16", "bf16")
BASELINE = True
CALLS = ("sdpa_flash_backward", "sdpa_efficient_backward", "sdpa_cudnn_backward", "sdpa_flash_backward_fp32")
WIDE = CALLS[-1]  # on a CPU, for 16-bit heads that share keys
GROUP = 2  # heads that share keys, of which torch's CPU kernel may add up the 16-bit gradients


def _inexact(problem: Problem) -> bool:
    """Whether torch's CPU kernel errs too much: in bf16 groups of 3 failed 1 of 6 checks, of 4 3, of 8 all of them."""
    return device() == "cpu" and problem.precision != "fp32" and problem["h"] > GROUP * problem["hkv"]


SPACE = Space(
    axes={"call": CALLS},
    where=(
        lambda config, problem: problem.precision != "fp32" or config["call"] not in ("sdpa_cudnn_backward", WIDE),
        lambda config, problem: config["call"] != WIDE or problem["h"] != problem["hkv"],
    ),
    default=lambda problem: {"call": WIDE if _inexact(problem) else "sdpa_flash_backward"},
    entrants="call",
)
Backward = Callable[..., tuple[Any, ...]]  # (dout, q, k, v, out, lse) -> (dq, dk, dv)


def _cpu(problem: Problem) -> Backward:
    """The flash kernel for CPUs. Its own causal mask is aligned at the top left, ours at the bottom right."""
    sq, sk = problem["sq"], problem["sk"]
    causal = bool(problem.flag("causal"))
    mask = None
    if causal and sq != sk:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(problem.precision, torch.float32)
        mask = torch.zeros(sq, sk, dtype=dtype).masked_fill_(torch.ones(sq, sk).triu(sk - sq + 1).bool(), -torch.inf)
    call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return lambda *tensors: call(*tensors, 0.0, causal and mask is None, attn_mask=mask)


def _cuda(problem: Problem, call: str) -> Backward:
    """A backend's kernel. The mask of efficient attention and cuDNN is aligned at the top left: sq = sk only.

    Raises:
        UsageError: the backend cannot do this problem.
    """
    aten, sq, sk = torch.ops.aten, problem["sq"], problem["sk"]
    causal, grouped = bool(problem.flag("causal")), problem["h"] != problem["hkv"]
    none = torch.zeros((), dtype=torch.int64, device="cuda")  # the state of a random generator that is not used
    if call == "sdpa_flash_backward":
        if problem.precision == "fp32":
            raise UsageError("sdpa_flash_backward takes 16-bit operands only")
        if causal and sq > sk:
            raise UsageError("sdpa_flash_backward wants sq <= sk under a causal mask")
        flash = aten._scaled_dot_product_flash_attention_backward.default
        return lambda *tensors: flash(*tensors, None, None, sq, sk, 0.0, causal, none, none)
    if grouped or (causal and sq != sk):
        raise UsageError(f"{call} has neither grouped heads nor a causal mask at the bottom right")
    if call == "sdpa_cudnn_backward":
        cudnn = aten._scaled_dot_product_cudnn_attention_backward.default
        return lambda dout, q, k, v, out, lse: cudnn(
            dout, q, k, v, out, lse[..., None], none, none, None, None, None, sq, sk, 0.0, causal
        )
    if sq % 32:
        raise UsageError("sdpa_efficient_backward wants lse padded to multiples of 32: sq is none")
    efficient = aten._scaled_dot_product_efficient_attention_backward.default
    needed = [True, True, True, False]
    return lambda dout, q, k, v, out, lse: efficient(dout, q, k, v, None, out, lse, none, none, 0.0, needed, causal)[:3]


def build(problem: Problem, config: Config) -> Run:
    """run(out, dout, q, k, v, out, lse) -> (dq, dk, dv), see the operator: the calls allocate what they return.

    torch 2.13 on a CPU adds up dk and dv of 16-bit heads that share keys in 16 bits (relative error 7e-3 in bf16 for
    8 heads, where 2e-3 is that of rounding): there the call on operands widened to fp32 stands in.

    Raises:
        UsageError: the backend does not exist on this device or cannot do the problem.
    """
    set_matmul_precision(problem)
    torch.set_grad_enabled(False)
    if config["call"] == WIDE:
        return _wide(problem)
    if device() == "cpu" and config["call"] != "sdpa_flash_backward":
        raise UsageError(f"{config['call']} exists on GPUs only")
    if _inexact(problem):
        raise UsageError("torch's CPU kernel adds up heads that share keys in 16 bits, which is too inexact")
    backward = _cpu(problem) if device() == "cpu" else _cuda(problem, config["call"])
    if device() == "cuda":
        _try(problem, config["call"], backward)

    def run(result: Any, *tensors: Any) -> Any:
        return tuple(backward(*tensors))

    return run


def _wide(problem: Problem) -> Run:
    if device() != "cpu":
        raise UsageError(f"{WIDE} stands in for a CPU kernel")
    backward = _cpu(problem.replace(precision="fp32"))

    def run(result: Any, dout: Any, *tensors: Any) -> Any:
        return tuple(t.to(dout.dtype) for t in backward(dout.float(), *(t.float() for t in tensors)))

    return run


def _try(problem: Problem, call: str, backward: Backward) -> None:
    """One call on zeros, one group of heads: backends decide by head size, mask and type."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(problem.precision, torch.float32)
    groups = problem["h"] // problem["hkv"]
    q = torch.zeros(1, groups, problem["sq"], problem["d"], dtype=dtype, device="cuda")
    kv = torch.zeros(1, 1, problem["sk"], problem["d"], dtype=dtype, device="cuda")
    try:
        backward(q, q, kv, kv, q, torch.zeros(q.shape[:3], device="cuda"))
    except RuntimeError as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        raise UsageError(f"{call} refuses this problem here: {reason}") from error
