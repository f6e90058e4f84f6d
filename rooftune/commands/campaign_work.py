"""What the phases of a campaign share: its problems, who is healthy, what was timed, and how long things took."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from rooftune.autotune.ranking import Gpu
from rooftune.commands.campaign_plan import Home, Plan
from rooftune.core import Config, Problem, Status
from rooftune.registry import Impl
from rooftune.results.record import Record
from rooftune.session import Session

LEAST_PATIENCE_S, MOST_PATIENCE_S = 30.0, 90.0
FINAL_TO_FIRST = 1.8


@dataclasses.dataclass
class Campaign:
    """The state. `gpu` describes the device to the analytic model; None: it knows none of this kind."""

    session: Session
    home: Home
    plan: Plan
    problems: Sequence[Problem]
    field: dict[str, list[Impl]]
    seed: int
    gpu: Gpu | None = None
    ceilings: dict[str, Any] | None = None
    free_bytes: int | None = None  # of device memory at the start: asking a driver takes seconds
    sources: dict[str, str] = dataclasses.field(default_factory=dict)  # competitor -> hash of today's source
    _longest_s: dict[str, float] = dataclasses.field(default_factory=dict)  # phase -> its longest step so far
    _built: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # competitor -> what -> seconds

    def __post_init__(self) -> None:
        self.sources = {impl.key: impl.source_hash for impls in self.field.values() for impl in impls}

    def patience_s(self, phase_s: float) -> float:
        """The longest that one request of a phase may take: half of it, so that a hung kernel leaves the rest.
        The ceilings are one request."""
        return (
            MOST_PATIENCE_S if self.plan.phase == "probe" else min(MOST_PATIENCE_S, max(LEAST_PATIENCE_S, phase_s / 2))
        )

    def room(self, least_s: float = 0.5) -> bool:
        """Whether a step like this phase's longest would end in time, or nearly; none is shorter than `least_s`."""
        return self.plan.left() > 0.6 * max(self._longest_s.get(self.plan.phase, 0.0), least_s / 0.6)

    def built(self, impl: Impl, problem: Problem, config: Config, seconds: float) -> None:
        """A competitor's worker was asked for a config ahead of the race."""
        self._built.setdefault(impl.key, {})[f"{problem} {config}"] = seconds

    def is_built(self, impl: Impl, problem: Problem, config: Config) -> bool:
        """Whether it was asked for ahead."""
        return f"{problem} {config}" in self._built.get(impl.key, {})

    def build_s(self, impl: Impl) -> float:
        """The longest that a competitor took to build and check a config ahead; 0 where nothing was."""
        return max(self._built.get(impl.key, {}).values(), default=0.0)

    def took(self, begin: float) -> float:
        seconds = self.plan.clock() - begin
        self._longest_s[self.plan.phase] = max(seconds, self._longest_s.get(self.plan.phase, 0.0))
        return seconds

    def a_final_s(self) -> float:
        """What one final race takes, judged by the longest race so far (here or in an earlier sitting): it has twice
        the rounds, and more entrants; the most of either is building and checking."""
        return FINAL_TO_FIRST * max((float(s.get("spent_s", 0.0)) for s in self.home.of("race")), default=0.0)

    def keep(self, records: Iterable[Record]) -> None:
        self.session.keep(self.home.compact(records))

    def to_check(self) -> list[tuple[Impl, list[str]]]:
        """Competitors that are no call of torch's, with the precisions they are asked for."""
        wanted: dict[str, tuple[Impl, list[str]]] = {}
        for problem in self.problems:
            for impl in self.field[problem.op]:
                if problem.precision in impl.precisions and not impl.baseline and not impl.per_shape:
                    precisions = wanted.setdefault(impl.module, (impl, []))[1]
                    if problem.precision not in precisions:
                        precisions.append(problem.precision)
        return list(wanted.values())

    def healthy(self, problem: Problem) -> list[Impl]:
        """Competitors of a problem, without those whose check failed or hung in this precision."""
        bad = {
            (line["impl"], line["precision"])
            for line in self.home.of("check")
            if line["status"] not in (Status.OK, Status.SKIPPED)
            and line["source_hash"] == self.sources.get(line["impl"])
        }
        return [
            i
            for i in self.field[problem.op]
            if problem.precision in i.precisions and (i.key, problem.precision) not in bad
        ]

    def latest(self, problem: Problem) -> list[Record]:
        """Today's sources in the last final race of a problem; in its first race where nothing was timed in that."""
        mine = [r for r in self.home.records if r.problem == str(problem) and r.source_hash == self.sources.get(r.impl)]
        found: list[Record] = []
        for phase in ("final", "race"):
            newest = {f"{r.impl} {r.config}": r for r in mine if r.regime.get("phase") == phase}
            found = found or list(newest.values())
            if any(r.time_s is not None for r in newest.values()):
                return list(newest.values())
        return found

    def check_key(self, impl: Impl, precision: str) -> str:
        """Of the step that checks a competitor's present source."""
        return f"check {impl.key} {precision} {impl.source_hash}"

    def is_torch(self, key: str) -> bool:
        """Whether a competitor is a baseline, or torch's own compiler."""
        found = next((i for i in self.field.get(key.partition("/")[0], ()) if i.key == key), None)
        return found is not None and (found.baseline or found.per_shape)

    def timed(self, problem: Problem) -> list[Record]:
        """Times of today's sources on a problem."""
        return [
            r
            for r in self.home.records
            if r.problem == str(problem) and r.time_s is not None and r.source_hash == self.sources.get(r.impl)
        ]
