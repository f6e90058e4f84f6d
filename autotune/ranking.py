"""A first ranking of configs by arithmetic, before anything is measured: what each would take on a device, in seconds.

The models (ranking_models.py, ranking_backward.py, ranking_rows.py) count waves, bytes through shared memory, L2
and memory, and matrix time, in the spirit of a roofline per tile. They are for ordering: a predicted time is no
result and is never shown as one. Pure Python; the device is described by its datasheet, and by measured ceilings
where there are some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rooftune import registry
from rooftune.autotune.ranking_backward import attention_backward
from rooftune.autotune.ranking_models import attention, gemm
from rooftune.autotune.ranking_parts import Traits
from rooftune.autotune.ranking_rows import rows
from rooftune.core import Config, Op, Problem, Resources, UsageError
from rooftune.datasheet import promised
from rooftune.occupancy import MULTIPROCESSORS
from rooftune.registry import Impl

# Product -> architecture, multiprocessors, boost clock in GHz, L2 in MB. Clocks are those at which the datasheet's
# matrix rate follows from the rate of one multiprocessor (A100: 108 x 2048 FLOP x 1.41 GHz = 312 TFLOP/s).
CHIPS: dict[str, tuple[str, int, float, float]] = {
    "B200": ("sm_100a", 148, 1.86, 126),
    "H200 NVL": ("sm_90a", 132, 1.55, 50),
    "H200": ("sm_90a", 132, 1.83, 50),
    "H100 NVL": ("sm_90a", 132, 1.55, 50),
    "H100 PCIe": ("sm_90a", 114, 1.62, 50),
    "H100": ("sm_90a", 132, 1.83, 50),
    "A100-SXM4-80GB": ("sm_80", 108, 1.41, 40),
    "A100 80GB PCIe": ("sm_80", 108, 1.41, 40),
    "A100": ("sm_80", 108, 1.41, 40),
    "L40S": ("sm_89", 142, 2.49, 96),
    "RTX 4090": ("sm_89", 128, 2.52, 72),
}
FRACTION_OF_COPY = 0.9  # of the datasheet's memory rate that a copy reaches; used where none was measured


@dataclass(frozen=True)
class Gpu:
    """What the models know of a device. Rates in FLOP/s (int8: op/s) and bytes/s."""

    name: str
    arch: str
    multiprocessors: int
    clock_hz: float
    l2_bytes: float
    copy_rate: float
    matrix_rate: Mapping[str, float]

    @classmethod
    def named(cls, name: str) -> Gpu:
        """From the datasheet alone: `Gpu.named("H200")`.

        Raises:
            UsageError: a product that is not in the table.
        """
        sheet = promised(name)
        if sheet is None or sheet["product"] not in CHIPS:
            raise UsageError(f"no datasheet for '{name}'; known: {', '.join(CHIPS)}")
        arch, count, clock, l2 = CHIPS[sheet["product"]]
        rates = {p: float(v) * 1e12 for p, v in sheet.items() if p not in ("product", "unit", "copy")}
        return cls(name, arch, count, clock * 1e9, l2 * 1e6, float(sheet["copy"]) * 1e9 * FRACTION_OF_COPY, rates)

    @classmethod
    def of(cls, fingerprint: Mapping[str, Any], ceilings: Mapping[str, Any] | None = None) -> Gpu | None:
        """The device of a fingerprint, with measured ceilings in place of promised ones; None if it is no CUDA
        device of a compute capability we know, or neither says how fast it is."""
        if fingerprint.get("kind") != "cuda":
            return None
        try:
            base = cls.named(str(fingerprint.get("name")))
        except UsageError:
            base = None
        major, _, minor = str(fingerprint.get("compute_capability") or "0.0").partition(".")
        arch = f"sm_{major}{minor}{'a' if int(major) >= 9 else ''}"
        rates = dict(base.matrix_rate) if base else {}
        copy = base.copy_rate if base else 0.0
        found = ceilings or {}
        for precision, entry in (found.get("matrix") or {}).items():
            if entry.get("value"):
                rates[precision] = float(entry["value"]) * 1e12
        largest = max((c for c in found.get("copy") or () if c.get("value")), default=None, key=_set_size)
        copy = float(largest["value"]) * 1e9 if largest else copy
        count = fingerprint.get("multiprocessors") or (base.multiprocessors if base else 0)
        clock = float(fingerprint.get("max_sm_clock_mhz") or 0) * 1e6 or (base.clock_hz if base else 0.0)
        l2 = float(fingerprint.get("l2_bytes") or 0) or (base.l2_bytes if base else 0.0)
        known = int(f"{major}{minor}" or 0) in MULTIPROCESSORS
        if not (known and count and clock and l2 and copy and rates):
            return None
        return cls(str(fingerprint.get("name")), arch, int(count), clock, l2, copy, rates)


Model = Callable[[Op, Problem, Config, Traits, Gpu, Resources | None], float | None]
# The dimensions an operator must have, most telling first.
MODELS: tuple[tuple[frozenset[str], Model], ...] = (
    (frozenset({"m", "n", "k"}), gemm),
    (frozenset({"b", "h", "sq", "d"}), attention),
    (frozenset({"m", "n"}), rows),
)
BY_NAME: dict[str, Model] = {"attention_bwd": attention_backward}  # same dimensions as the forward pass, other axes


def _set_size(entry: Mapping[str, Any]) -> float:
    return float(entry["working_set_bytes"])


def prior(
    impl: Impl,
    problem: Problem,
    configs: Sequence[Config],
    device: Gpu,
    resources: Mapping[int, Resources] | None = None,
) -> list[float] | None:
    """Predicted seconds per call of each config, smaller is better; infinite for what the device cannot launch.

    Args:
        resources: of some configs, by their number, where they were compiled: registers, shared memory, spills and
            instructions are then facts instead of estimates.
    Returns:
        None where no model knows the operator or the competitor's axes: then there is no ranking, not a bad one.
    """
    op = registry.op(problem.op)
    needed = set(op.dims) - set(op.defaults)
    model = BY_NAME.get(op.name) or next((m for dims, m in MODELS if dims <= needed), None)
    if model is None or not configs:
        return None
    known, traits = resources or {}, Traits.of(impl)
    scores = []
    for number, config in enumerate(configs):
        score = model(op, problem, config, traits, device, known.get(number))
        if score is None:
            return None
        scores.append(score if math.isfinite(score) else math.inf)
    return scores


def ranker(impl: Impl, problem: Problem, device: Gpu | None) -> Callable[[Sequence[Config]], list[float] | None] | None:
    """`prior` as a search takes it: configs -> seconds. None without a device that the model knows."""
    return None if device is None else lambda configs: prior(impl, problem, configs, device)
