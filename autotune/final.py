"""The end of a tuning run: the best few and the default again, on fresh samples, and whether one is really better.

The best of many noisy measurements looks better than it is (the winner's luck), so nothing measured during
the search decides. First the finalists and the default run interleaved rounds; these only choose. Then the
chosen one meets the default alone, in fresh processes, and these rounds only decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rooftune import race
from rooftune.core import Config, Problem, Status
from rooftune.lab import Lab
from rooftune.registry import Impl
from rooftune.results import statistics

FINALISTS = 3
METERED = 6  # finalists where joules decide: the search ranked them by time, and each costs a minute
ROUNDS = 12  # of each of the two stages
LEAST = 10  # of them, so that a 95 % interval is not the whole range
MARGIN = 1.005  # a config must be faster by more than this, as `compare` counts changes (0.5 %)


@dataclass
class Final:
    """What the fresh rounds say.

    Attributes:
        winner: the chosen entrant, or None if no finalist passed the thorough check.
        speedup: default's time over the winner's, with its exact 95 % interval (None: not comparable).
        better: the interval lies above `MARGIN`.
        reason: why the winner is kept or not, in one line.
        entrants: all who took part, with what they did in the choosing rounds.
    """

    default: race.Entrant
    winner: race.Entrant | None
    speedup: float | None
    speedup_ci: tuple[float, float] | None
    better: bool
    reason: str
    entrants: list[race.Entrant]


def decide(
    lab: Lab,
    impl: Impl,
    problem: Problem,
    default: Config,
    configs: Sequence[Config],
    options: race.Options,
    event: race.Event,
    objective: str = "time",
    energy: bool = False,
) -> Final:
    """Choose among the configs, then compare the chosen one with the default.

    Args:
        configs: at most a few, best first, without the default.
        options: how to time; `rounds` of each stage.
        objective: `time`, or `energy` and `edp`, for which everyone's joules are measured after the first stage;
            `energy` measures them in any case.
    """
    base = race.Entrant(impl, default, True)
    field = [base, *(race.Entrant(impl, config, False) for config in configs)]
    if configs:
        _stage(lab, problem, field, options, event, thorough=True, energy=energy or objective != "time")
    runs = [e for e in field[1:] if e.status == Status.OK and any(e.rounds) and _cost(e, objective) is not None]
    winner = min(runs, key=lambda e: _cost(e, objective) or 0.0, default=None)
    if winner is None:
        why = "no other config ran" if not configs else f"every finalist failed: {field[1].status} {field[1].reason}"
        return Final(base, None, None, None, False, why, field)
    if base.status != Status.OK:
        why = f"the default config does not run ({base.status} {base.reason}), so there is no comparison"
        return Final(base, winner, None, None, False, why, field)
    pair = [race.Entrant(impl, default, True), race.Entrant(impl, winner.config, False)]
    fresh = replace(options, seed=options.seed + 1)
    _stage(lab, problem, pair, fresh, event, thorough=False)
    for entrant in pair:
        if entrant.status != Status.OK:
            who = "default" if entrant.default else "chosen"
            why = f"the {who} config failed in the deciding rounds: {entrant.status} {entrant.reason}"
            return Final(base, winner, None, None, False, why, field)
    pair[1].error, pair[0].error = winner.error, base.error  # those of the thorough check
    pair[1].energy, pair[0].energy = winner.energy, base.energy
    value, low, high = statistics.ratio(pair[0].rounds, pair[1].rounds)
    if low is None or high is None:
        return Final(pair[0], pair[1], value, None, False, "too few rounds for an interval", field)
    if objective != "time":
        better, why = _cheaper(pair[0], pair[1], (low, high), objective)
        return Final(pair[0], pair[1], value, (low, high), better, why, field)
    better = low > MARGIN
    shown = f"{value:.3f}x the default's speed, 95 % interval {low:.3f} to {high:.3f}"
    why = f"{shown}, above {MARGIN}" if better else f"{shown}, not above {MARGIN}"
    return Final(pair[0], pair[1], value, (low, high), better, why, field)


def _cost(entrant: race.Entrant, objective: str) -> float | None:
    """What is minimised: seconds, joules, or their product; None if its joules were not measured."""
    time_s = statistics.summary(entrant.rounds)[0]
    if objective == "time":
        return time_s
    joules = (entrant.energy or {}).get("joules")
    return None if joules is None else float(joules) * (time_s if objective == "edp" else 1.0)


def _cheaper(
    base: race.Entrant, winner: race.Entrant, speedup: tuple[float, float], objective: str
) -> tuple[bool, str]:
    """Whether the joules (times seconds) are fewer with confidence: both windows' 95 % intervals at their far ends."""
    ours, theirs = winner.energy or {}, base.energy or {}
    if theirs.get("joules") is None or None in (ours.get("u95_rel"), theirs.get("u95_rel")):
        return False, f"the default's joules are not known: {theirs.get('reason') or 'no interval'}"
    ratio = theirs["joules"] / ours["joules"]
    away = (1 - theirs["u95_rel"]) / (1 + ours["u95_rel"])
    low = ratio * away * (speedup[0] if objective == "edp" else 1.0)
    what = "joules times seconds" if objective == "edp" else "joules"
    return low > MARGIN, f"{what}: at least {low:.3f}x fewer than the default's ({ratio:.3f}x fewer joules)"


def _stage(
    lab: Lab,
    problem: Problem,
    field: list[race.Entrant],
    options: race.Options,
    event: race.Event,
    thorough: bool,
    energy: bool = False,
) -> None:
    """Everyone in a fresh process, checked, then interleaved rounds in random order; the process ends with it."""
    impl = field[0].impl
    lab.retire(impl)
    race.prepare(lab, problem, field, replace(options, thorough=thorough), set(), event)
    started = [e for e in field if e.status == Status.OK]
    if started:
        race.time_rounds(lab, problem, started, options, options.rounds, event)
        if energy:
            race.measure_energy(lab, [e for e in started if e.status == Status.OK], options, event)
    lab.retire(impl)
    for entrant in field:
        entrant.handle = None
