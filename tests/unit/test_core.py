"""Problems, operators, spaces: printed forms, defaults, rules, and the one-line errors."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rooftune import registry
from rooftune.core import PRECISIONS, Problem, Space, UsageError, parse_count


@given(
    m=st.integers(1, 10**6),
    n=st.integers(1, 10**6),
    k=st.integers(1, 10**6),
    precision=st.sampled_from(sorted(PRECISIONS)),
    transpose=st.sampled_from(["nn", "nt", "tn", "tt"]),
    epilogue=st.sampled_from(["none", "bias", "bias_relu", "bias_gelu", "residual"]),
)
def test_a_printed_problem_reads_back(m: int, n: int, k: int, precision: str, transpose: str, epilogue: str) -> None:
    flags = {"transpose": transpose, "epilogue": epilogue}
    problem = registry.problem(Problem.make("gemm", precision, flags, m=m, n=n, k=k))
    assert registry.problem(str(problem)) == problem
    assert problem.flag("transpose", "nn") == transpose


def test_defaults_fill_left_out_sizes_and_order_does_not_matter() -> None:
    full = registry.problem("attention[b=1,h=8,hkv=8,sq=128,sk=128,d=64,fp32]")
    assert registry.problem("attention[d=64, sq=128, h=8, b=1]") == full


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gem[m=1,n=1,k=1]", "unknown op 'gem'; known: attention, "),
        ("softmax[m=0,n=4]", "must be positive"),
        ("softmax[m=-3,n=4]", "must be positive"),
        ("softmax[m=4]", "size n missing"),
        ("softmax[m=4,n=4,q=2]", "unknown size of softmax 'q'"),
        ("softmax[m=4,n=4,int8]", "unknown precision of softmax 'int8'"),
        ("softmax[m=4.5,n=4]", "not a whole number"),
        ("attention[b=1,h=1,sq=4,d=64,masked]", "unknown flag of attention 'masked'"),
        ("gemm[m=1,n=1,k=1,transpose=xx]", "unknown transpose of gemm 'xx'"),
        ("softmax", "is not a problem"),
    ],
)
def test_a_bad_problem_gets_one_line_that_says_what(text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry.problem(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_counts_have_suffixes() -> None:
    assert (parse_count("4k", "m"), parse_count("4Ki", "m"), parse_count("2M", "m")) == (4000, 4096, 2_000_000)


def _space() -> Space:
    return Space(
        axes={"block": (16, 32, 64), "warps": (1, 2, 4)},
        where=(lambda c, p: c["block"] * c["warps"] <= 128, lambda c, p: c["block"] <= p["n"]),
        default={"block": 64, "warps": 4},
    )


def test_a_space_never_yields_a_config_that_breaks_a_rule() -> None:
    problem = registry.problem("softmax[m=4,n=40]")
    space, rng = _space(), random.Random(0)
    configs = list(space.configs(problem))
    assert configs
    for config in [*configs, *(space.sample(problem, rng) for _ in range(50)), space.default_for(problem)]:
        assert config is not None
        assert config["block"] <= 40
        assert config["block"] * config["warps"] <= 128


def test_a_space_without_a_valid_config_says_so() -> None:
    with pytest.raises(UsageError, match="no valid config"):
        _space().default_for(registry.problem("softmax[m=4,n=8]"))


def test_every_operator_declares_work_that_is_positive_and_small_problems_that_parse() -> None:
    for name in registry.op_names():
        op = registry.op(name)
        for precision in op.precisions:
            for problem in op.small(precision):
                assert registry.problem(str(problem)) == op.problem(problem)
                assert op.flops(problem) > 0
                assert op.bytes(problem) > 0


def test_formulas_of_the_work() -> None:
    gemm = registry.problem("gemm[m=2,n=3,k=5,bf16]")
    assert registry.op("gemm").flops(gemm) == 60
    assert registry.op("gemm").bytes(gemm) == 2 * (10 + 15 + 6)
    full = registry.problem("attention[b=1,h=2,sq=8,d=16]")
    causal = registry.problem("attention[b=1,h=2,sq=8,d=16,causal]")
    attention = registry.op("attention")
    assert attention.flops(full) == 4 * 2 * 8 * 8 * 16
    assert attention.flops(causal) == attention.flops(full) / 2
