"""The end of a tuning: who is chosen, and what the deciding rounds alone may claim."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_lab import BEST, DEFAULT, IMPL, PROBLEM, FakeLab, cost

from rooftune import race
from rooftune.autotune import final
from rooftune.core import Config, Problem, Status
from rooftune.lab import Reply
from rooftune.registry import Impl

NEAR: Config = BEST | {"unroll": 4}
OPTIONS = race.Options(rounds=final.ROUNDS, seed=1)


def decide(fake: FakeLab, *configs: Config) -> final.Final:
    return final.decide(fake.lab, IMPL, PROBLEM, DEFAULT, configs, OPTIONS, lambda kind, text: None)


class CarefulLab(FakeLab):
    """The thorough check finds another error than the quick one."""

    def prepare(self, impl: Impl, problem: Problem, config: Config, seed: int, thorough: bool = True) -> Reply:
        reply = super().prepare(impl, problem, config, seed, thorough)
        if reply.ok:
            reply.data["error"] = {"rel_fro": 3e-6 if thorough else 1e-9}
        return reply


def test_the_fastest_is_chosen_and_its_error_is_that_of_the_thorough_check() -> None:
    fake = CarefulLab(noise=0.002)
    found = decide(fake, NEAR, BEST)
    assert found.winner is not None
    assert (found.winner.config, found.better) == (BEST, True)
    assert found.speedup == pytest.approx(cost(DEFAULT) / cost(BEST), rel=0.01)
    assert found.winner.error == found.default.error == {"rel_fro": 3e-6}
    assert fake.thorough == [DEFAULT, NEAR, BEST]  # once, before the choosing rounds
    assert fake.prepared[3:] == [DEFAULT, BEST]  # in fresh processes
    assert fake.retired == 4
    assert not fake.live


def test_the_interval_decides_not_the_estimate() -> None:
    fake = FakeLab(lambda config: 0.99e-3 if config == BEST else 1e-3, noise=0.06)
    found = decide(fake, BEST)
    assert found.speedup is not None
    assert found.speedup_ci is not None
    assert found.speedup > final.MARGIN > found.speedup_ci[0] > 1
    assert not found.better
    assert found.reason.endswith("not above 1.005")


@pytest.mark.parametrize(("who", "config"), [("default", DEFAULT), ("chosen", BEST)])
def test_a_failure_in_the_deciding_rounds_is_no_comparison(who: str, config: Config) -> None:
    def fate(verb: str, given: Config) -> Reply | None:
        return Reply(Status.WRONG, "row 3") if verb == "prepare" and given == config else None

    found = decide(FakeLab(fate=fate), BEST)
    assert (found.better, found.speedup) == (False, None)
    assert found.reason == f"the {who} config failed in the deciding rounds: wrong row 3"


def test_a_default_that_does_not_run_leaves_a_winner_without_a_comparison() -> None:
    def fate(verb: str, given: Config) -> Reply | None:
        return Reply(Status.WRONG, "row 3") if given == DEFAULT else None

    found = decide(FakeLab(fate=fate), BEST)
    assert found.winner is not None
    assert (found.better, found.speedup) == (False, None)
    assert "the default config does not run (wrong row 3)" in found.reason
    assert decide(FakeLab()).reason == "no other config ran"


def entrant(joules: float | None, u95: float | None = 0.1, seconds: float = 1.0, **more: Any) -> race.Entrant:
    energy = {"joules": joules, "u95_rel": u95, **more}
    return race.Entrant(IMPL, {}, False, energy=energy, rounds=[[seconds]] * 6)


@pytest.mark.parametrize(
    ("base", "winner", "objective", "better", "text"),
    [
        (entrant(2.0), entrant(1.0), "energy", True, "joules: at least 1.636x fewer than the default's (2.000x"),
        (entrant(1.1), entrant(1.0), "energy", False, "at least 0.900x"),
        (entrant(2.0), entrant(1.0), "edp", False, "joules times seconds: at least 0.982x"),
        (entrant(2.0, 0.0), entrant(1.0, 0.0), "edp", True, "at least 1.200x"),
        (entrant(2.0), entrant(1.0, None), "energy", False, "no interval"),
        (
            entrant(None, reason="no sensor"),
            entrant(1.0),
            "energy",
            False,
            "the default's joules are not known: no sens",
        ),
    ],
)
def test_joules_are_fewer_at_the_far_ends_of_both_intervals(
    base: race.Entrant, winner: race.Entrant, objective: str, better: bool, text: str
) -> None:
    found, why = final._cheaper(base, winner, (0.6, 0.7), objective)
    assert found == better
    assert text in why


def test_what_is_minimised() -> None:
    one = entrant(3.0, seconds=2.0)
    assert [final._cost(one, objective) for objective in ("time", "energy", "edp")] == [2.0, 3.0, 6.0]
    assert final._cost(entrant(None), "energy") is None
