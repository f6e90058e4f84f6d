"""attention_bwd/cupy_wgmma with one, two and three consumers a block, in every order of threads.

Its default for problems that an emulation can afford is one consumer; large ones have two.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from rooftune import check, registry
from rooftune.kernels.common import cupy_host

CASES = (
    # rings go round, the last queries and keys are no whole block, query heads share keys
    ("b=1,h=2,hkv=1,sq=150,sk=333,d=128,causal,bf16", (128, 64, 128, 96)),
    # 64 rows beside the diagonal have nothing to do while the others have; the first queries see no key
    ("b=1,h=4,hkv=1,sq=400,sk=200,d=64,causal,bf16", (192, 48, 192, 64)),
    # two stages, no mask
    ("b=1,h=2,hkv=1,sq=170,sk=290,d=128,fp16", (64, 80, 128, 144)),
)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "blocks"), CASES)
def test_blocks_of_every_size_are_right_in_any_order_of_threads(text: str, blocks: tuple[int, ...]) -> None:
    pytest.importorskip("torch")
    kernel: Any = importlib.import_module("rooftune.kernels.attention_bwd.cupy_wgmma")
    problem = registry.problem(f"attention_bwd[{text}]")
    config = dict(zip(("block_n1", "block_m1", "block_m2", "block_n2"), blocks, strict=True))
    assert kernel.SPACE.valid(config, problem)
    run = kernel.emulate(problem, config)
    for order in cupy_host.ORDERS:
        with cupy_host.thread_order(order, seed=5):
            verdict = check.check_case(registry.op("attention_bwd"), problem, run, seed=7)
        assert verdict.ok, f"{order}: {verdict.reason}"
        assert verdict.deterministic
