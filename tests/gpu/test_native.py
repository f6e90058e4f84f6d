"""Every competitor on a real GPU, in every precision it claims. Skipped, with the reason, where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rooftune import device, evidence, registry
from rooftune.core import Problem, Status
from rooftune.lab import Lab
from rooftune.registry import Impl

pytestmark = pytest.mark.gpu
HERE = next((d for d in device.devices() if d.kind != "cpu"), None)
WHY = "; ".join(f"{k}: {v}" for k, v in device.absent().items())
CASES = [
    pytest.param(i, p, id=f"{i.key}-{p}")
    for op in registry.op_names()
    for i in registry.impls(op)
    for p in i.precisions
    if not i.per_shape and "cpu" not in i.devices
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if HERE is None:
        pytest.skip(f"no GPU here ({WHY})")
    with Lab(HERE.torch, 1, HERE.kind) as made:
        yield made


@pytest.mark.parametrize(("impl", "precision"), CASES)
def test_a_gpu_competitor_passes_the_whole_gate_on_the_device(lab: Lab, impl: Impl, precision: str) -> None:
    if impl.missing:
        pytest.skip(f"{impl.key}: {impl.missing}")
    if lab.kind not in impl.devices:
        pytest.skip(f"{impl.key} runs on {', '.join(impl.devices)}")
    big: Problem = evidence.compile_problem(impl.op, precision)
    for problem in (registry.problem(registry.op(impl.op).small(precision)[0]), big):
        reply = lab.prepare(impl, problem, lab.space(impl, problem)["default"], seed=21)
        if reply.status == Status.SKIPPED and "sm_" in reply.reason:
            pytest.skip(reply.reason)  # instructions that another GPU has
        assert reply.status == Status.OK, f"{problem}: {reply.status}: {reply.reason}"
        timed = lab.time(impl, reply.data["handle"], seed=22)
        assert timed.ok, timed.reason
        lab.release(impl, reply.data["handle"])
