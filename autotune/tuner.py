"""Tuning: a search proposes configs, the Lab measures them, a journal keeps every outcome, fresh rounds decide.

The best config is kept in the tuned table only if it beats the default config with confidence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rooftune import device, race
from rooftune.autotune import final, search
from rooftune.autotune.journal import SCHEMA, Journal, Trial, canonical, default_path, digest, toolchain
from rooftune.autotune.limits import Budget, constraint
from rooftune.autotune.table import Entry, Table
from rooftune.autotune.trial import Bench
from rooftune.core import Config, Problem, Status, unknown
from rooftune.lab import Lab
from rooftune.registry import Impl
from rooftune.results import statistics

Event = race.Event
OBJECTIVES = ("time",)
DEFAULT_BUDGET = "60s"


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
    event: Event = lambda kind, text: None,
) -> TuneResult:
    """Search the configs of one competitor on one problem.

    Args:
        budget: `60s`, `2m`, `40`; see `Budget`.
        search_name: a generator of `autotune.search`.
        seed: of the search, the data and the order of rounds; part of the journal's key.
        journal_path: default: a file per competitor and problem in the results folder.
        max_error: largest relative Frobenius error a config may have.
        where: constraints such as `block_m<=64`.
        identity: of the device, as `Device.identity()`; looked up if not given.
        options: how to time; `rounds` is that of each stage of the final.
        table: where a winner goes; the default table if not given.
    Raises:
        UsageError: unknown search or objective, no valid config, a default that breaks a constraint.
        Unavailable: the competitor cannot run here, or stopped running.
    """
    spend = Budget.parse(budget) if isinstance(budget, str) else budget
    steps_of = search.find(search_name)
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    timing = options or race.Options(rounds=final.ROUNDS, min_sample_s=1e-3)
    timing = replace(timing, seed=seed)
    found = lab.space(impl, problem)
    default: Config = found["default"]
    rules = [constraint(text) for text in where]
    configs = [c for c in found["configs"] if c != default and all(rule(c) for rule in rules)]
    space = search.SearchSpace.of(found["axes"], [default, *configs], start=[default])
    what = {
        "schema": SCHEMA,
        "impl": impl.key,
        "problem": str(problem),
        "source_hash": impl.source_hash,
        "toolchain": toolchain(impl),
        "device": identity if identity is not None else identity_of(lab),
        "threads": lab.threads,
        "timing": {"cache": timing.cache, "clock": timing.clock},
        "space": digest([found["axes"], sorted(canonical(c) for c in [default, *configs])]),
        "search": search_name,
        "seed": seed,
        "max_error": max_error,
    }
    journal = Journal(journal_path or default_path(impl, problem), what, lambda text: event("journal", text))
    if journal.final is not None and not spend.left(journal):
        event("journal", f"{journal.path}: this budget is spent and decided; a larger --budget goes on from here")
        result = TuneResult(**{**journal.final, "resumed": journal.resumed})
    else:
        _search(lab, impl, problem, space, steps_of, journal, spend, timing, max_error, default, event)
        result = _conclude(lab, impl, problem, default, journal, timing, len(space), event)
        journal.finish(result.as_json())
    if result.better:
        (table or Table()).put(entry(result, problem, what))
    return result


def identity_of(lab: Lab) -> dict[str, Any]:
    """Identity of the device a Lab works on."""
    index = lab.device.partition(":")[2]
    return device.find(f"{lab.kind}:{index}" if index else lab.kind).identity()


def _search(
    lab: Lab,
    impl: Impl,
    problem: Problem,
    space: search.SearchSpace,
    steps_of: Callable[[search.SearchSpace, np.random.Generator], search.Search],
    journal: Journal,
    budget: Budget,
    options: race.Options,
    max_error: float | None,
    default: Config,
    event: Event,
) -> None:
    """Ask, measure, tell. A config whose outcome is in the journal is told and not measured."""
    started, before = time.monotonic(), journal.spent_s
    steps = steps_of(space, np.random.default_rng(options.seed))
    with Bench(lab, impl, problem, default, options, max_error) as bench:
        if (known := journal.trials.get(canonical(default))) and known.value is None:
            bench.default_reason = f"{known.status} {known.reason}"
        config = next(steps, None)
        while config is not None:
            trial = journal.trials.get(canonical(config))
            if trial is None:
                if not budget.left(journal):
                    break
                if config != default:
                    bench.ensure_default()
                trial = bench.measure(config)
                journal.add(trial)
                _tell(journal, trial, len(space), budget, before + time.monotonic() - started, event)
            elif trial.value is not None:
                bench.leader = min(bench.leader, trial.value)
            try:
                config = steps.send(search.Outcome(trial.value, str(trial.status), trial.reason))
            except StopIteration:
                config = None
    steps.close()


def _tell(journal: Journal, trial: Trial, valid: int, budget: Budget, spent_s: float, event: Event) -> None:
    values = [t.value for t in journal.trials.values() if t.value is not None]
    best = f"best {1 / min(values):.2f}x" if values and trial.ratio is not None else f"{len(values)} ran"
    text = f"{len(journal.trials)} of {valid} configs, {spent_s:.0f} s of {budget}, {best}"
    event("tune" if trial.status == Status.OK else "failed", f"{text}; {canonical(trial.config)}: {_how(trial)}")


def _how(trial: Trial) -> str:
    if trial.status != Status.OK:
        return f"{trial.status} {trial.reason}"
    return f"{trial.time_s:.3g} s" + (", cut" if trial.cut else "")


def _conclude(
    lab: Lab,
    impl: Impl,
    problem: Problem,
    default: Config,
    journal: Journal,
    options: race.Options,
    valid: int,
    event: Event,
) -> TuneResult:
    """The final among the best few that the search found."""
    trials = journal.trials
    ranked = sorted((t for t in trials.values() if t.value is not None and not t.cut), key=lambda t: t.value or 0.0)
    best = [t.config for t in ranked if t.config != default][: final.FINALISTS]
    timing = replace(options, rounds=max(options.rounds, 10))
    end = final.decide(lab, impl, problem, default, best, timing, event)
    failed: dict[str, int] = {}
    for trial in trials.values():
        if trial.status != Status.OK:
            failed[str(trial.status)] = failed.get(str(trial.status), 0) + 1
    winner = end.winner
    hoped = trials[canonical(winner.config)].ratio if winner else None
    claimed = 1 / hoped if hoped else None
    known = trials.get(canonical(default))
    return TuneResult(
        impl=impl.key,
        problem=str(problem),
        default=default,
        config=winner.config if winner and end.better else default,
        winner=winner.config if winner else None,
        better=end.better,
        reason=end.reason,
        time_s=_median(winner),
        default_time_s=_median(end.default) or (known.time_s if known else None),
        speedup=end.speedup,
        speedup_ci=list(end.speedup_ci) if end.speedup_ci else None,
        search_speedup=claimed,
        luck=claimed / end.speedup - 1 if claimed and end.speedup else None,
        rel_fro=_error(winner if winner and end.better else end.default, known),
        measured=len(trials),
        failed=sum(failed.values()),
        valid=valid,
        search=journal.what["search"],
        seed=journal.what["seed"],
        journal=str(journal.path),
        resumed=journal.resumed,
        failures=failed,
    )


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
