"""Our own kernels through the pytest fixture: a compute-bound and a memory-bound operator, torch beside them.

`python -m pytest tests/kernels/test_benchmarks.py --benchmark-json out.json` gives a table an operator.
"""

import pytest

from rooftune import registry

PROBLEMS = (
    "gemm[m=96,n=80,k=64,transpose=nt,epilogue=bias_relu,fp32]",
    "softmax[m=64,n=200,fp32]",
)
CASES = [
    (impl.key, text)
    for text in PROBLEMS
    for impl in registry.impls(text.partition("[")[0])
    if impl.name in ("torch", "numba")  # torch_compile takes half a minute to compile what is checked here
]


@pytest.mark.parametrize(("impl", "problem"), CASES)
def test_kernel(kernel_benchmark, impl, problem):
    record = kernel_benchmark(impl, problem, rounds=6)
    assert record.status == "ok"
    assert record.error["max_error"] <= 1.0
