"""Suites: found by listing the folder, all their problems legal, small enough for the device they are for."""

import pytest

from rooftune import registry
from rooftune.core import PRECISIONS, UsageError
from rooftune.suites import catalogue

KINDS = ("cpu", "cuda")
CPU_FLOPS = 2e10  # 0.2 s at 100 GFLOP/s, one AVX-512 core: the largest of any suite (2048^3 takes 17 GFLOP)


def test_the_folder_is_the_list():
    assert {"ci", "fa", "llm", "quick", "ragged", "rows", "square", "tour"} <= set(catalogue.names())
    assert "catalogue" not in catalogue.names()
    assert all(catalogue.summary(name) for name in catalogue.names())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suite", catalogue.names())
def test_every_problem_is_legal_in_every_precision(suite, kind):
    if (suite, kind) == ("cpu-goals", "cuda"):
        with pytest.raises(UsageError, match="on cuda"):
            catalogue.problems(suite, registry.op_names(), list(PRECISIONS), kind)
        return
    found = catalogue.problems(suite, registry.op_names(), list(PRECISIONS), kind)
    assert len(found) == len(set(found))
    for problem in found:
        assert registry.problem(str(problem)) == problem
        if problem.precision == "fp8":
            assert problem.flag("transpose") == "nt"
        if problem.precision == "int8":
            assert not problem.flag("epilogue")
        if problem.op == "attention":
            assert problem["h"] % problem["hkv"] == 0


@pytest.mark.parametrize("suite", catalogue.names())
def test_cpu_lists_stay_small(suite):
    for problem in catalogue.problems(suite, registry.op_names(), ["fp32"], "cpu"):
        op = registry.op(problem.op)
        assert op.flops(problem) <= CPU_FLOPS, problem
        assert op.bytes(problem) <= (520 if suite == "cpu-goals" else 64) * 2**20, problem  # goals beyond the caches


def test_goals_belong_to_the_suites_own_problems_the_template_before_its_operator():
    def goal(text, suite="cpu-goals"):
        return catalogue.goals(suite, [registry.problem(text)], "cpu").get(registry.problem(text))

    assert goal("gemm[m=1024,n=1024,k=1024,fp32]") == 1.4
    assert goal("gemm[m=1024,n=1024,k=1024,bf16]") == 0.85  # no goal of its own: the operator's
    assert goal("gemm[m=8,n=2048,k=1024,transpose=nt,fp32]") == 1.0
    assert goal("gemm[m=8,n=2048,k=1024,transpose=nt,fp16]") is None
    assert goal("attention[b=1,h=8,sq=2048,d=64,causal,fp32]") == 2.2
    assert goal("attention[b=1,h=8,sq=2048,d=64,causal,bf16]") == 1.7
    assert goal("gemm[m=1024,n=1024,k=1000,fp32]") is None  # not of the suite
    assert goal("softmax[m=1024,n=1024,fp32]", "ci") is None


def test_every_goal_is_of_a_problem_that_the_suite_has():
    listed = [*catalogue._listed("cpu-goals", "cpu"), *sum(catalogue._listed("cpu-goals", "cpu").values(), ())]
    keys = catalogue._read(catalogue._path("cpu-goals"))[2]
    assert set(keys) <= set(listed)
    problems = catalogue.problems("cpu-goals", registry.op_names(), ["fp32", "bf16"], "cpu")
    assert set(catalogue.goals("cpu-goals", problems, "cpu")) == set(problems)


def test_quick_has_two_problems_an_operator_of_ten_milliseconds():
    for op in ("attention", "gemm", "layernorm", "softmax"):
        found = catalogue.problems("quick", [op], ["fp32"], "cpu")
        assert len(found) == 2
        assert all(registry.op(op).flops(p) <= 1e9 and registry.op(op).bytes(p) <= 64 * 2**20 for p in found)


def test_order_is_operator_then_list_then_precision():
    found = [str(p) for p in catalogue.problems("ci", ["softmax", "gemm"], ["fp32", "bf16"], "cpu")]
    assert found == [
        "softmax[m=1024,n=1024,fp32]",
        "softmax[m=1024,n=1024,bf16]",
        "gemm[m=256,n=256,k=256,fp32]",
        "gemm[m=256,n=256,k=256,bf16]",
    ]


def test_rocm_uses_the_gpu_list_and_missing_precisions_are_left_out():
    assert catalogue.problems("ci", ["gemm"], ["bf16"], "rocm") == catalogue.problems("ci", ["gemm"], ["bf16"], "cuda")
    assert {p.op for p in catalogue.problems("ci", registry.op_names(), ["tf32"], "cuda")} == {"gemm", "attention"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("qick", ["gemm"], ["fp32"], "cpu"), "unknown suite 'qick'; known: c"),
        (("quick", ["gem"], ["fp32"], "cpu"), "unknown op 'gem'; known: attention"),
        (("quick", ["gemm"], ["fp31"], "cpu"), "unknown precision 'fp31'"),
        (("fa", ["gemm"], ["fp32"], "cpu"), "suite fa has no problem for gemm in fp32 on cpu; it holds attention"),
        (("fa", ["gemm"], ["bf16"], "cpu"), "or write one out: 'gemm[m=64,n=96,k=64,bf16]'"),
        (("quick", ["softmax"], ["int8"], "cpu"), "has no problem for softmax in int8"),
    ],
)
def test_errors_name_what_is_known(arguments, text):
    with pytest.raises(UsageError) as error:
        catalogue.problems(*arguments)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_in_the_folder_is_a_suite_and_others_are_not(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text('"""Mine."""\nPROBLEMS = {"cpu": {"softmax": ("softmax[m=2,n=3]",)}}\n')
    (tmp_path / "helper.py").write_text('"""No suite."""\nX = 1\n')
    monkeypatch.setattr(catalogue, "HERE", tmp_path)
    assert catalogue.names() == ("mine",)
    assert catalogue.summary("mine") == "Mine."
    assert [str(p) for p in catalogue.problems("mine", ["softmax"], ["bf16"], "cpu")] == ["softmax[m=2,n=3,bf16]"]
    (tmp_path / "clever.py").write_text('"""Not a literal."""\nPROBLEMS = dict(cpu={})\n')
    with pytest.raises(UsageError, match="must be a literal"):
        catalogue.names()
