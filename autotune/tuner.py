"""Tuning: a search proposes configs, the Lab measures them, a journal keeps every outcome, fresh rounds decide.

The best config is kept in the tuned table only if it beats the default config with confidence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rooftune import device, race, sensors
from rooftune.autotune import final
from rooftune.autotune.formats import Tuning
from rooftune.autotune.job import Job
from rooftune.autotune.journal import Trial, canonical
from rooftune.autotune.limits import Budget
from rooftune.autotune.nearest import distance
from rooftune.autotune.past import Prior
from rooftune.autotune.table import Entry, Table
from rooftune.core import Config, Problem, Status, Unavailable, unknown
from rooftune.energy import Energy
from rooftune.lab import Lab
from rooftune.registry import Impl
from rooftune.results import statistics

Event = race.Event
OBJECTIVES = ("time", "energy", "edp")
DEFAULT_BUDGET = "60s"
STARTS = 3  # configs from other shapes


@dataclass
class TuneResult:
    """What tuning found.

    Attributes:
        config: what to use: the tuned config if it is `better`, else the default.
        winner: the config that was best in the final's choosing rounds, better than the default or not.
        time_s, default_time_s: the winner's and the default's medians in the deciding rounds, seconds per call.
        speedup: default's time over the winner's in the deciding rounds, `speedup_ci` its 95 % interval.
        search_speedup: what the search had measured for the winner; `luck` = search_speedup / speedup - 1.
        rel_fro: relative Frobenius error of `config` in the thorough check.
        joules: of `config` per call, where the objective needed them; None otherwise.
        cache: its state in what was timed.
        drawn: of what the `valid` configs are a sample; empty where they are all.
        measured, failed, resumed: configs with an outcome; those without a time; those from an earlier run.
    """

    impl: str
    problem: str
    default: Config
    config: Config
    winner: Config | None
    better: bool
    reason: str
    time_s: float | None
    default_time_s: float | None
    speedup: float | None
    speedup_ci: list[float] | None
    search_speedup: float | None
    luck: float | None
    rel_fro: float | None
    measured: int
    failed: int
    valid: int
    search: str
    seed: int
    journal: str
    resumed: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    objective: str = "time"
    joules: float | None = None
    cache: str = "hot"
    drawn: str = ""

    @property
    def enters(self) -> bool:
        """Whether it belongs in the tuned table, which promises time as `best` compares it: with a hot cache."""
        return self.better and self.objective == "time" and self.cache == "hot"

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def tune(
    lab: Lab,
    impl: Impl,
    problem: Problem,
    budget: Budget | str = DEFAULT_BUDGET,
    search_name: str = "surrogate",
    seed: int = 0,
    journal_path: Path | None = None,
    objective: str = "time",
    max_error: float | None = None,
    where: Sequence[str] = (),
    identity: dict[str, Any] | None = None,
    options: race.Options | None = None,
    table: Table | None = None,
    also: Sequence[Config] = (),
    energy: bool = False,
    prior: Prior | None = None,
    history: Sequence[Tuning] = (),
    event: Event = lambda kind, text: None,
) -> TuneResult:
    """Search the configs of one competitor on one problem; see `Job` for the arguments not named here.

    Args:
        budget: `60s`, `2m`, `40`; see `Budget`.
        objective: what the final decides by; `energy` (joules a call) and `edp` (joules times seconds) need a
            sensor. The search itself minimises time: a figure in joules takes a minute per config.
        energy: measure the joules of the best few in any case; the objective decides alone.
        table: where a winner goes, if it `enters`; the default table if not given.
    Raises:
        UsageError: unknown search or objective, no valid config.
        Unavailable: the competitor cannot run here, or stopped running; or no sensor for the objective.
    """
    spend = Budget.parse(budget) if isinstance(budget, str) else budget
    check_objective(objective, lab)
    job = Job(
        lab,
        impl,
        problem,
        search_name,
        seed,
        journal_path,
        max_error,
        where,
        identity,
        options,
        also,
        winners_nearby(table or Table(), impl, problem),
        prior,
        history,
        event,
    )
    if job.journal.final is None or spend.left(job.journal) or job.missing:
        job.advance(spend)
    return conclude(job, objective, table, spend, energy)


def winners_nearby(table: Table, impl: Impl, problem: Problem) -> list[Config]:
    """What won for this competitor at the nearest other shapes, on whatever device: the search tries these first.

    A few only: where they mislead, they cost as many configs, and no more.
    """
    others = [(distance(problem, Problem.parse(e.problem)), -e.unix_time, e) for e in table.entries()]
    mine = [x for x in others if x[2].impl == impl.key and math.isfinite(x[0])]
    unique = {canonical(e.config): e.config for _, _, e in sorted(mine, key=lambda x: x[:2])}
    return list(unique.values())[:STARTS]


def check_objective(objective: str, lab: Lab) -> None:
    """Refuse an objective that nobody knows, or that cannot be measured here.

    Raises:
        UsageError: unknown. Unavailable: no sensor; says why.
    """
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    if objective == "time":
        return
    index = lab.device.partition(":")[2]
    sensor = sensors.find_sensor(device.find(f"{lab.kind}:{index}" if index else lab.kind))
    if isinstance(sensor, Energy):
        raise Unavailable(f"--objective {objective} needs an energy sensor: {sensor.reason}")


def conclude(
    job: Job,
    objective: str = "time",
    table: Table | None = None,
    budget: Budget | None = None,
    energy: bool = False,
) -> TuneResult:
    """The final of a job's search, unless its journal holds one about the same outcomes; a winner enters the table.

    An older entry for the same config leaves it, if fresh rounds say that it does not beat the default: whoever tunes
    until something wins would otherwise fill the table by luck.
    """
    journal = job.journal
    if journal.final is not None and journal.final.get("objective", "time") == objective:
        if budget is None or not budget.left(journal):
            job.event(
                "journal", f"{journal.path}: this budget is spent and decided; a larger --budget goes on from here"
            )
        result = TuneResult(**{**journal.final, "journal": str(journal.path), "resumed": journal.resumed})
    else:
        result = _conclude(job, objective, energy)
        journal.finish(result.as_json())
        if not result.better and result.speedup_ci is not None and (objective, result.cache) == ("time", "hot"):
            _withdraw(table or Table(), job, result)
    if result.enters:
        (table or Table()).put(entry(result, job.problem, job.what))
    return result


def _withdraw(table: Table, job: Job, result: TuneResult) -> None:
    """Take out the entry that claims what a new final did not find again."""
    found = table.lookup(job.impl, job.problem, job.what["device"], job.what["threads"]).entry
    if found is not None and found.config == result.winner and found.default == result.default:
        table.drop(found)
        job.event("table", f"an older entry is withdrawn: {canonical(found.config)} did not beat the default again")


def _conclude(job: Job, objective: str, energy: bool) -> TuneResult:
    """The final among the best few that the search found."""
    journal, default = job.journal, job.default
    trials = journal.trials
    ran = sorted((t for t in trials.values() if t.value is not None and t.config != default), key=_value)
    # What was cut as slower may still be the most frugal; and where all were, fresh rounds have the last word.
    whole = [t for t in ran if not t.cut] if objective == "time" else ran
    best = [t.config for t in whole or ran[:1]][: final.FINALISTS if objective == "time" else final.METERED]
    timing = replace(job.timing, rounds=max(job.timing.rounds, final.LEAST))
    end = final.decide(job.lab, job.impl, job.problem, default, best, timing, job.event, objective, energy)
    failed: dict[str, int] = {}
    for trial in trials.values():
        if trial.status != Status.OK:
            failed[str(trial.status)] = failed.get(str(trial.status), 0) + 1
    winner = end.winner
    hoped = trials[canonical(winner.config)].ratio if winner else None
    claimed = 1 / hoped if hoped else None
    known = trials.get(canonical(default))
    reason = end.reason
    if not best and (first := next((t for t in trials.values() if t.status != Status.OK), None)):
        who = "no config ran" if known is first else reason  # the default is tried first; of many one says enough
        reason = f"{who}; {canonical(first.config)}: {first.status} {first.reason}"
    return TuneResult(
        impl=job.impl.key,
        problem=str(job.problem),
        default=default,
        config=winner.config if winner and end.better else default,
        winner=winner.config if winner else None,
        better=end.better,
        reason=reason,
        time_s=_median(winner),
        default_time_s=_median(end.default) or (known.time_s if known else None),
        speedup=end.speedup,
        speedup_ci=list(end.speedup_ci) if end.speedup_ci else None,
        search_speedup=claimed,
        luck=claimed / end.speedup - 1 if claimed and end.speedup else None,
        rel_fro=_error(winner if winner and end.better else end.default, known),
        measured=len(trials),
        failed=sum(failed.values()),
        valid=len(job.space),
        drawn=job.drawn,
        search=journal.what["search"],
        seed=journal.what["seed"],
        journal=str(journal.path),
        resumed=journal.resumed,
        failures=failed,
        objective=objective,
        cache=job.timing.cache,
        joules=_joules(winner if winner and end.better else end.default),
    )


def _value(trial: Trial) -> float:
    return math.inf if trial.value is None else trial.value


def _joules(entrant: race.Entrant | None) -> float | None:
    """Per call, where the final measured them."""
    found = ((entrant.energy if entrant else None) or {}).get("joules")
    return found if isinstance(found, float) else None


def _error(used: race.Entrant, default: Trial | None) -> float | None:
    """Of the thorough check; where the final did not run, of the search's check of the default."""
    found = (used.error or {}).get("rel_fro")
    return found if isinstance(found, float) or default is None else default.rel_fro


def _median(entrant: race.Entrant | None) -> float | None:
    if entrant is None or not any(entrant.rounds):
        return None
    return statistics.summary(entrant.rounds)[0]


def entry(result: TuneResult, problem: Problem, what: dict[str, Any]) -> Entry:
    """The table's line for a winner."""
    assert result.winner is not None
    assert result.speedup is not None
    assert result.speedup_ci is not None
    assert result.time_s is not None
    assert result.default_time_s is not None
    return Entry(
        op=problem.op,
        problem=str(problem),
        precision=problem.precision,
        impl=result.impl,
        source_hash=what["source_hash"],
        toolchain=what["toolchain"],
        device=what["device"],
        threads=what["threads"],
        config=result.winner,
        default=result.default,
        time_s=result.time_s,
        default_time_s=result.default_time_s,
        speedup=result.speedup,
        speedup_ci=result.speedup_ci,
        rel_fro=result.rel_fro,
        journal=result.journal,
        unix_time=time.time(),
    )
