"""`run`: the race, and the evidence for competitors whose device is not here."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rooftune import evidence, race, registry
from rooftune.commands import common
from rooftune.core import Evidence, ExitCode, Problem, Status
from rooftune.registry import Impl
from rooftune.results.record import Record
from rooftune.session import COPIES, Session
from rooftune.suites import catalogue

MOST_AHEAD = 24  # builds of a competitor: its worker keeps 32


def run(chosen: argparse.Namespace) -> ExitCode:
    """Race every problem; print a table each as it is finished, then the evidence table."""
    from rooftune.results import report

    timing = common.options(chosen)
    common.check_targets(chosen)
    loaded = common.users(chosen)
    name = common.device_name(chosen)
    kind = name.partition(":")[0]
    problems = common.problems(chosen, kind, loaded)
    field = common.field(chosen, problems, loaded)
    console = common.console(chosen)
    if chosen.dry_run:
        for problem in problems:
            here = [i.name for i in field[problem.op] if kind in i.devices and problem.precision in i.precisions]
            console.print(f"{problem}: {', '.join(here) or 'nobody'}", markup=False)
        return ExitCode.OK
    records: list[Record] = []
    with Session("run", name, chosen.threads, chosen.quiet) as session, common.keeping(chosen, records):
        for problem in problems:
            session.check_memory(problem, registry.op(problem.op).memory_bytes(problem))
        session.check_user_files(loaded, {p.op: p for p in problems})
        if chosen.evidence in ("auto", "full", "none"):
            every = [impl for impls in field.values() for impl in impls]
            extra = common.tuned_entrants(session, problems, every)
            goals = catalogue.goals(chosen.suite, problems, kind)
            measure(session, problems, field, timing, console, extra, records, goals)
        if chosen.evidence != "none":
            proofs = prove(session, field, common.precisions(chosen), timing.seed, chosen.evidence == "full")
            records += proofs
            session.clear()
            if proofs:
                report.evidence_table(proofs, console)
        session.clear()
        if not records:
            console.print("nothing to prove: these competitors run on this device; without --evidence only they race")
            return ExitCode.NOTHING_RAN
        console.print(f"records: {session.path}", style="dim", markup=False)
    return verdict(records, [impl.key for impl in loaded])


def measure(
    session: Session,
    problems: Sequence[Problem],
    field: dict[str, list[Impl]],
    timing: race.Options,
    console: Any,
    extra: dict[Problem, list[race.Entrant]] | None = None,
    records: list[Record] | None = None,
    goals: Mapping[Problem, float] | None = None,
) -> list[Record]:
    """Race the problems one after another; records are stored and shown as soon as a problem is done.

    `records` is extended as they come, so that an interrupt leaves the caller what there is. `goals`: the ratio
    to torch that a suite asks for.
    """
    from rooftune.results import report

    ceilings = session.ceilings
    records = [] if records is None else records
    seen: set[Any] = set()
    absent = [i for impls in field.values() for i in impls if session.device.kind not in i.devices]
    standing = {key: str(found) for key, found in evidence.on_record(absent).items()}
    checked = build_ahead(session, problems, field, timing, extra or {}, seen)
    started = time.monotonic()
    for number, problem in enumerate(problems):
        eta = (
            ""
            if not number
            else f", about {(time.monotonic() - started) / number * (len(problems) - number):.0f} s left"
        )

        def event(
            kind: str, text: str, place: str = f"[{number + 1}/{len(problems)}{eta}]", p: Problem = problem
        ) -> None:
            session.say(f"{place} {text if kind == 'time' else f'{p}: {kind} {text}'}")

        mine = race.race(
            session.lab, problem, field[problem.op], timing, ceilings, (extra or {}).get(problem, ()), seen, event
        )
        baselines = {i.key for i in field[problem.op] if i.baseline}
        for record in mine:
            if record.status == Status.OK:
                record.error = checked.get(f"{problem} {record.impl} {record.config}", record.error)
            record.goal = None if record.impl in baselines else (goals or {}).get(problem)
        records += mine  # before they are stored: an interrupt in between must not lose them for --json
        session.keep(mine)
        session.clear()
        report.race_table(mine, console, standing=standing)
    return records


def build_ahead(
    session: Session,
    problems: Sequence[Problem],
    field: dict[str, list[Impl]],
    timing: race.Options,
    extra: dict[Problem, list[race.Entrant]],
    seen: set[Any],
) -> dict[str, dict[str, Any]]:
    """Beside a GPU, build and check everyone on every problem before anything is timed: each competitor in its own
    process, many at a time. Its worker keeps what it built, so that no race waits for the slowest compiler again.
    What fails here fails in the race, which says so. On a CPU compilers would share its cores one way or the other.

    Returns:
        The figures of the checks, which the races do not repeat as a whole: by problem, competitor and config.
    """
    lab, kind = session.lab, session.device.kind
    found: dict[str, dict[str, Any]] = {}
    if kind == "cpu" or len(problems) < 2:
        return found
    free, need = session.device.memory_bytes().free, max(registry.op(p.op).memory_bytes(p) for p in problems)
    most = race.at_once(lab) if free is None else min(race.at_once(lab), int(free / 2 / (need * COPIES)))
    over = threading.Event()

    def event(what: str, text: str) -> None:
        session.say(f"{what} {text}")

    def build(impl: Impl) -> None:
        left = MOST_AHEAD
        for problem in (p for p in problems if impl in field[p.op]):
            mine = race.entrants(lab, problem, [impl], event)
            mine += [race.Entrant(impl, e.config, e.default) for e in extra.get(problem, ()) if e.impl == impl]
            for entrant in mine:
                left -= 1
                if over.is_set() or left < 0:
                    return
                race.prepare(lab, problem, [entrant], timing, seen, event)
                if entrant.handle is not None and entrant.error is not None:
                    found[f"{problem} {impl.key} {entrant.config}"] = entrant.error
                    lab.release(impl, entrant.handle)

    impls = {impl.key: impl for some in field.values() for impl in some if kind in impl.devices and not impl.missing}
    pool = ThreadPoolExecutor(max(1, most))
    try:
        for done in [pool.submit(build, impl) for impl in impls.values()]:
            done.result()
    finally:  # after Ctrl-C too: nothing new begins
        over.set()
        pool.shutdown(wait=False, cancel_futures=True)
    return found


def prove(
    session: Session,
    field: dict[str, list[Impl]],
    precisions: Sequence[str],
    seed: int,
    thorough: bool,
    archs: Sequence[str] = evidence.ARCHITECTURES,
) -> list[Record]:
    """Emulate and compile the competitors that cannot run on this device."""
    absent = [i for impls in field.values() for i in impls if session.device.kind not in i.devices]
    absent = [i for i in absent if i.emulates or i.compiles]
    if not absent:
        return []
    done: list[Record] = []
    try:
        proofs = evidence.gather(
            session.lab,
            absent,
            precisions,
            seed,
            archs,
            thorough,
            lambda kind, text: session.say(f"{kind} {text}"),
            done,
        )
    except BaseException:  # Ctrl-C after minutes of compilers leaves what they had
        session.keep(done)
        raise
    session.keep(proofs)
    return proofs


BROKEN = Status.FAILED_COMPILE, Status.FAILED_LAUNCH, Status.FAILED_CRASH, Status.TIMEOUT


def verdict(records: Sequence[Record], loaded: Sequence[str] = ()) -> ExitCode:
    """1 if something is wrong, or one of `loaded` fails, 4 if nothing could run, else 0.

    A competitor of ours that cannot run here is no fault of the user's; a kernel that somebody brings (`--load`) and
    that crashes is what a test of it has to notice.
    """
    if any(r.status == Status.WRONG or (r.status in BROKEN and r.impl in loaded) for r in records):
        return ExitCode.REGRESSION
    measured = [r for r in records if r.evidence == Evidence.MEASURED]
    if measured and not any(r.status == Status.OK for r in records):
        return ExitCode.NOTHING_RAN
    return ExitCode.OK
