"""Backward operators: their float64 references agree with autograd, and parts of an output are judged one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from rooftune import check, registry, screen
from rooftune.autotune import gradients, inprocess
from rooftune.core import Problem, Reference, Status, UsageError
from rooftune.kernels import attention
from rooftune.kernels.layernorm import EPS
from rooftune.worker import Buffers, Handle, Session


def _given(text: str) -> tuple[Problem, tuple[torch.Tensor, ...], torch.Tensor]:
    """A problem, its inputs and the reference's values."""
    problem = registry.problem(text)
    op = registry.op(problem.op)
    tensors = op.inputs(problem, check.generator("cpu", 5), "cpu", "normal")
    value = op.reference(problem, tensors, None).value
    assert tuple(value.shape) == op.output(problem)[0]
    assert sum(op.parts(problem).values()) in (0, len(value))
    return problem, tensors, value


def _gradients(result: torch.Tensor, slope: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(result, leaves, slope.double())
    return torch.cat([g.reshape(-1, leaves[0].shape[-1]) for g in found])


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x.double().requires_grad_()


def _near(got: torch.Tensor, want: torch.Tensor) -> None:
    """The inputs hold statistics that were rounded to fp32."""
    assert float((got - want).norm() / want.norm()) < 2e-7


def test_softmax_backward_is_what_autograd_computes() -> None:
    x = _leaf(torch.randn(5, 33, generator=check.generator("cpu", 1)))
    problem = registry.problem("softmax_bwd[m=5,n=33]")
    dy, y = torch.randn(5, 33, generator=check.generator("cpu", 2)), x.softmax(-1)
    value = registry.op(problem.op).reference(problem, (dy, y.detach()), None).value
    _near(value, _gradients(y, dy, x))


@pytest.mark.parametrize("flag", ["", ",rms"])
def test_norm_backward_is_what_autograd_computes(flag: str) -> None:
    problem, tensors, value = _given(f"layernorm_bwd[m=37,n=65{flag}]")
    dy, x, weight = tensors[0], _leaf(tensors[1]), _leaf(tensors[2])
    if problem.flag("rms"):
        _near(value, _gradients(rms_norm(x, (65,), weight, EPS), dy, x, weight))
    else:
        bias = torch.zeros(65, dtype=torch.float64, requires_grad=True)
        _near(value, _gradients(layer_norm(x, (65,), weight, bias, EPS), dy, x, weight, bias))


@pytest.mark.parametrize("shape", ["hkv=2,sq=9,sk=14,d=16,causal", "sq=13,sk=6,d=16,causal", "hkv=1,sq=7,sk=5,d=32"])
def test_attention_backward_is_what_autograd_computes(shape: str) -> None:
    problem, tensors, value = _given(f"attention_bwd[b=2,h=4,{shape}]")
    dout, q, k, v = tensors[0], *(_leaf(t) for t in tensors[1:4])
    seen = torch.ones(problem["sq"], problem["sk"], dtype=torch.bool)
    if problem.flag("causal"):
        seen = seen.tril(problem["sk"] - problem["sq"])
    blind = ~seen.any(-1)  # rows that see no key: autograd of their softmax is NaN, their output is 0
    dout = dout.masked_fill(blind[:, None], 0.0)
    result = scaled_dot_product_attention(q, k, v, attn_mask=seen | blind[:, None], enable_gqa=True)
    assert bool((tensors[5].isinf() == blind).all())
    _near(value, _gradients(result, dout, q, k, v))


@pytest.mark.parametrize("shape", ["hkv=2,sq=9,sk=14,d=16,causal", "sq=13,sk=6,d=16,causal"])
def test_attention_gives_its_backward_what_it_needs(shape: str) -> None:
    """lse in fp32 behind an output of bf16, the same that the backward's own inputs hold."""
    problem, tensors, value = _given(f"attention[b=2,h=4,{shape},lse,bf16]")
    op, out = registry.op("attention"), torch.empty(value.shape, dtype=torch.bfloat16)
    backward = registry.problem(f"attention_bwd[b=2,h=4,{shape},bf16]")
    again = registry.op("attention_bwd").inputs(backward, check.generator("cpu", 5), "cpu", "normal")
    check.settle((again[4], again[5]), out)
    ref = op.reference(problem, tensors, None)
    assert check.judge_parts(op, problem, out, ref, None)[0] == ""
    result, lse = attention.results(problem, out)
    for mine, theirs in zip((*tensors, result, lse), (*again[1:5], again[5].view(-1)), strict=True):
        assert torch.equal(mine, theirs)
    rows = [0, len(out) - 1]
    assert check.judge_parts(op, problem, out[rows], op.reference(problem, tensors, rows), rows)[0] == ""
    lse[-1] += 1e-4  # of about 2: bf16 would not know
    assert check.judge_parts(op, problem, out, ref, None)[0].startswith("lse: ")


def test_attention_with_logarithms_has_no_gradient_of_its_own() -> None:
    problem, tensors, value = _given("attention[b=1,h=2,sq=3,sk=4,d=16,lse]")
    with pytest.raises(UsageError, match="holds the bits of two results"):
        gradients.gradients(problem, tensors, value)
    with pytest.raises(UsageError, match="wants an even d"):
        _given("attention[b=1,h=2,sq=3,d=15,lse,bf16]")
    numba = registry.impl("attention/numba").load()
    with pytest.raises(UsageError, match="attention/numba does not give the logarithms"):
        numba.build(problem, numba.SPACE.default_for(problem))


def test_rows_of_a_reference_are_those_of_the_whole() -> None:
    for text in ("layernorm_bwd[m=9,n=20]", "attention_bwd[b=1,h=4,hkv=2,sq=6,sk=8,d=16,causal]"):
        problem, tensors, value = _given(text)
        rows = [0, len(value) - 1, 7, len(value) - 2]
        some = registry.op(problem.op).reference(problem, tensors, rows)
        assert torch.allclose(some.value, value[rows], rtol=1e-12, atol=0)


def test_a_sample_has_the_edges_of_every_part() -> None:
    rows = screen.sample_rows(1002, 3, 48, {"dx": 1000, "dweight": 1, "dbias": 1})
    assert {0, 999, 1000, 1001} <= set(rows)
    assert len(rows) == 48 or len(rows) == 47  # a random row may be an edge
    assert screen.sample_rows(1002, 3, 6, {"dq": 500, "dk": 251, "dv": 251})[:1] == [0]
    assert screen.sample_rows(5, 3, 48) == list(range(5))


def test_a_small_part_is_judged_by_itself() -> None:
    problem, tensors, value = _given("layernorm_bwd[m=400,n=64]")
    op = registry.op(problem.op)
    ref = op.reference(problem, tensors, None)
    good = value.float()
    assert check.judge_parts(op, problem, good, ref, None)[0] == ""
    bad = good.clone()
    bad[-2] *= 1 + 4e-6  # dweight: within the bound of each element, above that of its norm
    wrong, figures = check.judge_parts(op, problem, bad, ref, None)
    assert wrong.startswith("dweight: relative Frobenius error")
    assert figures["rel_fro"] > 3e-6
    rows = [0, 399, 400, 401]
    part = op.reference(problem, tensors, rows)
    assert check.judge_parts(op, problem, bad[rows], part, rows)[0].startswith("dweight: ")


def test_a_returned_tuple_is_put_below_one_another() -> None:
    out = torch.zeros(5, 4)
    check.settle((torch.ones(3, 4), torch.full((4,), 2.0), torch.full((1, 4), 3.0)), out)
    assert out[:, 0].tolist() == [1, 1, 1, 2, 3]
    with pytest.raises(TypeError, match="instead of"):
        check.settle((torch.ones(3, 4), torch.ones(4)), out)


def test_a_backward_call_that_returns_its_parts_serves_in_this_process_too() -> None:
    problem, tensors, value = _given("layernorm_bwd[m=6,n=9]")
    kernel = inprocess.build(problem, "layernorm_bwd/torch", None, "a test")
    out = torch.empty(8, 9)
    kernel(out, *tensors)
    assert torch.allclose(out.double(), value, atol=1e-5)


def test_candidates_of_a_worker_on_one_problem_share_its_tensors() -> None:
    """Until the last of them is released; inputs are whole again before every round, whatever was done to them."""
    session = Session("native", "cpu")
    text = "layernorm_bwd[m=40,n=8]"
    asked = {"impl": "layernorm_bwd/torch", "config": {}, "seed": 1, "thorough": False}
    asked["config"] = session.space(asked["impl"], text)["default"]
    first, second, other = (
        session.prepare(problem=p, **asked)["handle"] for p in (text, text, "layernorm_bwd[m=9,n=8]")
    )
    on = session.handles[first].on
    assert session.handles[second].on is on
    assert session.handles[other].on is not on
    for handle in (first, second):
        assert session.time(handle, 3, samples=1)["status"] == Status.OK
    before = [t.clone() for t in on.tensors]
    for t in on.tensors:
        t.zero_()
    on.fill(3)
    assert all(torch.equal(t, was) for t, was in zip(on.tensors, before, strict=True))
    del on
    session.release(first)
    assert len(session.buffers) == 2
    session.release(second)
    assert len(session.buffers) == 1


def test_a_timed_output_in_parts_is_judged_at_all_edges_once_then_at_random() -> None:
    problem = registry.problem("layernorm_bwd[m=900,n=8]")
    op = registry.op(problem.op)
    seen: list[list[int]] = []

    def reference(problem: Problem, tensors: object, rows: list[int]) -> Reference:
        seen.append(rows)
        return op.reference(problem, tensors, rows)

    module = registry.impl("layernorm_bwd/torch").load()
    run = module.build(problem, module.SPACE.default_for(problem))
    handle = Handle(run, Buffers(replace(op, reference=reference), problem, "cpu"))
    for seed in range(4):
        out = handle.on.fill(seed)
        check.settle(run(out.tensor, *handle.on.tensors), out.tensor)
        rows = handle.rows(seed)
        assert handle.verify(rows, handle.look(rows)) == ""
    assert {0, 899, 900, 901} <= set(seen[0])
    assert all(len(rows) == 6 for rows in seen[1:])
    assert not any({900, 901} <= set(rows) for rows in seen[1:])
