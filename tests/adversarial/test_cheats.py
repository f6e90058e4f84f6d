"""Kernels that cheat, and kernels that are slightly wrong: the gate must catch each."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rooftune import check, registry, screen
from rooftune.core import Problem
from rooftune.kernels.attention_bwd import torch as attention_backward
from rooftune.registry import load_file

WIDE = registry.problem("softmax[m=8,n=8192]")
CHEATS = {
    "writes zeros": ("out.zero_()", "Frobenius"),
    "writes nothing": ("pass", "never written"),
    "writes all but the last column": ("out[:, :-1] = torch.softmax(x, -1)[:, :-1]", "never written"),
    "writes all but the last row": ("out[:-1] = torch.softmax(x, -1)[:-1]", "never written"),
    "changes its input": ("torch.softmax(x, -1, out=out); x.mul_(2)", "changed its input 0"),
    "writes before its output": (
        "torch.softmax(x, -1, out=out); out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(1)",
        "before the output",
    ),
    "writes after its output": (
        "torch.softmax(x, -1, out=out); out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(1)",
        "after the output",
    ),
    "caches by address": (
        "key = (x.data_ptr(), tuple(x.shape))\nif key not in memo: memo[key] = torch.softmax(x, -1)\n"
        "out.copy_(memo[key])",
        "second call",
    ),
    "caches by object": (
        "if id(x) not in memo: memo[id(x)] = (x, torch.softmax(x, -1))\nout.copy_(memo[id(x)][1])",
        "second call",
    ),
    "computes in bf16": ("out.copy_(torch.softmax(x.bfloat16(), -1))", "Frobenius"),
    "computes in fp16": ("out.copy_(torch.softmax(x.half(), -1))", "Frobenius"),
    "forgets the maximum": ("e = x.exp(); out.copy_(e / e.sum(-1, keepdim=True))", "large input"),
    "begins the maximum at 0": (
        "e = (x - x.amax(-1, keepdim=True).clamp_min(0)).exp(); out.copy_(e / e.sum(-1, keepdim=True))",
        "equal input",
    ),
    "hides NaN": ("torch.softmax(x.nan_to_num(), -1, out=out)", "should be nan"),
    "drops the tail of odd rows": (
        "n = x.shape[1] // 16 * 16\nout.zero_()\nif n: out[:, :n] = torch.softmax(x[:, :n], -1)",
        "m=1,n=1",
    ),
    "answers with the uniform distribution": ("out.fill_(1 / x.shape[1])", "Frobenius"),
    "rounds the last digit away": ("out.copy_((torch.softmax(x, -1) * 1e6).round() / 1e6)", "Frobenius"),
    "swaps two neighbours": ("y = torch.softmax(x, -1); y[0, :2] = y[0, :2].flip(0); out.copy_(y)", "error"),
    "is right for eight rows only": (
        "y = torch.softmax(x, -1)\nif x.shape[0] != 8: y.mul_(1.001)\nout.copy_(y)",
        "m=1,n=1",
    ),
    "leaves what is there where nothing seems to have changed": (
        "key = (x.data_ptr(), tuple(x.shape), x.sum().item())\nif memo.get(0) != key: torch.softmax(x, -1, out=out)\n"
        "memo[0] = key",
        "third call",
    ),
    "writes after its output with the poison": (
        "torch.softmax(x, -1, out=out)\n"
        "out.as_strided((9,), (1,), out.storage_offset() + out.numel()).view(torch.uint8).fill_(255)",
        "after the output",
    ),
    "treats minus infinity as a number": ("torch.softmax(x.clamp_min(-30), -1, out=out)", "neg_inf"),
}
TEXT = "import torch\nmemo = {}\ndef run(out, x):\n    BODY\n"


def _run(tmp_path: Path, body: str) -> check.Run:
    path = tmp_path / "cheat.py"
    path.write_text(TEXT.replace("BODY", body.replace("\n", "\n    ")))
    run: check.Run = load_file(path).run
    return run


def _check(run: check.Run, problem: Problem = WIDE) -> check.Verdict:
    return check.check(registry.op(problem.op), problem, {}, lambda p, c: run, seed=7)


@pytest.mark.parametrize("name", sorted(CHEATS))
def test_a_cheat_is_caught_for_the_right_reason(tmp_path: Path, name: str) -> None:
    body, words = CHEATS[name]
    verdict = _check(_run(tmp_path, body))
    assert not verdict.ok
    assert words in verdict.reason, verdict.reason


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("n", [1, 31, 1000, 8192])
def test_an_honest_kernel_passes(tmp_path: Path, precision: str, n: int) -> None:
    verdict = _check(
        _run(tmp_path, "torch.softmax(x, -1, out=out)"), registry.problem(f"softmax[m=8,n={n},{precision}]")
    )
    assert verdict.ok, verdict.reason
    assert verdict.deterministic


def test_what_fp16_rounds_below_its_normal_numbers_is_no_fault() -> None:
    """Of 65,536 columns the correctly rounded softmax has a relative error of 7e-4: its values are subnormal."""
    problem = registry.problem("softmax[m=2,n=65536,fp16]")

    def rounded(out: torch.Tensor, x: torch.Tensor) -> None:
        out.copy_(torch.softmax(x.double(), -1))

    op = registry.op("softmax")
    verdict = check.check_case(op, problem, rounded, seed=7)
    assert verdict.ok, verdict.reason
    verdict = check.check_case(op, problem, lambda out, x: rounded(out, x * 1.01), seed=7)
    assert "Frobenius" in verdict.reason


def test_a_mean_that_cancels_may_err_as_its_terms_do() -> None:
    """Rows of mean 0 with a number near it: of 524,288 random ones in rows of 16 there is one, and torch was wrong."""
    problem, op = registry.problem("layernorm[m=64,n=16]"), registry.op("layernorm")
    x, weight, bias = op.inputs(problem, check.generator("cpu", 1))
    x[:, 0], bias[0] = 0.0, 0.0
    x[:, 1:] -= x[:, 1:].mean(-1, keepdim=True)
    x[:, 0] = 1e-6
    reference = op.reference(problem, (x, weight, bias))
    out = torch.nn.functional.layer_norm(x, (16,), weight, bias, 1e-5)
    wrong, _ = check.judge(op, problem, out, reference)
    assert not wrong, wrong
    wrong, _ = check.judge(op, problem, out + 1e-5 * weight, reference)
    assert wrong


def test_sums_of_very_many_terms_may_err_as_fp32_does_and_no_more() -> None:
    problem, op = registry.problem("gemm[m=8,n=8,k=100003]"), registry.op("gemm")
    for seed in range(3):
        verdict = check.check_case(op, problem, lambda out, a, b: torch.matmul(a, b, out=out), seed=seed)
        assert verdict.ok, verdict.reason
    for wrong in (lambda a, b: a[:, :-1] @ b[:-1], lambda a, b: (a.bfloat16() @ b.bfloat16()).float()):
        verdict = check.check_case(op, problem, lambda out, a, b, wrong=wrong: out.copy_(wrong(a, b)), seed=1)
        assert "Frobenius" in verdict.reason


WRONG_GEMMS = {
    "drops one step of k": "out.copy_(a[:, :-1] @ b[:-1])",
    "accumulates in fp16": (
        "acc = torch.zeros_like(out, dtype=torch.float16)\n"
        "for i in range(0, a.shape[1], 8): acc += a[:, i:i+8].half() @ b[i:i+8].half()\nout.copy_(acc)"
    ),
    "rounds twice to bf16": "out.copy_((a.float() @ b.float()).bfloat16().mul(1.004))",
    "transposes b of a square": "out.copy_(a @ (b.t() if b.shape[0] == b.shape[1] else b))",
    "uses tf32-like inputs": (
        "r = lambda t: (t.float().view(torch.int32) & -8192).view(torch.float32)\nout.copy_(r(a) @ r(b))"
    ),
}


@pytest.mark.parametrize("name", sorted(WRONG_GEMMS))
def test_a_subtly_wrong_gemm_is_caught(tmp_path: Path, name: str) -> None:
    path = tmp_path / "gemm.py"
    path.write_text("import torch\ndef run(out, a, b):\n    " + WRONG_GEMMS[name].replace("\n", "\n    ") + "\n")
    run = load_file(path).run
    problem = registry.problem("gemm[m=64,n=64,k=64]" if "bf16" not in name else "gemm[m=64,n=64,k=64,bf16]")
    verdict = check.check(registry.op("gemm"), problem, {}, lambda p, c: run, seed=7)
    assert not verdict.ok


ANOTHER_EPS = (
    "x, n = x.float(), x.shape[-1]\nmean = x.mean(-1, keepdim=True) * bool(bias)\n"
    "y = (x - mean) * (x.sub(mean).square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.float()\n"
    "out.copy_(y + bias[0].float() if bias else y)"
)
FROM_ZERO = (
    "s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[3] ** 0.5\n"
    "e = (s - s.amax(-1, keepdim=True).clamp_min(0)).exp()\n"
    "out.copy_(e / e.sum(-1, keepdim=True) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1))"
)
UNSEEN = {  # arguments, body, problem, reason
    "norm": ("x, weight, *bias", ANOTHER_EPS, "layernorm[m=8,n=1024,bf16]", "small input"),
    "rms": ("x, weight, *bias", ANOTHER_EPS, "layernorm[m=8,n=1024,rms,bf16]", "small input"),
    "attention": ("q, k, v", FROM_ZERO, "attention[b=1,h=4,hkv=2,sq=40,sk=40,d=32]", "large input"),
    "-128": (
        "a, b",
        "out.copy_(a.clamp_min(-127).double() @ b.clamp_min(-127).double())",
        "gemm[m=32,n=48,k=64,int8]",
        "integers input",
    ),
    "sums of two in 16 bits": (
        "a, b",
        "out.zero_()\nfor i in range(0, a.shape[1], 2):\n"
        "    out += (a[:, i : i + 2].double() @ b[i : i + 2].double()).clamp(-32768, 32767).int()",
        "gemm[m=32,n=48,k=64,int8]",
        "integers input",
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_random_numbers_do_not_show_is_caught(tmp_path: Path, name: str) -> None:
    """A maximum that begins at 0, another EPS, the least int8: right on random numbers of both signs and of size 1."""
    arguments, body, text, words = UNSEEN[name]
    path = tmp_path / "wrong.py"
    path.write_text(f"import torch\ndef run(out, {arguments}):\n    " + body.replace("\n", "\n    ") + "\n")
    run, problem = load_file(path).run, registry.problem(text)
    assert check.check_case(registry.op(problem.op), problem, run, seed=7).ok
    verdict = check.check(registry.op(problem.op), problem, {}, lambda p, c: run, seed=7)
    assert not verdict.ok
    assert words in verdict.reason, verdict.reason


def test_a_scale_that_was_remembered_is_caught() -> None:
    problem, remembered = registry.problem("gemm[m=32,n=48,k=64,transpose=nt,fp8]"), list[float]()

    def run(out, a, b, scale_a, scale_b):  # type: ignore[no-untyped-def]
        remembered.append(float(scale_a) * float(scale_b))
        out.copy_(a.float() @ b.float().t() * remembered[0])

    verdict = check.check_case(registry.op("gemm"), problem, run, seed=7)
    assert not verdict.ok
    assert "second call" in verdict.reason


def test_large_outputs_are_sampled_and_still_watched_everywhere(tmp_path: Path) -> None:
    problem = registry.problem("gemm[m=1200,n=700,k=900]")  # above WHOLE_FLOPS
    assert registry.op("gemm").flops(problem) > check.WHOLE_FLOPS

    def holes(out, a, b):  # type: ignore[no-untyped-def]
        full = a @ b
        out[:600], out[610:] = full[:600], full[610:]

    verdict = check.check(registry.op("gemm"), problem, {}, lambda p, c: holes, seed=7)
    assert not verdict.ok
    assert "never written" in verdict.reason


def test_integers_that_one_call_leaves_out_are_missed_in_rows_that_are_not_compared() -> None:
    """What is written in two calls and left out in the third, which has another poison: its bits tell."""
    problem = registry.problem("gemm[m=2000,n=300,k=300,int8]")
    assert registry.op("gemm").flops(problem) > check.WHOLE_FLOPS
    calls = []

    def holes(out, a, b):  # type: ignore[no-untyped-def]
        full = torch._int_mm(a, b)
        calls.append(0)
        rows = [i for i in range(2000) if len(calls) < 3 or i != 1000]
        out[rows] = full[rows]

    verdict = check.check(registry.op("gemm"), problem, {}, lambda p, c: holes, seed=7, thorough=False)
    assert not verdict.ok
    assert verdict.reason == "integers differ from those of the call before (third call, nothing changed)"


LARGE = [  # problems whose float64 reference is of some rows only, and one number that is wrong
    ("gemm[m=1500,n=700,k=300,fp32]", (777, 333), 0.3),
    ("gemm[m=1500,n=700,k=300,transpose=nt,bf16]", (1200, 0), 6.0),
    ("gemm[m=1500,n=704,k=304,int8]", (777, 333), 1),
    ("gemm[m=1504,n=704,k=304,transpose=nt,fp8]", (777, 333), 30.0),
    ("gemm[m=1500,n=700,k=300,transpose=tn,epilogue=residual,fp16]", (700, 699), 0.3),
    ("gemm[m=1500,n=700,k=300,transpose=tt,epilogue=bias,fp32]", (1, 1), 0.01),
    ("gemm[m=1500,n=700,k=300,epilogue=bias_gelu,fp32]", (777, 333), 0.3),
    ("softmax[m=9000,n=200,fp32]", (4567, 100), 1e-4),
    ("softmax[m=9000,n=200,bf16]", (4567, 100), 1e-2),
    ("layernorm[m=9000,n=200,fp16]", (4567, 100), 0.1),
    ("layernorm[m=9000,n=200,rms,fp32]", (4567, 100), 1e-3),
    ("attention[b=1,h=4,hkv=2,sq=700,sk=900,d=64,causal,fp32]", (2500, 60), 1e-3),
]


@pytest.mark.parametrize(("text", "where", "off"), LARGE)
def test_one_wrong_number_in_a_large_output_is_found(text: str, where: tuple[int, int], off: float) -> None:
    problem = registry.problem(text)
    op = registry.op(problem.op)
    rows = math.prod(op.output(problem)[0][:-1])
    for turn in (7, 8):
        assert where[0] not in screen.sample_rows(rows, turn, screen.SAMPLED_ROWS), "found by chance"

    def run(error: float) -> check.Run:
        def fill(out: torch.Tensor, *inputs: torch.Tensor) -> None:
            out.copy_(op.reference(problem, inputs, None).value.reshape(out.shape))
            out.view(rows, -1)[where] += error

        return fill

    right = check.check(op, problem, {}, lambda p, c: run(0), seed=7, thorough=False)
    assert right.ok, right.reason
    assert right.rows is not None
    assert screen.SAMPLED_ROWS < right.rows < rows
    wrong = check.check(op, problem, {}, lambda p, c: run(off), seed=7, thorough=False)
    assert not wrong.ok
    assert f"at {where}" in wrong.reason
    assert "suspect" in wrong.reason


def test_a_large_output_without_a_formula_has_its_sampled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = registry.problem("softmax_bwd[m=9000,n=200,fp32]")
    op = registry.op("softmax_bwd")
    tensors = op.inputs(problem, check.generator("cpu", 1), "cpu", "normal")
    assert screen.suspects(op, problem, torch.zeros(9000, 200), tensors) == []
    problem, zeros = registry.problem("softmax[m=9000,n=200,fp32]"), torch.zeros(9000, 200)
    assert len(screen.suspects(registry.op("softmax"), problem, zeros, [zeros])) == screen.SUSPECTS

    def lacks_memory(problem: Problem, tensors: object) -> None:
        raise torch.OutOfMemoryError("by torch's call, not by the kernel that is judged")

    monkeypatch.setitem(screen.FORMULAS, "softmax", lacks_memory)
    assert screen.suspects(registry.op("softmax"), problem, zeros, [zeros]) == []


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_judged_has_all_threads_and_nobody_loses_them(fails: bool) -> None:
    """The judgement runs on one thread; a kernel that saw one only would be another than the one that is timed."""
    threads, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)

    def run(out: torch.Tensor, x: torch.Tensor) -> None:
        seen.append(torch.get_num_threads())
        if fails:
            raise RuntimeError("no such kernel image")
        torch.softmax(x, -1, out=out)

    try:
        if fails:
            with pytest.raises(RuntimeError, match="no such kernel image"):
                _check(run)
        else:
            assert _check(run).ok
        assert set(seen) == {3}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_scores_that_cancel_may_err_as_their_terms_do() -> None:
    """Heads that share the keys of the last one, whose large scores cancel: torch's backward had 2.2 of the allowed."""
    problem = registry.problem("attention_bwd[b=2,h=4,hkv=2,sq=5,sk=131,d=64,fp32]")
    run = attention_backward.build(problem, {"call": "sdpa_flash_backward"})
    for seed in range(40):
        verdict = check.check_case(registry.op("attention_bwd"), problem, run, seed, kind="large")
        assert verdict.ok, verdict.reason
        assert verdict.max_error is not None
        assert verdict.max_error < 0.5
