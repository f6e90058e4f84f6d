"""Precision as an axis: tune a problem in every allowed precision, keep what no other beats in time and error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rooftune import registry
from rooftune.autotune.tuner import TuneResult, tune
from rooftune.core import Problem, RooftuneError
from rooftune.lab import Lab
from rooftune.registry import Impl


@dataclass(frozen=True)
class Point:
    """One competitor in one precision after tuning.

    Attributes:
        rel_fro: relative Frobenius error against float64 *on inputs already rounded to that precision*. What
            rounding the inputs costs is not in it: fp16 inputs hold 11 bits, bf16 and fp8 fewer.
        front: no other point is both faster and more accurate.
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
        max_error: largest relative Frobenius error allowed (see `Point.rel_fro`).
        options: as for `tune`; the budget is for each competitor and precision.
    Returns:
        All points, the fastest first; those without a time last. `front` marks the Pareto front.
    """
    points: list[Point] = []
    for precision in precisions:
        for impl in impls:
            if precision not in impl.precisions:
                points.append(Point(precision, impl.key, None, None, None, None, reason=f"does not do {precision}"))
                continue
            try:
                asked = registry.problem(problem.replace(precision=precision))
                result = tune(lab, impl, asked, max_error=max_error, **options)
            except RooftuneError as error:  # one precision that cannot be tuned does not end the others
                points.append(Point(precision, impl.key, None, None, None, None, reason=str(error)))
                continue
            points.append(_point(precision, result, max_error))
    return front(points)


def _point(precision: str, result: TuneResult, max_error: float | None) -> Point:
    time_s = result.time_s if result.better else result.default_time_s
    reason = "" if time_s is not None else result.reason
    if time_s is not None and max_error is not None and (result.rel_fro is None or result.rel_fro > max_error):
        reason = f"its error {result.rel_fro} is above {max_error:.1e}"
    return Point(precision, result.impl, time_s, result.rel_fro, result.config, result, reason=reason)


def front(points: Sequence[Point]) -> list[Point]:
    """Mark the points that no other beats in time without a larger error; sort by time."""

    def beaten(p: Point) -> bool:
        assert p.time_s is not None
        assert p.rel_fro is not None
        return any(
            (q.time_s, q.rel_fro) != (p.time_s, p.rel_fro) and q.time_s <= p.time_s and q.rel_fro <= p.rel_fro
            for q in points
            if not q.reason and q.time_s is not None and q.rel_fro is not None
        )

    marked = [
        Point(**{**vars(p), "front": not p.reason and p.time_s is not None and p.rel_fro is not None and not beaten(p)})
        for p in points
    ]
    return sorted(marked, key=lambda p: (p.time_s is None, p.time_s or 0.0))
