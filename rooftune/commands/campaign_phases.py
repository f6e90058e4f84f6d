"""The phases of a campaign that check and race. Each walks its steps while there is time, and leaves every outcome
in the folder; what was finished there is not repeated."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

from rooftune import evidence, race, registry, static
from rooftune.autotune import ranking
from rooftune.commands.campaign_tune import best_config
from rooftune.commands.campaign_work import Campaign
from rooftune.core import Config, Evidence, Problem, Unavailable, UsageError
from rooftune.device_cpu import cores
from rooftune.lab import OutOfTime, Reply
from rooftune.registry import Impl
from rooftune.results.record import Record
from rooftune.session import COPIES

RACE_ROUNDS, FINAL_ROUNDS = 6, 12
FAVOURITES = 2  # configs of the analytic model that race beside a default
RANKED = 4000  # configs that it looks at: half a second
SLOW_BUILD_S = 3.0  # of a competitor's config: a race would wait for it, as for Numba's products on a GPU
FEW = 2  # builders still at work: the other cores rest
AUTOTUNED = {"mode": "max-autotune-no-cudagraphs"}  # torch.compile's slow mode is an entrant of its own on a GPU


def probe(work: Campaign) -> None:
    """Ceilings: measured once, or read from the folder."""
    if work.home.ceilings is not None:
        work.session.know(work.home.ceilings)
    try:
        work.ceilings = work.home.ceilings = work.session.ceilings
    except OutOfTime:
        raise
    except (Unavailable, UsageError) as error:  # no roof then, but times and ratios
        work.home.finish("probe", "probe", "failed", reason=str(error))


def check(work: Campaign) -> None:
    """Every competitor on small problems, thoroughly, each in a process of its own; several at a time. Beside a GPU
    what is right goes on to build what the first races will time: defaults, and favourites while many are at it."""
    wanted = work.to_check()
    doubt = evidence.on_record(impl for impl, _ in wanted)
    order = sorted(wanted, key=lambda w: _uncertainty(doubt[w[0].key]), reverse=True)
    stop, lost, few, lock = threading.Event(), threading.Event(), threading.Event(), threading.Lock()
    pool = ThreadPoolExecutor(_at_once(work))
    ahead: set[Future[None]] = {pool.submit(_build_ahead, work, impl, stop, few, lock) for impl in _compilers(work)}
    checks = {pool.submit(_check, work, impl, asked, stop, lost, lock): impl for impl, asked in order}
    try:
        while checks or ahead:
            finished = wait([*checks, *ahead], timeout=1.0, return_when=FIRST_COMPLETED).done
            for task in finished:
                task.result()
                ahead.discard(task)
                impl = checks.pop(task, None)
                if impl is not None and work.session.device.kind != "cpu":
                    ahead.add(pool.submit(_build_ahead, work, impl, stop, few, lock))
            if not checks and len(ahead) <= FEW:
                few.set()
            if work.plan.left() <= 0:
                stop.set()  # what has begun ends, within its patience
    except BaseException:
        lost.set()  # workers are ended from outside: what they then say is nobody's outcome
        raise
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _at_once(work: Campaign) -> int:
    """Checks and compilers side by side: most of either is a core's work also where a GPU runs the kernels. Beside an
    H200 16 cores checked 72 competitors and precisions in 80 s, 13 at a time."""
    here = cores()
    if work.session.device.kind == "cpu":
        return max(1, min(4, here // 2 + 1))
    return max(4, min(16, here))


def _compilers(work: Campaign) -> list[Impl]:
    """Competitors that compile for each shape (3 s for a softmax, beside an H200), which a GPU need not wait for."""
    if work.session.device.kind == "cpu":
        return []
    return [impl for impls in work.field.values() for impl in impls if impl.per_shape]


def _build_ahead(work: Campaign, impl: Impl, stop: threading.Event, few: threading.Event, lock: threading.Lock) -> None:
    """Build a competitor of the first races while others are checked: its worker keeps what it built. What fails here
    fails in the race, which says so. `few`: most cores rest, so only what every race has is worth the wait."""
    with lock:  # checks add steps meanwhile
        raced = {p for p in work.problems if any(key.startswith(f"race {p} ") for key in work.home.steps)}
        open_problems = [p for p in work.problems if p not in raced and p.op == impl.op and impl in work.healthy(p)]
    for favourites in (False, True):  # those in every race first
        for problem in open_problems:
            try:
                configs = _best_by_model(work, problem, impl) if favourites else [_default(work, problem, impl)]
                for config in configs:
                    if stop.is_set() or (favourites and few.is_set()):
                        return
                    work.session.say(f"build {impl.key} {problem}")
                    begin = time.monotonic()
                    reply = work.session.lab.prepare(impl, problem, config, work.seed, thorough=False)
                    work.built(impl, problem, config, time.monotonic() - begin)
                    if reply.ok:
                        work.session.lab.release(impl, reply.data["handle"])
            except (OutOfTime, UsageError):
                return


def _default(work: Campaign, problem: Problem, impl: Impl) -> Config:
    found: Config = work.session.lab.space(impl, problem)["default"]
    return found


def _check(
    work: Campaign,
    impl: Impl,
    precisions: Sequence[str],
    stop: threading.Event,
    lost: threading.Event,
    lock: threading.Lock,
) -> None:
    for precision in precisions:
        key = work.check_key(impl, precision)
        if work.home.done(key) or stop.is_set():
            continue
        work.session.say(f"check {impl.key} {precision}")
        begin = time.monotonic()
        small = registry.problem(registry.op(impl.op).small(precision)[0])
        config: Config = {}
        reply = work.session.lab.ask(impl, "space", 60.0, problem=str(small))
        if reply.ok:
            config = reply.data["default"]
            reply = work.session.lab.prepare(impl, small, config, work.seed, thorough=True)
        if lost.is_set():
            return
        with lock:
            work.keep([_checked(impl, small, config, reply)])
            about = {"impl": impl.key, "precision": precision, "source_hash": impl.source_hash}
            spent_s = round(time.monotonic() - begin, 2)
            work.home.finish(key, "check", str(reply.status), reason=reply.reason, spent_s=spent_s, **about)
        if not reply.ok:  # its context may be damaged; a sound process goes on to the race
            work.session.lab.retire(impl)


def first_race(work: Campaign) -> None:
    """Defaults, the analytic favourites, and torch's calls; few rounds, the most valuable problem first."""
    for problem in work.problems:
        impls = work.healthy(problem)
        key = f"race {problem} {_digest(work.sources[i.key] for i in impls)}"
        if not impls or work.home.done(key) or not work.room():
            continue
        _race(work, key, "race", problem, impls, _favourites(work, problem, impls), RACE_ROUNDS)


def final(work: Campaign) -> None:
    """Again with the best config of each competitor beside its default, and with every torch call, torch.compile's
    max-autotune among them: more rounds, the numbers to carry home."""
    for problem in work.problems:
        extra = []
        for impl in work.healthy(problem):
            best = best_config(work, impl, problem)
            if best is not None:
                extra.append(race.Entrant(impl, best, False))
        impls = work.healthy(problem)
        configs = [f"{e.impl.key} {e.config}" for e in extra]
        key = f"final {problem} {_digest([*(work.sources[i.key] for i in impls), *configs])}"
        if impls and not work.home.done(key) and work.room():
            _race(work, key, "final", problem, impls, [*extra, *_autotuned(work, impls)], FINAL_ROUNDS)


def _race(
    work: Campaign,
    key: str,
    phase: str,
    problem: Problem,
    impls: Sequence[Impl],
    extra: list[race.Entrant],
    rounds: int,
) -> None:
    begin = work.plan.clock()
    need = registry.op(problem.op).memory_bytes(problem) * COPIES
    if work.free_bytes is not None and need > work.free_bytes:
        reason = f"needs {need / 2**30:.1f} GiB, {work.free_bytes / 2**30:.1f} are free"
        work.home.finish(key, phase, "skipped", problem=str(problem), reason=reason)
        return
    options = race.Options(rounds=rounds, min_sample_s=1e-3, seed=work.seed, thorough=False)

    def event(kind: str, text: str) -> None:
        work.session.say(f"{phase} {text if kind == 'time' else f'{problem}: {kind} {text}'}")

    records = race.race(work.session.lab, problem, impls, options, work.ceilings, extra, set(), event)
    for record in records:
        record.regime["phase"] = phase
    work.keep(records)
    work.home.finish(key, phase, "ok", problem=str(problem), spent_s=round(work.took(begin), 2))


def _favourites(work: Campaign, problem: Problem, impls: Sequence[Impl]) -> list[race.Entrant]:
    """The configs that the analytic model puts first, where it knows the device and the axes. A competitor that takes
    long to build has those that were built ahead: a race would stand still for the others."""
    found: list[race.Entrant] = []
    for impl in impls:
        try:
            best = _best_by_model(work, problem, impl)
        except UsageError:
            continue  # the race says what is wrong with it
        if work.build_s(impl) > SLOW_BUILD_S:
            best = [config for config in best if work.is_built(impl, problem, config)]
        found += [race.Entrant(impl, config, False) for config in best]
    return found


def _best_by_model(work: Campaign, problem: Problem, impl: Impl) -> list[Config]:
    if work.gpu is None or impl.baseline or impl.per_shape:
        return []
    space = work.session.lab.space(impl, problem)
    configs = space["configs"]
    if len(configs) > RANKED:
        configs = random.Random(work.seed).sample(configs, RANKED)
    compiled = static.known(impl, problem, configs, work.gpu.arch)
    scores = ranking.prior(impl, problem, configs, work.gpu, compiled)
    if scores is None:
        return []
    order = sorted(range(len(scores)), key=scores.__getitem__)
    return [configs[n] for n in order[: FAVOURITES + 1] if configs[n] != space["default"]][:FAVOURITES]


def _autotuned(work: Campaign, impls: Sequence[Impl]) -> list[race.Entrant]:
    """torch.compile with max-autotune is a call that a user could pick, though it takes a minute; on a CPU several."""
    if work.session.device.kind == "cpu":
        return []
    return [race.Entrant(impl, dict(AUTOTUNED), False) for impl in impls if impl.per_shape]


def _uncertainty(standing: evidence.Standing) -> float:
    """Less is known: checked earlier. Nothing, compiled, emulated, measured; an older source counts half a step."""
    steps = {Evidence.MEASURED: 0.0, Evidence.EMULATED: 1.0, Evidence.COMPILED: 2.0}
    return min((steps[k] for k in standing.kinds), default=3.0) + (0.5 if standing.stale else 0.0)


def _checked(impl: Impl, problem: Problem, config: Config, reply: Reply) -> Record:
    return replace(evidence.record_of(impl, problem, config, Evidence.MEASURED, reply), regime={"phase": "check"})


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
