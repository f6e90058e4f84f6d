"""Searches: which config to try next. To add one, write a generator here.

A search is `def name(space, rng)`: it yields a config that was not tried yet and gets back its `Outcome`;
it ends when nothing is left to try. Its budget, its clock and what measuring means are the caller's. Every
public generator function of this module is a search under its own name.

Replayed over recorded spaces of real GPUs by `replay`, it is scored without one; see tests/unit/test_search.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rooftune.autotune.features import Array, Features, Rows
from rooftune.autotune.surrogate import Surrogate, diverse
from rooftune.autotune.warm import trend
from rooftune.core import Config, Unavailable, unknown

STARTS = 8  # diverse configs before the model takes over
KNOWN = 4  # configs that what is known beforehand expects to be fastest, before others
WARM = 10  # configs until histories have said what they know: a bad one may cost a tenth of 100


@dataclass(frozen=True)
class Outcome:
    """What became of a config: the objective (smaller is better), or None and why there is none."""

    value: float | None
    status: str = "ok"
    reason: str = ""


class SearchSpace:
    """The valid configs of one problem.

    Args:
        axes: name -> values.
        index: [configs, axes], the position of each value on its axis.
        start: configs to try first (the default one), most promising first.
        prior: a time expected of each config, by an analytic model; only the order counts, NaN is unknown.
        history: of the same kernel on other devices or shapes, [configs] each: best time there / time there,
            0 if it failed there, NaN if unknown; see `recall`.
    """

    def __init__(
        self,
        axes: Mapping[str, Sequence[Any]],
        index: Rows,
        start: Sequence[Config] = (),
        prior: Sequence[float] | Array | None = None,
        history: Sequence[Array] = (),
    ) -> None:
        self.axes = {name: list(values) for name, values in axes.items()}
        self.index = np.asarray(index, dtype=np.int64).reshape(len(index), len(self.axes))
        self._row = {tuple(line): i for i, line in enumerate(self.index.tolist())}
        self.start = [self.row(config) for config in start]
        self.prior = None if prior is None else np.asarray(prior, dtype=np.float64)
        self.history = [np.asarray(past, dtype=np.float64) for past in history]

    @classmethod
    def of(
        cls, axes: Mapping[str, Sequence[Any]], configs: Iterable[Config], start: Sequence[Config] = ()
    ) -> SearchSpace:
        """From config dicts."""
        index = [[_place(values, config[name]) for name, values in axes.items()] for config in configs]
        return cls(axes, np.array(index, dtype=np.int64), start)

    def __len__(self) -> int:
        return len(self.index)

    def config(self, row: int) -> Config:
        """The config in a row."""
        return {name: values[i] for (name, values), i in zip(self.axes.items(), self.index[row], strict=True)}

    def row(self, config: Config) -> int:
        """The row of a config; KeyError if it is not valid here."""
        return self._row[tuple(_place(values, config[name]) for name, values in self.axes.items())]

    def recall(self, past: Iterable[tuple[Config, float | None]]) -> Array:
        """A history from (config, time or None if it failed) elsewhere, without configs that are not valid here."""
        times = np.full(len(self), np.nan)
        for config, time in past:
            try:
                times[self.row(config)] = math.inf if time is None else time
            except (KeyError, ValueError):  # an axis or a value that this space lacks
                continue
        best = np.nanmin(times) if np.isfinite(times).any() else 1.0
        out: Array = best / times
        return out

    def differs(self, row: int) -> Rows:
        """On how many axes every config differs from one: [configs]."""
        return np.asarray((self.index != self.index[row]).sum(1))


Search = Generator[Config, Outcome, None]


def names() -> dict[str, Callable[[SearchSpace, np.random.Generator], Search]]:
    """Every search by name: the public generator functions of this module."""
    here = globals().values()
    return {f.__name__: f for f in here if inspect.isgeneratorfunction(f) and f.__name__[0] != "_"}


def find(name: str) -> Callable[[SearchSpace, np.random.Generator], Search]:
    """The search of that name.

    Raises:
        UsageError: there is none; the text lists those there are.
    """
    known = names()
    if name not in known:
        raise unknown("search", name, list(known))
    return known[name]


def replay(
    space: Any, evaluate: Callable[[int], float | None], budget: int, seed: int, search: str = "surrogate"
) -> None:
    """Run a search over a recorded table.

    Args:
        space: has `keys`, `values` {key: values} and `idx` [configs, keys]; may have `history`, as `SearchSpace`.
        evaluate: row -> time, or None if that config failed; may raise to end the search.
        budget: configs to try.
    """
    axes = {key: space.values[key] for key in space.keys}
    known = SearchSpace(axes, space.idx, history=getattr(space, "history", ()))
    steps = find(search)(known, np.random.default_rng(seed))
    try:
        config = next(steps)
        for _ in range(budget):
            config = steps.send(Outcome(evaluate(known.row(config))))
    except StopIteration:
        return
    finally:
        steps.close()


# --- the searches ---------------------------------------------------------------------------------------------------


def random(space: SearchSpace, rng: np.random.Generator) -> Search:
    """Every config once, in random order: the floor for any other search."""
    for row in _first(space.start, rng.permutation(len(space))):
        yield space.config(row)


def exhaustive(space: SearchSpace, rng: np.random.Generator) -> Search:
    """Every config once, in the order of the space."""
    for row in _first(space.start, range(len(space))):
        yield space.config(row)


def local(space: SearchSpace, rng: np.random.Generator) -> Search:
    """Descent: change one axis of the current config, keep the first improvement; restart at random when stuck."""
    seen: dict[int, float] = {}
    for restart in _first(space.start, rng.permutation(len(space))):
        if restart in seen:
            continue
        here, seen[restart] = restart, _value((yield space.config(restart)))
        moved = True
        while moved:
            moved = False
            near = np.flatnonzero(space.differs(here) == 1)
            steps = np.abs(space.index[near] - space.index[here]).sum(1)
            for row in near[np.argsort(steps + rng.random(len(near)))].tolist():  # small changes first
                if row not in seen:
                    seen[row] = _value((yield space.config(row)))
                    if seen[row] < seen[here]:
                        here, moved = row, True
                        break


def surrogate(space: SearchSpace, rng: np.random.Generator) -> Search:
    """Learn log time from what was tried; try what promises the largest improvement.

    A diverse start, half of it with powers of two for sizes, then two Gaussian processes and a forest judge
    candidates: configs one or two axes from the best ones, and random ones. Every second step stays close to the best,
    where all vote; when that was in vain, such steps go farther and become rarer, and the others look in other regions.
    Between them the processes lead by turns. Failed configs lower the chance of those like them.

    Where something is known beforehand, the configs it expects to be fastest come first. After a ranking the diverse
    ones follow every second step: they find out whether it is true here. Histories lead WARM configs, then the diverse
    ones follow in a row, and the processes judge without histories: what they know is found by then, and where they are
    wrong (a convolution's best config on an A100 is 415th on an A6000) a process that trusts them looks in their region
    only. There, this and the pauses close to the best let 56 % of 25 runs reach 95 % of the optimum within 100
    evaluations (before, 33 % of 24; with the diverse ones every second step, 40 %; with nothing known, 61 to 75 %). On
    three spaces whose histories are right, the median after 25 evaluations lost .001 at most.
    """
    if not len(space):
        return
    features = Features(list(space.axes.values()), space.index)
    known = trend(features, space.history, space.prior)
    model = Surrogate(features, space.index, rng, known)
    starts = diverse(features.spread, STARTS, rng, features.even)
    planned = _first(space.start, starts if known is None else known.firsts[:KNOWN])
    later, histories = ([], 0) if known is None else (starts, known.histories)
    while model.free.any():
        if len(model.tried) == WARM:
            model.forget()
        later = [row for row in later if model.free[row]]
        if planned:
            row = planned.pop(0)
        elif later and (len(model.tried) >= WARM if histories else len(model.tried) % 2 == 0):
            row = later.pop(0)
        else:
            row = model.propose()
        model.tell(row, _value((yield space.config(row))))


def tpe(space: SearchSpace, rng: np.random.Generator) -> Search:
    """Tree-structured Parzen estimator of the optional package optuna, for comparison.

    It knows no rules between axes: what it asks for is moved to the nearest valid config not tried yet.
    """
    try:
        import optuna
    except ImportError as error:
        raise Unavailable("the search 'tpe' needs optuna: pip install 'rooftune[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=int(rng.integers(2**31))))
    ordinal = {name: optuna.distributions.IntDistribution(0, len(v) - 1) for name, v in space.axes.items()}
    free = np.ones(len(space), dtype=bool)
    planned = _first(space.start, ())
    while free.any():
        if planned:
            row, trial = planned.pop(0), None
        else:
            trial = study.ask(ordinal)
            asked = np.array([trial.params[name] for name in space.axes])
            open_rows = np.flatnonzero(free)
            row = int(open_rows[np.argmin(np.abs(space.index[open_rows] - asked).sum(1))])
            study.tell(trial, state=optuna.trial.TrialState.FAIL)  # only the moved config below is told
        free[row] = False
        value = _value((yield space.config(row)))
        told = dict(zip(space.axes, space.index[row].tolist(), strict=True))
        state = optuna.trial.TrialState.COMPLETE if math.isfinite(value) else optuna.trial.TrialState.FAIL
        study.add_trial(
            optuna.trial.create_trial(
                params=told, distributions=ordinal, value=value if math.isfinite(value) else None, state=state
            )
        )


# --- parts ----------------------------------------------------------------------------------------------------------


def _place(values: Sequence[Any], value: Any) -> int:
    """Where a value is on its axis: of 1 and True, which are equal, the one of its type."""
    found = values.index(value)
    if type(values[found]) is not type(value):
        return next((i for i, v in enumerate(values) if type(v) is type(value) and v == value), found)
    return found


def _value(outcome: Outcome) -> float:
    return math.inf if outcome.value is None else outcome.value


def _first(start: Iterable[int], rest: Iterable[Any]) -> list[int]:
    """The start, then the rest, each row once."""
    return list(dict.fromkeys([*start, *(int(r) for r in rest)]))
