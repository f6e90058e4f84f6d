"""What the samples say: exact, distribution-free, numpy only.

The unit of replication is the *round* (all competitors once, in random order), never the single call:
samples within a process agree with each other more than with the next process (Kalibera and Jones,
"Rigorous benchmarking in reasonable time", ISMM 2013). A round is summarised by its 25 % order statistic,
which timing outliers, all of them slow, do not reach. Rounds are [rounds][samples], in seconds; an empty
round stands for one that was lost, and what it is paired with is left out too.

Sources: signed-rank test: Wilcoxon, Biometrics Bulletin 1 (1945). Estimate and interval: Hodges and Lehmann,
Ann. Math. Statist. 34 (1963); Hollander, Wolfe, Chicken, "Nonparametric Statistical Methods", 3.1-3.3 (one
sample), 4.2-4.3 (two samples) and 3.6 (median by order statistics). Several tests: Holm, Scand. J. Statist. 6 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from rooftune.core import UsageError

Rounds = Sequence[Sequence[float]]
Array = npt.NDArray[np.float64]
Interval = tuple[float, float | None, float | None]  # estimate, low, high; None: too few rounds for one


def q25(rounds: Rounds) -> Array:
    """Per round the smallest sample that at least a quarter are not above; NaN for a lost (empty) round.

    Raises:
        UsageError: a sample is not a positive finite time.
    """
    out = np.full(len(rounds), math.nan)
    for i, samples in enumerate(rounds):
        if len(samples):
            values = np.sort(np.asarray(samples, dtype=np.float64))
            if not (np.isfinite(values).all() and values[0] > 0):
                raise UsageError(f"round {i} holds a time that is not positive and finite")
            out[i] = values[math.ceil(len(values) / 4) - 1]
    return out


def paired_logs(rounds_a: Rounds, rounds_b: Rounds) -> Array:
    """log(time a / time b) per round, of the rounds that both have.

    Raises:
        UsageError: different numbers of rounds: row r of both must come from the same round.
    """
    if len(rounds_a) != len(rounds_b):
        raise UsageError(f"rounds cannot be paired: {len(rounds_a)} and {len(rounds_b)}")
    logs: Array = np.log(q25(rounds_a)) - np.log(q25(rounds_b))
    return logs[np.isfinite(logs)]


def shares(rounds: int, launches: int) -> list[int]:
    """How many of the rounds each launch has, in order."""
    return [rounds // launches + (launch < rounds % launches) for launch in range(launches)]


def launch_logs(rounds_a: Rounds, rounds_b: Rounds, launches: int) -> Array:
    """As `paired_logs`, one value a launch, the median of its rounds: what a process has by luck, all of them have."""
    ends = np.cumsum(shares(len(rounds_a), launches))
    parts = [paired_logs(rounds_a[i:j], rounds_b[i:j]) for i, j in zip([0, *ends[:-1]], ends, strict=True)]
    return np.array([np.median(part) for part in parts if len(part)])


@lru_cache(maxsize=64)
def _signed_rank_sf(n: int) -> Array:
    """P(W+ >= w) for w = 0 .. n(n+1)/2 if every sign is a fair coin: W+ sums a random subset of 1..n."""
    mass = np.zeros(n * (n + 1) // 2 + 1)
    mass[0] = 1.0
    for rank in range(1, n + 1):
        shifted = mass.copy()
        shifted[rank:] += mass[:-rank]
        mass = shifted / 2
    tail: Array = np.cumsum(mass[::-1])[::-1]
    tail.setflags(write=False)
    return tail


EXACT = 10_000  # pairs of two samples; exact counts of 300 x 300 took 22 s, of 1,000 x 1,000 8 GB


@lru_cache(maxsize=64)
def _rank_sum_sf(m: int, n: int) -> Array:
    """P(U >= u) for u = 0 .. m*n if all orders of m and n values are equally likely.

    The largest value is one of the m with chance m/(m+n), and then beats all n others (Mann and Whitney,
    Ann. Math. Statist. 18 (1947), in probabilities instead of counts: no overflow, no cancellation). Above `EXACT`
    pairs by the normal distribution, whose 95 % interval is the exact one for 100 x 100 and a little wider for unlike
    numbers (6 x 2,000: by 20 of 12,000 pairs at each end).
    """
    size = m * n + 1
    if m * n > EXACT:
        spread = math.sqrt(m * n * (m + n + 1) / 6)
        return np.array([math.erfc((u - 0.5 - m * n / 2) / spread) / 2 for u in range(size)])
    row = [np.zeros(size) for _ in range(n + 1)]  # distributions for (i, 0..n); i = 0 and j = 0 are certain: U = 0
    for mass in row:
        mass[0] = 1.0
    for i in range(1, m + 1):
        for j in range(1, n + 1):
            mass = row[j - 1] * (j / (i + j))
            mass[j:] += row[j][: size - j] * (i / (i + j))
            row[j] = mass
    tail: Array = np.cumsum(row[n][::-1])[::-1]
    tail.setflags(write=False)
    return tail


def signed_rank_p(differences: Sequence[float] | Array) -> float:
    """One-sided exact p of "the differences lie above 0" (Wilcoxon).

    Never too small: zeros count against it, and among equal sizes the positive ones get the lower ranks.
    """
    d = np.asarray(differences, dtype=np.float64)
    if not len(d):
        return 1.0
    order = np.lexsort((d <= 0, np.abs(d)))
    ranks = np.arange(1, len(d) + 1)
    return float(_signed_rank_sf(len(d))[int(ranks[d[order] > 0].sum())])


def _exact_interval(pairs: Array, tail: Array, alpha: float) -> Interval:
    """Median of the sorted pairwise values and the closed interval whose ends the test would not reject."""
    small = np.flatnonzero(tail <= alpha / 2)
    if not len(small):
        return float(np.median(pairs)), None, None
    cut = len(pairs) - int(small[0])
    return float(np.median(pairs)), float(pairs[cut]), float(pairs[len(pairs) - 1 - cut])


def hodges_lehmann(differences: Sequence[float] | Array, alpha: float = 0.05) -> Interval:
    """Median of the pairwise means, and its exact interval. No interval below 6 values at 95 %."""
    d = np.asarray(differences, dtype=np.float64)
    if not len(d):
        raise UsageError("no round is left to compare")
    i, j = np.triu_indices(len(d))
    return _exact_interval(np.sort((d[i] + d[j]) / 2), _signed_rank_sf(len(d)), alpha)


def hodges_lehmann_shift(a: Sequence[float] | Array, b: Sequence[float] | Array, alpha: float = 0.05) -> Interval:
    """Median of all differences a - b of two independent samples, and its exact interval (Mann-Whitney)."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not len(x) or not len(y):
        raise UsageError("no round is left to compare")
    pairs = np.sort((x[:, None] - y[None, :]).ravel())
    return _exact_interval(pairs, _rank_sum_sf(min(len(x), len(y)), max(len(x), len(y))), alpha)


def _exp(interval: Interval) -> Interval:
    mid, lo, hi = interval
    return math.exp(mid), None if lo is None else math.exp(lo), None if hi is None else math.exp(hi)


def summary(rounds: Rounds, alpha: float = 0.05) -> Interval:
    """(time_s, low, high): median over rounds of the 25 % order statistic, with the exact interval between
    two order statistics (sign test). Fewer than 6 rounds have no 95 % interval.

    Raises:
        UsageError: no round at all, or a sample that is not a time.
    """
    values = np.sort(q25(rounds)[~np.isnan(q25(rounds))])
    n = len(values)
    if not n:
        raise UsageError("no round was measured")
    below, k = 0.0, 0  # largest k with P(Binomial(n, 1/2) < k) <= alpha / 2
    while k < n and (below := below + math.comb(n, k) / 2**n) <= alpha / 2:
        k += 1
    lo, hi = (float(values[k - 1]), float(values[n - k])) if k else (None, None)
    return float(np.median(values)), lo, hi


def ratio(rounds_a: Rounds, rounds_b: Rounds, alpha: float = 0.05) -> Interval:
    """time a / time b of *paired* rounds (row r of both from the same round): above 1, a is slower.

    Drift that a round shares cancels. `ratio_to_torch` is `ratio(torch's rounds, ours)`.
    """
    return _exp(hodges_lehmann(paired_logs(rounds_a, rounds_b), alpha))


def unpaired_ratio(rounds_a: Rounds, rounds_b: Rounds, alpha: float = 0.05) -> Interval:
    """time a / time b of two separate sessions. The interval holds within-session noise only: what
    differs between two sessions (process, clock, temperature) is in the estimate, not in the interval."""
    a, b = q25(rounds_a), q25(rounds_b)
    return _exp(hodges_lehmann_shift(np.log(a[~np.isnan(a)]), np.log(b[~np.isnan(b)]), alpha))


def tie_set(rounds_by_name: Mapping[str, Rounds], alpha: float = 0.05) -> tuple[str, set[str]]:
    """(leader, names that cannot be told from it): those whose interval against the leader contains 1.

    The leader has the smallest median. With too few rounds for an interval nobody can be told apart.
    """
    if not rounds_by_name:
        raise UsageError("no competitor was measured")
    leader = min(rounds_by_name, key=lambda name: summary(rounds_by_name[name])[0])
    tied = {leader}
    for name, rounds in rounds_by_name.items():
        _, lo, hi = ratio(rounds, rounds_by_name[leader], alpha)
        if lo is None or hi is None or lo <= 1.0 <= hi:
            tied.add(name)
    return leader, tied


def holm(p: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses are rejected with a family-wise error of at most alpha, whatever their dependence."""
    rejected = [False] * len(p)
    for step, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if not p[index] <= alpha / (len(p) - step):
            break
        rejected[index] = True
    return rejected


def suite_rounds(cells: Sequence[Rounds]) -> list[list[float]]:
    """All cells of a suite as one: per round the geometric mean over cells, an empty round where one lost it.

    Two of these, compared like any cell, show a change that is everywhere but too small to see in one cell.

    Raises:
        UsageError: no cells, or cells with different numbers of rounds.
    """
    if not cells or len({len(rounds) for rounds in cells}) != 1:
        raise UsageError("cells with different numbers of rounds have no common mean")
    means = np.mean(np.stack([np.log(q25(rounds)) for rounds in cells]), axis=0)
    return [[math.exp(mean)] if math.isfinite(mean) else [] for mean in means.tolist()]


@lru_cache(maxsize=256)
def _effect_in_sd(n: int, alpha: float, power: float) -> float | None:
    """The shift, in standard deviations of normal differences, that the signed-rank test finds with this power.

    By simulation (fixed seed, 2,000 samples, bisection): the asymptotic formula, sqrt(pi/3n) (z_alpha + z_power),
    promises 95 % but finds 86 % at n = 20 and alpha = .001. None: no outcome of n rounds reaches alpha.
    """
    critical = np.flatnonzero(_signed_rank_sf(n) <= alpha)
    if not len(critical):
        return None
    noise = np.random.default_rng(n).standard_normal((2000, n))
    low, high = 0.0, 16.0
    while high - low > 0.005:
        shift = (low + high) / 2
        moved = noise + shift
        ranks = np.argsort(np.argsort(np.abs(moved), axis=1), axis=1) + 1
        found = float(np.mean(np.where(moved > 0, ranks, 0).sum(axis=1) >= critical[0]))
        low, high = (low, shift) if found >= power else (shift, high)
    return high


def detectable_effect(
    differences: Sequence[float] | Array,
    rounds: int | None = None,
    alpha: float = 0.01,
    power: float = 0.95,
    margin: float = 0.0,
) -> float | None:
    """The smallest slowdown (0.03 = 3 %) that `rounds` such rounds would find with this power, one-sided.

    About the margin plus 1.1 standard deviations at 32 rounds and alpha = .01/200. None: so few rounds that no
    outcome could be significant, or fewer than two to estimate the spread from.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2:
        return None
    effect = _effect_in_sd(len(d) if rounds is None else rounds, alpha, power)
    return None if effect is None else math.expm1(margin + float(np.std(d, ddof=1)) * effect)


@dataclass(frozen=True)
class Decision:
    """Verdict on one cell: `ratio` is candidate time / base time with its 95 % interval; `p` of the
    direction it went; `mde` the smallest change these rounds would have found."""

    verdict: str  # slower, faster, same, inconclusive
    ratio: float | None  # None: no round in common
    lo: float | None
    hi: float | None
    p: float
    mde: float | None
    rounds: int


def decide(
    pairs: Mapping[Any, tuple[Rounds, Rounds]],
    margin: float = 0.005,
    same: float = 0.02,
    alpha: float = 0.01,
    launches: Mapping[Any, int] | None = None,
) -> dict[Any, Decision]:
    """Base against candidate, {cell: (base rounds, candidate rounds)} of interleaved rounds.

    `slower`/`faster`: by more than the margin; the chance of one false `slower` among all cells is at most
    alpha, and the same for `faster` (Holm over exact p). `same`: the 95 % interval lies within 1 +- same. If
    a screen chose these cells, the rounds must be fresh ones, taken after it.

    `launches`: cells whose rounds several processes share, and how many. Then p is the larger of that of the rounds
    and that of the launches: two processes of one kernel that differ by 1 % made 23 of 40 builds of 20 unchanged
    cells red, with 32 rounds in two launches, as the rounds of a process all say the same.
    """
    logs = {cell: paired_logs(candidate, base) for cell, (base, candidate) in pairs.items()}
    each = {cell: (launches or {}).get(cell, 1) for cell in pairs}
    grouped = {cell: launch_logs(pairs[cell][1], pairs[cell][0], n) for cell, n in each.items() if n > 1}
    tests = [[d, grouped[cell]] if cell in grouped else [d] for cell, d in logs.items()]
    slow = [max(signed_rank_p(d - math.log1p(margin)) for d in test) for test in tests]
    fast = [max(signed_rank_p(-d - math.log1p(margin)) for d in test) for test in tests]
    is_slow, is_fast = holm(slow, alpha), holm(fast, alpha)
    out: dict[Any, Decision] = {}
    for i, (cell, d) in enumerate(logs.items()):
        mid, lo, hi = _exp(hodges_lehmann(d)) if len(d) else (None, None, None)
        shown = lo is not None and hi is not None and 1 - same < lo and hi < 1 + same
        verdict = "slower" if is_slow[i] else "faster" if is_fast[i] else "same" if shown else "inconclusive"
        found = [detectable_effect(x, alpha=alpha / len(logs), margin=math.log1p(margin)) for x in tests[i]]
        known = [x for x in found if x is not None]
        mde = max(known) if len(known) == len(found) else None
        out[cell] = Decision(verdict, mid, lo, hi, min(slow[i], fast[i]), mde, len(d))
    return out


def screen(pairs: Mapping[Any, tuple[Rounds, Rounds]], margin: float = 0.005, alpha: float = 0.10) -> list[Any]:
    """Cells worth confirming on fresh rounds: one-sided p at most alpha in either direction, uncorrected."""
    flagged = []
    for cell, (base, candidate) in pairs.items():
        d = paired_logs(candidate, base)
        if min(signed_rank_p(d - math.log1p(margin)), signed_rank_p(-d - math.log1p(margin))) <= alpha:
            flagged.append(cell)
    return flagged
