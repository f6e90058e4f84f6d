"""The phases of a campaign that tune and that meter energy."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator

from rooftune import race
from rooftune.autotune import ranking, tuner
from rooftune.autotune.table import Table
from rooftune.commands.campaign_plan import shares_of
from rooftune.commands.campaign_work import Campaign
from rooftune.core import Config, Problem, RooftuneError
from rooftune.lab import OutOfTime
from rooftune.registry import Impl
from rooftune.results.record import Record

PROSPECT = 2.0  # times the fastest on record: tuning seldom gains more, and this is for who may win
LEAST_TUNE_S = 30.0  # a slice below this is spent on starting processes
FINAL_S = 20.0  # of a tuning's own final, in two fresh processes; corrected by what it took
# The 63 s a competitor of the whole protocol (metering.py) do not fit.
ENERGY = {"windows": 3, "window_s": 4.0, "idle_s": 2.0, "warm_s": 2.0}
ENERGY_S = 18.0  # what these take


def tune(work: Campaign) -> None:
    """Time by the share of the roof that the best config so far still misses, to the neediest few."""
    missing = {pair: share for pair, share in missing_roof(work).items() if not work.home.done(tune_key(*pair))}
    dealt = shares_of(missing, max(0.0, work.plan.left()), LEAST_TUNE_S)
    final_s = FINAL_S
    for number, ((impl, problem), _) in enumerate(dealt):
        rest = sum(share for _, share in dealt[number:])
        slice_s = max(0.0, work.plan.left()) * dealt[number][1] / rest
        if slice_s < LEAST_TUNE_S / 2 or work.home.full():
            break
        budget_s = max(2.0, slice_s - final_s)
        begin = work.plan.clock()
        with _no_longer_than(work, 1.5 * slice_s):
            _tune(work, impl, problem, budget_s)
        final_s = max(3.0, 0.5 * final_s + 0.5 * (work.took(begin) - budget_s))


@contextlib.contextmanager
def _no_longer_than(work: Campaign, seconds: float) -> Iterator[None]:
    """A tuning that overruns is broken off, and the next one begins; its journal stays, so that it can be resumed."""
    lab = work.session.lab
    phase_end, mine = lab.until, time.monotonic() + seconds
    lab.until = min(phase_end, mine)
    try:
        yield
    except OutOfTime:
        if mine >= phase_end:
            raise
    finally:
        lab.until = phase_end


def missing_roof(work: Campaign) -> dict[tuple[Impl, Problem], float]:
    """(competitor, problem) -> share of the roof its best config misses; without a roof, of the best torch call's
    speed doubled. Baselines, and what has nothing to tune or no prospect of being the fastest, are left out."""
    found: dict[tuple[Impl, Problem], float] = {}
    for problem in work.problems:
        timed = work.timed(problem)
        slowest = PROSPECT * min((r.time_s for r in timed if r.time_s is not None), default=math.inf)
        for impl in work.healthy(problem):
            mine = [r for r in timed if r.impl == impl.key]
            fast = any(r.time_s is not None and r.time_s <= slowest for r in mine)
            if fast and not impl.baseline and not impl.per_shape:
                reached = max(r.roof if r.roof is not None else (r.ratio_to_torch or 0.0) / 2 for r in mine)
                found[impl, problem] = max(0.0, 1.0 - reached)
    return found


def _tune(work: Campaign, impl: Impl, problem: Problem, budget_s: float) -> None:
    key = tune_key(impl, problem)
    name = re.sub(r"[^a-z0-9]+", "-", f"{impl.key} {problem}".lower()).strip("-")
    about = {"impl": impl.key, "problem": str(problem), "budget_s": round(budget_s, 1)}
    try:
        if len(work.session.lab.space(impl, problem)["configs"]) < 2:
            work.home.finish(key, "tune", "skipped", reason="has one config", **about)
            return
        result = tuner.tune(
            work.session.lab,
            impl,
            problem,
            f"{budget_s:.1f}s",
            seed=work.seed,
            journal_path=work.home.folder / "tune" / f"{name}.jsonl",
            identity=work.session.about["identity"],
            options=race.Options(rounds=10, min_sample_s=1e-3),
            table=Table(work.home.folder / "tuned.json"),
            prior=ranking.ranker(impl, problem, work.gpu),
            event=lambda kind, text: work.session.say(f"tune {impl.key} {problem}: {text}"),
        )
    except OutOfTime:
        raise
    except RooftuneError as error:
        work.home.finish(key, "tune", "failed", reason=str(error), **about)
        return
    finally:
        work.session.lab.retire(impl)
    work.home.finish(key, "tune", "ok", result=result.as_json(), **about)


def best_config(work: Campaign, impl: Impl, problem: Problem) -> Config | None:
    """The tuned config if there is one, else the fastest that raced; None if that is the default."""
    tuned = work.home.done(tune_key(impl, problem))
    if tuned is not None and tuned["status"] == "ok" and tuned["result"]["better"]:
        found: Config = tuned["result"]["config"]
        return found
    mine = [r for r in work.timed(problem) if r.impl == impl.key and not impl.baseline and not impl.per_shape]
    best = min(mine, key=lambda r: r.time_s or 0.0, default=None)
    return None if best is None or best.default else best.config


def energy(work: Campaign) -> None:
    """Joules per call of the best of ours and the best torch call, problem by problem."""
    for problem in work.problems:
        timed = [r for r in work.timed(problem) if r.regime.get("phase") == "final"]
        for torch in (False, True):
            mine = [r for r in timed if work.is_torch(r.impl) == torch]
            best = min(mine, key=lambda r: r.time_s or 0.0, default=None)
            if best is None:
                continue
            key = f"energy {problem} {best.impl} {best.config} {best.source_hash}"
            if not work.home.done(key) and work.room(ENERGY_S):
                _energy(work, key, problem, best)


def _energy(work: Campaign, key: str, problem: Problem, record: Record) -> None:
    begin = work.plan.clock()
    impl = next(i for i in work.field[problem.op] if i.key == record.impl)
    lab = work.session.lab
    about = {"impl": impl.key, "problem": str(problem), "config": record.config}
    reply = lab.prepare(impl, problem, record.config, work.seed, thorough=False)
    if reply.ok:
        with lab.exclusive():
            reply = lab.measure_energy(impl, reply.data["handle"], work.seed, **ENERGY)
    lab.retire(impl)
    found = reply.data.get("energy") or {}
    work.took(begin)
    work.home.finish(key, "energy", str(reply.status), reason=reply.reason, energy=found, **about)


def tune_key(impl: Impl, problem: Problem) -> str:
    """Of the step that tunes a competitor's present source on a problem."""
    return f"tune {impl.key} {problem} {impl.source_hash}"
