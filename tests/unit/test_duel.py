"""Two revisions: a screen that finds where to look, and fresh rounds that alone decide."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rooftune.core import ExitCode
from rooftune.results import duel, statistics
from rooftune.results.compare import SUITE, Verdict, gate
from rooftune.results.duel import Rule
from rooftune.results.record import Record

RULE = Rule()


def records(session: str, rounds: int, cells: dict[str, tuple[float, float]], seed: int = 0) -> list[Record]:
    """Of one side: name -> (log of the time in ms, deviation from round to round)."""
    found = []
    for name, (mean, spread) in cells.items():
        rng = np.random.default_rng([seed, rounds, *name.encode()])
        times = mean + rng.normal(0, spread, (rounds, 1)) + rng.normal(0, 0.001, (rounds, 5))
        samples = (1e-3 * np.exp(times)).tolist()
        found.append(_record(name, session, rounds=samples, time_s=statistics.summary(samples)[0]))
    return found


def _record(name: str, session: str, **changes: Any) -> Record:
    plain: dict[str, Any] = {"op": "softmax", "shape": "m=8,n=500", "precision": "fp32", "config": {}, "default": True}
    plain |= {"problem": "softmax[m=8,n=500,fp32]", "impl": f"softmax/{name}", "status": "ok", "run": ""}
    return Record(**(plain | {"regime": {"session": session}} | changes))


def sides(session: str, rounds: int, cells: dict[str, tuple[float, float, float]]) -> duel.Sides:
    """name -> (log of candidate over base, deviations of base and of candidate)."""
    base = records(session, rounds, {name: (0.0, one) for name, (_, one, _) in cells.items()}, seed=1)
    return base, records(session, rounds, {name: (mean, two) for name, (mean, _, two) in cells.items()}, seed=2)


def judged(truth: dict[str, tuple[float, float, float]], screen: dict[str, float] | None = None) -> dict[str, Verdict]:
    """Verdicts by name; `screen` replaces the change that the screen sees."""
    first = {name: ((screen or {}).get(name, mean), one, two) for name, (mean, one, two) in truth.items()}
    screened = sides("screen", RULE.screen, first)
    keys = {name.rpartition("/")[2] for _, name in duel.to_confirm(*screened, RULE)}
    decided = sides("decide", RULE.confirm, {name: cell for name, cell in truth.items() if name in keys})
    cells = duel.verdicts(screened, decided, RULE)
    return {c.impl.rpartition("/")[2] if c.problem != SUITE else SUITE: c.verdict for c in cells}


@pytest.mark.parametrize(
    ("mean", "spread", "verdict", "code"),
    [
        (0.0, 0.002, Verdict.SAME, ExitCode.OK),
        (0.03, 0.004, Verdict.SLOWER, ExitCode.REGRESSION),
        (-0.03, 0.004, Verdict.FASTER, ExitCode.OK),
        (0.0, 0.05, Verdict.UNSEEN, ExitCode.OK),
        (0.0, 0.6, Verdict.INCONCLUSIVE, ExitCode.INCONCLUSIVE),
    ],
)
def test_what_fresh_rounds_say(mean: float, spread: float, verdict: Verdict, code: ExitCode) -> None:
    cell = {"one": (mean, spread, spread)}
    cells = duel.verdicts(sides("screen", 8, cell), sides("decide", 32, cell), RULE)
    assert [c.verdict for c in cells] == [verdict]
    assert gate(cells) == code
    assert cells[0].rounds == 32


def test_quiet_cells_cost_no_more_rounds() -> None:
    quiet = dict.fromkeys("abcdef", (0.0, 0.002, 0.002))
    slow, loud = {"slow": (0.03, 0.002, 0.002)}, {"loud": (0.0, 0.2, 0.2)}
    found = duel.to_confirm(*sides("screen", 8, quiet | slow | loud), RULE)
    assert [name for _, name in found] == ["softmax/slow", "softmax/loud"]


def test_all_cells_are_confirmed_where_their_mean_changed() -> None:
    some = {"a": (0.0, 0.001, 0.001), "b": (0.03, 0.001, 0.001), "c": (0.03, 0.001, 0.001)}
    screened = sides("screen", 8, some)
    assert [name for _, name in duel.to_confirm(*screened, RULE)] == ["softmax/a", "softmax/b", "softmax/c"]
    fresh = sides("decide", 32, dict.fromkeys(some, (0.0, 0.001, 0.001)))
    assert [(c.problem == SUITE, c.verdict) for c in duel.verdicts(screened, fresh, RULE) if c.problem == SUITE] == [
        (True, Verdict.SAME)
    ]


def lucky(launches: int, cells: int, mean: float, rng: np.random.Generator) -> list[Verdict]:
    """One comparison where every process of either side has 1 % of luck, and rounds in it agree within 0.3 %."""

    def side(count: int, rounds: int, processes: int, mean: float) -> list[Record]:
        luck = [
            np.repeat(rng.normal(mean, 0.01, processes), statistics.shares(rounds, processes)) for _ in range(count)
        ]
        times = [1e-3 * np.exp(one + rng.normal(0, 0.003, rounds)) for one in luck]
        regime = {"session": f"s:{rounds}", "launches": processes}
        return [
            _record(f"k{i}", "", rounds=t[:, None].tolist(), time_s=1e-3, regime=regime) for i, t in enumerate(times)
        ]

    screened = side(cells, RULE.screen, 1, 0.0), side(cells, RULE.screen, 1, mean)
    keys = {name for _, name in duel.to_confirm(*screened, RULE)}
    fresh = side(cells, RULE.confirm, launches, 0.0), side(cells, RULE.confirm, launches, mean)
    decided = tuple([record for record in run if record.impl in keys] for run in fresh)
    return [c.verdict for c in duel.verdicts(screened, (decided[0], decided[1]), RULE)]


def test_a_process_that_is_unlucky_as_a_whole_is_no_change() -> None:
    """40 comparisons of 10 equal cells; with two processes a side, whose rounds all count, half of them are red."""
    rng, many = np.random.default_rng(3), duel.launches(10, RULE)
    red = sum(Verdict.SLOWER in lucky(many, 10, 0.0, rng) for _ in range(40))
    assert red <= 2
    found = [lucky(many, 10, 0.06, rng).count(Verdict.SLOWER) for _ in range(5)]
    assert min(found) >= 9


@pytest.mark.parametrize(("cells", "launches"), [(0, 8), (1, 8), (2, 9), (20, 12)])
def test_processes_suffice_for_the_chance_of_a_false_alarm(cells: int, launches: int) -> None:
    """All but one of them agreeing reach the smallest level that Holm asks of one of so many cells."""
    assert duel.launches(cells, RULE) == launches
    assert statistics.signed_rank_p([1.0] * (launches - 1)) <= RULE.alpha / max(cells, 1)


def test_a_competitor_is_confirmed_with_all_its_calls() -> None:
    quick, slow = sides("screen", 8, {"a": (0.0, 0.002, 0.002)}), sides("screen", 8, {"a": (0.05, 0.002, 0.002)})
    for calls, name in ((quick, "one"), (slow, "two")):
        for record in (*calls[0], *calls[1]):
            record.config = {"call": name}
    both = [*quick[0], *slow[0]], [*quick[1], *slow[1]]
    assert duel.to_confirm(*both, RULE) == [("softmax[m=8,n=500,fp32]", "softmax/a")]
    cells = duel.verdicts(both, ([], []), RULE)
    assert {c.impl for c in cells if c.problem != SUITE} == {"softmax/a:one", "softmax/a:two"}


def test_what_the_screen_saw_by_luck_is_no_verdict() -> None:
    truth = {"lucky": (0.0, 0.003, 0.003), "other": (0.0, 0.003, 0.003)}
    assert judged(truth, screen={"lucky": 0.05})["lucky"] == Verdict.SAME
    assert judged({"lucky": (0.05, 0.003, 0.003), "other": (0.0, 0.003, 0.003)})["lucky"] == Verdict.SLOWER


def test_a_small_change_everywhere_shows_in_the_mean_of_the_screen() -> None:
    many = {f"k{i}": (0.012, 0.004, 0.004) for i in range(12)}
    assert judged(many)[SUITE] == Verdict.SLOWER
    assert SUITE not in judged({f"k{i}": (0.0, 0.9, 0.9) for i in range(3)})  # it shows nothing there


def test_a_kernel_that_breaks_is_broken_and_one_that_is_gone_is_said() -> None:
    base, candidate = sides("screen", 8, {"a": (0.0, 0.002, 0.002), "b": (0.0, 0.002, 0.002)})
    candidate[1] = _record("b", "screen", status="wrong", reason="row 3", rounds=None, time_s=None)
    base.append(_record("c", "screen", status="skipped", reason="runs on cuda, not on cpu"))
    candidate.append(_record("c", "screen", status="skipped", reason="runs on cuda, not on cpu"))
    assert [name for _, name in duel.to_confirm(base, candidate, RULE)] == []
    cells = duel.verdicts((base, candidate), ([], []), RULE)
    assert {c.impl: c.verdict for c in cells} == {
        "softmax/a": Verdict.SAME,
        "softmax/b": Verdict.BROKEN,
        "softmax/c": Verdict.UNMEASURED,
    }
    assert gate(cells) == ExitCode.REGRESSION
    lines = duel.explain(cells, RULE, 0)
    assert any("unmeasured: 1 (skipped: runs on cuda, not on cpu)" in line for line in lines)
    assert any("bench.py static --baseline" in line for line in lines)


def test_false_alarms_of_many_unchanged_cells() -> None:
    """60 comparisons of 20 equal cells: by the rule at most one in a hundred has an alarm."""
    alarms = 0
    for seed in range(60):
        cells = {f"k{i}x{seed}": (0.0, 0.02, 0.02) for i in range(20)}
        alarms += any(v in (Verdict.SLOWER, Verdict.FASTER) for v in judged(cells).values())
    assert alarms <= 3


def test_a_cell_is_hopeless_only_if_no_launch_to_come_could_make_a_verdict() -> None:
    rng, launches, alpha = np.random.default_rng(5), 12, RULE.alpha / 16
    ended = []
    for mean in [0.0] * 40 + [0.02, 0.05] * 20:
        luck = mean + rng.normal(0, 0.01, launches)
        candidate = [[math.exp(luck[i]), math.exp(luck[i])] for i in range(launches)]
        base = [[1.0, 1.0]] * launches
        stops = [n for n in range(1, launches) if duel.hopeless(base[:n], candidate[:n], n, launches, alpha, RULE)]
        if mean == 0.0:
            ended.append(stops[0])
        if stops:
            first = stops[0]
            assert stops == list(range(first, launches))  # more launches give no hope back
            for toward in (luck, -luck):
                assert statistics.signed_rank_p(toward - math.log1p(RULE.margin)) > alpha
        else:
            assert mean > 0.0
    assert sum(ended) / len(ended) < 4  # of 12
    assert not duel.hopeless([[1.0]] * 11, [[1.05]] * 11, 11, 12, alpha, RULE)
    assert not duel.hopeless([[1.05]] * 11, [[1.0]] * 11, 11, 12, alpha, RULE)
