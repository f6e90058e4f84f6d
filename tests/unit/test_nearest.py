"""A rule for shapes in between: fitted on some, judged on others, and used only where it held."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_lab import FakeLab
from test_dispatch import record, store

from rooftune import device, registry
from rooftune.autotune import dispatch, nearest
from rooftune.autotune.journal import canonical
from rooftune.autotune.limits import Budget
from rooftune.autotune.nearest import Rule, Shape, distance, fit, told
from rooftune.autotune.table import Table, rule_key
from rooftune.core import Problem

NUMBA, TORCH = registry.impl("softmax/numba"), registry.impl("softmax/torch")
DEFAULT, WIDE, TALL = {"u": 1}, {"u": 2}, {"u": 4}
HERE = {"kind": "cpu", "name": "test"}


def problem(n: int, m: int = 64) -> Problem:
    return registry.problem(f"softmax[m={m},n={n}]")


def shape(n: int, config: Any, wide: float, tall: float = 1.5, **more: Any) -> Shape:
    ratios = {canonical(DEFAULT): 1.0, canonical(WIDE): wide, canonical(TALL): tall}
    return Shape(problem(n), DEFAULT, config, ratios, **more)


def test_distance_counts_factors_of_two_and_never_crosses_flags() -> None:
    assert distance(problem(64), problem(128)) == 1
    assert distance(problem(64, 64), problem(128, 32)) == pytest.approx(2**0.5)
    assert distance(problem(64), registry.problem("softmax[m=64,n=64,bf16]")) == float("inf")
    plain, causal = (registry.problem(f"attention[b=1,h=1,sq=64,d=64{flag}]") for flag in ("", ",causal"))
    assert distance(plain, causal) == float("inf")


def test_a_config_that_wins_everywhere_is_carried_to_shapes_in_between() -> None:
    rule = fit("softmax/numba", [shape(n, WIDE, 0.7) for n in (128, 256, 512, 1024, 2048)])
    assert rule is not None
    assert rule.sound
    assert (rule.fallback, rule.slower, rule.regret) == (0.0, 0.0, 0.0)
    assert rule.gain == pytest.approx(1 / 0.7)
    config, why = rule.choose(problem(300))
    assert config == WIDE
    assert "tuned at softmax[m=64,n=256,fp32]" in why
    assert rule.radius == 1  # the smallest of those that lose nothing
    assert rule.choose(problem(4096))[0] == WIDE  # as far as that
    assert rule.choose(problem(4100))[0] is None
    assert rule.choose(problem(100_000))[0] is None
    assert "expected regret 0.0% (worst 0.0%), falls back to the default on 0%; used" in told(rule)


def test_the_gain_is_the_smallest_and_the_regret_is_of_the_best_that_was_seen() -> None:
    rule = fit("softmax/numba", [shape(n, WIDE, 0.8 if n == 512 else 0.7, 0.75) for n in (128, 256, 512, 1024)])
    assert rule is not None
    assert rule.gain == pytest.approx(1 / 0.8)
    assert (rule.worst, rule.regret) == pytest.approx((0.8 / 0.75 - 1, (0.8 / 0.75 - 1) / 4))
    assert Shape(problem(64), DEFAULT, DEFAULT, {}).best == 1  # the default's own


def test_where_the_nearest_shape_stays_with_the_default_so_does_the_rule() -> None:
    rule = Rule("softmax/numba", 2.0, ((str(problem(128)), WIDE), (str(problem(512)), None)), 0, 0, 0, 0, 1.3)
    assert rule.choose(problem(150)) == (
        WIDE,
        f"tuned at {problem(128)}; on held-out shapes this rule gained at least 1.30x",
    )
    assert rule.choose(problem(500)) == (None, f"the default is not beaten at the nearest tuned shape, {problem(512)}")


def test_a_neighbour_that_stays_with_its_default_says_nothing_about_another_default() -> None:
    stays = [shape(n, DEFAULT, 0.9) for n in (128, 512)]
    held = Shape(problem(256), WIDE, WIDE, {})
    assert nearest._pick(held, stays, 4.0) == WIDE


def test_where_neighbours_disagree_the_default_stays() -> None:
    """Each shape has its own winner, which loses at the next: no radius is safe."""
    shapes = [shape(2 ** (7 + i), (WIDE, TALL)[i % 2], (0.7, 1.6)[i % 2], (1.6, 0.7)[i % 2]) for i in range(6)]
    rule = fit("softmax/numba", shapes)
    assert rule is not None
    assert rule.choose(problem(181))[0] is None
    assert rule.regret > 0.2  # what the default leaves on the table
    assert rule.fallback >= 0.5
    assert "used for shapes in between" not in told(rule)


def test_it_is_judged_on_shapes_it_was_not_fitted_on() -> None:
    """The fitted radius covers the odd one at the end when it is held out: the claim fails there, and is not used."""
    shapes = [shape(n, WIDE, 0.7) for n in (128, 256, 512)] + [shape(1024, DEFAULT, 1.4)]
    rule = fit("softmax/numba", shapes)
    assert rule is not None
    assert rule.slower == 0.25
    assert not rule.sound
    assert "slower than the default on 25% of the held-out shapes" in told(rule) or "no radius" in told(rule)


def test_what_was_not_measured_is_not_claimed_and_what_fails_is_the_default() -> None:
    shapes = [shape(n, WIDE, 0.7) for n in (128, 256, 512)]
    unknown = Shape(problem(1024), DEFAULT, TALL, {canonical(DEFAULT): 1.0, canonical(TALL): 0.8})
    rule = fit("softmax/numba", [*shapes, unknown])
    assert rule is not None
    assert rule.slower > 0
    assert rule.radius == 0
    failed = Shape(problem(1024), DEFAULT, DEFAULT, {canonical(DEFAULT): 1.0}, frozenset({canonical(WIDE)}))
    rule = fit("softmax/numba", [*shapes, failed])
    assert rule is not None
    assert rule.slower == 0
    assert fit("softmax/numba", shapes) is None


def test_rules_are_kept_beside_the_table_and_expire_with_their_key(tmp_path: Path) -> None:
    table = Table(tmp_path / "tuned.json")
    rule = fit("softmax/numba", [shape(n, WIDE, 0.7) for n in (128, 256, 512, 1024)])
    assert rule is not None
    assert table.neighbour(NUMBA, problem(300), HERE, 1).why == "no rule for shapes in between"
    table.rules.put(rule, rule_key(NUMBA, HERE, 1))
    assert table.neighbour(NUMBA, problem(300), HERE, 1).config == WIDE
    assert table.neighbour(NUMBA, problem(300), HERE, 1).gain == pytest.approx(1 / 0.7)
    assert table.neighbour(NUMBA, problem(300), HERE, 2).config is None
    assert rule_key(NUMBA, HERE, 1)["source_hash"] == NUMBA.source_hash
    assert table.neighbour(NUMBA, problem(300), {**HERE, "name": "other"}, 1).config is None
    assert table.neighbour(NUMBA, registry.problem("softmax[m=64,n=256,bf16]"), HERE, 1).config is None
    worse = Rule(**{**vars(rule), "slower": 0.5})
    table.rules.put(worse, rule_key(NUMBA, HERE, 1))
    assert "slower than the default on held-out shapes" in table.neighbour(NUMBA, problem(300), HERE, 1).why


@pytest.mark.parametrize(("low", "used"), [(0.75, "softmax/numba"), (0.6, "softmax/torch")])
def test_best_uses_a_neighbours_config_if_that_beats_torch_for_sure(
    monkeypatch: pytest.MonkeyPatch, low: float, used: str
) -> None:
    identity = device.find("cpu").identity()
    monkeypatch.setattr(device.Device, "identity", lambda self: dict(identity))
    asked = registry.problem("softmax[m=8,n=64,fp32]")
    default = NUMBA.load().SPACE.default_for(asked)
    store(record(TORCH, {"call": "softmax_out"}, None), record(NUMBA, default, 0.9, low))
    other = {**default, "unroll": 1}  # any valid config that is not the default
    points = tuple((str(problem(n, 8)), other) for n in (32, 128, 256, 512))
    rule = Rule("softmax/numba", 1.0, points, 0.0, 0.0, 0.0, 0.0, 1.5)
    Table().rules.put(rule, rule_key(NUMBA, identity, 1))
    choice = dispatch.choose(asked)
    assert choice.use.impl == used
    if used == "softmax/numba":
        assert choice.use.source == "nearest"
        assert choice.use.ratio == pytest.approx(0.9 * 1.5)
        assert "on held-out shapes this rule gained at least 1.50x" in choice.use.why


# --- many problems, one budget --------------------------------------------------------------------------------------


def test_the_budget_goes_where_something_is_to_be_gained(tmp_path: Path) -> None:
    from fake_lab import IMPL, cost

    from rooftune.autotune.job import Job
    from rooftune.autotune.share import share

    def job(name: str, fake: FakeLab) -> Job:
        return Job(fake.lab, IMPL, problem(len(name)), journal_path=tmp_path / f"{name}.jsonl", identity=HERE)

    flat = job("flat", FakeLab(cost=lambda config: 1e-3, noise=0.0))
    steep = job("steep", FakeLab(cost=lambda c: cost(c) ** 3, noise=0.0))
    accounts = share([flat, steep], Budget(configs=40))
    assert [a.job for a in accounts] == [flat, steep]
    tried = [len(j.journal.trials) for j in (flat, steep)]
    assert 40 <= sum(tried) <= 44  # the last slice is not cut short
    assert tried[1] > 2 * tried[0] >= 4
    again = job("steep", FakeLab())
    assert len(again.journal.trials) == tried[1]  # each job has its own journal, and goes on from it
    heavy = job("heavy", FakeLab(cost=lambda c: cost(c) ** 3, noise=0.0))
    light = job("lighter", FakeLab(cost=lambda c: cost(c) ** 3, noise=0.0))
    share([heavy, light], Budget(configs=40), {str(heavy.problem): 1e3})
    assert len(heavy.journal.trials) > len(light.journal.trials)


def test_a_shared_budget_ends_when_nothing_is_left(tmp_path: Path) -> None:
    from fake_lab import IMPL

    from rooftune.autotune.job import Job
    from rooftune.autotune.share import share

    only = Job(FakeLab().lab, IMPL, problem(7), journal_path=tmp_path / "j.jsonl", identity=HERE)
    (account,) = share([only], Budget())
    assert account.ended == "every config was tried"
    assert len(only.journal.trials) == 48


def test_shape_of_reads_a_journals_outcomes(tmp_path: Path) -> None:
    from fake_lab import BEST, IMPL, run
    from fake_lab import DEFAULT as PLAIN

    from rooftune.autotune.job import Job

    result = run(FakeLab(), tmp_path / "j.jsonl", "48")
    job = Job(FakeLab().lab, IMPL, registry.problem(result.problem), journal_path=tmp_path / "j.jsonl", identity=HERE)
    made = nearest.shape_of(job.problem, job.default, result.config, job.journal.trials)
    assert made.ratio(PLAIN) == 1.0
    assert made.ratio(BEST) == pytest.approx(0.5, rel=0.05)
    assert made.best == made.ratio(BEST)
    assert not made.stays
    assert made.ratio({"never": "seen"}) is None
