"""`campaign`: the most from ten minutes at a fresh device, in one command that can be killed and goes on.

Phases: ceilings; every competitor checked, most uncertain first; a race of defaults, of the analytic model's
favourites and of every torch call; tuning by share of roof still missing; a final race; energy; a summary. Each has
its share of the time, and no single request may take more than a part of it, so a kernel that hangs costs seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rooftune import registry, sensors
from rooftune.autotune.limits import Budget
from rooftune.autotune.ranking import Gpu
from rooftune.commands import campaign_summary, common
from rooftune.commands.campaign_phases import check, final, first_race, probe
from rooftune.commands.campaign_plan import Home, Plan
from rooftune.commands.campaign_tune import energy, tune
from rooftune.commands.campaign_work import Campaign
from rooftune.commands.run import verdict
from rooftune.core import ExitCode, Problem, Unavailable, UsageError
from rooftune.energy import Energy
from rooftune.evidence import compile_problem
from rooftune.lab import OutOfTime
from rooftune.registry import Impl
from rooftune.session import Session
from rooftune.suites import catalogue

PRECISIONS = {"cpu": ("fp32",)}  # of a campaign that names none; a GPU's are below
GPU_PRECISIONS = ("bf16", "fp8", "int8")
LEAST_S = 10.0
PHASES: dict[str, Callable[[Campaign], None]] = {  # as in campaign_plan.SHARES, which holds their time
    "probe": probe,
    "check": check,
    "race": first_race,
    "tune": tune,
    "final": final,
    "energy": energy,
}


def campaign(chosen: argparse.Namespace) -> ExitCode:
    """Run what is left of the campaign in `--out`. What was measured is on disk at every moment."""
    common.check_targets(chosen)
    budget_s = Budget.parse(chosen.budget).seconds
    if budget_s is None or budget_s < LEAST_S:
        raise UsageError(f"--budget {chosen.budget}: a campaign needs a time of at least {LEAST_S:g} s, such as 9m")
    loaded = common.users(chosen)
    name = common.device_name(chosen)
    kind = name.partition(":")[0]
    problems = _problems(chosen, kind, loaded)
    field = {op: _field(chosen, op, loaded, kind) for op in dict.fromkeys(p.op for p in problems)}
    console = common.console(chosen)

    def tell(text: str) -> None:
        session.clear()
        console.print(text, markup=False)

    begin = time.monotonic()
    home = Home(Path(chosen.out), lambda text: console.print(text, markup=False))
    with Session("campaign", name, chosen.threads, chosen.quiet, home.path) as session:
        home.open(session.run, session.about["identity"])
        if not home.steps:
            session.check_user_files(loaded, {p.op: p for p in problems})
        else:
            tell(f"going on in {home.folder}: {len(home.steps)} finished steps are not repeated")
        sensor = sensors.find_sensor(session.device)
        plan = Plan(budget_s - (time.monotonic() - begin), "energy" if isinstance(sensor, Energy) else "")
        if isinstance(sensor, Energy):
            tell(f"energy: unavailable({sensor.reason})")
            if not home.done("energy"):
                home.finish("energy", "energy", "unavailable", reason=sensor.reason)
        work = Campaign(session, home, plan, problems, field, chosen.seed)
        work.free_bytes = session.device.memory_bytes().free
        try:
            _phases(work, tell)
        finally:  # also after Ctrl-C: the records so far, and what they say
            session.lab.close()
            home.fit()
            session.clear()
            campaign_summary.show(work, console)
            common.write(chosen, home.records)
    return verdict([r for r in home.records if r.source_hash == work.sources.get(r.impl)])


def _phases(work: Campaign, say: Callable[[str], None]) -> None:
    """All phases in order; one whose steps are all done takes no time.

    A step that is under way at a phase's end has some time more (`Plan.break_off`); then it is broken off, without
    an outcome, and the next phase begins.
    """
    for phase, walk in PHASES.items():
        if phase == "tune":  # a small budget's tuning left no time for a single final race
            work.plan.keep("final", work.a_final_s())
        seconds = work.plan.enter(phase)
        if work.plan.shares[phase] == 0.0:
            continue
        say(f"{work.plan.spent():4.0f} s  {phase}: up to {seconds:.0f} s")
        work.session.lab.patience_s = work.patience_s(seconds)
        work.session.lab.until = work.plan.break_off()
        try:
            walk(work)
        except OutOfTime as late:
            say(f"{work.plan.spent():4.0f} s  {phase}: broken off ({late})")
        if phase == "probe":
            work.gpu = Gpu.of(work.session.fingerprint, work.ceilings)


def _problems(chosen: argparse.Namespace, kind: str, loaded: Sequence[Impl]) -> list[Problem]:
    """Named problems; else the suite's, the first precision of every operator before the second of any.

    Raises:
        UsageError: unknown names, or nothing to do.
    """
    texts = [w for w in chosen.what if "[" in w]
    ops = [w for w in chosen.what if "[" not in w] or ([] if texts else _ops(loaded, kind))
    found = [registry.problem(text) for text in texts]
    for name in ops:
        registry.op(name)
    for precision in common.precisions(chosen) if chosen.precision else PRECISIONS.get(kind, GPU_PRECISIONS):
        for name in ops:
            if precision in registry.op(name).precisions:
                found += _of_suite(name, precision, kind)
    if not found:
        raise UsageError("no problem for these operators and precisions; name one: gemm[m=512,n=512,k=512,fp32]")
    common.check_wanted(loaded, found)
    return list(dict.fromkeys(found))


def _ops(loaded: Sequence[Impl], kind: str) -> list[str]:
    """Those of the loaded files; else the suite's in its order, then those it does not name for which there is more
    here than torch."""
    if loaded:
        return sorted({impl.op for impl in loaded})
    named = [op for op in catalogue.operators("campaign", kind) if op in registry.op_names()]
    return [*named, *(op for op in registry.op_names() if op not in named and _contested(op, kind))]


def _contested(op: str, kind: str) -> bool:
    ours = (i for i in registry.impls(op) if not i.baseline and not i.per_shape)
    return any(kind in i.devices and not i.missing for i in ours)


def _of_suite(op: str, precision: str, kind: str) -> list[Problem]:
    try:
        return catalogue.problems("campaign", [op], [precision], kind)
    except UsageError:  # an operator that the suite does not name
        return [
            compile_problem(op, precision) if kind != "cpu" else registry.problem(registry.op(op).small(precision)[0])
        ]


def _field(chosen: argparse.Namespace, op: str, loaded: Sequence[Impl], kind: str) -> list[Impl]:
    """Competitors that can run here.

    Raises:
        Unavailable: none.
    """
    here = [i for i in common.impls(chosen, op, loaded) if kind in i.devices and not i.missing]
    if not here:
        raise Unavailable(f"no competitor of {op} runs on {kind}")
    return here
