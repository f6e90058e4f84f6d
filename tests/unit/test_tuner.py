"""Tuning with a Lab whose truth is known: what is measured, kept, resumed, and when the default stays."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_lab import BEST, DEFAULT, HERE, IMPL, PROBLEM, FakeLab, config_lines, cost, run

from rooftune import registry
from rooftune.autotune import final, journal, search
from rooftune.autotune.limits import Budget, constraint
from rooftune.autotune.precisions import Point, front, tune_precisions
from rooftune.autotune.table import Table
from rooftune.autotune.trial import ROUNDS
from rooftune.autotune.tuner import tune
from rooftune.core import Config, Status, Unavailable, UsageError
from rooftune.lab import Lab, Reply


def test_finds_the_best_and_writes_an_entry_with_the_defaults_own_time(tmp_path: Path) -> None:
    fake = FakeLab()
    result = run(fake, tmp_path / "j.jsonl", "48")
    assert result.better
    assert result.config == BEST
    assert result.speedup == pytest.approx(cost(DEFAULT) / cost(BEST), rel=0.02)
    assert result.speedup_ci is not None
    assert result.speedup_ci[0] > final.MARGIN
    assert result.search_speedup is not None
    assert result.luck == pytest.approx(result.search_speedup / (result.speedup or 0) - 1)
    (entry,) = Table(tmp_path / "tuned.json").entries()
    assert entry.config == BEST
    assert entry.default == DEFAULT
    assert entry.default_time_s > entry.time_s
    assert set(map(journal.canonical, fake.thorough)) >= {journal.canonical(BEST), journal.canonical(DEFAULT)}
    assert fake.most_live <= 1 + final.FINALISTS  # handles are released: memory stays flat
    assert not fake.live


def test_ratios_are_right_although_the_machine_drifts_to_several_times_slower(tmp_path: Path) -> None:
    fake = FakeLab(noise=0.005)
    run(fake, tmp_path / "j.jsonl", "48")
    assert fake.drift > 1.5
    for trial in config_lines(tmp_path / "j.jsonl"):
        assert trial["ratio"] == pytest.approx(cost(trial["config"]) / cost(DEFAULT), rel=0.03)


def test_no_entry_where_nothing_beats_the_default(tmp_path: Path) -> None:
    fake = FakeLab(cost=lambda config: 1e-3, noise=0.05)
    result = run(fake, tmp_path / "j.jsonl", "15")
    assert not result.better
    assert result.config == DEFAULT
    assert "not above 1.005" in result.reason
    assert result.search_speedup is not None
    assert result.search_speedup > 1  # the luckiest of 15 looked better: the final knows
    assert Table(tmp_path / "tuned.json").entries() == []


def test_what_does_not_win_again_leaves_the_table(tmp_path: Path) -> None:
    """`tune` says "the default stays": then no older entry may make `best` use the config after all."""
    table, said = Table(tmp_path / "tuned.json"), []
    assert run(FakeLab(), tmp_path / "j.jsonl", "48").better
    (entry,) = table.entries()
    slower = FakeLab(cost=lambda config: 2e-3 if config not in (BEST, DEFAULT) else 1e-3)
    again = run(slower, tmp_path / "k.jsonl", "48", objective="time", event=lambda kind, text: said.append(text))
    assert (again.winner, again.better) == (BEST, False)
    assert table.entries() == []
    assert any("an older entry is withdrawn" in text for text in said)
    table.put(entry)
    other = FakeLab(cost=lambda config: 2e-3 if config == BEST else 1e-3)  # not the one that was compared
    assert run(other, tmp_path / "l.jsonl", "48").winner != BEST
    assert table.entries() == [entry]


def test_false_winners_are_rarer_than_the_interval_promises(tmp_path: Path) -> None:
    wrong = 0
    for seed in range(20):
        fake = FakeLab(cost=lambda config: 1e-3, noise=0.05)
        fake.rng.seed(seed)
        wrong += run(fake, tmp_path / f"{seed}.jsonl", "8", seed=seed).better
    assert wrong <= 2  # nominal 2.5 % a side and a margin on top; 3 of 20 would have p = 0.013


@pytest.mark.parametrize("verb", ["prepare", "time"])
@pytest.mark.parametrize("status", [Status.FAILED_CRASH, Status.WRONG, Status.TIMEOUT, Status.FAILED_LAUNCH])
def test_failures_are_outcomes_with_a_reason_and_the_others_go_on(tmp_path: Path, verb: str, status: Status) -> None:
    def fate(asked: str, config: Config) -> Reply | None:
        return Reply(status, "boom") if config["num_warps"] == 8 and asked == verb else None

    fake = FakeLab(fate=fate)
    result = run(fake, tmp_path / "j.jsonl", "48")
    assert result.failures == {str(status): 12}
    assert result.config == BEST
    assert fake.most_live <= 1 + final.FINALISTS
    bad = [t for t in config_lines(tmp_path / "j.jsonl") if t["config"]["num_warps"] == 8]
    assert len(bad) == 12
    assert all(t["reason"] == "boom" and t["time_s"] is None and t["ratio"] is None for t in bad)


def test_a_config_that_poisons_the_worker_is_blamed_and_not_the_default(tmp_path: Path) -> None:
    state = {"poisoned": False}

    def fate(verb: str, config: Config) -> Reply | None:
        if verb == "prepare":
            state["poisoned"] = config["block_m"] == 128
        if verb == "time" and state["poisoned"] and config == DEFAULT:
            return Reply(Status.FAILED_CRASH, "sticky error")
        return None

    result = run(FakeLab(fate=fate, noise=0.001), tmp_path / "j.jsonl", "48")
    bad = [t for t in config_lines(tmp_path / "j.jsonl") if t["status"] != Status.OK]
    assert all(t["config"]["block_m"] == 128 and "beside it" in t["reason"] for t in bad)
    assert len(bad) > 6  # those timed before the default in their first round may keep a time
    assert result.config == BEST


def test_slow_configs_are_cut_after_a_round_or_two_and_cannot_win(tmp_path: Path) -> None:
    fake = FakeLab(cost=lambda c: cost(c) * (4 if c["unroll"] == 4 else 1))
    result = run(fake, tmp_path / "j.jsonl", "48")
    trials = config_lines(tmp_path / "j.jsonl")
    slow = [t for t in trials if t["config"]["unroll"] == 4]
    assert slow
    assert all(t["cut"] and len(t["rounds"]) < ROUNDS for t in slow)
    assert any(len(t["rounds"]) >= ROUNDS for t in trials)
    assert result.config["unroll"] != 4


def test_a_disturbed_round_does_not_cut_the_best_config(tmp_path: Path) -> None:
    """A neighbour on the machine: the first round of the best config takes 2.5 times as long."""

    class Disturbed(FakeLab):
        disturbed = False

        def time(self, impl: Any, handle: int, seed: int, deadline_s: float = 60.0, **options: Any) -> Reply:
            reply = super().time(impl, handle, seed, deadline_s, **options)
            if reply.ok and self.live[handle] == BEST and not self.disturbed:
                self.disturbed = True
                reply.data["samples_s"] = [2.5 * s for s in reply.data["samples_s"]]
            return reply

    fake = Disturbed()
    result = run(fake, tmp_path / "j.jsonl", "48")
    assert fake.disturbed
    assert result.config == BEST


def test_contenders_get_more_rounds_than_the_rest(tmp_path: Path) -> None:
    run(FakeLab(noise=0.005), tmp_path / "j.jsonl", "48", search_name="exhaustive")
    trials = config_lines(tmp_path / "j.jsonl")
    behind = [t for t in trials[12:] if t["ratio"] > 1.3 * min(x["ratio"] for x in trials)]
    assert behind
    assert sum(t["cut"] for t in behind) > len(behind) / 2
    assert max(len(t["rounds"]) for t in trials) > ROUNDS
    late = trials[24:]  # most of the leaders are known
    assert sum(len(t["rounds"]) for t in late) < ROUNDS * len(late)  # cheaper than three for everyone


def test_a_default_that_does_not_run_leaves_times_but_no_entry(tmp_path: Path) -> None:
    fake = FakeLab(fate=lambda verb, c: Reply(Status.FAILED_LAUNCH, "shared memory") if c == DEFAULT else None)
    result = run(fake, tmp_path / "j.jsonl", "48")
    assert not result.better
    assert result.winner == BEST
    assert result.speedup is None
    assert "does not run" in result.reason
    assert "shared memory" in result.reason
    assert all(t["ratio"] is None for t in config_lines(tmp_path / "j.jsonl"))


def test_a_default_that_stops_running_ends_the_tuning_with_the_journal_kept(tmp_path: Path) -> None:
    seen = {"n": 0}

    def fate(verb: str, config: Config) -> Reply | None:
        seen["n"] += 1
        return Reply(Status.FAILED_CRASH, "device lost") if seen["n"] > 40 else None

    with pytest.raises(Unavailable, match="device lost"):
        run(FakeLab(fate=fate), tmp_path / "j.jsonl", "48")
    assert config_lines(tmp_path / "j.jsonl")


def test_a_finalist_that_fails_the_thorough_check_does_not_win(tmp_path: Path) -> None:
    fate = lambda verb, c: Reply(Status.WRONG, "ragged") if verb == "thorough" and c == BEST else None  # noqa: E731
    result = run(FakeLab(fate=fate), tmp_path / "j.jsonl", "48")
    assert result.winner != BEST
    assert result.better


def test_max_error_excludes_configs(tmp_path: Path) -> None:
    result = run(FakeLab(), tmp_path / "j.jsonl", "10", max_error=1e-9)
    assert result.failures == {"skipped": 9}
    assert not result.better


def test_constraints_limit_the_space(tmp_path: Path) -> None:
    result = run(FakeLab(), tmp_path / "j.jsonl", "99", where=["block_m<=32", "num_warps!=8"])
    assert result.measured == 2 * 3 * 3
    assert result.config == {"block_m": 32, "num_warps": 4, "unroll": 2}


@pytest.mark.parametrize("name", [n for n in search.names() if n != "tpe"])
def test_every_search_can_tune_and_never_repeats_a_config(tmp_path: Path, name: str) -> None:
    result = run(FakeLab(), tmp_path / "j.jsonl", "99", search_name=name)
    assert result.config == BEST
    assert result.measured == result.valid == 48


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds", "configs"),
    [("60s", 60, None), ("2m", 120, None), ("1.5h", 5400, None), ("40", None, 40), ("40 configs", None, 40)],
)
def test_budgets(text: str, seconds: float | None, configs: int | None) -> None:
    assert Budget.parse(text) == Budget(seconds, configs)


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "soon", "1e9", "5 days"])
def test_bad_budgets_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        Budget.parse(text)


def test_a_time_budget_ends_the_search(tmp_path: Path) -> None:
    result = run(FakeLab(sleep_s=0.02), tmp_path / "j.jsonl", "0.2s")
    assert 2 <= result.measured < 30


def test_constraints_are_read_and_refused() -> None:
    assert constraint("block_m<=64")({"block_m": 64})
    assert not constraint("block_m < 64")({"block_m": 64})
    assert constraint("call=sdpa")({"call": "sdpa"})
    assert constraint("swizzle=true")({"swizzle": True})
    assert constraint("other>3")({"block_m": 1})
    assert constraint("split!=4")({"split": None})  # None is not 4
    assert not constraint("split<4")({"split": None})
    assert constraint("mode=4")({"mode": "4"})
    for bad in ("block_m", "block_m<=big", "<=3", "__import__('os')"):
        with pytest.raises(UsageError):
            constraint(bad)


@pytest.mark.parametrize("options", [{"search_name": "magic"}, {"objective": "beauty"}])
def test_unknown_names_are_refused_before_anything_is_measured(tmp_path: Path, options: dict[str, str]) -> None:
    fake = FakeLab()
    with pytest.raises(UsageError, match="known:"):
        run(fake, tmp_path / "j.jsonl", **options)  # type: ignore[arg-type]
    assert not fake.prepared


# --- precisions and the real thing ----------------------------------------------------------------------------------


def test_pareto_front() -> None:
    def point(time_s: float | None, error: float | None, reason: str = "") -> Point:
        return Point("fp32", "x/y", time_s, error, None, None, reason=reason, error=error)

    points = front([point(3, 1e-7), point(1, 1e-3), point(2, 1e-2), point(None, None, "no"), point(0.5, 9.0, "over")])
    assert [(p.time_s, p.front) for p in points] == [(0.5, False), (1, True), (2, False), (3, True), (None, False)]


def test_precisions_are_tuned_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = tune_precisions(
        FakeLab().lab, [IMPL], PROBLEM, ["fp32", "bf16", "tf32"], budget="6", identity=HERE, table=Table(tmp_path / "t")
    )
    assert {p.precision for p in points if p.time_s} == {"fp32", "bf16"}
    assert next(p for p in points if p.precision == "tf32").reason == "does not do tf32"
    assert any(p.front for p in points)
    json.dumps([p.as_json() for p in points])


TUNABLE = '''"""A user's kernel with a knob: how many chunks of rows it works in; one value is wrong, one crashes."""
import os, signal, time
import torch
from rooftune.core import Space
OP = "softmax"
DEVICES = ("cpu",)
PRECISIONS = ("fp32",)
REQUIRES = ("torch",)
SPACE = Space(axes={"naps": (0, 4), "mode": ("right", "wrong", "crash")}, default={"naps": 4, "mode": "right"},
              where=(lambda c, p: c["mode"] == "right" or c["naps"] == 0,))
def build(problem, config):
    def run(out, x):
        time.sleep(2e-3 * config["naps"])
        if config["mode"] == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        torch.softmax(x, -1, out=out)
        if config["mode"] == "wrong":
            out.mul_(1.01)
    return run
'''


@pytest.mark.slow
def test_a_users_file_is_tuned_for_real(tmp_path: Path, lab: Lab) -> None:
    path = tmp_path / "mine.py"
    path.write_text(TUNABLE)
    problem = registry.problem("softmax[m=16,n=64,fp32]")
    table = Table(tmp_path / "tuned.json")
    result = tune(lab, registry.user_impl(path), problem, "9", search_name="local", table=table)
    assert (result.measured, result.failures) == (4, {"wrong": 1, "failed(crash)": 1})
    assert result.better, result.reason
    assert result.config == {"naps": 0, "mode": "right"}
    assert result.speedup is not None
    assert result.speedup > 3
    assert len(table.entries()) == 1


@pytest.mark.parametrize(("fails", "words"), [(0, 'no config ran; {"a": 1}: '), (1, 'no other config ran; {"a": 2}: ')])
def test_where_nothing_else_ran_the_verdict_says_why(
    kernel: Callable[[str], Path], tmp_path: Path, lab: Lab, fails: int, words: str
) -> None:
    path = kernel(f"if config['a'] > {fails}: raise ValueError('no such tile')\ntorch.softmax(x, -1, out=out)")
    path.write_text(path.read_text().replace("Space()", "Space(axes={'a': (1, 2)}, default={'a': 1})"))
    problem = registry.problem("softmax[m=16,n=64,fp32]")
    result = tune(lab, registry.user_impl(path), problem, "2", table=Table(tmp_path / "tuned.json"))
    assert result.reason.startswith(f"{words}failed(launch) ValueError: no such tile"), result.reason
