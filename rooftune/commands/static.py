"""`static`: compile-time resources of every GPU kernel, and the gate that compares them with a baseline."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rooftune import evidence, registry, static, streams
from rooftune.commands import common
from rooftune.core import PRECISIONS, ExitCode, Problem, Status, UsageError, unknown
from rooftune.lab import Lab
from rooftune.occupancy import multiprocessor
from rooftune.registry import Impl
from rooftune.results import static as results
from rooftune.results import store


def static_verb(chosen: argparse.Namespace) -> ExitCode:
    """Compile, show, and judge. Exit 1: worse than the baseline, or a default config does not compile."""
    common.check_targets(chosen)
    archs = common.names(chosen.arch) or list(evidence.ARCHITECTURES)
    for arch in archs:
        multiprocessor(arch)
    baseline = results.load(chosen.baseline) if chosen.baseline else []
    wanted = _wanted(chosen)
    started = time.monotonic()

    def say(kind: str, text: str) -> None:
        if not chosen.quiet and sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[2K{kind} {text}, {time.monotonic() - started:.0f} s"[:110])
            sys.stderr.flush()

    with Lab("cpu") as lab:
        jobs = _jobs(lab, wanted, archs, chosen.configs)
        known = {results.key(_as_row(job)) for job in jobs}
        baseline = _in_scope(chosen, baseline, archs)
        jobs += _again(lab, wanted, [r for r in baseline if results.key(r) not in known and not r["default"]])
        rows = static.compile_rows(lab, jobs, say)
    if not chosen.quiet and sys.stderr.isatty():
        sys.stderr.write("\r\x1b[2K")
    changes = results.compare(baseline, rows) if chosen.baseline else []
    console = common.console(chosen)
    if not chosen.baseline:
        results.table(rows, console)
    else:
        results.change_table(changes, console)
    _write(chosen, rows, changes)
    if chosen.baseline:
        return results.gate(changes)
    broken = [r for r in rows if r["default"] and r["status"] not in (Status.OK, Status.SKIPPED)]
    if broken:
        return ExitCode.REGRESSION
    return ExitCode.OK if any(r["status"] == Status.OK for r in rows) else ExitCode.NOTHING_RAN


def _wanted(chosen: argparse.Namespace) -> list[tuple[Impl, Problem]]:
    """Competitors with a problem each: of the operators, competitors and problems named, and the files loaded.

    Raises:
        UsageError: a name that there is not, or nothing that compiles.
    """
    precisions = common.names(chosen.precision)
    for name in precisions:
        if name not in PRECISIONS:
            raise unknown("precision", name, list(PRECISIONS))
    loaded = common.users(chosen)
    impls: dict[str, Impl] = {i.module: i for i in loaded}
    problems: list[Problem] = []
    for text in chosen.what or ([] if loaded else registry.op_names()):
        if "[" in text:
            problems.append(registry.problem(text))
            found = registry.impls(problems[-1].op)
        else:
            found = (registry.impl(text),) if "/" in text else registry.impls(text)
        impls |= {i.module: i for i in found}
    pairs = []
    for impl in impls.values():
        if not impl.compiles:
            if impl in loaded or f"{impl.key}" in chosen.what:
                raise UsageError(f"{impl.key} has no compile_for(problem, config, arch): nothing to look at")
            continue
        for precision in impl.precisions:
            if precisions and precision not in precisions:
                continue
            mine = [p for p in problems if p.op == impl.op and p.precision == precision]
            if not mine and any(p.op == impl.op for p in problems):
                continue
            pairs += [(impl, p) for p in mine or [evidence.compile_problem(impl.op, precision)]]
    if not pairs:
        raise UsageError("no competitor of these compiles for a GPU in these precisions")
    return pairs


def _in_scope(chosen: argparse.Namespace, baseline: list[results.Row], archs: Sequence[str]) -> list[results.Row]:
    """The baseline's rows that the command is about: also those of kernels that are not here any more.

    Raises:
        UsageError: there is a baseline, and none of its rows is.
    """
    precisions = common.names(chosen.precision)
    named = [*chosen.what, *(impl.key for impl in common.users(chosen))]

    def about(row: results.Row) -> bool:
        mine = {row["impl"], row["impl"].partition("/")[0], row["problem"]}
        shape = any("[" in text and str(registry.problem(text)) == row["problem"] for text in chosen.what)
        return (not named or shape or bool(mine & set(named))) and (not precisions or row["precision"] in precisions)

    found = [row for row in baseline if row["arch"] in archs and about(row)]
    if baseline and not found:
        raise UsageError(f"{chosen.baseline} has no row about {', '.join([*named, *precisions, *archs])}")
    return found


def _jobs(lab: Lab, wanted: Sequence[tuple[Impl, Problem]], archs: Sequence[str], configs: str) -> list[static.Job]:
    """A job per competitor, problem, config and architecture. One that is not installed has one, to say so."""
    jobs = []
    for impl, problem in wanted:
        found: list[dict[str, Any]] = [{}] if impl.missing else static.configs(lab, impl, problem, configs)
        jobs += [static.Job(impl, problem, c, n == 0, arch) for n, c in enumerate(found) for arch in archs]
    return jobs


def _again(lab: Lab, wanted: Sequence[tuple[Impl, Problem]], rows: Sequence[results.Row]) -> list[static.Job]:
    """The baseline's other configs, as far as they are valid still: what is not is gone."""
    by_name = {(impl.key, str(problem)): (impl, problem) for impl, problem in wanted if not impl.missing}
    valid: dict[tuple[str, str], list[dict[str, Any]]] = {}
    jobs = []
    for row in rows:
        name = row["impl"], row["problem"]
        if name in by_name:
            impl, problem = by_name[name]
            if name not in valid:
                valid[name] = lab.space(impl, problem, "compile")["configs"]
            if row["config"] in valid[name]:
                jobs.append(static.Job(impl, problem, row["config"], False, row["arch"]))
    return jobs


def _as_row(job: static.Job) -> results.Row:
    return static.row(job, {"status": str(Status.SKIPPED)})


def _write(chosen: argparse.Namespace, rows: list[results.Row], changes: Sequence[results.Change]) -> None:
    """`--save`, and the forms for programs; with a baseline a row also has its verdict and what changed."""
    if chosen.save:
        results.save(chosen.save, rows)
    judged = {
        results.key(c.row): {"verdict": str(c.verdict), "change": c.text, "baseline_source_hash": c.older or None}
        for c in changes
    }
    if judged:
        rows = [row | judged[results.key(row)] for row in rows]
    makers: dict[str, Callable[[], str]] = {
        "json": lambda: results.to_json_lines(rows),
        "csv": lambda: results.to_csv(rows),
        "md": lambda: results.to_markdown(rows, changes),
    }
    for form, make in makers.items():
        target = getattr(chosen, form)
        if target == "-":
            streams.put(make())
        elif target:
            store.atomic_write(target, make())
