"""One competitor being tuned on one problem: what the search proposes is measured, journalled and told.

A job can be advanced bit by bit, so that many share one budget (`share`), and killed at any time: the journal
brings it back to where it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rooftune import device, race
from rooftune.autotune import final, search
from rooftune.autotune.ahead import Ahead
from rooftune.autotune.formats import Tuning
from rooftune.autotune.journal import SCHEMA, Journal, Trial, canonical, default_path, digest, toolchain
from rooftune.autotune.limits import Budget, constraint
from rooftune.autotune.past import Known, Prior, journals
from rooftune.autotune.trial import Bench
from rooftune.core import Config, Problem, Status
from rooftune.lab import Lab
from rooftune.registry import Impl

Event = race.Event


class Job:
    """A search with its journal.

    Args:
        search_name: a generator of `autotune.search`.
        seed: of the search, the data and the order of rounds; part of the journal's key.
        journal_path: default: a file per competitor and problem in the results folder.
        max_error: largest relative Frobenius error a config may have.
        where: constraints such as `block_m<=64`.
        identity: of the device, as `Device.identity()`; looked up if not given.
        options: how to time; `rounds` is that of each stage of the final.
        start: configs to try right after the default, such as those that won at other shapes.
        prior: a model's expected seconds for a list of configs, where there is one.
        history: earlier tunings of the same kernel, elsewhere; those of our own journals are found by themselves.
        also: configs to measure in any case, once the search's budget is spent: winners of other shapes.
    Raises:
        UsageError: unknown search, no valid config.
    """

    def __init__(
        self,
        lab: Lab,
        impl: Impl,
        problem: Problem,
        search_name: str = "surrogate",
        seed: int = 0,
        journal_path: Path | None = None,
        max_error: float | None = None,
        where: Sequence[str] = (),
        identity: dict[str, Any] | None = None,
        options: race.Options | None = None,
        also: Sequence[Config] = (),
        start: Sequence[Config] = (),
        prior: Prior | None = None,
        history: Sequence[Tuning] = (),
        event: Event = lambda kind, text: None,
    ) -> None:
        steps_of = search.find(search_name)
        self.lab, self.impl, self.problem, self.event = lab, impl, problem, event
        self.max_error = max_error
        self.timing = replace(options or race.Options(rounds=final.ROUNDS, min_sample_s=1e-3), seed=seed)
        found = lab.space(impl, problem)
        self.default: Config = found["default"]
        rules = [constraint(text) for text in where]
        configs = [c for c in found["configs"] if c != self.default and all(rule(c) for rule in rules)]
        texts = [canonical(c) for c in [self.default, *configs]]
        self._valid = set(texts)
        self.drawn: str = found.get("drawn", "")
        first = [self.default, *(c for c in start if self.valid(c))]
        space = Known.of(found["axes"], [self.default, *configs], start=first)
        assert isinstance(space, Known)
        self.space = space
        self.also = [c for c in also if self.valid(c)]
        self.what: dict[str, Any] = {
            "schema": SCHEMA,
            "impl": impl.key,
            "problem": str(problem),
            "source_hash": impl.source_hash,
            "toolchain": toolchain(impl),
            "device": identity if identity is not None else identity_of(lab),
            "threads": lab.threads,
            "timing": {"cache": self.timing.cache, "clock": self.timing.clock},
            "space": digest([found["axes"], sorted(texts)]),
            "search": search_name,
            "seed": seed,
            "max_error": max_error,
        }
        path = journal_path or default_path(impl, problem)
        self.journal = Journal(path, self.what, lambda text: event("journal", text))
        here = str(self.what["device"].get("name", ""))
        space.learn([*history, *journals(impl, problem, here, path)], prior)
        self._steps = steps_of(self.space, np.random.default_rng(seed))
        self._next = next(self._steps, None)
        drawn = np.random.default_rng(seed + 1).permutation(len(space))  # not by the search's own generator
        self._others = drawn if space.prior is None else np.argsort(space.prior, kind="stable")
        self.ahead = Ahead(lab, impl, problem, self.default)

    def valid(self, config: Config) -> bool:
        """Whether a config, such as another shape's winner, breaks no rule here."""
        return canonical(config) in self._valid

    @property
    def missing(self) -> list[Config]:
        """Of `also`, what has no outcome yet."""
        return [c for c in self.also if canonical(c) not in self.journal.trials]

    @property
    def exhausted(self) -> bool:
        """The search has nothing left to try."""
        return self._next is None

    @property
    def best(self) -> float | None:
        """The smallest value so far (of the default: 1)."""
        return min((t.value for t in self.journal.trials.values() if t.value is not None), default=None)

    def advance(self, budget: Budget, others: bool = True) -> None:
        """Ask, measure, tell, until the budget is spent or nothing is left; then the `others` given as `also`.

        A config whose outcome is in the journal is told and not measured.

        Raises:
            Unavailable: the competitor cannot run here, or stopped running.
        """
        started, before = time.monotonic(), self.journal.spent_s
        with Bench(self.lab, self.impl, self.problem, self.default, self.timing, self.max_error) as bench, self.ahead:
            if (known := self.journal.trials.get(canonical(self.default))) and known.value is None:
                bench.default_reason = f"{known.status} {known.reason}"
            while self._next is not None:
                trial = self.journal.trials.get(canonical(self._next))
                if trial is None:
                    if not budget.left(self.journal):
                        break
                    trial = self._measure(bench, self._next)
                    self._tell(trial, budget, before + time.monotonic() - started)
                elif trial.value is not None:
                    bench.leads(trial)
                try:
                    self._next = self._steps.send(search.Outcome(trial.value, str(trial.status), trial.reason))
                except StopIteration:
                    self._next = None
            for config in self.missing if others else ():
                self._tell(self._measure(bench, config), budget, before + time.monotonic() - started)

    def _measure(self, bench: Bench, config: Config) -> Trial:
        """Drop it by its machine code, or take the outcome of identical code, or measure it; keep the outcome."""
        trial = self.ahead.judge(config, self.journal.trials)
        if trial is None:
            self.ahead.expect(self._likely())
            if config != self.default:
                bench.ensure_default()
            trial = bench.measure(config)
        self.journal.add(trial)
        return trial

    def _likely(self) -> Iterator[Config]:
        """What the search may propose next. One that takes all in turn: those that follow. Another: one axis from the
        best so far, small steps first; then what the model expects most of, or any."""
        trials = self.journal.trials
        if self.what["search"] == "exhaustive" and self._next is not None:
            rows = np.arange(self.space.row(self._next) + 1, len(self.space))
        else:
            ran = [t for t in trials.values() if t.value is not None]
            best = self.space.row(min(ran, key=lambda t: t.value or 0.0).config if ran else self.default)
            near = np.flatnonzero(self.space.differs(best) == 1)
            steps = np.abs(self.space.index[near] - self.space.index[best]).sum(1)
            rows = np.concatenate([near[np.argsort(steps, kind="stable")], self._others])
        found = (self.space.config(int(row)) for row in rows)
        return (config for config in found if canonical(config) not in trials)

    def _tell(self, trial: Trial, budget: Budget, spent_s: float) -> None:
        trials = self.journal.trials
        values = [t.value for t in trials.values() if t.value is not None]
        best = f"best {1 / min(values):.2f}x" if values and trial.ratio is not None else f"{len(values)} ran"
        text = f"{len(trials)} of {len(self.space)} configs, {spent_s:.0f} s of {budget}, {best}"
        kind = "tune" if trial.status == Status.OK else "failed"
        self.event(kind, f"{text}; {canonical(trial.config)}: {_how(trial)}")


def _how(trial: Trial) -> str:
    if trial.status != Status.OK:
        return f"{trial.status} {trial.reason}"
    return f"{trial.time_s:.3g} s" + (", cut" if trial.cut else "")


def identity_of(lab: Lab) -> dict[str, Any]:
    """Identity of the device a Lab works on."""
    index = lab.device.partition(":")[2]
    return device.find(f"{lab.kind}:{index}" if index else lab.kind).identity()
