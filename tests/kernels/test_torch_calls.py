"""torch's calls on a CPU: where one form fills a given output and one makes a new one, both race and both are right."""

# nothing below can be imported where torch is missing
from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch not installed", allow_module_level=True)

from rooftune import check, registry
from rooftune.core import UsageError

BOTH = {
    "gemm[m=33,n=40,k=50,fp32]": {"matmul", "matmul_new"},
    "softmax[m=9,n=300,fp32]": {"softmax_out", "softmax"},
    "softmax[m=9,n=300,bf16]": {"softmax_out", "softmax"},
    "layernorm[m=9,n=300,fp32]": {"native_layer_norm_out", "layer_norm"},
    "layernorm[m=9,n=300,bf16]": {"native_layer_norm_out", "layer_norm"},
}


@pytest.mark.parametrize("text", BOTH)
def test_both_forms_of_a_call_enter_the_race(text: str) -> None:
    problem = registry.problem(text)
    op, module = registry.op(problem.op), registry.impl(f"{problem.op}/torch").load()
    configs = {config["call"]: config for config in module.SPACE.configs(problem)}
    assert BOTH[text] <= set(configs)
    assert module.SPACE.default_for(problem)["call"] in configs
    for call in BOTH[text]:
        verdict = check.check_case(op, problem, module.build(problem, configs[call]), seed=3)
        assert verdict.ok, f"{call}: {verdict.reason}"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("h", [2, 8])
def test_torch_has_a_right_backward_of_heads_that_share_keys(h: int, precision: str) -> None:
    """Its CPU kernel adds up their gradients in 16 bits: of 8 heads no check passed, and there was no torch."""
    problem = registry.problem(f"attention_bwd[b=1,h={h},hkv=1,sq=128,d=64,{precision}]")
    op, module = registry.op(problem.op), registry.impl("attention_bwd/torch").load()
    right = set()
    for config in module.SPACE.configs(problem):
        try:
            run = module.build(problem, config)
        except UsageError:
            continue
        for seed in (1, 4, 7):
            verdict = check.check_case(op, problem, run, seed=seed)
            assert verdict.ok, f"{config}: {verdict.reason}"
        right.add(config["call"])
    assert module.SPACE.default_for(problem)["call"] in right
