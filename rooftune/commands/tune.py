"""`tune` and `best`: find a better config, keep it only if it is better; say what production should use."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rooftune import registry
from rooftune.autotune import dispatch, precisions, tuner
from rooftune.autotune.tuner import TuneResult
from rooftune.commands import common
from rooftune.core import ExitCode, Problem, Unavailable, UsageError
from rooftune.registry import Impl
from rooftune.results import store
from rooftune.session import Session

SEEDS = 5  # of a replay: one search alone may be lucky


def tune(chosen: argparse.Namespace) -> ExitCode:
    """Every competitor with more than one config, on every problem; `--max-error` races the precisions too."""
    if chosen.simulate:
        return simulated(chosen)
    common.options(chosen)
    common.check_targets(chosen)
    loaded = common.users(chosen)
    name = common.device_name(chosen)
    kind = name.partition(":")[0]
    problems = common.problems(chosen, kind, loaded)
    seed = chosen.seed or 0  # part of the journal's key: a drawn seed would never find its journal again
    console = common.console(chosen)
    results: list[dict[str, Any]] = []
    check_search(chosen)
    with Session("tune", name, chosen.threads, chosen.quiet) as session:
        session.check_user_files(loaded, {p.op: p for p in problems})
        try:
            if chosen.max_error is not None:
                shapes = dict.fromkeys(p.replace(precision="fp32") for p in problems)
                for shape in shapes:
                    impls = [i for i in common.impls(chosen, shape.op, loaded) if _tunable(i, kind)]
                    _precisions(chosen, session, impls, shape, seed, results, console)
            else:
                for problem in problems:
                    for impl in common.impls(chosen, problem.op, loaded):
                        if _tunable(impl, kind) and problem.precision in impl.precisions:
                            _one(chosen, session, impl, problem, seed, results, console)
        finally:
            _write(chosen, results)
        session.clear()
    if not results:
        raise UsageError("nothing to tune: no competitor with more than one config runs here on these problems")
    return ExitCode.OK


def check_search(chosen: argparse.Namespace) -> None:
    """Complain about the search and the budget before the device is touched."""
    from rooftune.autotune import search
    from rooftune.autotune.limits import Budget

    search.find(chosen.search)
    Budget.parse(chosen.budget)


def simulated(chosen: argparse.Namespace) -> ExitCode:
    """Replay the search on recorded tunings with several seeds; no device is touched."""
    from rooftune.autotune import formats, simulate
    from rooftune.autotune.limits import Budget

    check_search(chosen)
    budget = Budget.parse(chosen.budget)
    if budget.seconds is not None and chosen.budget != tuner.DEFAULT_BUDGET:
        raise UsageError(f"--budget {chosen.budget}: a replay takes no time; give configs, such as --budget 100")
    console = common.console(chosen)
    first = chosen.seed or 0
    results: list[dict[str, Any]] = []
    for path in chosen.simulate:
        for tuning in formats.load(Path(path)):
            replays = [
                simulate.replay(tuning, chosen.search, budget.configs, seed) for seed in range(first, first + SEEDS)
            ]
            told = simulate.summary(tuning, replays)
            results.append(told)
            console.print(f"\n{tuning.kernel} {tuning.problem} {tuning.device}".rstrip(), style="bold", markup=False)
            console.print(f"  {told['recorded']} configs on record, {chosen.search}, {SEEDS} seeds", markup=False)
            shares = "  ".join(
                f"{n}: {share:.3f}" for n, share in told["share_after"].items() if int(n) <= told["tried"]
            )
            console.print(f"  share of the best time after so many configs, median: {shares or 'fewer than 10'}")
            needed = [told[key] or "not reached" for key in ("configs_to_95", "configs_to_99")]
            console.print(f"  configs to 95 % of it: {needed[0]}, to 99 %: {needed[1]}", markup=False)
            console.print(f"  best on record: {_config(told['best_config'])}", style="dim", markup=False)
    _write(chosen, results)
    return ExitCode.OK


def _tunable(impl: Impl, kind: str) -> bool:
    """Baselines are not ours to tune: each of their calls races by itself."""
    return kind in impl.devices and impl.missing is None and not impl.baseline and not impl.per_shape


def _one(
    chosen: argparse.Namespace,
    session: Session,
    impl: Impl,
    problem: Problem,
    seed: int,
    results: list[Any],
    console: Any,
) -> None:
    def event(kind: str, text: str) -> None:
        session.say(f"{problem} {impl.key}: {text}")

    try:
        result = tuner.tune(
            session.lab,
            impl,
            problem,
            chosen.budget,
            chosen.search,
            seed,
            identity=session.about["identity"],
            event=event,
        )
    except Unavailable as error:
        session.clear()
        console.print(f"{impl.key} {problem}: {error}", markup=False)
        return
    session.clear()
    results.append({"kind": "tuned", **result.as_json()})
    session.log.append({"schema": 1, "run": session.run, "kind": "tuned", "result": result.as_json()})
    show(result, console)


def show(result: TuneResult, console: Any) -> None:
    """One tuned competitor, in four lines."""
    console.print(f"\n{result.impl} on {result.problem}", style="bold", markup=False)
    fails = ", ".join(f"{n} {status}" for status, n in result.failures.items())
    resumed = f", {result.resumed} of them from an earlier run" if result.resumed else ""
    console.print(
        f"  searched {result.measured} of {result.valid} valid configs ({result.search}{resumed})"
        + (f"; without a time: {fails}" if fails else ""),
        markup=False,
    )
    if result.speedup is not None and result.winner is not None:
        low, high = result.speedup_ci or (float("nan"), float("nan"))
        console.print(
            f"  {'winner' if result.better else 'candidate'} {_config(result.winner)}: "
            f"{result.speedup:.3f}x the default [{low:.3f}, {high:.3f}] on fresh rounds "
            f"(the search had seen {result.search_speedup or 0:.3f}x)",
            markup=False,
        )
    kept = "kept: entered in the tuned table" if result.better else f"not kept: {result.reason}; the default stays"
    console.print(f"  {kept}", style="green" if result.better else "dim", markup=False)
    console.print(f"  journal: {result.journal}", style="dim", markup=False)


def _config(config: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in config.items())


def _precisions(
    chosen: argparse.Namespace,
    session: Session,
    impls: list[Impl],
    shape: Problem,
    seed: int,
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
        budget=chosen.budget,
        search_name=chosen.search,
        seed=seed,
        identity=session.about["identity"],
        event=lambda kind, text: session.say(f"{shape} {text}"),
    )
    session.clear()
    title = f"{shape.op} {shape.shape}: precisions with error up to {chosen.max_error:g}"
    console.print(f"\n{title}", style="bold", markup=False)
    for point in points:
        mark = "front" if point.front else ""
        time = "-" if point.time_s is None else f"{point.time_s * 1e6:,.1f} us"
        error = "-" if point.rel_fro is None else f"{point.rel_fro:.1e}"
        console.print(
            f"  {point.precision:5} {point.impl:24} {time:>14} error {error:8} {mark} {point.reason}", markup=False
        )
        results.append({"kind": "point", "shape": str(shape), **point.as_json()})
    session.log.append({"schema": 1, "run": session.run, "kind": "front", "points": [p.as_json() for p in points]})


def _write(chosen: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(r) + "\n" for r in results)
    for form in ("csv", "md", "junit"):
        if getattr(chosen, form, None):
            raise UsageError(f"--{form} is for records of runs; tuning results go to --json")
    if chosen.json == "-":
        sys.stdout.write(text)
    elif chosen.json:
        store.atomic_write(chosen.json, text)


def best(chosen: argparse.Namespace) -> ExitCode:
    """What to use, why, what it beat, and what would be known better after which command."""
    console = common.console(chosen)
    answers = []
    for text in chosen.what:
        answer = dispatch.explain(text, common.device_name(chosen), chosen.threads)
        answers.append({"kind": "best", **answer})
        console.print(f"\n{answer['problem']} on {answer['device']}", style="bold", markup=False)
        config = f" ({_config(answer['config'])})" if answer.get("config") else ""
        console.print(f"  use {answer['impl']}{config}", style="green", markup=False)
        console.print(f"  because {answer['why']}", markup=False)
        for other in answer["considered"]:
            console.print(f"  not {other['impl']}: {other['reason'] or other['why']}", style="dim", markup=False)
        if answer["next"]:
            console.print(f"  next: {answer['next']}", style="dim", markup=False)
    _write(chosen, answers)
    return ExitCode.OK
