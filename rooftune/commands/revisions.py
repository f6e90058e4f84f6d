"""`compare --base REV`: two revisions' kernels in one session; `selfcheck`: one revision against itself."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rooftune import locks, race, registry, revisions
from rooftune.commands import common, judge
from rooftune.core import ExitCode, Problem, Status, UsageError
from rooftune.registry import Impl
from rooftune.results import duel, statistics, store
from rooftune.results.compare import SUITE, Cell, Verdict, gate
from rooftune.results.duel import Rule
from rooftune.results.record import Record
from rooftune.session import Session

WORKING_TREE = "the working tree"
Pair = tuple[Impl, Impl]  # base, candidate
Runs = tuple[list[Record], list[Record]]
Settled = Callable[[Sequence[Sequence[race.Entrant]], int], bool]  # both sides' entrants, launches so far


@dataclass(frozen=True)
class Side:
    """One revision: where its kernels lie (None: here), and a user's files in it."""

    name: str
    place: Path | None
    files: list[Path]


def compare(chosen: argparse.Namespace) -> ExitCode:
    """Race each changed competitor of the candidate against the base's. Exit 1: broken or confirmed slower."""
    rule, timing = _rule(chosen), common.options(chosen)
    common.check_targets(chosen)
    with tempfile.TemporaryDirectory(prefix="rooftune-revisions-", dir=locks.temporary()) as folder:
        sides = [
            _side(chosen, revision, Path(folder) / name)
            for name, revision in (("base", chosen.base), ("candidate", chosen.cand))
        ]
        names = " against ".join(side.name for side in sides[::-1])
        lone = _lone(chosen, sides)
        cells, lines = _duel(chosen, sides, rule, timing, lambda pair: chosen.every or _changed(pair))
    if not cells:
        text = "; ".join(("no competitor that both have changed", *lone))
        common.console(chosen).print(f"{names}: {text}", markup=False)
        return ExitCode.OK
    _show(chosen, cells, f"{names} (ratio above 1: slower now)", [*lines, *lone])
    return gate(cells, judge.undecided(chosen))


def selfcheck(chosen: argparse.Namespace) -> ExitCode:
    """Race every competitor against itself: how often this machine and our rule cry wolf, and what they would find.

    Exit 3 if a kernel is called slower or faster than itself.
    """
    rule, timing = _rule(chosen), common.options(chosen)
    common.check_targets(chosen)
    with tempfile.TemporaryDirectory(prefix="rooftune-revisions-", dir=locks.temporary()) as folder:
        twin = revisions.copy(Path(folder) / "twin")
        files = [registry.user_impl(Path(path)).path for path in chosen.load]
        again = [revisions.copy_file(path, twin / str(i)) for i, path in enumerate(files)]
        sides = [Side(WORKING_TREE, None, files), Side("itself", twin, again)]
        cells, lines = _duel(chosen, sides, rule, timing, lambda pair: True)
    if not cells:
        raise UsageError("no competitor of these problems runs here; next: bench.py list")
    _show(chosen, cells, "Everything against itself", lines)
    alarms = [c for c in cells if c.verdict in (Verdict.SLOWER, Verdict.FASTER)]
    timed = sum(c.ratio is not None for c in cells if c.problem != SUITE)
    most = 4 * rule.alpha  # slower and faster, cells and their mean
    text = f"false alarms: {len(alarms)} in {timed} cells (by the rule at most {most:.0%} of such checks have one)"
    common.console(chosen).print(text, markup=False)
    return ExitCode.INCONCLUSIVE if alarms else gate(cells, judge.undecided(chosen))


def _rule(chosen: argparse.Namespace) -> Rule:
    for name in ("rounds", "confirm"):
        if getattr(chosen, name) < 6:
            raise UsageError(f"--{name} must be 6 or more, not {getattr(chosen, name)}: fewer decide nothing")
    for name in ("margin", "detect"):
        if not 0 <= getattr(chosen, name) < 100:
            raise UsageError(f"--{name} is in percent, from 0 to 100, not {getattr(chosen, name):g}")
    return Rule(chosen.rounds, chosen.confirm, chosen.margin / 100, chosen.detect / 100)


def _side(chosen: argparse.Namespace, revision: str | None, folder: Path) -> Side:
    files = [registry.user_impl(Path(path)).path for path in chosen.load]
    if revision is None:
        return Side(WORKING_TREE, None, files)
    commit = revisions.commit(revision, files[0] if files else registry.kernel_folder())
    name = commit if commit == revision else f"{revision} ({commit})"
    if files:  # their repository is asked, not ours, and our kernels stay as they are
        return Side(name, None, [revisions.user_file(revision, p, folder / str(i)) for i, p in enumerate(files)])
    return Side(name, revisions.home(revision, folder), [])


def _changed(pair: Pair) -> bool:
    return pair[0].source_hash != pair[1].source_hash


def _duel(
    chosen: argparse.Namespace,
    sides: Sequence[Side],
    rule: Rule,
    timing: race.Options,
    wanted: Callable[[Pair], bool],
) -> tuple[list[Cell], list[str]]:
    """The cells, and what is to be said about how they were judged."""
    name = common.device_name(chosen)
    loaded = common.users(chosen)
    problems = common.problems(chosen, name.partition(":")[0], loaded)
    if not loaded:
        common.field(chosen, problems, ())
    pairs = {op: [p for p in _pairs(chosen, op, sides, loaded) if wanted(p)] for op in {p.op for p in problems}}
    problems = [p for p in problems if pairs[p.op]]
    if not problems:
        return [], []
    path = store.new_run_path(chosen.verb)
    path = path.parent / "revisions" / path.name  # no run that `latest` may name
    with Session(chosen.verb, name, chosen.threads, chosen.quiet, path) as session:
        screen = replace(timing, rounds=rule.screen, launches=1)
        screened = _rounds(session, {p: pairs[p.op] for p in problems}, screen, sides)
        keys = duel.to_confirm(*screened, rule)
        again = {p: [pair for pair in pairs[p.op] if (str(p), pair[1].key) in keys] for p in problems}
        again = {p: some for p, some in again.items() if some}
        count = sum((r.problem, r.impl) in keys for r in screened[1])
        launches = max(timing.launches, duel.launches(count, rule)) if timing.launches > 1 else 1
        confirm = replace(timing, rounds=max(rule.confirm, launches), launches=launches, thorough=False)
        whole = duel.moved(*screened, rule)  # the mean of all needs all launches of all
        decided = _rounds(session, again, confirm, sides, _never if whole else _settled(rule, count, launches))
        session.clear()
        cells = duel.verdicts(screened, decided, rule)
        common.console(chosen).print(f"records: {session.path}", style="dim", markup=False, highlight=False)
    return cells, duel.explain(cells, rule, len(keys), launches)


def _known(op: str, side: Side) -> dict[str, Impl]:
    """A side's competitors by key; torch's own calls are nobody's change."""
    return {impl.key: impl for impl in revisions.competitors(op, side.place, side.files) if not impl.baseline}


def _pairs(chosen: argparse.Namespace, op: str, sides: Sequence[Side], loaded: Sequence[Impl]) -> list[Pair]:
    """Competitors that both sides have. With --load only the user's."""
    asked = {impl.key for impl in loaded or common.impls(chosen, op, loaded)}
    base, candidate = (_known(op, side) for side in sides)
    return [(base[key], impl) for key, impl in candidate.items() if key in base and key in asked]


def _lone(chosen: argparse.Namespace, sides: Sequence[Side]) -> list[str]:
    """Competitors that one side alone has: a line for each side that has some."""
    if chosen.load:
        return []
    every = [{key for op in registry.op_names() for key in _known(op, side)} for side in sides]
    only = [sorted(every[0] - every[1]), sorted(every[1] - every[0])]
    return [f"only in {side.name}: {', '.join(keys)}" for side, keys in zip(sides, only, strict=True) if keys]


def _never(fields: Sequence[Sequence[race.Entrant]], launches: int) -> bool:
    return False


def _rounds(
    session: Session,
    pairs: dict[Problem, list[Pair]],
    timing: race.Options,
    sides: Sequence[Side],
    settled: Settled = _never,
) -> Runs:
    """(base's records, candidate's), of interleaved rounds in fresh processes; stored as soon as a problem is done.

    A process serves all problems of its competitor and is gone before the next launch: to start one takes seconds, and
    one for each of 16 cells took 12 launches beyond a quarter of an hour. A problem that is `settled` by its first
    launches has the rest of its rounds in the processes there are.
    They are no results: `best` must not take what an older kernel did for today's.
    """
    lab, seen, fields = session.lab, set[Any](), dict[Problem, list[list[race.Entrant]]]()
    shares, left = statistics.shares(timing.rounds, timing.launches), dict(pairs)
    runs: Runs = ([], [])
    for launch, rounds in enumerate(shares):
        for impl in {id(impl): impl for some in left.values() for pair in some for impl in pair}.values():
            lab.retire(impl)
        options = replace(timing, thorough=timing.thorough and not launch)
        for number, (problem, some) in enumerate(list(left.items())):
            place = f"[{number + 1}/{len(left)}{f', launch {launch + 1}/{len(shares)}' if len(shares) > 1 else ''}]"

            def event(kind: str, text: str, place: str = place, p: Problem = problem) -> None:
                session.say(f"{place} {text if kind == 'time' else f'{p}: {kind} {text}'}")

            if not launch:
                session.check_memory(problem, registry.op(problem.op).memory_bytes(problem))
                fields[problem] = [race.entrants(lab, problem, [pair[i] for pair in some], event) for i in (0, 1)]
                # the base has been checked as what it was
                seen |= {race.checked(problem, entrant) for entrant in fields[problem][0]}
            runners = [e for field in fields[problem] for e in field if e.status == Status.OK]
            race.prepare(lab, problem, runners, options, seen, event)
            race.time_rounds(lab, problem, [e for e in runners if e.status == Status.OK], options, rounds, event)
            last = launch == len(shares) - 1
            if not last and settled(fields[problem], launch + 1):
                rest = [e for e in runners if e.status == Status.OK]
                race.time_rounds(lab, problem, rest, options, sum(shares[launch + 1 :]), event)
                last = True
            for entrant in runners:
                if entrant.handle is not None:
                    lab.release(entrant.impl, entrant.handle)
                    entrant.handle = None
            if last:
                del left[problem]
                _keep(session, problem, fields[problem], replace(timing, launches=launch + 1), sides, runs)
    return runs


def _settled(rule: Rule, cells: int, launches: int) -> Settled:
    """Whether no cell of a problem can have a verdict any more; Holm's first step asks most."""

    def settled(fields: Sequence[Sequence[race.Entrant]], done: int) -> bool:
        alpha = rule.alpha / max(cells, 1)
        runs = [[e for e in field if e.status == Status.OK and any(e.rounds)] for field in fields]
        return [(e.impl.key, e.config) for e in runs[0]] == [(e.impl.key, e.config) for e in runs[1]] and all(
            duel.hopeless(a.rounds, b.rounds, done, launches, alpha, rule) for a, b in zip(*runs, strict=True)
        )

    return settled


def _keep(
    session: Session,
    problem: Problem,
    fields: Sequence[Sequence[race.Entrant]],
    timing: race.Options,
    sides: Sequence[Side],
    runs: Runs,
) -> None:
    """The records of a problem's rounds: to the disk, and to the runs."""
    for run, field, side in zip(runs, fields, sides, strict=True):
        records = race.judge(registry.op(problem.op), problem, field, timing, None, session.lab)
        for record in records:
            record.regime["session"] = f"{session.run}:{timing.rounds}"
            record.device, record.versions = session.about, session.versions
            session.log.append(record.to_json() | {"kind": "revision", "side": side.name})
        run += records


def _show(chosen: argparse.Namespace, cells: Sequence[Cell], title: str, lines: Sequence[str]) -> None:
    from rooftune.results import report

    report.compare_table(cells, common.console(chosen), title=title, lines=lines)
    judge.publish(chosen, cells, lines)
