"""`report`: stored runs again, as tables or for a program; `--history`: what may have changed over many runs."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rooftune import evidence, streams
from rooftune.commands import common
from rooftune.core import Evidence, ExitCode, UsageError
from rooftune.results import history, store
from rooftune.results.changes import Change
from rooftune.results.history import SHORTEST, Series
from rooftune.results.record import Record


def report(chosen: argparse.Namespace) -> ExitCode:
    """Show runs as `run` showed them. With --history exit 3 if something may have become slower: a candidate, which
    `compare --base` confirms or not."""
    common.check_targets(chosen)
    if chosen.history:
        return _history(chosen)
    from rooftune.results import report as tables

    console = common.console(chosen)
    records: list[Record] = []
    for path in [store.resolve(text) for text in chosen.what or ["latest"]]:
        mine = store.load_run(path)
        console.print(path.stem, style="bold", markup=False, end="")
        console.print(f"  {_when(mine[0].unix_time)}  {_versions(mine[0])}", markup=False)
        tables.race_table(mine, console)
        if proofs := [r for r in mine if r.evidence != Evidence.MEASURED]:
            tables.evidence_table(proofs, console)
        for impl, source in evidence.stale(mine).items():
            console.print(f"  stale: {impl} is of source {source[:8]}, not of today's", markup=False, style="yellow")
        records += mine
    common.write(chosen, records)
    return ExitCode.OK


def _when(unix_time: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_time))


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {record.versions[name]}" for name in ("rooftune", "torch") if name in record.versions)


def _history(chosen: argparse.Namespace) -> ExitCode:
    """All series of the runs named, or of all runs that are stored here; those with candidates as a table."""
    if chosen.csv or chosen.md or chosen.junit:
        raise UsageError("--history prints a table or --json")
    paths = [store.resolve(text) for text in chosen.what] or store.list_runs()
    runs = history.load(paths)
    found = history.series(runs)
    if not found:
        raise UsageError(f"no measured run in {len(paths)} files of {_folder(paths)}; make some with: bench.py run")
    long_enough = [s for s in found if len(s.points) >= SHORTEST]
    rows = [(s, change) for s in long_enough for change in s.changes()]
    rows.sort(key=lambda row: -row[1].ratio)
    if chosen.json:
        _write(chosen.json, [_as_json(s, change) for s, change in rows])
    from rooftune.results import report as tables

    console = common.console(chosen)
    if rows:
        columns = [tables.Column("candidate"), tables.Column("problem", flexible=True), tables.Column("competitor")]
        columns += [tables.Column(name, right=True) for name in ("time by", "p", "runs")] + [tables.Column("from run")]
        lines = [(_cells(s, c), "red" if c.ratio > 1 else "green") for s, c in rows]
        tables.print_table(console, "What may have changed", columns, lines)
        for s, change in rows:
            if change.ratio > 1:
                console.print(f"  {s.impl} {s.problem}: next: {_next(s, change)}", markup=False, soft_wrap=True)
    short, other = len(found) - len(long_enough), len(paths) - len(runs)
    text = f"{len(runs)} runs, {len(found)} series, {len(rows)} candidates"
    text += f"; {short} series have fewer than {SHORTEST} runs and were not judged" if short else ""
    console.print(text + (f"; {other} files hold no time" if other else ""))
    return ExitCode.INCONCLUSIVE if any(change.ratio > 1 for _, change in rows) else ExitCode.OK


def _folder(paths: list[Path]) -> Path:
    return paths[0].parent if paths else store.results_dir()


def _cells(s: Series, change: Change) -> list[str]:
    verdict = "slower?" if change.ratio > 1 else "faster?"
    by = f"{(change.ratio - 1) * 100:+.1f}%" + (" vs torch" if s.by != "time" else "")
    return [verdict, s.problem, s.name, by, f"{change.p:.0e}", str(len(s.points)), s.points[change.at].run]


def _next(s: Series, change: Change) -> str:
    """What decides: both commits in one session, where they are known and hold what was measured."""
    before, after = s.points[change.at - 1], s.points[change.at]
    commits = before.commit, after.commit
    if all(c and not c.endswith("-dirty") for c in commits) and commits[0] != commits[1]:
        only = s.name.partition(":")[0]
        return f'python bench.py compare --base {commits[0]} --cand {commits[1]} "{s.problem}" --only {only}'
    return f"python bench.py compare {before.run} {after.run}"


def _as_json(s: Series, change: Change) -> dict[str, Any]:
    before, after = s.points[change.at - 1], s.points[change.at]
    about = {"problem": s.problem, "impl": s.impl, "device": s.device, "by": s.by, "runs": len(s.points)}
    ends = {"before": before.run, "after": after.run, "commit_before": before.commit, "commit_after": after.commit}
    return about | {"slower": change.ratio, "p": change.p} | ends | {"next": _next(s, change)}


def _write(target: str, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if target == "-":
        streams.put(text)
    else:
        store.atomic_write(target, text)
