"""Searches on landscapes whose best is known: what they promise, and that the model is worth its time."""

from __future__ import annotations

import itertools
import math
import sys
import types
from typing import Any

import numpy as np
import pytest

from rooftune.autotune import search
from rooftune.autotune.model import Forest, Process, features, log_improvement, matern
from rooftune.autotune.search import Outcome, SearchSpace
from rooftune.core import Unavailable, UsageError

NUMPY_ONLY = [name for name in search.names() if name != "tpe"]
AXES: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 48, 64, 96, 128, 192, 256),
    "block_n": (16, 32, 48, 64, 96, 128, 192, 256),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "order": ("row", "column", "tile"),
    "vector": (False, True),
}


class View:
    """A space in the form of recorded tables: `keys`, `values`, `idx`."""

    def __init__(self) -> None:
        self.keys = list(AXES)
        self.values = {k: list(v) for k, v in AXES.items()}
        grid = itertools.product(*(range(len(v)) for v in AXES.values()))
        self.idx = np.array([i for i in grid if AXES["block_m"][i[0]] * AXES["block_n"][i[1]] <= 128 * 192])
        self.N = len(self.idx)


def times(view: View, seed: int) -> list[float | None]:
    """A kernel's shape: tiles amortise loads until they spill, odd sizes are unaligned, warps fit the tile;
    configs with too much shared memory fail. The seed moves the optimum and adds roughness."""
    rng = np.random.default_rng(seed)
    target, stage, vector = 2 ** rng.uniform(11, 14), rng.uniform(2, 4), rng.random() < 0.5
    rough = rng.normal(0, 0.05, view.N)
    found: list[float | None] = []
    for row, index in enumerate(view.idx.tolist()):
        m, n, warps, stages, order, wide = (v[i] for v, i in zip(AXES.values(), index, strict=True))
        if (m + n) * stages * 128 > 160_000:
            found.append(None)
            continue
        cost = 0.30 * abs(math.log2(m * n / target)) + 0.2 * abs(math.log2(m * n / warps / 1024))
        cost += 0.15 * abs(stages - stage) + 0.15 * (m % 32 != 0) + 0.15 * (n % 32 != 0)
        cost += 0.2 * (order != "tile") + 0.1 * (wide != vector) + rough[row]
        found.append(math.exp(cost))
    return found


def quality(name: str, seed: int, budget: int) -> float:
    """Best time of the table over the best one found."""
    view = View()
    table = times(view, seed)
    got: list[float] = []

    def evaluate(row: int) -> float | None:
        got.append(table[row] or math.inf)
        return table[row]

    search.replay(view, evaluate, budget, seed, name)
    return min(t for t in table if t is not None) / min(got)


def drive(name: str, space: SearchSpace, values: Any, seed: int, budget: int = 10_000) -> list[int]:
    """Rows in the order in which a search asks for them."""
    asked: list[int] = []
    steps = search.find(name)(space, np.random.default_rng(seed))
    config = next(steps, None)
    while config is not None and len(asked) < budget:
        asked.append(space.row(config))
        try:
            config = steps.send(Outcome(values[asked[-1]]))
        except StopIteration:
            config = None
    return asked


SMALL = SearchSpace.of(
    {"a": (1, 2, 4, 8), "b": (1, 2, 3), "c": ("x", "y")},
    [{"a": a, "b": b, "c": c} for a in (1, 2, 4, 8) for b in (1, 2, 3) for c in "xy" if a * b < 20],
    start=[{"a": 8, "b": 1, "c": "y"}],
)


@pytest.mark.parametrize("name", NUMPY_ONLY)
@pytest.mark.parametrize("fate", ["fine", "all fail", "half fail", "all equal"])
def test_every_search_tries_every_config_exactly_once_and_ends(name: str, fate: str) -> None:
    values: list[float | None] = [1.0 + (i * 7 % 11) for i in range(len(SMALL))]
    if fate == "all equal":
        values = [1.0] * len(SMALL)
    elif fate != "fine":
        values = [None if fate == "all fail" or i % 2 else v for i, v in enumerate(values)]
    asked = drive(name, SMALL, values, seed=3)
    assert sorted(asked) == list(range(len(SMALL)))
    assert asked[0] == SMALL.start[0]


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_the_seed_decides_everything(name: str) -> None:
    view = View()
    space, values = SearchSpace(view.values, view.idx), times(view, 1)
    first = drive(name, space, values, seed=5, budget=40)
    assert drive(name, space, values, seed=5, budget=40) == first
    if name != "exhaustive":
        assert drive(name, space, values, seed=6, budget=40) != first


def test_the_surrogate_finds_far_better_configs_than_chance() -> None:
    """Recorded GPU spaces (7 of the public hub, names and order hidden, 12 seeds) gave 0.85/0.94/0.99 of the
    optimum after 25/50/100 configs, random search 0.73/0.78/0.82; a made landscape keeps that from being lost."""
    seeds = range(6)
    learned = np.array([quality("surrogate", s, 40) for s in seeds])
    chance = np.array([quality("random", s, 40) for s in seeds])
    assert np.median(learned) > 0.87  # 12 seeds: 0.95, random 0.70; these six: 0.91 and 0.72
    assert np.median(learned) > np.median(chance) + 0.15


def test_local_descends() -> None:
    found = [quality("local", s, 150) for s in range(6)]
    assert np.median(found) > np.median([quality("random", s, 150) for s in range(6)])


def test_failed_configs_make_those_like_them_less_attractive() -> None:
    rng = np.random.default_rng(4)
    x = np.linspace(0, 1, 41)[:, None]
    good, y = np.arange(0, 41, 8), np.array([0.3, -0.2, 0.1, -0.4, 0.2, 0.0])
    model = Process(1)
    model.log[0] = math.log(0.1)  # "like" means within a tenth of the range
    model.condition(x[good], y)
    forest = Forest(x[good], y, rng)
    rows, failed = np.setdiff1d(np.arange(41), [*good, 20]), np.array([20])
    none = np.zeros(0, dtype=np.int64)
    with_failure = search._merit(model, forest, x, x, rows, failed, y, True)
    without = search._merit(model, forest, x, x, rows, none, y, True)
    loss = without - with_failure
    assert (loss > 0).all()
    assert loss[np.abs(rows - 20) <= 2].min() > 10 * loss[np.abs(rows - 20) >= 15].max()


def test_names_are_the_public_generators_of_the_module() -> None:
    assert set(search.names()) == {"random", "exhaustive", "local", "surrogate", "tpe"}
    with pytest.raises(UsageError, match="unknown search 'best'; known: exhaustive, local"):
        search.find("best")


def test_a_new_search_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(space: SearchSpace, rng: np.random.Generator) -> search.Search:
        for row in reversed(range(len(space))):
            yield space.config(row)

    monkeypatch.setattr(search, "backwards", backwards, raising=False)
    assert drive("backwards", SMALL, [1.0] * len(SMALL), 0)[0] == len(SMALL) - 1


def test_space_rows_and_configs() -> None:
    assert SMALL.row(SMALL.config(5)) == 5
    with pytest.raises(KeyError):
        SMALL.row({"a": 8, "b": 3, "c": "x"})  # a rule forbids it
    assert SMALL.differs(0)[0] == 0
    assert set(SMALL.differs(0)) == {0, 1, 2, 3}
    assert len(SearchSpace.of({}, [{}])) == 1
    assert drive("surrogate", SearchSpace.of({}, [{}]), [1.0], 0) == [0]


# --- tpe ------------------------------------------------------------------------------------------------------------


def test_tpe_without_optuna_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(Unavailable, match=r"pip install 'rooftune\[search\]'"):
        next(search.tpe(SMALL, np.random.default_rng(0)))


def test_tpe_with_optuna() -> None:
    pytest.importorskip("optuna")
    assert sorted(drive("tpe", SMALL, [1.0 + i if i % 3 else None for i in range(len(SMALL))], 0)) == list(
        range(len(SMALL))
    )
    assert isinstance(sys.modules["optuna"], types.ModuleType)


# --- the model ------------------------------------------------------------------------------------------------------


def test_features_tell_aligned_sizes_apart() -> None:
    near, mixed = features(
        [[16, 32, 48, 64, 80, 96, 112, 128], ["a", "b"], [7]], np.array([[i, 0, 0] for i in range(8)])
    )
    assert near.shape == (8, 5)  # log size, alignment, power of two, two names; the constant axis has none
    assert (near[:, 1] > 0.4).nonzero()[0].tolist() == [3, 7]  # 64 and 128: more than 64 gains nothing
    assert near[:, 2].tolist() == [0.5, 0.5, 0, 0.5, 0, 0, 0, 0.5]
    assert mixed.shape[1] >= near.shape[1]
    assert (near >= 0).all()
    assert (near <= 1).all()


def test_the_process_gradient_is_that_of_its_loss() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((12, 3)), rng.normal(size=12)
    model = Process(3)
    squares = (x[:, None] - x[None]) ** 2
    at = model.log + rng.normal(0, 0.2, 5)
    _, grad = model._loss(at, y, squares)
    for i in range(5):
        step = np.eye(5)[i] * 1e-5
        slope = (model._loss(at + step, y, squares)[0] - model._loss(at - step, y, squares)[0]) / 2e-5
        assert slope == pytest.approx(grad[i], rel=1e-4, abs=1e-5)


def test_the_process_interpolates_and_learns_which_feature_matters() -> None:
    rng = np.random.default_rng(1)
    x = rng.random((40, 2))
    y = np.sin(6 * x[:, 0])
    model = Process(2)
    for _ in range(4):
        model.fit(x, y)
    assert model.log[0] < model.log[1]
    mean, spread, near = model.predict(x)
    np.testing.assert_allclose(mean, y, atol=0.1)
    assert (model.predict(x + 5.0)[1] > spread.max()).all()
    np.testing.assert_allclose(near.sum(1), model.closeness(x, x))
    np.testing.assert_allclose(np.diag(matern(x, x)), 1.0, atol=1e-6)


def test_improvement_agrees_with_numbers_drawn() -> None:
    rng = np.random.default_rng(2)
    for mean, spread in ((0.5, 1.0), (-1.0, 0.3), (2.0, 0.8)):
        drawn = np.maximum(0.0 - rng.normal(mean, spread, 400_000), 0).mean()
        got = log_improvement(np.array([mean]), np.array([spread]), 0.0)[0]
        assert math.exp(got) == pytest.approx(drawn, rel=0.03)
    far = log_improvement(np.array([5.9, 6.1, 50.0]), np.ones(3), 0.0)
    assert (np.diff(far) < 0).all()
    assert np.isfinite(far).all()


def test_trees_fit_their_data_and_average_between() -> None:
    rng = np.random.default_rng(3)
    x = rng.random((60, 4))
    y = (x[:, 1] > 0.5) * 2.0 + x[:, 0]
    forest = Forest(x, y, rng, trees=30)
    mean, spread = forest.predict(x)
    np.testing.assert_allclose(mean, y)
    np.testing.assert_allclose(spread, 0, atol=1e-9)
    fresh = rng.random((200, 4))
    truth = (fresh[:, 1] > 0.5) * 2.0 + fresh[:, 0]
    assert np.corrcoef(forest.predict(fresh)[0], truth)[0, 1] > 0.95
    one = Forest(x[:1], y[:1], rng)
    assert one.predict(fresh)[0].tolist() == [y[0]] * 200
    same = Forest(np.zeros((5, 2)), np.arange(5.0), rng)  # nothing to split on: the mean
    assert same.predict(np.zeros((1, 2)))[0][0] == 2.0
