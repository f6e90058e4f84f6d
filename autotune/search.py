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
import numpy.typing as npt

from rooftune.autotune.model import Array, Forest, Process, Rows, features, log_improvement
from rooftune.core import Config, Unavailable, unknown

STARTS = 8  # diverse configs before the model takes over
REFIT = 2  # steps between fits of the length scales
GLOBAL, PAIRS = 1000, 600  # candidates a step: random ones, and ones two axes away from the best
SLOW_HALF = 0.75  # times above this quantile are compressed: how slow a bad config is does not matter


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
    """

    def __init__(self, axes: Mapping[str, Sequence[Any]], index: Rows, start: Sequence[Config] = ()) -> None:
        self.axes = {name: list(values) for name, values in axes.items()}
        self.index = np.asarray(index, dtype=np.int64).reshape(len(index), len(self.axes))
        self._row = {tuple(line): i for i, line in enumerate(self.index.tolist())}
        self.start = [self.row(config) for config in start]

    @classmethod
    def of(
        cls, axes: Mapping[str, Sequence[Any]], configs: Iterable[Config], start: Sequence[Config] = ()
    ) -> SearchSpace:
        """From config dicts."""
        index = [[list(values).index(config[name]) for name, values in axes.items()] for config in configs]
        return cls(axes, np.array(index, dtype=np.int64), start)

    def __len__(self) -> int:
        return len(self.index)

    def config(self, row: int) -> Config:
        """The config in a row."""
        return {name: values[i] for (name, values), i in zip(self.axes.items(), self.index[row], strict=True)}

    def row(self, config: Config) -> int:
        """The row of a config; KeyError if it is not valid here."""
        return self._row[tuple(values.index(config[name]) for name, values in self.axes.items())]

    def differs(self, row: int) -> Rows:
        """On how many axes every config differs from one: [configs]."""
        return np.asarray((self.index != self.index[row]).sum(1))


Search = Generator[Config, Outcome, None]
Flags = npt.NDArray[np.bool_]


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
        space: has `keys`, `values` {key: values} and `idx` [configs, keys].
        evaluate: row -> time, or None if that config failed; may raise to end the search.
        budget: configs to try.
    """
    known = SearchSpace({key: space.values[key] for key in space.keys}, space.idx)
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
    """Learn log time from what was tried; try where the expected improvement is largest.

    A diverse start, then a Gaussian process and a forest judge candidates: configs one or two axes from the
    three best, and random ones. Every second step stays one axis from the best. Failed configs lower the
    chance of those like them.
    """
    near, mixed = features(list(space.axes.values()), space.index)
    model = Process(near.shape[1])
    forest: Forest | None = None
    tried: list[int] = []
    values: list[float] = []
    free = np.ones(len(space), dtype=bool)
    planned = _first(space.start, _diverse(near, STARTS, rng))
    step = 0
    while free.any():
        good = np.flatnonzero(np.isfinite(values))
        if planned:
            row = planned.pop(0)
        elif len(good) < 3:
            row = int(rng.choice(np.flatnonzero(free)))
        else:
            done = np.array(tried)[good]
            y = _target(np.array(values)[good])
            model.fit(near[done], y) if step % REFIT == 0 else model.condition(near[done], y)
            step += 1
            if forest is None or step % 2 == 0:
                forest = Forest(mixed[done], y, rng)
            rows = _candidates(space, done[np.argsort(y, kind="stable")[:3]], free, step % 2 == 0, rng)
            failed = np.array([r for r, v in zip(tried, values, strict=True) if not math.isfinite(v)], dtype=np.int64)
            row = int(rows[int(np.argmax(_merit(model, forest, near, mixed, rows, failed, y, step % 2 == 1)))])
        free[row] = False
        tried.append(row)
        value = _value((yield space.config(row)))
        values.append(math.log(value) if value > 0 else -math.inf)


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


def _value(outcome: Outcome) -> float:
    return math.inf if outcome.value is None else outcome.value


def _first(start: Iterable[int], rest: Iterable[Any]) -> list[int]:
    """The start, then the rest, each row once."""
    return list(dict.fromkeys([*start, *(int(r) for r in rest)]))


def _target(logs: Array) -> Array:
    """Log times with the slow ones compressed, standardised."""
    cap = np.quantile(logs, SLOW_HALF)
    y = np.where(logs > cap, cap + 0.25 * np.log1p(np.maximum(logs - cap, 0.0)), logs)
    out: Array = (y - y.mean()) / (y.std() + 1e-9)
    return out


def _diverse(x: Array, count: int, rng: np.random.Generator, pool: int = 400) -> list[int]:
    """A random config, then always the one farthest (city blocks) from those picked, within a random pool."""
    drawn = rng.choice(len(x), min(pool, len(x)), replace=False)
    picked = [int(drawn[0])]
    gap = np.abs(x[drawn] - x[picked[0]]).sum(1)
    while len(picked) < min(count, len(drawn)):
        far = int(gap.argmax())
        picked.append(int(drawn[far]))
        gap = np.minimum(gap, np.abs(x[drawn] - x[drawn[far]]).sum(1))
    return picked


def _candidates(space: SearchSpace, best: Rows, free: Flags, close: bool, rng: np.random.Generator) -> Rows:
    """Rows worth judging; `close` keeps to one axis from the best where something is left there."""
    if close:
        rows = np.flatnonzero((space.differs(int(best[0])) == 1) & free)
        if len(rows):
            return rows
    gap = np.min([space.differs(int(row)) for row in best], axis=0)
    pairs = np.flatnonzero((gap == 2) & free)
    some = rng.choice(pairs, min(PAIRS, len(pairs)), replace=False)
    anywhere = rng.choice(len(space), min(GLOBAL, len(space)), replace=False)
    rows = np.unique(np.concatenate([np.flatnonzero((gap == 1) & free), some, anywhere]))
    rows = rows[free[rows]]
    return rows if len(rows) else np.flatnonzero(free)


def _rank(merit: Array) -> Array:
    """Ranks scaled to [0, 1], best 1."""
    out = np.empty(len(merit))
    out[np.argsort(merit, kind="stable")] = np.arange(len(merit))
    return out / max(len(merit) - 1, 1)


def _merit(
    model: Process, forest: Forest, near: Array, mixed: Array, rows: Rows, failed: Rows, y: Array, lead: bool
) -> Array:
    """How promising rows are: the process leads with the forest as a quarter vote, or both vote alike."""
    mean, spread, close = model.predict(near[rows])
    first = _rank(log_improvement(mean, spread, float(y.min())))
    votes, doubt = forest.predict(mixed[rows])
    second = _rank(log_improvement(votes, doubt + 0.05, float(y.min())))
    merit: Array = first + 0.25 * second if lead else 0.5 * (first + second)
    if len(failed):
        works = close.sum(1)
        odds = (works + 0.3) / (works + model.closeness(near[rows], near[failed]) + 0.3)
        merit = merit + 0.5 * np.log(odds)
    return merit
