"""Where a series of results changed: candidates for a look, never a verdict.

A series has one value a run (the log of a time or of a ratio), in order of time. Lone outliers are clipped by Hampel's
rule (median and MAD of five neighbours, 3 of them; Davies and Gather, J. Amer. Statist. Assoc. 88 (1993)). Then the
series is divided where the energy distance between what lies before and after is largest (E-divisive: Matteson and
James, J. Amer. Statist. Assoc. 109 (2014)), as long as Student's t-test calls the division significant, and divisions
that are not, or too small, are taken back, the weakest first (Hunter: Fleming and others, ICPE 2023).

In simulated series of 120 commits (1 % noise; with outliers, with autocorrelation, with a random walk) there is one
false candidate in five series at most, and of steps of 5 % at least 97 of 100 are found within ten commits, of 3 % 87.
Where clocks have two states 3 % apart it is 88 and 39 (tests/unit/test_changes.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
P, LEAST_CHANGE = 1e-6, 0.015
WEAK = 100.0  # times P: what divides at first, so that two steps close to each other do not hide one another
WIDTH, DEVIATIONS = 5, 3.0
MAD = 1.4826  # times the median absolute deviation: a normal distribution's standard deviation


@dataclass(frozen=True)
class Change:
    """A series changed at `at`, the first index after it. `ratio` is the mean after it over that before (of what the
    logs are of), up to the next changes; `p` of the t-test."""

    at: int
    ratio: float
    p: float


def clipped(values: Sequence[float] | Array) -> Array:
    """Values farther than `DEVIATIONS` from the median of `WIDTH` neighbours take that median. At the ends the window
    is the first or last `WIDTH` values, so the newest value is judged too."""
    x = np.asarray(values, dtype=np.float64)
    out = x.copy()
    for i in range(len(x)):
        start = max(0, min(i - WIDTH // 2, len(x) - WIDTH))
        near = x[start : start + WIDTH]
        middle = float(np.median(near))
        if abs(x[i] - middle) > DEVIATIONS * MAD * float(np.median(np.abs(near - middle))):
            out[i] = middle
    return out


def changes(values: Sequence[float] | Array, p: float = P, least: float = LEAST_CHANGE) -> list[Change]:
    """Where the logs in `values` changed their level, in order.

    Args:
        p: largest probability by chance of a change that is kept.
        least: smallest |ratio - 1| that is kept.
    """
    x = clipped(values)
    cuts = sorted(_divided(x, 0, len(x), p * WEAK))
    while cuts:
        judged = [_judge(x, before, cut, after) for before, cut, after in _triples(cuts, len(x))]
        worst = max(judged, key=lambda c: c.p)
        if worst.p <= p:
            small = min(judged, key=lambda c: abs(math.log(c.ratio)))
            if abs(small.ratio - 1) >= least:
                return judged
            worst = small
        cuts.remove(worst.at)
    return []


def _triples(cuts: Sequence[int], end: int) -> list[tuple[int, int, int]]:
    edges = [0, *cuts, end]
    return list(zip(edges, edges[1:], edges[2:], strict=False))


def _judge(x: Array, before: int, cut: int, after: int) -> Change:
    a, b = x[before:cut], x[cut:after]
    return Change(cut, math.exp(float(b.mean() - a.mean())), t_test(a, b))


def _divided(x: Array, start: int, end: int, p: float) -> list[int]:
    """Cuts of x[start:end], found by dividing it again and again."""
    cut = _best_cut(x[start:end])
    if cut is None or t_test(x[start : start + cut], x[start + cut : end]) > p:
        return []
    middle = start + cut
    return [*_divided(x, start, middle, p), middle, *_divided(x, middle, end, p)]


def _best_cut(x: Array) -> int | None:
    """The division with the largest energy statistic (Matteson and James, eq. 5, alpha = 1); None of fewer than four
    values, as either side needs two."""
    n = len(x)
    if n < 4:
        return None
    apart = np.abs(x[:, None] - x[None, :])
    before = np.triu(apart).cumsum(0).cumsum(1).diagonal()  # [i]: all pairs within the first i + 1 values
    total = before[-1]
    rows = apart.sum(1).cumsum()  # [i]: of the first i + 1 values to all
    cut = np.arange(2, n - 1)
    left = before[cut - 1]
    across = rows[cut - 1] - 2 * left
    right = total - left - across
    m, k = cut.astype(np.float64), (n - cut).astype(np.float64)
    energy = 2 * across / (m * k) - left / (m * (m - 1) / 2) - right / (k * (k - 1) / 2)
    return int(cut[np.argmax(energy * m * k / n)])


def t_test(a: Array, b: Array) -> float:
    """Student's two-sided test of equal means with one variance: the probability of such a difference by chance."""
    m, k = len(a), len(b)
    freedom = m + k - 2
    if m < 2 or k < 2:
        return 1.0
    variance = (float(((a - a.mean()) ** 2).sum()) + float(((b - b.mean()) ** 2).sum())) / freedom
    difference = float(b.mean() - a.mean())
    if variance == 0.0:
        return 0.0 if difference else 1.0
    t_squared = difference**2 / (variance * (1 / m + 1 / k))
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t_squared))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), regularised, by its continued fraction (DLMF 8.17.22) in Lentz's way; 1e-12 relative."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    value = c = 1.0
    d = 0.0
    for n in range(1, 1000):
        m = n // 2
        if n % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / (1.0 + term * d)
        c = 1.0 + term / c
        value *= c * d
        if abs(c * d - 1.0) < 1e-14:
            break
    return front / value
