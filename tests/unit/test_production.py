"""What a program calls: kernels are found again without a look at the disk, under torch.compile and autograd too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import rooftune
from rooftune import registry
from rooftune.autotune import gradients, production
from rooftune.check import generator
from rooftune.core import UsageError


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    rooftune.forget()
    yield
    rooftune.forget()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every time records are looked at."""
    seen: list[str] = []
    choose = production.choose

    def counted(problem: Any, *rest: Any) -> Any:
        seen.append(str(problem))
        return choose(problem, *rest)

    monkeypatch.setattr(production, "choose", counted)
    return seen


def tensors(text: str, grad: bool = False) -> tuple[Any, list[torch.Tensor]]:
    problem = registry.problem(text)
    made = registry.op(problem.op).inputs(problem, generator("cpu", 1), "cpu", "normal")
    return problem, [t.requires_grad_(grad) for t in made]


def test_the_second_call_reads_and_builds_nothing(looks: list[str]) -> None:
    x = torch.randn(8, 64)
    first = rooftune.best("softmax", x)
    assert rooftune.best("softmax", torch.randn(8, 64)) is first
    assert looks == ["softmax[m=8,n=64,fp32]"]
    rooftune.best("softmax", x.bfloat16())
    rooftune.best("softmax", x[:4])
    assert looks[1:] == ["softmax[m=8,n=64,bf16]", "softmax[m=4,n=64,fp32]"]
    rooftune.forget()
    assert rooftune.best("softmax", x) is not first


def test_another_thread_gets_a_kernel_of_its_own() -> None:
    x = torch.randn(8, 64)
    mine, theirs = rooftune.best("softmax", x), []
    worker = threading.Thread(target=lambda: theirs.append(rooftune.best("softmax", x)))
    worker.start()
    worker.join()
    assert theirs[0] is not mine


def test_the_number_of_kept_kernels_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(production, "KEPT", 2)
    for m in (1, 2, 3):
        rooftune.best("softmax", torch.randn(m, 8))
    assert len(production._kernels) == 2


@pytest.mark.parametrize(
    ("out", "x", "text"),
    [
        (torch.empty(8, 64), torch.randn(8, 65), r"got contiguous \[8, 65\]"),
        (torch.empty(8, 64), torch.randn(64, 8).t(), "not contiguous"),
        (torch.empty(8, 64), torch.randn(8, 64).double(), "float64"),
        (torch.empty(8, 64).half(), torch.randn(8, 64), "float16"),
    ],
)
def test_a_kernel_refuses_tensors_it_would_misread(out: torch.Tensor, x: torch.Tensor, text: str) -> None:
    kernel = rooftune.best("softmax[m=8,n=64,fp32]", device="cpu")
    with pytest.raises(UsageError, match=text):
        kernel(out, x)
    with pytest.raises(UsageError, match="not 1 tensors"):
        kernel(out)


def test_out_must_not_share_memory_with_an_input() -> None:
    """torch.mm(a, b, out=a) computes garbage without a word; a kernel in several passes would as well."""
    kernel = rooftune.best("gemm[m=4,n=4,k=4]", device="cpu")
    both, b = torch.randn(32), torch.randn(4, 4)
    a = both[:16].view(4, 4)
    for out in (a, both[12:28].view(4, 4), b):
        with pytest.raises(UsageError, match="out shares memory with an input"):
            kernel(out, a, b)
    kernel(both[16:].view(4, 4), a, b)
    assert torch.allclose(both[16:].view(4, 4), a @ b, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "made", "options", "text"),
    [
        ("gemm", [torch.randn(8, 8), torch.randn(8, 8).bfloat16()], {}, "tensor 1 is bfloat16, expected float32"),
        ("gemm", [torch.randn(8, 8).bfloat16()] * 2, {"precision": "fp32"}, "tensor 0 is bfloat16, expected float32"),
        ("layernorm", [torch.randn(8, 8).bfloat16(), *torch.randn(2, 8)], {}, "tensor 1 is float32, expected bfloat16"),
        ("gemm", [torch.randn(8, 8), torch.empty(8, 8, device="meta")], {}, "tensor 1 is on meta, another on cpu"),
        ("softmax[m=64,n=32]", [torch.randn(8, 8)], {}, r"not for tensors of shape \[8, 8\]"),
        ("attention[b=1,h=1,sq=8,d=8]", [], {"causal": True}, "says its precision and flags itself"),
        ("softmax[m=64,n=32]", [], {"precision": "bf16"}, "says its precision and flags itself"),
    ],
)
def test_tensors_that_a_kernel_would_misread_have_none(op: str, made: Any, options: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        rooftune.best(op, *made, **options)
    for requires in (False, True)[: 1 + ("[" not in op)] if made else ():  # also as a custom op, which has a name
        with pytest.raises(UsageError, match=text):
            rooftune.call(op, *(t.detach().requires_grad_(requires) for t in made), **options)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_changes_neither_type_nor_values(inside: bool) -> None:
    _, (q, k, v) = tensors("attention[b=1,h=2,sq=8,d=16]")
    out, right = torch.empty_like(q), scaled_dot_product_attention(q, k, v)
    kernel = None if inside else rooftune.best("attention", q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        kernel = kernel or rooftune.best("attention", q, k, v)
        assert kernel.impl == "attention/torch"
        kernel(out, q, k, v)
        y = rooftune.call("attention", q, k, v)
        assert torch.is_autocast_enabled("cpu")
    assert y.dtype == torch.float32
    assert max(float((out - right).abs().max()), float((y - right).abs().max())) < 1e-5


def test_derivatives_that_it_does_not_have_are_refused_and_not_zero() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    (first,) = torch.autograd.grad(rooftune.call("softmax", x).pow(3).sum(), x, create_graph=True)
    (right,) = torch.autograd.grad(torch.softmax(x, -1).pow(3).sum(), x)
    assert torch.allclose(first, right, atol=1e-6)
    with pytest.raises(UsageError, match="no second derivatives"):
        first.pow(2).sum().backward()
    rooftune.call("softmax", x.detach())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(4, 8))
        with pytest.raises(UsageError, match="no forward-mode derivatives"):
            rooftune.call("softmax", dual)
        assert rooftune.call("softmax", x.detach()).shape == (4, 8)


def test_a_name_that_is_none_is_told_with_gradients_too() -> None:
    for requires in (False, True):
        with pytest.raises(UsageError, match="unknown op 'softmx'; known: attention, "):
            rooftune.call("softmx", torch.randn(8, 8, requires_grad=requires))


def test_flags_that_are_off_are_none() -> None:
    q = torch.randn(1, 2, 8, 16)
    for off in (False, 0, None):
        assert rooftune.best("attention", q, q, q, causal=off).problem.flags == ()
        assert rooftune.call("attention", q.clone().requires_grad_(), q, q, causal=off).shape == q.shape


def test_the_python_face_refuses_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="softmax/numba computes softmax, and gemm"):
        rooftune.tune("softmax/numba", "gemm[m=8,n=8,k=8,fp32]", "2")
    with pytest.raises(UsageError, match="unknown competitor of softmax 'trch'"):  # one name is no list of letters
        rooftune.run("softmax[m=8,n=8,fp32]", only="trch")


def settings() -> list[Any]:
    cuda = torch.backends.cuda
    sdp = [cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()]
    return [torch.is_grad_enabled(), torch.get_float32_matmul_precision(), *sdp]


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_torch_competitors_leave_the_users_settings_alone(precision: str) -> None:
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        before = settings()
        problem, (q, k, v) = tensors("attention[b=1,h=2,sq=8,d=16]")
        kernel = rooftune.best(str(problem), device="cpu")
        for _ in range(3):
            kernel(torch.empty_like(q), q, k, v)
            assert settings() == before
        seen: list[str] = []
        a = torch.randn(4, 4)
        production.build(registry.problem("gemm[m=4,n=4,k=4]"), "gemm/torch", None, "")
        run = production.build(registry.problem("gemm[m=4,n=4,k=4]"), "gemm/torch", None, "")
        assert settings() == before
        inner = torch.matmul
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch, "matmul", lambda *x, **o: (seen.append(torch.get_float32_matmul_precision()), inner(*x, **o))[0]
            )
            run(torch.empty(4, 4), a, a)
        assert seen == ["highest"]  # an fp32 problem is computed in fp32, whatever the user's products may do
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision(old)
        torch.backends.cuda.enable_flash_sdp(True)


def test_call_returns_a_new_tensor_and_copies_views() -> None:
    x = torch.randn(64, 8)
    y = rooftune.call("softmax", x)
    torch.testing.assert_close(y, torch.softmax(x, -1))
    assert rooftune.call("softmax", x).data_ptr() != y.data_ptr()
    torch.testing.assert_close(rooftune.call("softmax", x.t()), torch.softmax(x.t(), -1))
    with pytest.raises(UsageError, match="3 dimensions"):
        rooftune.call("softmax", torch.randn(2, 3, 4))


def test_call_passes_the_operators_own_checks_as_a_custom_op() -> None:
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")  # the fourth compiles: the next test does
    _, inputs = tensors("attention[b=1,h=2,hkv=1,sq=8,sk=12,d=16,causal]", grad=True)
    torch.library.opcheck(torch.ops.rooftune.attention.default, (inputs, "causal", ""), test_utils=utils)
    _, inputs = tensors("layernorm[m=4,n=8]", grad=True)
    torch.library.opcheck(torch.ops.rooftune.layernorm.default, (inputs, "", "fp32"), test_utils=utils)


def test_one_graph_under_compile_with_gradients_and_changing_sizes(looks: list[str]) -> None:
    def step(f: Callable[..., Any], q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = f(*leaves)
        return (out, *torch.autograd.grad(out.square().sum(), leaves))

    def ours(q: Any, k: Any, v: Any) -> Any:
        return rooftune.call("attention", q * 2, k, v, causal=True).relu()

    def theirs(q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q * 2, k, v, is_causal=True).relu()

    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (8, 12):
        _, inputs = tensors(f"attention[b=1,h=2,sq={size},d=16]")
        for mine, right in zip(step(compiled, *inputs), step(theirs, *inputs), strict=True):
            torch.testing.assert_close(mine, right)
    assert len(looks) == 2


@pytest.mark.parametrize(
    "text",
    [
        "softmax[m=4,n=9]",
        "layernorm[m=4,n=9]",
        "layernorm[m=4,n=9,rms]",
        "gemm[m=4,n=5,k=6]",
        "gemm[m=4,n=5,k=6,transpose=nt,epilogue=bias_gelu]",
        "gemm[m=4,n=5,k=6,transpose=tt,epilogue=bias_relu]",
        "gemm[m=4,n=5,k=6,epilogue=residual]",
        "attention[b=2,h=4,hkv=2,sq=5,sk=5,d=8,causal]",
        "attention[b=1,h=2,sq=3,sk=7,d=8,causal]",
        "attention[b=1,h=2,sq=7,sk=3,d=8,causal]",
        "attention[b=1,h=2,hkv=1,sq=7,sk=3,d=8]",
    ],
)
def test_gradients_are_those_of_the_float64_reference(text: str) -> None:
    problem, inputs = tensors(text, grad=True)
    out = rooftune.call(problem.op, *inputs, **dict(problem.flags))
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    value = registry.op(problem.op).reference(problem, exact, None).value.reshape(out.shape)
    torch.testing.assert_close(out.double(), value, atol=2e-5, rtol=2e-5)
    right = torch.autograd.grad(value, exact, gradient.double())
    for mine, theirs in zip(torch.autograd.grad(out, inputs, gradient), right, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=5e-5, rtol=5e-5)


def test_an_operator_without_a_formula_uses_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, inputs = tensors("softmax[m=4,n=9,bf16]")
    gradient = torch.randn(4, 9).bfloat16()
    by_formula = gradients.gradients(problem, inputs, gradient)
    monkeypatch.setattr(gradients, "FORMULAS", {})
    (slow,) = gradients.gradients(problem, inputs, gradient)
    assert slow.dtype == torch.bfloat16
    torch.testing.assert_close(slow, by_formula[0], atol=1e-2, rtol=1e-2)
    with pytest.raises(UsageError, match="no gradient: int8"):
        gradients.gradients(registry.problem("gemm[m=16,n=16,k=16,int8]"), inputs, gradient)
