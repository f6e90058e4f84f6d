"""torch's flex_attention, compiled: the attention kernel that Inductor generates from a template."""

from __future__ import annotations

from typing import Any

from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from rooftune.check import Run
from rooftune.core import Config, Problem, Space
from rooftune.kernels.attention import without_lse
from rooftune.kernels.common.torch import device
from rooftune.kernels.common.torch_compile import MODES, compile_body

DEVICES = ("cuda",)  # the CPU template turns a row with a NaN into zeros, which is wrong
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
PER_SHAPE = True
SPACE = Space(axes={"mode": MODES}, default={"mode": "default"})


def build(problem: Problem, config: Config) -> Run:
    """run(out: [b, h, sq, d], q: [b, h, sq, d], k, v: [b, hkv, sk, d])."""
    without_lse(problem, "attention/torch_compile")
    sq, sk, grouped = problem["sq"], problem["sk"], problem["h"] != problem["hkv"]
    mask = None
    if problem.flag("causal"):

        def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return query + (sk - sq) >= key

        mask = create_block_mask(seen, None, None, sq, sk, device=device())

    def attention(out: Any, q: Any, k: Any, v: Any) -> None:
        out.copy_(flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped))

    return compile_body(problem, config["mode"], attention)
