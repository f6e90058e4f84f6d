"""Every competitor, found by itself: right on the CPU, or emulated on it, or compiled for four GPUs.

A competitor whose packages are missing is skipped with that reason; nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rooftune import evidence, registry
from rooftune.core import Evidence, Problem, Status
from rooftune.lab import Lab, Reply
from rooftune.registry import Impl

IMPLS = [impl for op in registry.op_names() for impl in registry.impls(op)]
NATIVE = [i for i in IMPLS if "cpu" in i.devices]
GPU = [i for i in IMPLS if "cpu" not in i.devices and not i.per_shape]  # torch.compile needs the device itself
# flags that change a kernel's code path; each precision gets the first, the first precision gets them all
VARIANTS = {
    "gemm": ({}, {"transpose": "nt", "epilogue": "bias_gelu"}, {"transpose": "tn", "epilogue": "bias"},
             {"transpose": "tt", "epilogue": "bias_relu"}, {"epilogue": "residual"}),
    "attention": ({"causal": "1"}, {}, {"causal": "1", "lse": "1"}),
    "layernorm": ({}, {"rms": "1"}),
    "softmax": ({},),
    "softmax_bwd": ({},),
    "layernorm_bwd": ({}, {"rms": "1"}),
    "attention_bwd": ({"causal": "1"}, {}),
}  # fmt: skip
SIZES = {
    "gemm": {"m": 130, "n": 200, "k": 90},
    "attention": {"b": 2, "h": 4, "hkv": 2, "sq": 150, "sk": 190, "d": 64},
    "layernorm": {"m": 70, "n": 1000},
    "softmax": {"m": 70, "n": 1000},
    "softmax_bwd": {"m": 70, "n": 1000},
    "layernorm_bwd": {"m": 70, "n": 1000},
    "attention_bwd": {"b": 2, "h": 4, "hkv": 2, "sq": 90, "sk": 130, "d": 64},
}
THOROUGH = {  # with ragged relatives; else bf16, fp32, int8. Row kernels differ by precision in loads and stores only
    "softmax": ("bf16",), "layernorm": ("bf16",), "softmax_bwd": ("fp32",), "layernorm_bwd": ("fp32",),
    "attention_bwd": ("bf16",),
}  # fmt: skip
LONG = (("gemm", "numba_cuda"), ("attention", "numba_cuda"))  # a compiler of 12 and 18 s


def _slow(yes: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if yes else []


# fp16 differs from bf16 in the type of one instruction: compiled for GEMM only (Numba-CUDA's takes 10 s, and is not)
COMPILED = [
    pytest.param(
        i,
        p,
        id=f"{i.key}-{p}",
        marks=_slow((i.op, i.name) in LONG),
    )
    for i in GPU
    for p in i.precisions
    if (p != "fp16" or (i.op == "gemm" and i.name != "numba_cuda")) and (p == "bf16" or not i.op.endswith("_bwd"))
]
WITHOUT = {
    ("attention/numba", "lse"),
    ("attention/numba_decode", "lse"),
    ("attention/numba_cuda", "lse"),
}  # flags that a competitor refuses
# `make test` sees every competitor once in bf16 and in fp32, `make test-slow` the other formats and flags of the same
# kernels, and what takes ten seconds or more of a compiler or an emulation. CI runs both.
QUICK = ("bf16", "fp32")
SLOW = {
    ("attention/numba_cuda", "fp32"), ("attention/numba_cuda", "bf16"), ("attention/triton", "fp32"),
    ("attention_bwd/torch", "fp32"), ("attention_bwd/torch", "bf16"),
}  # fmt: skip
OTHERS_SLOW = ("attention/numba", "gemm/numba")
TORCH_INT8 = {"m": 144, "n": 208, "k": 96}  # torch's int8 and fp8 calls want multiples of 16


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("cpu", threads=2) as made:
        yield made


def _cases(impls: list[Impl]) -> list[object]:
    found = []
    for impl in impls:
        for precision in impl.precisions:
            if precision == "fp16" and impl.op.endswith("_bwd"):  # bf16 in every line but one; forwards see both
                continue
            variants = VARIANTS.get(impl.op, ({},))
            # torch.compile takes some 8 s a case, and its flags are torch's own code paths
            every = precision == impl.precisions[0] and not impl.per_shape
            for flags in variants if every else variants[:1]:
                if any((impl.key, flag) in WITHOUT for flag in flags):
                    continue
                if precision == "fp8":
                    flags = {"transpose": "nt"}
                label = "-".join([impl.key, precision, *(f"{k}:{v}" for k, v in flags.items())])
                quick = precision in QUICK and flags == variants[0] and (impl.key, precision) not in SLOW
                found.append(pytest.param(impl, precision, flags, id=label, marks=_slow(impl.per_shape or not quick)))
    return found


def _need(impl: Impl) -> None:
    if impl.missing:
        pytest.skip(f"{impl.key}: {impl.missing}")


def _need_instructions(impl: Impl, reply: Reply) -> None:
    """A competitor made of instructions that this CPU lacks says so; test_numba_other_cpus.py runs it spelled out."""
    if impl.name in ("numba_amx", "numba_split") and reply.status == Status.SKIPPED:
        assert "needs a CPU with AMX" in reply.reason
        pytest.skip(f"{impl.key}: {reply.reason}")


@pytest.mark.parametrize(("impl", "precision", "flags"), _cases(NATIVE))
def test_native_competitors_pass_the_whole_gate(lab: Lab, impl: Impl, precision: str, flags: dict[str, str]) -> None:
    _need(impl)
    sizes = TORCH_INT8 if precision in ("int8", "fp8") else SIZES[impl.op]
    problem = registry.problem(Problem.make(impl.op, precision, flags, **sizes))
    found = lab.space(impl, problem)
    # torch.compile compiles for each ragged relative: a minute an operator, of a kernel that torch itself tests
    reply = lab.prepare(impl, problem, found["default"], seed=11, thorough=not impl.per_shape)
    if precision == "tf32" and reply.status == Status.SKIPPED:
        assert "GPU" in reply.reason or "CUDA" in reply.reason
        return
    _need_instructions(impl, reply)
    assert reply.status == Status.OK, f"{reply.status}: {reply.reason}"
    assert impl.per_shape or len(reply.data["error"]["cases"]) > 1


@pytest.mark.parametrize(
    "impl",
    [
        pytest.param(i, id=i.key, marks=_slow(i.key in OTHERS_SLOW))
        for i in NATIVE
        if not i.baseline and not i.per_shape
    ],
)
def test_other_configs_of_native_competitors_are_right_too(lab: Lab, impl: Impl) -> None:
    _need(impl)
    precision = "fp32" if "fp32" in impl.precisions else impl.precisions[0]
    problem = registry.problem(Problem.make(impl.op, precision, VARIANTS[impl.op][0], **SIZES[impl.op]))
    configs = lab.space(impl, problem)["configs"]
    for config in configs[:: max(1, len(configs) // 3)]:
        reply = lab.prepare(impl, problem, config, seed=12, thorough=False)
        _need_instructions(impl, reply)
        assert reply.status == Status.OK, f"{config}: {reply.status}: {reply.reason}"


@pytest.mark.parametrize(("impl", "precision", "flags"), _cases(GPU))
def test_gpu_competitors_are_right_when_emulated(lab: Lab, impl: Impl, precision: str, flags: dict[str, str]) -> None:
    _need(impl)
    small = registry.op(impl.op).small(precision)[0]
    problem = registry.problem(Problem(small.op, small.dims, precision, tuple(sorted(flags.items()))))
    thorough = flags == VARIANTS[impl.op][0] and precision in THOROUGH.get(impl.op, ("bf16", "fp32", "int8"))
    thorough = thorough and not (impl.name == "numba_cuda" and precision == "fp32")  # minutes in the simulator
    record = evidence.emulate(lab, impl, problem, seed=13, thorough=thorough)
    assert record.evidence == Evidence.EMULATED
    assert record.status == Status.OK, f"{record.status}: {record.reason}"
    assert record.time_s is None


OTHER_PATHS = {  # configs whose code the default of a small problem does not reach
    "a tile written in halves": (
        "gemm/triton",
        "gemm[m=72,n=136,k=64,transpose=nt,epilogue=bias_gelu,bf16]",
        {"block_m": 32, "block_n": 64, "block_k": 32, "num_warps": 4, "schedule": "persistent", "subtiles": 2},
    ),
    "a residual beside tensor cores": ("gemm/cupy", "gemm[m=72,n=136,k=64,epilogue=residual,bf16]", {"block_m": 64}),
    "a residual after a split k": (
        "gemm/cupy_wgmma",
        "gemm[m=40,n=200,k=328,transpose=nt,epilogue=residual,bf16]",
        {"split_k": 2, "block_k": 64},
    ),
    "a residual of a product that is not transposed": (
        "gemm/cupy_wgmma",
        "gemm[m=200,n=136,k=72,transpose=nt,epilogue=residual,fp16]",
        {"block_n": 64, "num_stages": 3},
    ),
    "a residual in Numba's tensor cores": ("gemm/numba_cuda", "gemm[m=72,n=90,k=40,epilogue=residual,fp16]", {}),
    "tf32, of which an operand is transposed first": (
        "gemm/cupy_wgmma",
        "gemm[m=72,n=75,k=40,transpose=tt,epilogue=residual,tf32]",
        {"block_n": 64, "num_stages": 3},
    ),
    "the last parts of k streamed": (
        "gemm/cupy_wgmma",
        "gemm[m=72,n=75,k=520,transpose=nt,epilogue=bias_gelu,tf32]",
        {"block_n": 64, "num_stages": 3, "stream_k": 1},
    ),
    "sums of exponentials of rows that see no key": (
        "attention/cupy_wgmma",
        "attention[b=1,h=2,hkv=1,sq=150,sk=20,d=64,causal,lse,bf16]",
        {"block_m": 64, "block_n": 64, "pingpong": 0},
    ),
    "heads that share keys in one tile, queries before the first key": (
        "attention/cupy_wgmma",
        "attention[b=2,h=4,hkv=2,sq=130,sk=70,d=64,causal,lse,fp16]",
        {"block_m": 128, "pack_gqa": 1},
    ),
    "eight queries of each of eight heads in one tile": (
        "attention/cupy_wgmma",
        "attention[b=1,h=16,hkv=2,sq=19,sk=201,d=128,causal,lse,bf16]",
        {"block_m": 64, "pack_gqa": 1, "pingpong": 0},
    ),
    "exponentials before the wait, results in the place of wide queries": (
        "attention/cupy_wgmma",
        "attention[b=1,h=1,sq=150,sk=200,d=256,causal,bf16]",
        {"block_m": 128, "block_n": 80, "num_stages": 2, "late_wait": 1},
    ),
    "exponentials before the wait, queries fetched a tile ahead": (
        "attention/cupy_wgmma",
        "attention[b=1,h=3,sq=200,sk=190,d=64,fp16]",
        {"block_m": 192, "block_n": 96, "late_wait": 1},
    ),
    "sums of exponentials by tensor cores": (
        "attention/cupy",
        "attention[b=2,h=2,hkv=1,sq=35,sk=33,d=48,causal,lse,bf16]",
        {"block_m": 32, "num_warps": 2},
    ),
    "sums of exponentials of split keys": (
        "attention/cupy_decode",
        "attention[b=1,h=4,hkv=2,sq=5,sk=300,d=64,causal,lse,bf16]",
        {"num_splits": 4, "num_warps": 2},
    ),
    "sums of exponentials beside TMA": (
        "attention/triton",
        "attention[b=1,h=2,hkv=1,sq=35,sk=50,d=64,lse,bf16]",
        {"schedule": "tma"},
    ),
    "several rows a program": ("layernorm_bwd/triton", "layernorm_bwd[m=70,n=40,bf16]", {"block_m": 1, "programs": 32}),
    "dk and dv by a launch each": ("attention_bwd/cupy", "attention_bwd[b=1,h=2,hkv=1,sq=40,sk=56,d=256,bf16]", {}),
    "wide heads in fp32": ("attention_bwd/cupy", "attention_bwd[b=1,h=2,hkv=1,sq=20,sk=37,d=144,causal,fp32]", {}),
    "several rows a block": (
        "layernorm_bwd/cupy",
        "layernorm_bwd[m=70,n=200,fp32]",
        {"threads_per_row": 64, "num_threads": 64, "vec": 2, "blocks": 32},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHER_PATHS)
def test_a_path_beside_the_default_is_right_when_emulated(lab: Lab, path: str) -> None:
    key, text, changes = OTHER_PATHS[path]
    impl, problem = registry.impl(key), registry.problem(text)
    _need(impl)
    config = {**lab.space(impl, problem, "emulate")["default"], **changes}
    assert config in lab.space(impl, problem, "emulate")["configs"]
    reply = lab.ask(
        impl, "prepare", evidence.EMULATE_S, "emulate", problem=str(problem), config=config, seed=3, thorough=False
    )
    assert reply.status == Status.OK, reply.reason


@pytest.mark.parametrize(("impl", "precision"), COMPILED)
def test_gpu_competitors_compile_without_spills(lab: Lab, impl: Impl, precision: str) -> None:
    _need(impl)
    backward = impl.op.endswith("_bwd")  # several kernels each: two architectures, to save a minute
    archs = ("sm_90a", "sm_120a") if backward else evidence.ARCHITECTURES
    record = evidence.compile_all(lab, impl, evidence.compile_problem(impl.op, precision), archs)
    assert record.status == Status.OK, f"{record.status}: {record.reason}"
    assert [row["arch"] for row in record.resources or ()] == list(archs)
    for row in record.resources or ():
        if row["status"] == Status.SKIPPED:  # an architecture without the instructions, and it says so
            needs = "sm_90a" if "wgmma" in impl.name else "fp8"
            assert needs in row["reason"]
            assert precision == "fp8" or row["arch"] != needs
            continue
        assert 0 < row["registers"] <= 255
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= 232_448
        if impl.op in ("gemm", "attention", "attention_bwd") and precision in ("fp16", "bf16"):
            assert row["tensor_core"], f"{row['arch']}: no tensor-core instruction"


# What a default config needs besides: values read after the product, and what is left of tiles dealt out by k.
@pytest.mark.slow
@pytest.mark.parametrize("flag", ["epilogue=residual", "epilogue=bias_gelu"])
@pytest.mark.parametrize("name", ["cupy", "cupy_wgmma", "numba_cuda", "triton"])
def test_epilogues_do_not_spill_on_hopper(lab: Lab, name: str, flag: str) -> None:
    impl, problem = registry.impl(f"gemm/{name}"), registry.problem(f"gemm[m=4096,n=4096,k=4096,{flag},bf16]")
    _need(impl)
    assert _spills(lab, impl, problem, {}) == 0


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["bf16", "epilogue=residual,bf16"])
def test_streamed_k_does_not_spill(lab: Lab, flag: str) -> None:
    impl, problem = registry.impl("gemm/cupy_wgmma"), registry.problem(f"gemm[m=4096,n=4096,k=4096,{flag}]")
    _need(impl)
    # In pairs of blocks. Alone, the same tile spills 12 to 76 bytes, and `tune` leaves it out for that.
    assert _spills(lab, impl, problem, {"stream_k": 1, "cluster_m": 2}) == 0


def _spills(lab: Lab, impl: Impl, problem: Problem, changes: dict[str, int]) -> int:
    config = {**lab.space(impl, problem, "compile")["default"], **changes}
    assert config in lab.space(impl, problem, "compile")["configs"]
    reply = lab.ask(impl, "compile", 300.0, "compile", problem=str(problem), config=config, arch="sm_90a")
    assert reply.status == Status.OK, reply.reason
    return int(reply.data["spill_bytes"])


def test_listing_is_complete_and_says_what_each_is() -> None:
    for op in registry.op_names():
        names = {i.name for i in registry.impls(op)}
        assert {"torch", "triton"} <= names
        if not op.endswith("_bwd"):  # backward passes: in Triton and CUDA C++ first
            assert {"torch_compile", "numba", "numba_cuda", "cupy"} <= names
    for impl in IMPLS:
        assert impl.summary.endswith("."), f"{impl.path} has no first line"
        assert set(impl.precisions) <= set(registry.op(impl.op).precisions)
        assert "cpu" in impl.devices or impl.per_shape or (impl.emulates and impl.compiles), impl.key
