"""Ceilings and the roof: the arithmetic on made-up figures, the measuring on tiny sizes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rooftune import probe, probe_cpu, probe_cuda, probe_registers
from rooftune.core import UsageError
from rooftune.datasheet import promised

MADE_UP: dict[str, Any] = {
    "copy": [
        {"working_set_bytes": 2**18, "value": 40.0},  # slower than the next: the call itself takes its time
        {"working_set_bytes": 2**21, "value": 100.0},
        {"working_set_bytes": 2**24, "value": None, "reason": "broke"},
        {"working_set_bytes": 2**30, "value": 20.0},
    ],
    "matrix": {
        "fp32": {"value": 0.1},
        "bf16": {"value": 0.8},
        "fp8": {"value": None, "reason": "torch does not multiply fp8"},
    },
    "vector": {"fp32": {"value": 0.25}},
    "tiles": {"bf16": {"value": None, "reason": "no AMX here"}},
}


@pytest.mark.parametrize(
    ("size", "gbps"), [(1, 100), (2**18, 100), (2**21, 100), (2**25, 100), (2**26, 20), (2**30, 20), (2**40, 20)]
)
def test_bandwidth_is_the_nearest_sets_or_a_larger_ones(size: int, gbps: float) -> None:
    assert probe.bandwidth(MADE_UP, size)[0] == gbps * 1e9


def test_roof_of_a_compute_bound_problem_is_the_slower_of_both() -> None:
    assert probe.roof(MADE_UP, "compute", 1e12, 2**20, "bf16") == (1e12 / 0.8e12, "matrix rate bf16")
    assert probe.roof(MADE_UP, "compute", 1e12, 2**20, "fp32") == (1e12 / 0.25e12, "vector rate fp32")
    with_tiles = {**MADE_UP, "tiles": {"bf16": {"value": 2.0}}}
    assert probe.roof(with_tiles, "compute", 1e12, 2**20, "bf16") == (1e12 / 2e12, "tiles rate bf16")
    time_s, name = probe.roof(MADE_UP, "compute", 1e6, 2**30, "bf16")
    assert time_s == pytest.approx(2**30 / 20e9)
    assert name == "copy of 1 GiB"


def test_roof_of_a_memory_bound_problem_needs_no_matrix_rate() -> None:
    time_s, name = probe.roof(MADE_UP, "memory", 1e15, 2**20, "fp8")
    assert (time_s, name) == (2**20 / 100e9, "copy of 2 MiB")


def test_a_missing_ceiling_is_a_reason() -> None:
    assert probe.roof(MADE_UP, "compute", 1.0, 1.0, "fp8") == (
        None,
        "no matrix rate for fp8: torch does not multiply fp8",
    )
    assert probe.roof(MADE_UP, "compute", 1.0, 1.0, "int8") == (None, "no matrix rate for int8: not measured")
    assert probe.roof({}, "memory", 1.0, 1.0, "fp32") == (None, "no copy bandwidth was measured")


def test_a_ceiling_is_the_best_sample_and_tells_its_spread() -> None:
    made = probe.entry([8.0, 10.0, 9.0], "GB/s", "copy")
    assert (made["value"], made["spread"]) == (10.0, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40", None),
    ],
)
def test_datasheet_finds_the_product_or_nothing(name: str, product: str | None) -> None:
    found = promised(name)
    assert (found and found["product"]) == product


def test_cpu_ceilings_are_complete_and_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(probe_cpu, "COPY_SETS", (2**16, 2**18))
    monkeypatch.setattr(probe_cpu, "MATRIX_SIZES", (32, 64))
    monkeypatch.setattr(probe_cpu, "LIMIT_S", 0.01)
    monkeypatch.setattr(probe_cpu, "BEYOND_MIN", 2**20)
    monkeypatch.setattr("rooftune.device_cpu.last_level_bytes", lambda: 2**19)
    found = probe.ceilings("cpu", threads=1)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [c["working_set_bytes"] for c in found["copy"]] == [2**16, 2**18, 2**20]
    entries = [*found["copy"], *(made for kind in ("matrix", "vector", "tiles") for made in found[kind].values())]
    for made in entries:
        assert (made["value"] is None) == bool(made.get("reason")), made
        assert made["value"] is None or (made["value"] > 0 and math.isfinite(made["value"]) and made["how"])
    for precision in ("fp32", "bf16", "fp16", "int8"):
        assert found["matrix"][precision]["value"]
    for made in found["tiles"].values():  # not one against the other: between them a shared core may change its pace
        assert made["value"] is None or made["value"] > found["vector"]["fp32"]["value"]
    assert set(found["vector"]) == {"fp32", "bf16", "int8"}
    assert found["matrix"]["int8"]["value"] >= 2 * (found["vector"]["fp32"]["value"] or 0)
    assert found["matrix"]["fp16"]["value"] >= max(
        found["matrix"]["fp32"]["value"], found["vector"]["fp32"]["value"] or 0
    )


def test_a_streamed_copy_moves_every_byte() -> None:
    torch = pytest.importorskip("torch")
    copy = probe_registers.streamed_copy()
    if copy is None:
        pytest.skip(f"no streamed copy: {probe_registers.no_numba()}")
    size = 5 * probe_registers.GRAIN
    source = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    target = torch.zeros(size + probe_registers.GRAIN, dtype=torch.uint8)
    copy(target.data_ptr(), source.data_ptr(), size)
    assert torch.equal(target[:size], source)
    assert not target[size:].any()


def test_every_gpu_product_is_a_right_call() -> None:
    """The calls the GPU probe makes, on CPU tensors: their arguments are right."""
    torch = pytest.importorskip("torch")
    for precision, dtype in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"), ("int8", "int32")):
        out = probe_cuda._product(precision, 64, "cpu")()
        assert (out.shape, out.dtype) == ((64, 64), getattr(torch, dtype))
    before = (
        torch.backends.cuda.matmul.fp32_precision if hasattr(torch.backends.cuda.matmul, "fp32_precision") else None
    )
    with probe_cuda._tf32(True):
        assert torch.backends.cuda.matmul.allow_tf32 if before is None else True
    if before is not None:
        assert torch.backends.cuda.matmul.fp32_precision == before


def test_threads_must_be_positive() -> None:
    with pytest.raises(UsageError, match="threads must be positive"):
        probe.ceilings("cpu", threads=0)
