"""Precision as an axis: tune a problem in every allowed precision, keep what no other beats in time, error and energy.

The error that counts is that of the whole: what rounding fp32 inputs to the precision costs, and what the kernel
adds. The first does not depend on the kernel, so it is computed once, in float64, before anything is tuned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rooftune import device, registry, sensors
from rooftune.autotune.tuner import TuneResult, tune
from rooftune.check import generator
from rooftune.core import PRECISIONS, Problem, RooftuneError
from rooftune.energy import Energy
from rooftune.lab import Lab
from rooftune.registry import Impl
from rooftune.screen import sample_rows

ROWS = 64  # of the output, for the error of rounding the inputs: some 10^4 values, and it is a norm over all of them


@dataclass(frozen=True)
class Point:
    """One competitor in one precision after tuning.

    Attributes:
        rel_fro: the kernel's relative Frobenius error, against float64 on inputs already rounded to the precision.
        input_error: what rounding fp32 inputs to the precision changes in the exact result, likewise relative.
        error: both together; they are independent, so their squares add. This is what `max_error` limits.
        joules: per call; None without a sensor.
        front: no other point is as good in time, error and (where all have them) joules, and better in one.
        reason: why it has no time, or is not allowed.
    """

    precision: str
    impl: str
    time_s: float | None
    rel_fro: float | None
    config: dict[str, Any] | None
    result: TuneResult | None
    front: bool = False
    reason: str = ""
    input_error: float | None = None
    error: float | None = None
    joules: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def tune_precisions(
    lab: Lab,
    impls: Sequence[Impl],
    problem: Problem,
    precisions: Sequence[str],
    max_error: float | None = None,
    **options: Any,
) -> list[Point]:
    """Tune every competitor in every precision it does.

    Args:
        max_error: largest `Point.error` allowed. A precision whose inputs alone exceed it costs no device time.
        options: as for `tune`; the budget is for each competitor and precision.
    Returns:
        All points, the fastest first; those without a time last. `front` marks the Pareto front.
    """
    points: list[Point] = []
    index = lab.device.partition(":")[2]
    sensor = sensors.find_sensor(device.find(f"{lab.kind}:{index}" if index else lab.kind))
    for precision in precisions:
        rounding: float | None = None
        for impl in impls:
            none = Point(precision, impl.key, None, None, None, None)
            if precision not in impl.precisions:
                points.append(replace(none, reason=f"does not do {precision}"))
                continue
            try:
                asked = registry.problem(problem.replace(precision=precision))
                if rounding is None:
                    rounding = float(lab.call("rooftune.autotune.precisions:input_error", problem=str(asked)))
                none = replace(none, input_error=rounding)
                if max_error is not None and rounding > max_error:
                    reason = f"rounding the inputs alone changes the result by {rounding:.1e}, above {max_error:.1e}"
                    points.append(replace(none, reason=reason))
                    continue
                energy = not isinstance(sensor, Energy)
                result = tune(lab, impl, asked, max_error=max_error, energy=energy, **options)
            except RooftuneError as error:  # one precision that cannot be tuned does not end the others
                points.append(replace(none, reason=str(error)))
                continue
            points.append(_point(none, result, max_error))
    return front(points)


def input_error(problem: str, seed: int = 0) -> float:
    """Relative Frobenius change of the exact result when fp32 N(0,1) inputs are rounded to the problem's precision.

    fp8 and int8 operands are scaled per tensor so that the largest value is the format's largest. Runs in a
    worker. tf32 is 0: there the kernel rounds, and its own error holds it.
    """
    asked = registry.problem(problem)
    exact = registry.problem(asked.replace(precision="fp32"))
    op = registry.op(asked.op)
    if asked.precision in ("fp32", "tf32"):
        return 0.0
    inputs = op.inputs(exact, generator("cpu", seed), "cpu", "normal")
    rounded = [_rounded(t, asked.precision) for t in inputs]
    rows = sample_rows(math.prod(op.output(exact)[0][:-1]), seed, ROWS)
    right = op.reference(exact, inputs, rows).value
    got = op.reference(exact, rounded, rows).value
    return float((got - right).norm() / right.norm())


def _rounded(tensor: Any, precision: str) -> Any:
    """A fp32 tensor after a trip through the precision; vectors (bias, weights) stay in bf16 beside fp8 and int8."""
    import torch

    if precision not in ("fp8", "int8"):
        return tensor.to(getattr(torch, PRECISIONS[precision].storage)).float()
    if tensor.dim() < 2:
        return tensor.bfloat16().float()
    largest = torch.finfo(torch.float8_e4m3fn).max if precision == "fp8" else 127.0
    scale = tensor.abs().max() / largest
    steps = (tensor / scale).to(torch.float8_e4m3fn).float() if precision == "fp8" else (tensor / scale).round()
    return steps * scale


def _point(none: Point, result: TuneResult, max_error: float | None) -> Point:
    time_s = result.time_s if result.better else result.default_time_s
    error = None if result.rel_fro is None else math.hypot(result.rel_fro, none.input_error or 0.0)
    reason = "" if time_s is not None else result.reason
    if time_s is not None and max_error is not None and (error is None or error > max_error):
        reason = f"its error {'is not known' if error is None else f'{error:.1e} is above {max_error:.1e}'}"
    return replace(
        none,
        time_s=time_s,
        rel_fro=result.rel_fro,
        config=result.config,
        result=result,
        reason=reason,
        error=error,
        joules=result.joules,
    )


def front(points: Sequence[Point]) -> list[Point]:
    """Mark the points that no other beats without being worse elsewhere; sort by time."""
    allowed = [p for p in points if not p.reason and p.time_s is not None and p.error is not None]
    metered = all(p.joules is not None for p in allowed)

    def costs(p: Point) -> tuple[float, ...]:
        return (p.time_s or 0.0, p.error or 0.0, *((p.joules or 0.0,) if metered else ()))

    def beaten(p: Point) -> bool:
        mine = costs(p)
        return any(costs(q) != mine and all(a <= b for a, b in zip(costs(q), mine, strict=True)) for q in allowed)

    marked = [replace(p, front=any(p is q for q in allowed) and not beaten(p)) for p in points]
    return sorted(marked, key=lambda p: (p.time_s is None, p.time_s or 0.0))
