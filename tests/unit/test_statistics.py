"""The statistics against scipy's exact tests, and their error rates by simulation with fixed seeds."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rooftune.core import UsageError
from rooftune.results import statistics as S  # noqa: N812 - read as one word below

ROOT = Path(__file__).resolve().parents[2]
Rng = np.random.Generator


def rounds(rng: Rng, n: int, mean: float = 0.0, sd: float = 0.01, samples: int = 5) -> list[list[float]]:
    """Lognormal times around one second, the same spread within and between rounds."""
    level = rng.normal(mean, sd, (n, 1))
    return [[float(v) for v in row] for row in np.exp(level + rng.normal(0, sd, (n, samples)))]


def test_q25_is_an_order_statistic() -> None:
    assert S.q25([[5, 1, 4, 2, 3]]).tolist() == [2]  # ceil(5/4) = 2nd
    assert S.q25([[4, 3, 2, 1], [7]]).tolist() == [1, 7]
    assert math.isnan(S.q25([[], [1.0]])[0])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_what_is_not_a_time_is_refused(bad: float) -> None:
    with pytest.raises(UsageError, match="round 1"):
        S.q25([[1.0], [2.0, bad]])


@pytest.mark.parametrize("n", [1, 5, 6, 8, 20, 32, 50])
def test_signed_rank_equals_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        d = rng.normal(0.3, 1, n)
        expected = stats.wilcoxon(d, alternative="greater", method="exact").pvalue
        assert S.signed_rank_p(d) == pytest.approx(expected, abs=1e-12)


def test_signed_rank_extremes() -> None:
    assert S.signed_rank_p([]) == 1.0
    assert S.signed_rank_p([0.0] * 20) == 1.0
    assert S.signed_rank_p([1.0] * 20) == 2.0**-20
    assert 0 < S.signed_rank_p(np.arange(1, 301)) < 1e-80  # no underflow in the recursion


def test_ties_and_zeros_never_make_p_too_small() -> None:
    rng = np.random.default_rng(0)
    for alpha in (0.05, 0.01):
        coarse = np.round(rng.normal(0, 1, (4000, 20)) * 2) / 2
        assert np.mean([S.signed_rank_p(d) <= alpha for d in coarse]) <= alpha


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 7), (6, 6), (10, 30)])
def test_rank_sum_equals_scipy(m: int, n: int) -> None:
    rng = np.random.default_rng(m)
    for _ in range(10):
        a, b = rng.normal(0.5, 1, m), rng.normal(0, 1, n)
        u = int((a[:, None] > b[None, :]).sum())
        expected = stats.mannwhitneyu(a, b, alternative="greater", method="exact").pvalue
        assert S._rank_sum_sf(m, n)[u] == pytest.approx(expected, abs=1e-12)


def test_of_many_rounds_the_normal_distribution_gives_the_exact_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = S._rank_sum_sf(101, 100)
    monkeypatch.setattr(S, "EXACT", 101 * 100)
    S._rank_sum_sf.cache_clear()
    exact = S._rank_sum_sf(101, 100)
    S._rank_sum_sf.cache_clear()
    assert len(normal) == len(exact)
    assert not np.array_equal(normal, exact)
    assert np.abs(normal - exact).max() < 5e-4
    assert np.flatnonzero(normal <= 0.025)[0] == np.flatnonzero(exact <= 0.025)[0]


def test_two_sessions_of_a_thousand_rounds_are_compared() -> None:
    """The exact distribution of a million pairs would take 8 GB."""
    rng = np.random.default_rng(5)
    a, b = (np.exp(rng.normal(mean, 0.01, (1000, 1))).tolist() for mean in (0.02, 0.0))
    value, low, high = S.unpaired_ratio(a, b)
    assert low is not None
    assert high is not None
    assert 1.017 < low < value < high < 1.024


def test_estimates_are_medians_of_pairs() -> None:
    assert S.hodges_lehmann([1.0, 2.0, 6.0])[0] == 2.75  # of 1, 1.5, 2, 3.5, 4, 6
    assert S.hodges_lehmann_shift([1.0, 5.0], [0.0, 1.0])[0] == 2.5  # of 0, 1, 4, 5


def test_interval_ends_where_the_test_stops_rejecting() -> None:
    d = np.random.default_rng(3).normal(0.2, 1, 15)
    _, lo, hi = S.hodges_lehmann(d)
    assert lo is not None
    assert hi is not None
    assert S.signed_rank_p(d - (lo - 1e-9)) <= 0.025 < S.signed_rank_p(d - (lo + 1e-9))
    assert S.signed_rank_p((hi + 1e-9) - d) <= 0.025 < S.signed_rank_p((hi - 1e-9) - d)


@pytest.mark.parametrize("n", [6, 10, 32])
def test_coverage_of_the_ratio(n: int) -> None:
    rng, hits, runs = np.random.default_rng(n), 0, 1000
    for _ in range(runs):
        _, lo, hi = S.hodges_lehmann(0.03 + 0.01 * rng.standard_t(3, n))
        hits += lo is not None and hi is not None and lo <= 0.03 <= hi
    assert 0.935 <= hits / runs <= 0.985  # exact levels: 96.9 % at 6, 95.1 % at 10


@pytest.mark.parametrize("n", [6, 10, 25])
def test_coverage_of_the_median(n: int) -> None:
    rng, hits, runs = np.random.default_rng(n), 0, 1000
    for _ in range(runs):
        _, lo, hi = S.summary([[float(v)] for v in rng.lognormal(0, 0.5, n)])
        hits += lo is not None and hi is not None and lo <= 1.0 <= hi
    assert 0.94 <= hits / runs <= 0.99


def test_coverage_of_the_unpaired_ratio() -> None:
    rng, hits, runs = np.random.default_rng(1), 0, 1000
    for _ in range(runs):
        _, lo, hi = S.hodges_lehmann_shift(rng.normal(0.1, 1, 8), rng.normal(0, 1, 12))
        hits += lo is not None and hi is not None and lo <= 0.1 <= hi
    assert 0.935 <= hits / runs <= 0.975


@pytest.mark.parametrize(("n", "known"), [(1, False), (5, False), (6, True)])
def test_too_few_rounds_have_no_interval(n: int, known: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rounds(rng, n), rounds(rng, n)
    for time, lo, hi in (S.summary(a), S.ratio(a, b)):
        assert time > 0
        assert (lo is not None, hi is not None) == (known, known)


def test_summary_orders_its_interval() -> None:
    time, lo, hi = S.summary([[float(v)] for v in range(1, 11)])
    assert (time, lo, hi) == (5.5, 2.0, 9.0)  # P(Binomial(10, 1/2) <= 1) = 1.1 %
    with pytest.raises(UsageError, match="no round"):
        S.summary([[], []])


def test_ratio_is_first_over_second_and_drift_cancels() -> None:
    rng = np.random.default_rng(5)
    drift = np.linspace(1, 3, 12)  # three times slower in the end: shared by a round, so it cancels
    a = [[v * f for v in r] for r, f in zip(rounds(rng, 12, 0.0, 0.001), drift, strict=True)]
    b = [[v * f for v in r] for r, f in zip(rounds(rng, 12, math.log(2), 0.001), drift, strict=True)]
    value, lo, hi = S.ratio(b, a)
    assert value == pytest.approx(2.0, rel=0.01)
    assert lo is not None
    assert hi is not None
    assert lo < value < hi
    assert hi / lo < 1.01


def test_lost_rounds_take_their_partner_out() -> None:
    a, b = [[1.0], [], [3.0]], [[2.0], [9.0], [6.0]]
    assert S.paired_logs(b, a).tolist() == pytest.approx([math.log(2)] * 2)
    with pytest.raises(UsageError, match="cannot be paired: 3 and 2"):
        S.ratio(a, b[:2])
    with pytest.raises(UsageError, match="no round is left"):
        S.ratio([[1.0], []], [[], [1.0]])
    with pytest.raises(UsageError, match="no round is left"):
        S.unpaired_ratio([[1.0]], [[]])


def test_tie_set() -> None:
    rng = np.random.default_rng(1)
    by_name = {"a": rounds(rng, 12), "b": rounds(rng, 12, 0.001), "c": rounds(rng, 12, 0.2)}
    leader, tied = S.tie_set(by_name)
    assert leader in ("a", "b")
    assert tied == {"a", "b"}
    assert S.tie_set({k: v[:5] for k, v in by_name.items()})[1] == {"a", "b", "c"}  # no interval, no winner
    assert S.tie_set({"c": by_name["c"]}) == ("c", {"c"})


def test_holm_against_its_definition() -> None:
    assert S.holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert S.holm([0.045, 0.02, 0.005, 0.015], 0.05) == [True] * 4  # by Bonferroni only one
    assert S.holm([], 0.05) == []
    assert S.holm([math.nan], 0.05) == [False]


def test_suite_rounds_show_what_no_cell_shows() -> None:
    rng = np.random.default_rng(10)
    base = [rounds(rng, 11, sd=0.02) for _ in range(40)]
    candidate = [rounds(rng, 11, 0.015, sd=0.02) for _ in range(40)]
    cells = S.decide(dict(enumerate(zip(base, candidate, strict=True))))
    assert not any(d.verdict == "slower" for d in cells.values())  # 2^-11 is above .01 / 40
    whole = S.decide({"suite": (S.suite_rounds(base), S.suite_rounds(candidate))})["suite"]
    assert whole.verdict == "slower"
    assert whole.ratio == pytest.approx(1.015, abs=0.006)
    assert S.suite_rounds([[[1.0], []], [[4.0], [1.0]]]) == [[2.0], []]
    with pytest.raises(UsageError, match="different numbers"):
        S.suite_rounds([[[1.0]], [[1.0], [1.0]]])


def test_detectable_effect_is_detected() -> None:
    rng, n, alpha, sd = np.random.default_rng(4), 20, 0.001, 0.02
    effect = S.detectable_effect(rng.normal(0, sd, 2000), n, alpha, 0.95, margin=0.005)
    assert effect is not None
    shift = math.log1p(effect)
    found = np.mean([S.signed_rank_p(rng.normal(shift, sd, n) - 0.005) <= alpha for _ in range(600)])
    assert found >= 0.92
    rule = S.detectable_effect(rng.normal(0, sd, 2000), 32, 0.01 / 200)
    assert rule == pytest.approx(1.15 * sd, rel=0.08)
    assert S.detectable_effect([0.1] * 6, alpha=0.01) is None  # 2^-6 is above 0.01
    assert S.detectable_effect([0.1], 32) is None  # one round has no spread


@pytest.mark.parametrize("mean", [0.0, 0.03])
def test_decisions_hold_their_error_rate(mean: float) -> None:
    """20 cells of 32 rounds, per-round process effect and outliers: no false alarm at 0, all found at 3 %."""
    rng, builds, red, found = np.random.default_rng(6), 25, 0, 0
    for _ in range(builds):
        pairs = {}
        for cell in range(20):
            drift = rng.normal(0, 0.02, (32, 1))  # shared by the round
            noise = [rng.normal(m, 0.01, (32, 1)) + rng.exponential(0.005, (32, 5)) for m in (0.0, mean)]
            pairs[cell] = tuple(np.exp(drift + e) for e in noise)
        verdicts = [d.verdict for d in S.decide(pairs).values()]  # type: ignore[arg-type]
        red += "slower" in verdicts
        found += verdicts.count("slower")
        assert "faster" not in verdicts
    assert red <= 1 if mean == 0.0 else found >= 0.95 * builds * 20


def test_verdicts() -> None:
    rng = np.random.default_rng(8)
    base, quiet = rounds(rng, 20), [[1.0 + i * 1e-4] for i in range(20)]
    found = S.decide(
        {
            "slower": (base, [[2 * v for v in r] for r in base]),
            "faster": (base, [[v / 2 for v in r] for r in base]),
            "same": (quiet, quiet),
            "inconclusive": (rounds(rng, 5), rounds(rng, 5)),
        }
    )
    assert {name: d.verdict for name, d in found.items()} == {name: name for name in found}
    assert found["slower"].ratio == pytest.approx(2.0)
    assert found["inconclusive"].mde is None
    lost = S.decide({0: ([[]], [[1.0]])})[0]
    assert (lost.verdict, lost.ratio, lost.rounds) == ("inconclusive", None, 0)


def test_rounds_are_shared_evenly() -> None:
    assert S.shares(32, 8) == [4] * 8
    assert S.shares(10, 3) == [4, 3, 3]
    assert S.shares(5, 1) == [5]


def test_launches_that_do_not_agree_decide_nothing() -> None:
    """16 rounds, of which four of each of three processes are 5 % slower, and those of the fourth faster."""
    base = [[1.0]] * 16
    luck = [[1.05 + i / 1000] for i in range(12)] + [[0.95 + i / 1000] for i in range(4)]
    shown = S.launch_logs(luck, [*base[:15], []], 4)  # a lost round takes its partner out
    assert np.exp(shown) == pytest.approx([1.0515, 1.0555, 1.0595, 0.951], abs=1e-5)
    mostly = [*luck[:12], *([0.99 + i / 1000] for i in range(4))]
    assert S.decide({0: (base, mostly)}, alpha=0.05)[0].verdict == "slower"
    assert S.decide({0: (base, mostly)}, alpha=0.05, launches={0: 4})[0].verdict == "inconclusive"
    slow = [[1.05 + i / 1000] for i in range(16)]
    assert S.decide({0: (base, slow)}, launches={0: 8})[0].verdict == "slower"
    quick = S.decide({0: (slow, base)}, launches={0: 8})[0]
    assert (quick.verdict, quick.p) == ("faster", 1 / 256)
    few = S.decide({0: (base, slow)}, launches={0: 4})[0]  # not even all of four are significant
    assert (few.verdict, few.p, few.mde) == ("inconclusive", 1 / 16, None)


def test_among_many_cells_only_a_larger_change_is_found() -> None:
    rng = np.random.default_rng(4)
    pair = rounds(rng, 32), rounds(rng, 32)
    alone, among = (S.decide(dict.fromkeys(range(n), pair))[0].mde for n in (1, 20))
    assert alone is not None
    assert among is not None
    assert among > 1.1 * alone


def test_screen_flags_what_is_worth_confirming() -> None:
    rng = np.random.default_rng(9)
    pairs = {"slow": (rounds(rng, 8), rounds(rng, 8, 0.1)), "fast": (rounds(rng, 8, 0.1), rounds(rng, 8))}
    assert S.screen(pairs | {"none": (rounds(rng, 8), rounds(rng, 8))}) == ["slow", "fast"]


def test_help_needs_no_numpy() -> None:
    code = "import sys, rooftune.bench as b; b.parser(); print(sorted({'numpy', 'rich', 'torch'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
