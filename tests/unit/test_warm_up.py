"""Competitors of several problems are built and checked beforehand, and nothing stays behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from fake_lab import IMPL, PROBLEM, FakeLab

from rooftune import race, registry
from rooftune.core import Config, Problem, Status
from rooftune.lab import Reply
from rooftune.registry import Impl

PROBLEMS = [PROBLEM, registry.problem("softmax[m=64,n=640,fp32]")]
OPTIONS = race.Options(rounds=6, seed=1)


class OneCall(FakeLab):
    """Its competitor starts with its default alone."""

    def space(self, impl: Impl, problem: Problem, mode: str = "native") -> dict[str, Any]:
        return super().space(impl, problem, mode) | {"entrants": None}


def test_every_problem_is_built_once_and_let_go() -> None:
    fake = OneCall()
    seen: set[Any] = set()
    race.warm_up(fake.lab, PROBLEMS, {"softmax": [IMPL]}, OPTIONS, seen, lambda kind, text: None)
    assert len(fake.prepared) == len(PROBLEMS)
    assert not fake.live
    assert not fake.calls  # nothing is timed


def test_the_race_does_not_repeat_the_thorough_check() -> None:
    fake = OneCall()
    seen: set[Any] = set()
    race.warm_up(fake.lab, PROBLEMS, {"softmax": [IMPL]}, OPTIONS, seen, lambda kind, text: None)
    checked = len(fake.thorough)
    assert checked == 1  # same config, same flags: the second problem needs none
    records = race.race(fake.lab, PROBLEM, [IMPL], OPTIONS, seen=seen)
    assert [r.status for r in records] == [Status.OK]
    assert len(fake.thorough) == checked


def test_a_failure_is_left_to_the_race_to_report() -> None:
    def fate(verb: str, config: Config) -> Reply | None:
        return Reply(Status.FAILED_CRASH, "crashed: SIGSEGV") if verb == "thorough" else None

    fake = OneCall(fate=fate)
    seen: set[Any] = set()
    race.warm_up(fake.lab, [PROBLEM], {"softmax": [IMPL]}, OPTIONS, seen, lambda kind, text: None)
    (record,) = race.race(fake.lab, PROBLEM, [IMPL], OPTIONS, seen=seen)
    assert record.status == Status.FAILED_CRASH
    assert record.time_s is None
