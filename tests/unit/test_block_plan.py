"""The plan of a transformer layer: its steps, its price, the sizes it comes in, the error it may have."""

import math

import pytest

from rooftune.core import UsageError
from rooftune.suites import block, block_plan

CASES = [(m, "prefill") for m in block.MODELS] + [(m.name, "decode") for m in block.MODELS.values() if m.decodes]


def tiny(model="gpt2", phase="prefill", precision="fp32"):
    return block.shape(model, phase, precision, "cpu", 2, 19, 64 if model == "llama3-8b" else 12)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("transformer-base", 3.15e6), ("bert-base", 7.08e6), ("gpt2", 7.08e6), ("llama3-8b", 218.1e6)],
)
def test_flops_are_two_per_parameter_and_token_plus_attention(model, parameters):
    shape = block_plan.Shape(model, "prefill", "bf16", 1, 512)
    m = shape.sizes
    attention = 4 * m.h * 512 * (256 if m.causal else 512) * m.hd
    assert block_plan.flops(block.plan(shape)) == pytest.approx(2 * 512 * parameters + attention, rel=2e-3)


def test_llama_prefill_and_decode_match_the_published_arithmetic():
    prefill = block.plan(block.shape("llama3-8b", "prefill", "bf16", "cuda", seq=4096))
    assert block_plan.flops(prefill) == pytest.approx(1.787e12 + 0.137e12, rel=1e-3)
    decode = block.plan(block.shape("llama3-8b", "decode", "bf16", "cuda", seq=1023))
    assert block_plan.traffic(decode) == pytest.approx(436e6 + 4.2e6, rel=2e-3)


def test_norms_stand_before_or_after_the_operators():
    def names(model):
        return [s.name for s in block.plan(tiny(model))]

    post = "qkv split attention merge o add1 norm1 up down add2 norm2"
    assert names("bert-base") == names("transformer-base") == post.split()
    assert names("gpt2") == ["norm1", "qkv", "split", "attention", "merge", "o", "add1", "norm2", "up", "down", "add2"]
    llama = "norm1 qkv split_rope attention merge o add1 norm2 up swiglu down add2"
    assert names("llama3-8b") == llama.split()


def test_the_flags_of_the_operators_follow_the_model():
    steps = {(m, s.name): s.problem for m in block.MODELS for s in block.plan(tiny(m))}
    assert "epilogue=bias_relu,transpose=nt" in steps["transformer-base", "up"]
    assert "epilogue=bias_gelu,transpose=nt" in steps["gpt2", "up"]
    assert "epilogue" not in steps["llama3-8b", "up"]
    assert ",rms," in steps["llama3-8b", "norm1"]
    assert [",causal," in steps[m, "attention"] for m in block.MODELS] == [False, False, True, True]
    assert ",causal," not in next(s for s in block.plan(tiny(phase="decode")) if s.name == "attention").problem


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 8, 16, 100])
def test_scaled_models_stay_models(factor):
    for model in block.MODELS.values():
        m = model.scaled(factor)
        assert m.h % m.hkv == 0
        assert m.d == m.h * m.hd
        assert m.hd % 16 == 0
        assert 32 <= m.hd <= 256
        assert m.dff % 16 == 0
        assert m.d <= model.d


def test_a_cpu_gets_what_runs_in_seconds_and_a_gpu_the_model_itself():
    for model, phase in CASES:
        small, whole = (block.shape(model, phase, "fp32", kind) for kind in ("cpu", "cuda"))
        assert block_plan.flops(block.plan(small)) <= 5e9
        assert block_plan.traffic(block.plan(small)) <= 2.5e8
        assert whole.scale == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("gpt3",), "unknown model 'gpt3'; known: bert-base, gpt2, llama3-8b, transformer-base"),
        (("gpt2", "train"), "unknown phase 'train'; known: decode, prefill"),
        (
            ("bert-base", "decode"),
            "bert-base is an encoder: it has no decode phase; models that have: transformer-base",
        ),
        (("gpt2", "prefill", "fp8"), "unknown precision of a block 'fp8'"),
        (("gpt2", "prefill", "fp32", "cpu", -1), "batch of a block must be positive, not -1"),
        (("gpt2", "prefill", "fp32", "cpu", 1, 8, -2), "scale of a block must be positive, not -2"),
    ],
)
def test_bad_shapes_are_named(arguments, text):
    with pytest.raises(UsageError) as error:
        block.shape(*arguments)
    assert text in str(error.value)


def test_the_bound_adds_tolerances_in_squares():
    shape = tiny("gpt2", precision="bf16")
    bound, text = block_plan.error_bound(shape, block.plan(shape))
    # norm1 qkv o add1 norm2 up down add2 at 2.5e-3, attention at 4e-3; split and merge only copy
    assert bound == pytest.approx(math.sqrt(8 * 2.5e-3**2 + 4e-3**2))
    assert "9 roundings" in text
