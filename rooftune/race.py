"""The race: many competitors, one problem, one device; checked, then timed in interleaved rounds.

In a round every competitor is timed once, in an order drawn anew from the logged seed; a round's statistic is its
25 % order statistic; ratios are Hodges-Lehmann estimates over rounds with an exact signed-rank interval. The number
of rounds is fixed beforehand.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rooftune import pools, registry
from rooftune.core import Candidate, Config, Evidence, Op, Problem, Status, UsageError
from rooftune.device_cpu import cores
from rooftune.lab import Lab, Reply
from rooftune.registry import Impl
from rooftune.results import statistics
from rooftune.results.record import Record
from rooftune.spaces import NoConfig

Event = Callable[[str, str], None]  # (kind, text): "prepare", "time", "failed", ...
SLOW_S = 0.1  # calls above this get three samples a round instead of five
VERIFY_SHARE = 0.2  # of the rounds end with a check of the timed output; the last one always does


@dataclass(frozen=True)
class Options:
    """How to time. `rounds` >= 6 is the least for a 95 % interval (exact signed-rank)."""

    rounds: int = 10
    launches: int = 1
    samples: int = 5
    min_sample_s: float = 2e-3
    cache: str = "hot"
    clock: str = "wall"
    seed: int = field(default_factory=lambda: secrets.randbits(31))
    thorough: bool = True
    energy: bool = False


@dataclass
class Entrant:
    """A candidate on its way through the race."""

    impl: Impl
    config: Config
    default: bool
    status: Status = Status.OK
    reason: str = ""
    error: dict[str, Any] | None = None
    handle: int | None = None
    estimate_s: float | None = None
    rounds: list[list[float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    build_s: float | None = None
    energy: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        call = self.config.get("call")
        name = f"{self.impl.key}:{call}" if call else self.impl.key + ("" if self.default else "*")
        return f"{name} of {self.impl.home.name}" if self.impl.home else name

    @property
    def candidate(self) -> Candidate:
        return Candidate.of(self.impl.key, self.config)

    def fail(self, reply: Reply) -> None:
        """Out of the race: no time stays beside a failure."""
        self.status, self.reason = reply.status, reply.reason
        self.rounds.clear()
        self.handle = None


def entrants(lab: Lab, problem: Problem, impls: Iterable[Impl], event: Event) -> list[Entrant]:
    """Who starts: every competitor with its default config; of the baseline, each call a user could pick.

    One that is not installed, or does not do this precision or device, is listed as skipped with the reason.
    """

    def one(impl: Impl) -> list[Entrant]:
        reason = impl.missing or _unfit(impl, problem, lab.kind)
        if reason:
            return [Entrant(impl, {}, True, Status.SKIPPED, reason)]
        event("prepare", impl.key)
        try:
            space = lab.space(impl, problem)
        except NoConfig as error:
            return [Entrant(impl, {}, True, Status.SKIPPED, str(error))]
        except UsageError as error:
            return [Entrant(impl, {}, True, Status.FAILED_COMPILE, str(error))]
        axis = space["entrants"]
        if axis is None:
            return [Entrant(impl, space["default"], True)]
        starters = {c[axis]: c for c in reversed(space["configs"]) if _alike(c, space["default"], axis)}
        calls = [starters[value] for value in space["axes"][axis] if value in starters]
        return [Entrant(impl, config, config == space["default"]) for config in calls]

    with pools.asking(lab, at_once(lab)) as pool:  # a worker imports its backend first: seconds each
        return [entrant for group in pool.map(one, impls) for entrant in group]


def _alike(config: Config, default: Config, axis: str) -> bool:
    return all(config[a] == default[a] for a in config if a != axis)


def _unfit(impl: Impl, problem: Problem, kind: str) -> str:
    if kind not in impl.devices:
        return f"runs on {', '.join(impl.devices)}, not on {kind}"
    if problem.precision not in impl.precisions:
        return f"does not do {problem.precision} (only {', '.join(impl.precisions)})"
    return ""


def checked(problem: Problem, entrant: Entrant) -> Any:
    """What the thorough check of an entrant holds for: `prepare` remembers it as seen."""
    found = (entrant.impl.path, problem.precision, problem.flags, entrant.candidate)
    return (*found, problem) if entrant.impl.per_shape else found


def prepare(
    lab: Lab, problem: Problem, field_: Sequence[Entrant], options: Options, seen: set[Any], event: Event
) -> None:
    """Build and check everyone, some competitors at a time; a failure leaves the race with its reason.

    `seen` holds what passed the thorough check (ragged shapes, adversarial values) in this session.
    """

    def work(group: list[Entrant]) -> None:
        for entrant in group:
            event("prepare", entrant.label)
            key = checked(problem, entrant)
            seed = random.Random(f"{options.seed}:{problem}:{entrant.label}").getrandbits(31)
            thorough = options.thorough and key not in seen
            reply = lab.prepare(entrant.impl, problem, entrant.config, seed, thorough)
            if not reply.ok:
                entrant.error = reply.data.get("error")
                entrant.fail(reply)
                event("failed", f"{entrant.label}: {reply.status} {reply.reason}")
                continue
            seen.add(key)
            if entrant.error is None or thorough:
                entrant.error = reply.data["error"]
            entrant.handle, entrant.build_s = reply.data["handle"], reply.data["build_s"]

    groups: dict[Path, list[Entrant]] = {}
    for entrant in field_:
        if entrant.status == Status.OK and entrant.handle is None:
            groups.setdefault(entrant.impl.path, []).append(entrant)
    with pools.asking(lab, at_once(lab)) as pool:
        list(pool.map(work, groups.values()))


def at_once(lab: Lab) -> int:
    """How many competitors get ready together: two on a CPU, which they all load; more where compilers run beside
    a GPU."""
    return 2 if lab.kind == "cpu" else max(2, min(12, cores() - 2))


def time_rounds(
    lab: Lab,
    problem: Problem,
    field_: Sequence[Entrant],
    options: Options,
    rounds: int,
    event: Event,
    last: bool = True,
) -> None:
    """Interleaved rounds among those that are prepared; appends to `Entrant.rounds`."""
    rng = random.Random(f"{options.seed}:{problem}:{len(field_[0].rounds) if field_ else 0}")
    for number in range(rounds):
        order = [e for e in field_ if e.handle is not None]
        rng.shuffle(order)
        for entrant in field_:
            entrant.rounds.append([])  # stays empty if the round is lost: rounds are paired by their number
        with lab.exclusive():
            for entrant in order:
                if entrant.handle is None:
                    continue  # went with its worker, which another config of the same competitor ended in this round
                slow = (entrant.estimate_s or 0.0) > SLOW_S
                verify = (last and number == rounds - 1) or rng.random() < VERIFY_SHARE
                reply = lab.time(
                    entrant.impl,
                    entrant.handle,
                    rng.getrandbits(31),
                    max(30.0, 100 * (entrant.estimate_s or 0.0)),
                    verify=verify,
                    samples=3 if slow else options.samples,
                    min_sample_s=options.min_sample_s,
                    cache=options.cache,
                    clock=options.clock,
                )
                if not reply.ok:
                    if reply.status == Status.WRONG:  # its worker lives: give the tensors back
                        lab.release(entrant.impl, entrant.handle)
                    entrant.fail(reply)
                    event("failed", f"{entrant.label}: {reply.status} {reply.reason}")
                    for other in field_:  # its worker is gone, and with it what else it had prepared
                        if other.impl is entrant.impl and other is not entrant and reply.status != Status.WRONG:
                            other.handle = None
                    continue
                samples = reply.data["samples_s"]
                entrant.rounds[-1] = samples
                entrant.estimate_s = entrant.estimate_s or min(samples)
                for note in reply.data.get("notes") or ():
                    if note not in entrant.notes:
                        entrant.notes.append(note)
        event("time", f"{problem} round {number + 1}/{rounds}")
        field_ = [e for e in field_ if e.status == Status.OK]
        lost = [e for e in field_ if e.handle is None]
        if lost:
            prepare(lab, problem, lost, replace(options, thorough=False), set(), event)


def race(
    lab: Lab,
    problem: Problem,
    impls: Iterable[Impl],
    options: Options,
    ceilings: dict[str, Any] | None = None,
    extra: Sequence[Entrant] = (),
    seen: set[Any] | None = None,
    event: Event = lambda kind, text: None,
) -> list[Record]:
    """Run one problem and judge it. The order of the result is that of the entrants.

    Args:
        extra: further entrants, such as tuned configs.
        seen: shared between the problems of a run: who passed the thorough check.
    """
    field_ = [*entrants(lab, problem, impls, event), *extra]
    seen = set() if seen is None else seen
    runners = [e for e in field_ if e.status == Status.OK]
    run_rounds(lab, problem, runners, options, seen, event)
    if options.energy:
        measure_energy(lab, runners, options, event)
    for entrant in runners:
        if entrant.handle is not None:
            lab.release(entrant.impl, entrant.handle)
    return judge(registry.op(problem.op), problem, field_, options, ceilings, lab)


def run_rounds(
    lab: Lab, problem: Problem, runners: Sequence[Entrant], options: Options, seen: set[Any], event: Event
) -> None:
    """All rounds of everyone, with fresh processes for every launch after the first."""
    for launch, rounds in enumerate(statistics.shares(options.rounds, options.launches)):
        if launch:
            for entrant in runners:
                lab.retire(entrant.impl)
                entrant.handle = None
        prepare(lab, problem, runners, options if not launch else replace(options, thorough=False), seen, event)
        time_rounds(lab, problem, [e for e in runners if e.status == Status.OK], options, rounds, event)


def measure_energy(lab: Lab, runners: Sequence[Entrant], options: Options, event: Event) -> None:
    """Joules per call of everyone still in the race, in random order, after the timing."""
    rng = random.Random(f"{options.seed}:energy")
    for entrant in rng.sample(list(runners), len(runners)):
        if entrant.handle is not None:
            event("energy", entrant.label)
            with lab.exclusive():
                reply = lab.measure_energy(entrant.impl, entrant.handle, rng.getrandbits(31))
            if reply.ok:
                entrant.energy = reply.data["energy"]
            else:  # it failed under a load of seconds: that is a failure, its time goes too
                entrant.fail(reply)


def judge(
    op: Op, problem: Problem, field_: Sequence[Entrant], options: Options, ceilings: dict[str, Any] | None, lab: Lab
) -> list[Record]:
    """Turn rounds into records: times, ratios to the best torch call, share of the roof, the tie set."""
    from rooftune import probe

    complete = {i: e for i, e in enumerate(field_) if any(e.rounds) and e.status == Status.OK}
    records: list[Record] = []
    judged_by = registry.judge_hash(problem.op)
    times = {i: statistics.summary(e.rounds) for i, e in complete.items()}
    baselines = [i for i, e in complete.items() if e.impl.baseline]
    best_torch = min(baselines, key=lambda i: times[i][0], default=None)
    leader, tied = statistics.tie_set({str(i): e.rounds for i, e in complete.items()}) if complete else ("", set())
    for index, entrant in enumerate(field_):
        record = Record(
            problem=str(problem),
            op=problem.op,
            shape=problem.shape,
            precision=problem.precision,
            impl=entrant.impl.key,
            config=entrant.config,
            default=entrant.default,
            status=entrant.status,
            reason=entrant.reason,
            evidence=Evidence.MEASURED,
            error=entrant.error,
            energy=entrant.energy,
            source_hash=entrant.impl.source_hash,
            judge_hash=judged_by,
            regime={
                "clock": options.clock,
                "cache": options.cache,
                "threads": lab.threads,
                "launches": options.launches,
                "seed": options.seed,
                "notes": entrant.notes,
            },
        )
        records.append(record)
        if index not in complete:
            continue
        time_s, low, high = times[index]
        record.rounds = entrant.rounds
        record.time_s = time_s
        record.time_ci_s = None if low is None or high is None else [low, high]
        record.tflops = op.flops(problem) / time_s / 1e12
        record.gbps = op.bytes(problem) / time_s / 1e9
        record.tie = str(index) in tied or str(index) == leader
        if ceilings is not None:
            floor_s, why = probe.roof(ceilings, op.bound, op.flops(problem), op.bytes(problem), problem.precision)
            record.roof = None if floor_s is None else floor_s / time_s
            if floor_s is not None and best_torch is not None:
                record.ratio_at_roof = times[best_torch][0] / floor_s
            record.regime["roof"] = why
        if best_torch is not None:
            value, lo, hi = statistics.ratio(complete[best_torch].rounds, entrant.rounds)
            record.ratio_to_torch = value
            record.ratio_ci = None if lo is None or hi is None else [lo, hi]
        else:
            record.regime["ratio_to_torch"] = "no torch call ran on this problem"
    return records
