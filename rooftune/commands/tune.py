"""`tune` and `best`: find a better config, keep it only if it is better; say what production should use."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rooftune import race, registry, streams
from rooftune.autotune import dispatch, final, formats, nearest, precisions, ranking, search, tuner
from rooftune.autotune.formats import Tuning
from rooftune.autotune.job import Job
from rooftune.autotune.limits import EFFORTS, Budget
from rooftune.autotune.share import share
from rooftune.autotune.table import Table, rule_key
from rooftune.autotune.tuner import TuneResult
from rooftune.commands import common
from rooftune.core import ExitCode, Problem, Unavailable, UsageError
from rooftune.registry import Impl
from rooftune.results import store
from rooftune.session import Session
from rooftune.spaces import NoConfig


def tune(chosen: argparse.Namespace) -> ExitCode:
    """Every competitor with more than one config, on every problem; `--max-error` races the precisions too."""
    if chosen.simulate:
        from rooftune.commands.simulate import simulated

        return simulated(chosen)
    common.check_targets(chosen)
    loaded = common.users(chosen)
    name = common.device_name(chosen)
    kind = name.partition(":")[0]
    problems = common.problems(chosen, kind, loaded)
    console = common.console(chosen)
    results: list[dict[str, Any]] = []
    plan = Plan.of(chosen)
    for text in plan.weights:
        if all(str(problem) != text for problem in problems):
            raise UsageError(f"--weight {text}: is none of the problems to tune: {', '.join(map(str, problems))}")
    with Session("tune", name, chosen.threads, chosen.quiet) as session:
        tuner.check_objective(plan.objective, session.lab)
        session.check_user_files(loaded, {p.op: p for p in problems})
        try:
            if chosen.max_error is not None:
                shapes = dict.fromkeys(p.replace(precision="fp32") for p in problems)
                for shape in shapes:
                    impls = [i for i in common.impls(chosen, shape.op, loaded) if _tunable(i, kind)]
                    _precisions(chosen, plan, session, impls, shape, results, console)
            else:
                pairs = [
                    (impl, problem)
                    for problem in problems
                    for impl in common.impls(chosen, problem.op, loaded)
                    if _tunable(impl, kind) and problem.precision in impl.precisions
                ]
                _tune_all(plan, session, pairs, results, console)
        finally:
            if results:  # a file of earlier ones is not replaced by nothing
                write(chosen, results)
        session.clear()
    if not results:
        raise UsageError("nothing to tune: no competitor with more than one config runs here on these problems")
    return _verdict(results, [impl.key for impl in loaded])


def _verdict(results: Sequence[dict[str, Any]], loaded: Sequence[str]) -> ExitCode:
    """As of `run`: 1 if a kernel that somebody brings (`--load`) has no config that ran, 4 if nobody has."""
    tuned = [r for r in results if r["kind"] == "tuned"]
    none = [r for r in tuned if 0 < r["measured"] == r["failed"]]
    if any(r["impl"] in loaded for r in none):
        return ExitCode.REGRESSION
    return ExitCode.NOTHING_RAN if tuned and len(none) == len(tuned) else ExitCode.OK


@dataclass(frozen=True)
class Plan:
    """How hard to look, for what and how to time, as the options say."""

    search: str
    budget: Budget
    objective: str
    seed: int
    shared: bool
    weights: dict[str, float]
    history: list[Tuning]
    timing: race.Options

    @classmethod
    def of(cls, chosen: argparse.Namespace) -> Plan:
        """Read the options; complains before the device is touched.

        Raises:
            UsageError: unknown search, a budget or weight that is not understood, a number out of range.
        """
        timing = common.options(chosen)
        if timing.rounds < final.LEAST:
            raise UsageError(f"--rounds {timing.rounds}: the final decides by at least {final.LEAST}")
        if chosen.max_error is not None and not 0 < chosen.max_error < math.inf:
            raise UsageError(f"--max-error must be positive, as 1e-2, not {chosen.max_error:g}")
        name = chosen.search
        budget = EFFORTS[chosen.effort] if chosen.effort else Budget.parse(tuner.DEFAULT_BUDGET)
        if chosen.effort == "exhaustive":
            name = "exhaustive"
        if chosen.budget:
            budget = Budget.parse(chosen.budget)
        search.find(name)
        weights: dict[str, float] = {}
        for text in chosen.weight:
            problem, _, number = text.rpartition("=")
            if not re.fullmatch(r"\d+(\.\d+)?", number) or not float(number):
                raise UsageError(f"--weight {text}: write PROBLEM=NUMBER above 0, such as 'softmax[m=64,n=512]=2.5'")
            weights[str(registry.problem(problem))] = float(number)
        seed = chosen.seed or 0  # part of the journal's key: a drawn seed would never find its journal again
        history = [tuning for path in chosen.history for tuning in formats.load(Path(path))]
        shared = chosen.share or bool(weights)
        if shared and chosen.max_error is not None:
            given = "--share" if chosen.share else "--weight"
            raise UsageError(f"{given} and --max-error: a budget is shared among problems, not among their precisions")
        return cls(name, budget, chosen.objective, seed, shared, weights, history, timing)


def _tune_all(
    plan: Plan, session: Session, pairs: list[tuple[Impl, Problem]], results: list[Any], console: Any
) -> None:
    """Tune each by itself, or all on one budget; then try every winner at the sizes beside its own."""
    jobs: list[Job] = []
    found: dict[int, TuneResult] = {}
    on_cuda = session.device.kind == "cuda"  # the analytic model knows no other devices
    gpu = ranking.Gpu.of(session.fingerprint, session.ceilings) if on_cuda else None
    for impl, problem in pairs:
        try:
            job = Job(
                session.lab,
                impl,
                problem,
                plan.search,
                plan.seed,
                identity=session.about["identity"],
                options=plan.timing,
                start=tuner.winners_nearby(Table(), impl, problem),
                prior=ranking.ranker(impl, problem, gpu),
                history=plan.history,
                event=_teller(session, f"{problem} {impl.key}"),
            )
            if not jobs and job.ahead.why:
                console.print(f"compile-ahead: {job.ahead.why}", style="dim", markup=False)
            if not plan.shared:
                if job.journal.final is None or plan.budget.left(job.journal):
                    job.advance(plan.budget)
                found[len(jobs)] = _conclude(job, plan, session, results, console)
        except (NoConfig, Unavailable) as error:
            session.clear()
            console.print(f"{impl.key} {problem}: {error}", markup=False)
            continue
        jobs.append(job)
    if plan.shared:
        for account in share(jobs, plan.budget, plan.weights, lambda kind, text: session.say(text)):
            found[jobs.index(account.job)] = _conclude(account.job, plan, session, results, console)
    for number, result in _neighbours(plan, session, jobs, found, console).items():
        results[:] = [r for r in results if (r["impl"], r["problem"]) != (result.impl, result.problem)]
        results.append({"kind": "tuned", **result.as_json()})
        found[number] = result


def _teller(session: Session, who: str) -> race.Event:
    return lambda kind, text: session.say(f"{who}: {text}")


def _conclude(job: Job, plan: Plan, session: Session, results: list[Any], console: Any) -> TuneResult:
    result = tuner.conclude(job, plan.objective)
    session.clear()
    results.append({"kind": "tuned", **result.as_json()})
    session.log.append({"schema": 1, "run": session.run, "kind": "tuned", "result": result.as_json()})
    show(result, console)
    return result


def _neighbours(
    plan: Plan, session: Session, jobs: list[Job], found: dict[int, TuneResult], console: Any
) -> dict[int, TuneResult]:
    """Per competitor, flags and precision: measure each shape's winner at the others, fit the rule, say what it costs.

    Returns:
        The results that this changed: a neighbour's winner may be the better one here too.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number in found:
        problem = jobs[number].problem
        groups.setdefault((jobs[number].impl, problem.precision, problem.flags), []).append(number)
    changed: dict[int, TuneResult] = {}
    if plan.timing.cache != "hot":  # the rule is for the table, which these results do not enter
        return changed
    table = Table()
    for (impl, precision, _), numbers in groups.items():
        if len(numbers) < nearest.LEAST:
            if len(numbers) > 1:
                text = f"\n{impl.key} {precision}: a rule for shapes in between needs {nearest.LEAST} tuned together"
                console.print(text, style="dim", markup=False)
            continue
        winners = [found[n].config for n in numbers]
        for number in numbers:
            job = jobs[number]
            job.also = [c for c in winners if job.valid(c)]
            if job.missing:
                try:
                    job.advance(Budget(configs=0))
                    changed[number] = tuner.conclude(job, plan.objective)
                except Unavailable as error:  # what is missing makes the rule weaker, not the results wrong
                    console.print(f"{impl.key} {job.problem}: {error}", markup=False)
        after = {n: changed.get(n, found[n]) for n in numbers}
        shapes = [
            nearest.shape_of(jobs[n].problem, jobs[n].default, r.config, jobs[n].journal.trials)
            for n, r in after.items()
        ]
        rule = nearest.fit(impl.key, shapes)
        if rule is None:
            continue
        table.rules.put(rule, rule_key(impl, session.about["identity"], session.threads))
        session.clear()
        console.print(f"\n{impl.key} {precision}, {len(numbers)} shapes", style="bold", markup=False)
        console.print(f"  {nearest.told(rule)}", markup=False)
    return changed


def _tunable(impl: Impl, kind: str) -> bool:
    """Baselines are not ours to tune: each of their calls races by itself."""
    return kind in impl.devices and impl.missing is None and not impl.baseline and not impl.per_shape


def show(result: TuneResult, console: Any) -> None:
    """One tuned competitor, in four lines."""
    console.print(f"\n{result.impl} on {result.problem}", style="bold", markup=False)
    fails = ", ".join(f"{n} {status}" for status, n in result.failures.items())
    drawn = f", {result.drawn}" if result.drawn else ""
    resumed = f", {result.resumed} of them from an earlier run" if result.resumed else ""
    console.print(
        f"  searched {result.measured} of {result.valid} valid configs{drawn} ({result.search}{resumed})"
        + (f"; without a time: {fails}" if fails else ""),
        markup=False,
    )
    if result.speedup is not None and result.winner is not None:
        low, high = result.speedup_ci or (float("nan"), float("nan"))
        console.print(
            f"  {'winner' if result.better else 'candidate'} {config_text(result.winner)}: "
            f"{result.speedup:.3f}x the default [{low:.3f}, {high:.3f}] on fresh rounds "
            f"(the search had seen {result.search_speedup or 0:.3f}x)",
            markup=False,
        )
    kept = f"not kept: {result.reason}; the default stays"
    if result.enters:
        kept = "kept: entered in the tuned table"
    elif result.better:
        kept = "better, but not entered in the tuned table: that is for time with a hot cache"
    console.print(f"  {kept}", style="green" if result.better else "dim", markup=False)
    console.print(f"  journal: {result.journal}", style="dim", markup=False)


def config_text(config: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in config.items())


def _precisions(
    chosen: argparse.Namespace,
    plan: Plan,
    session: Session,
    impls: list[Impl],
    shape: Problem,
    results: list[Any],
    console: Any,
) -> None:
    op = registry.op(shape.op)
    asked = common.names(chosen.precision) or [
        p for p in op.precisions if p != "fp8" or shape.flag("transpose") == "nt"
    ]
    points = precisions.tune_precisions(
        session.lab,
        impls,
        shape,
        asked,
        chosen.max_error,
        budget=plan.budget,
        search_name=plan.search,
        seed=plan.seed,
        objective=plan.objective,
        history=plan.history,
        identity=session.about["identity"],
        options=plan.timing,
        event=lambda kind, text: session.say(f"{shape} {text}"),
    )
    session.clear()
    title = f"{shape.op} {shape.shape}: precisions with error up to {chosen.max_error:g}, inputs' rounding included"
    console.print(f"\n{title}", style="bold", markup=False)
    for point in points:
        mark = "front" if point.front else ""
        time = "-" if point.time_s is None else f"{point.time_s * 1e6:,.1f} us"
        error = "-" if point.error is None else f"{point.error:.1e}"
        joules = "" if point.joules is None else f"{point.joules * 1e3:,.2f} mJ "
        console.print(
            f"  {point.precision:5} {point.impl:24} {time:>14} error {error:8} {joules}{mark} {point.reason}",
            markup=False,
        )
        results.append({"kind": "point", "shape": str(shape), **point.as_json()})
    session.log.append({"schema": 1, "run": session.run, "kind": "front", "points": [p.as_json() for p in points]})


def write(chosen: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(r) + "\n" for r in results)
    if chosen.json == "-":
        streams.put(text)
    elif chosen.json:
        store.atomic_write(chosen.json, text)


def best(chosen: argparse.Namespace) -> ExitCode:
    """What to use, why, what it beat, and what would be known better after which command."""
    console = common.console(chosen)
    answers = []
    for text in chosen.what:
        answer = dispatch.choose(text, common.device_name(chosen), chosen.threads).as_json()
        answers.append({"kind": "best", **answer})
        console.print(f"\n{answer['problem']} on {answer['device']}", style="bold", markup=False)
        config = f" ({config_text(answer['config'])})" if answer.get("config") else ""
        console.print(f"  use {answer['impl']}{config}", style="green", markup=False)
        console.print(f"  because {answer['why']}", markup=False)
        for other in answer["considered"]:
            console.print(f"  not {other['impl']}: {other['reason'] or other['why']}", style="dim", markup=False)
        if answer["next"]:
            console.print(f"  next: {answer['next']}", style="dim", markup=False)
    write(chosen, answers)
    return ExitCode.OK
