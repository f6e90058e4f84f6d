"""The verb `tune` on several shapes, with a Lab whose truth is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_lab import BEST, DEFAULT, FakeLab

from rooftune import bench
from rooftune.autotune.table import Table
from rooftune.commands import tune
from rooftune.core import ExitCode
from rooftune.results import store

SHAPES = [f"softmax[m=64,n={n}]" for n in (128, 256, 512, 1024)]


class Sitting:
    """The part of a Session that the verb uses."""

    fakes: list[FakeLab] = []

    def __init__(self, name: str, device_name: str, threads: int | None, quiet: bool) -> None:
        self.fake = FakeLab()
        self.fakes.append(self.fake)
        self.lab, self.threads, self.run = self.fake.lab, 1, "r"
        self.about = {"identity": {"kind": "cpu", "name": "test"}}
        self.device = SimpleNamespace(kind="cpu")
        self.log = store.Log(store.new_run_path(name))

    def __enter__(self) -> Sitting:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def clear(self) -> None:
        pass

    def check_user_files(self, impls: Any, problem_of: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _sitting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "Session", Sitting)
    monkeypatch.setenv("COLUMNS", "400")
    Sitting.fakes.clear()


def ran(*arguments: str) -> int:
    return bench.main(["tune", *arguments, "--only", "numba", "--precision", "fp32", "--device", "cpu"])


def test_winners_are_tried_at_their_neighbours_and_the_rule_says_what_it_costs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ran(*SHAPES, "--budget", "48", "--search", "random") == ExitCode.OK
    out = capsys.readouterr().out
    assert out.count("kept: entered in the tuned table") == 4
    assert "compile-ahead: none; on a CPU a compiler beside a timing would disturb it" in out
    assert "softmax/numba fp32, 4 shapes" in out
    assert "judged on 4 held-out shapes: expected regret" in out
    assert "falls back to the default on 0%; used for shapes in between" in out
    assert [e.config for e in Table().entries()] == [BEST] * 4
    again = ran(*SHAPES, "--budget", "48", "--search", "random")  # all of it is in the journals
    assert again == ExitCode.OK
    assert Sitting.fakes[1].prepared == []


def test_later_shapes_start_from_the_winners_of_earlier_ones() -> None:
    assert ran(SHAPES[0], "--budget", "48") == ExitCode.OK
    assert ran(SHAPES[1], "--budget", "3") == ExitCode.OK
    first = [c for i, c in enumerate(Sitting.fakes[1].prepared) if c not in Sitting.fakes[1].prepared[:i]]
    assert first[:2] == [DEFAULT, BEST]


def test_one_budget_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert ran(*SHAPES[:2], "--budget", "40", "--weight", f"{SHAPES[1]}=100", "--json", str(out)) == ExitCode.OK
    results = {r["problem"]: r for r in map(json.loads, out.read_text().splitlines())}
    counts = [results[text.replace("]", ",fp32]")]["measured"] for text in SHAPES[:2]]
    assert 40 <= sum(counts) <= 46
    assert counts[1] > counts[0]


def test_a_weight_of_no_problem_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(*SHAPES[:2], "--budget", "4", "--weight", "softmax[m=64,n=127]=2") == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "softmax[m=64,n=127,fp32]: is none of the problems to tune: softmax[m=64,n=128,fp32]" in said
    assert Sitting.fakes == []


@pytest.mark.parametrize("precisions", [[], ["--max-error", "1e-2"]])
def test_it_times_as_it_is_told_to(precisions: list[str]) -> None:
    how = ["--cache", "cold", "--clock", "cpu", "--threads", "1", "--samples", "3", "--min-sample-ms", "0.5"]
    assert ran(SHAPES[0], "--budget", "3", "--rounds", "14", *how, *precisions) == ExitCode.OK
    timings = Sitting.fakes[0].timings
    told = {"cache": "cold", "clock": "cpu", "samples": 3, "min_sample_s": 0.5e-3}
    assert [{name: t[name] for name in told} for t in timings] == [told] * len(timings)
    assert len(timings) >= 2 * 2 * 14  # two stages of the final, with two configs at least


def test_winners_with_a_cold_cache_do_not_enter_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(*SHAPES, "--budget", "48", "--search", "random", "--cache", "cold") == ExitCode.OK
    out = capsys.readouterr().out
    assert out.count("better, but not entered in the tuned table: that is for time with a hot cache") == 4
    assert "held-out" not in out
    assert Table().entries() == []


def test_effort_sets_search_and_budget() -> None:
    assert ran(SHAPES[0], "--effort", "exhaustive") == ExitCode.OK
    assert len({json.dumps(c) for c in Sitting.fakes[0].prepared}) == 48
    chosen = bench.parser().parse_args(["tune", "--effort", "quick"])
    plan = tune.Plan.of(chosen)
    assert (plan.search, plan.budget.seconds, plan.budget.configs) == ("surrogate", 30.0, 40)
    assert tune.Plan.of(bench.parser().parse_args(["tune", "--effort", "full", "--budget", "7"])).budget.configs == 7


@pytest.mark.parametrize(
    ("failed", "loaded", "code"),
    [
        ((2, 2), ("softmax/mine",), ExitCode.REGRESSION),
        ((1, 1), ("softmax/mine",), ExitCode.OK),
        ((0, 2), (), ExitCode.OK),  # a competitor of ours that cannot run here is no fault of the user's
        ((2, 2), (), ExitCode.NOTHING_RAN),
    ],
)
def test_the_exit_code_says_where_no_config_ran(failed: tuple[int, int], loaded: tuple[str], code: int) -> None:
    names = ("softmax/numba", "softmax/mine")
    results = [
        {"kind": "tuned", "impl": name, "measured": 2, "failed": count}
        for name, count in zip(names, failed, strict=True)
    ]
    assert tune._verdict([*results, {"kind": "point"}], loaded) == code
