"""The analytic ranking against what an H200 measured (results/reference/h200/sweeps.jsonl)."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest

from rooftune import registry
from rooftune.autotune import ranking
from rooftune.results import store

RATES = {"bf16": 797, "fp16": 767, "fp8": 1517, "int8": 926, "tf32": 417, "fp32": 51}
SHORT_S = 30e-6  # below it the sweeps show launches
# The first sitting whose sources are in essence today's; clusters of the Hopper GEMM only from the third on.
SINCE = {"gemm/cupy": 3, "attention/cupy_wgmma": 3}


def h200() -> ranking.Gpu:
    sizes = {"multiprocessors": 132, "max_sm_clock_mhz": 1980, "l2_bytes": 62914560, "compute_capability": "9.0"}
    ceilings = {
        "matrix": {precision: {"value": value} for precision, value in RATES.items()},
        "copy": [{"value": 4276, "working_set_bytes": 2**33}],
    }
    found = ranking.Gpu.of({"kind": "cuda", "name": "NVIDIA H200", **sizes}, ceilings)
    assert found is not None
    return found


def sweeps() -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """(competitor, problem, sitting) -> its lines, where there are four at least."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for text in (store.REFERENCE / "h200" / "sweeps.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        impl, config = line["impl"], line["config"]
        clustered = config.get("cluster_m", 1) * config.get("cluster_n", 1) > 1
        old = line["sitting"] < SINCE.get(impl, 3 if clustered and impl == "gemm/cupy_wgmma" else 1)
        if "variant" not in line and not old and line["time_s"] >= SHORT_S and "torch" not in impl:
            groups[impl, line["problem"], line["sitting"]].append(line)
    return {key: lines for key, lines in groups.items() if len(lines) >= 4}


@pytest.mark.parametrize(
    ("impl", "least"),
    [  # mean share of the fastest config on record that the best of the model's first three has
        ("gemm/triton", 0.98),  # 0.72 before a step's own passage counted
        ("gemm/cupy_wgmma", 0.96),
        ("attention/triton", 0.97),
        ("attention/cupy_wgmma", 0.97),
        ("attention_bwd/triton", 0.97),
        ("attention_bwd/cupy_wgmma", 0.97),
    ],
)
def test_the_models_first_three_are_near_the_fastest_on_record(impl: str, least: float) -> None:
    gpu, shares = h200(), []
    for (name, text, _), lines in sweeps().items():
        if name != impl:
            continue
        problem = registry.problem(text)
        configs = [{"late_wait": 0, **x["config"]} if impl == "attention/cupy_wgmma" else x["config"] for x in lines]
        scores = ranking.prior(registry.impl(impl), problem, configs, gpu)
        assert scores is not None
        times = [line["time_s"] for line in lines]
        first = sorted(range(len(times)), key=scores.__getitem__)[:3]
        shares.append(min(times) / min(times[i] for i in first))
    assert len(shares) >= 2
    assert sum(shares) / len(shares) >= least, shares
