"""`compare` and `check`: verdicts on stored runs (`revisions`: on two commits), and the gate for CI."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rooftune import evidence, race, registry
from rooftune.commands import common
from rooftune.commands.run import measure
from rooftune.core import Evidence, ExitCode, Problem, Status, UsageError
from rooftune.registry import Impl
from rooftune.results import store
from rooftune.results.compare import Cell, gate
from rooftune.results.compare import compare as judge_runs
from rooftune.results.record import Record

RUNS = ("verbose", "verb", "what", "unchosen", "inconclusive", "format", "json", "junit", "quiet")  # of stored runs


def compare(chosen: argparse.Namespace) -> ExitCode:
    """Cell by cell, two stored runs, or with --base two revisions. Exit 1: broken or confirmed slower; 3: suspect
    or undecided."""
    from rooftune.results import report

    if chosen.base is not None or chosen.cand is not None:
        if chosen.base is None:
            raise UsageError("--cand needs --base: the revision that it is compared with")
        from rooftune.commands import revisions

        return revisions.compare(chosen)
    for name, value in vars(chosen.unchosen()).items():
        if name not in RUNS and getattr(chosen, name) != value:
            raise UsageError(
                f"--{name.replace('_', '-')} is about racing, and stored runs are raced no more: add --base REV"
            )
    if len(chosen.what) < 2:
        raise UsageError("two runs are needed, such as latest~1 latest; or --base REV; next: bench.py compare --help")
    if len(chosen.what) > 2:
        raise UsageError(f"'{chosen.what[2]}': nothing is expected there; next: bench.py compare --help")
    common.check_targets(chosen)
    base, candidate = (store.load_run(store.resolve(text)) for text in chosen.what)
    cells = judge_runs(base, candidate)
    console = common.console(chosen)
    report.compare_table(cells, console)
    for name, records in (("base", base), ("candidate", candidate)):
        for impl, source in evidence.stale(records).items():
            text = f"  stale: the {name}'s {impl} is of source {source[:8]}, not of today's"
            console.print(text, markup=False, style="yellow")
    publish(chosen, cells)
    return gate(cells, undecided(chosen))


def check(chosen: argparse.Namespace) -> ExitCode:
    """Measure the baseline's cells again (or take `--current`) and judge them against it."""
    from rooftune.results import report

    common.check_targets(chosen)
    if chosen.rounds <= 0:
        raise UsageError(f"--rounds must be positive, not {chosen.rounds}")
    baseline = store.load_run(store.resolve(chosen.baseline))
    if chosen.current:
        current = store.load_run(store.resolve(chosen.current))
    else:
        current = _measure_again(chosen, baseline)
    cells = judge_runs(baseline, current)
    report.compare_table(cells, common.console(chosen))
    publish(chosen, cells)
    return gate(cells, undecided(chosen))


def undecided(chosen: argparse.Namespace) -> ExitCode:
    """`--inconclusive`: the exit code where a cell is suspect or undecided."""
    return ExitCode.OK if chosen.inconclusive == "pass" else ExitCode.INCONCLUSIVE


def publish(chosen: argparse.Namespace, cells: Sequence[Cell], lines: Sequence[str] | None = None) -> None:
    """`--format github`, `--json`, `--junit`. Lines: what is said about the cells, if not what `compare` says."""
    from rooftune.results import export

    _write_cells(chosen, cells)
    if chosen.format == "github" or (chosen.format == "auto" and os.environ.get("GITHUB_ACTIONS") == "true"):
        print("\n".join(export.github_annotations(cells)), file=sys.stderr if common.to_stdout(chosen) else sys.stdout)
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            try:
                with Path(summary).open("a", encoding="utf-8") as file:
                    file.write(export.step_summary(cells, lines=lines))
            except OSError as error:
                raise UsageError(f"cannot append to GITHUB_STEP_SUMMARY={summary}: {error.strerror}") from error


def _write_cells(chosen: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """`--json` and `--junit` of verdicts."""
    import json
    from dataclasses import asdict

    from rooftune.results import export

    texts: dict[str, Callable[[], str]] = {
        "json": lambda: "".join(json.dumps(asdict(c)) + "\n" for c in cells),
        "junit": lambda: export.junit(cells),
    }
    for form, make in texts.items():
        target = getattr(chosen, form)
        if target == "-":
            sys.stdout.write(make())
        elif target:
            store.atomic_write(target, make())


def _measure_again(chosen: argparse.Namespace, baseline: Sequence[Record]) -> list[Record]:
    """The baseline's problems and competitors, timed as they were then (rounds aside)."""
    from rooftune.session import Session

    timed = [r for r in baseline if r.evidence == Evidence.MEASURED and r.status == Status.OK]
    if not timed:
        raise UsageError(f"{chosen.baseline}: no measured cell to check; make one with: python bench.py run --suite ci")
    regime = timed[0].regime
    threads = chosen.threads or regime.get("threads")
    timing = race.Options(
        rounds=chosen.rounds, cache=regime.get("cache", "hot"), clock=regime.get("clock", "wall"), thorough=False
    )
    problems = list(dict.fromkeys(registry.problem(r.problem) for r in timed))
    field: dict[str, list[Impl]] = {}
    for record in timed:
        impls = field.setdefault(record.op, [])
        if all(i.key != record.impl for i in impls):
            try:
                impls.append(registry.impl(record.impl))
            except UsageError:
                print(f"rooftune: {record.impl} is not here any more: its cells count as gone", file=sys.stderr)
    console = common.console(chosen)
    with Session("check", common.device_name(chosen), threads, chosen.quiet) as session:
        return measure(session, problems, field, timing, console, _tuned(timed))


def _tuned(timed: Sequence[Record]) -> dict[Problem, list[race.Entrant]]:
    """Tuned entrants of the baseline enter again with the same config."""
    extra: dict[Problem, list[race.Entrant]] = {}
    for record in timed:
        if not record.default and "call" not in record.config:
            impl = next((i for i in registry.impls(record.op) if i.key == record.impl), None)
            if impl is not None:
                extra.setdefault(registry.problem(record.problem), []).append(race.Entrant(impl, record.config, False))
    return extra
