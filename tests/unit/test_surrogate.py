"""What the learning search believes: features, processes, trees, failures and what is known beforehand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rooftune.autotune.features import Features
from rooftune.autotune.forest import Forest
from rooftune.autotune.process import Process, log_improvement
from rooftune.autotune.surrogate import FAR, MISSES, Surrogate, diverse, rank, steep, wide
from rooftune.autotune.warm import trend

SIZES = [16, 32, 48, 64, 80, 96, 112, 128]
VALUES = [SIZES, [1, 2, 4, 8], ["row", "column", "tile"], [0, 1], [7]]
INDEX = np.array(
    [i for i in itertools.product(*(range(len(v)) for v in VALUES)) if SIZES[i[0]] * VALUES[1][i[1]] <= 256]
)


# --- features -------------------------------------------------------------------------------------------------------


def test_features_tell_aligned_sizes_apart() -> None:
    axis = Features(VALUES, INDEX).axes[0]
    assert axis.coords is not None
    assert axis.coords.shape == (8, 3)  # log2, alignment, power of two
    assert axis.coords[:, 1].argsort(kind="stable")[-2:].tolist() == [3, 7]  # 64 and 128: more gains nothing
    assert axis.coords[:, 2].tolist() == [1, 1, 0, 1, 0, 0, 0, 1]
    np.testing.assert_allclose(axis.coords[[0, 1, 3, 7], 0], [0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("values", [["a", "b"], [0, 1], [False, True], [0, 1, 2], [64, 128], [None, 1, 2]])
def test_names_codes_and_pairs_have_no_order(values: list[object]) -> None:
    assert Features([values], np.arange(len(values))[:, None]).axes[0].coords is None


def test_a_zero_is_one_step_below_the_smallest_size() -> None:
    axis = Features([[0, 1, 2, 4, 8, 16]], np.arange(6)[:, None]).axes[0]
    assert axis.coords is not None
    gaps = np.diff(axis.coords[:, 0])
    assert gaps[0] > gaps.mean() * 0.5
    assert gaps.max() < 2 * gaps.mean()


def test_axes_that_a_rule_ties_together_make_products_and_ratios() -> None:
    features = Features(VALUES, INDEX)
    assert features.given == 4  # the constant axis teaches nothing
    product, ratio, even = features.axes[4:]
    threads = np.array([SIZES[i] * VALUES[1][j] for i, j in INDEX[:, :2].tolist()])
    assert len(np.unique(threads)) == product.count
    assert all(len(np.unique(threads[product.at == k])) == 1 for k in range(product.count))
    assert ratio.count > product.count / 2
    assert even.at.tolist() == [int(SIZES[i] & (SIZES[i] - 1) == 0) for i in INDEX[:, 0]]
    grid = np.array(list(itertools.product(range(3), range(3))))
    assert len(Features([[16, 32, 64], [1, 2, 4]], grid).axes) == 2  # no rule, nothing derived


# --- processes ------------------------------------------------------------------------------------------------------


def sample(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(INDEX), count, replace=False)
    at = INDEX[rows]
    y = np.abs(at[:, 0] - 4) * 0.5 + 1.5 * (at[:, 2] == 1) + 0.3 * at[:, 1]
    return rows, (y - y.mean()) / y.std()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("trends", [0, 2])
def test_the_gradient_of_a_process_is_that_of_its_loss(joint: bool, trends: int) -> None:
    features, rng = Features(VALUES, INDEX), np.random.default_rng(0)
    rows, y = sample(14, 0)
    model = Process(features, joint, np.full(trends, 0.5))
    gaps, pairs = model._used(features.at[rows])
    rest, fixed = model._detrend(y, rng.normal(size=(14, trends)) if trends else None)
    at = model.log + rng.normal(0, 0.2, len(model.log)) * model._free
    _, grad = model._loss(at, rest, gaps, pairs, fixed)
    for i in np.flatnonzero(model._free):
        step = np.eye(len(at))[i] * 1e-5
        up, down = (model._loss(at + s, rest, gaps, pairs, fixed)[0] for s in (step, -step))
        assert (up - down) / 2e-5 == pytest.approx(grad[i], rel=1e-4, abs=1e-5)
    assert not grad[~model._free].any()


@pytest.mark.parametrize("joint", [False, True])
def test_a_process_predicts_what_it_has_not_seen(joint: bool) -> None:
    features = Features(VALUES, INDEX)
    rows, y = sample(90, 1)
    model = Process(features, joint)
    model.fit(features.at[rows[:45]], y[:45], 40)
    mean, spread, near = model.predict(features.at[rows])
    assert np.abs(mean[:45] - y[:45]).max() < 0.15
    assert np.corrcoef(mean[45:], y[45:])[0, 1] > 0.9
    assert spread[45:].mean() > spread[:45].mean()
    np.testing.assert_allclose(near, model.closeness(features.at[rows], features.at[rows[:45]]))
    np.testing.assert_allclose(np.diag(model.closeness(features.at, features.at)), 1.0)


def test_a_product_learns_which_axis_matters() -> None:
    features = Features(VALUES, INDEX)
    rows, y = sample(60, 2)
    model = Process(features)
    model.fit(features.at[rows], y, 60)
    odds = model.log[:-2].reshape(len(features.axes), -1)[:, 0]
    assert odds[2] > odds[3] + 1  # the order matters, the switch does not


@pytest.mark.parametrize("joint", [False, True])
def test_a_trend_is_believed_until_it_proves_wrong(joint: bool) -> None:
    features = Features(VALUES, INDEX)
    rows, y = sample(60, 3)
    truth = np.zeros(len(INDEX))
    truth[rows] = y
    false = np.random.default_rng(1).normal(size=len(INDEX))
    errors = []
    for column in (truth, false):
        model = Process(features, joint, np.array([1.0]))
        model.fit(features.at[rows[:10]], y[:10], 20, column[rows[:10], None])
        errors.append(np.abs(model.predict(features.at[rows[10:]], column[rows[10:], None])[0] - y[10:]).mean())
    assert errors[0] < 0.3
    plain = Process(features, joint)
    plain.fit(features.at[rows[:10]], y[:10], 20)
    assert errors[1] < np.abs(plain.predict(features.at[rows[10:]])[0] - y[10:]).mean() + 0.5  # not the full 1.0


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


# --- the search's own -----------------------------------------------------------------------------------------------


def test_targets_keep_the_order_and_flatten_the_slow() -> None:
    logs = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 1.0, 3.0, 9.0])
    for warp in (steep, wide):
        y = warp(logs)
        assert (np.diff(y) > 0).all()
        assert (y[-1] - y[-2]) / (y[1] - y[0]) < 0.3 * 6.0 / 0.1
    np.testing.assert_allclose(wide(logs)[:5], logs[:5])


def test_ranks() -> None:
    assert rank(np.array([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert rank(np.array([1.0, 1.0 + 1e-12])).tolist() == [0.0, 1.0]  # the same up to the last bits: by row


def test_a_diverse_start_spreads() -> None:
    features, rng = Features(VALUES, INDEX), np.random.default_rng(0)
    picked = diverse(features.spread, 8, rng)
    assert len(set(picked)) == 8
    gap = np.abs(features.spread[picked][:, None] - features.spread[picked]).sum(2)[np.triu_indices(8, 1)].min()
    chance = [
        np.abs(x[:, None] - x).sum(2)[np.triu_indices(8, 1)].min()
        for x in (features.spread[rng.choice(len(INDEX), 8, replace=False)] for _ in range(20))
    ]
    assert gap > np.max(chance)


def test_half_of_a_diverse_start_has_powers_of_two_for_sizes() -> None:
    values = [[16, 32, 48, 64, 80, 96, 112, 128], [1, 2, 3, 4], [1, 2, 3, 4], [0, 1]]
    index = np.stack(np.meshgrid(*(np.arange(len(v)) for v in values), indexing="ij"), -1).reshape(-1, 4)
    features = Features(values, index)
    sizes = np.stack([np.array(v)[index[:, i]] for i, v in enumerate(values[:3])], 1)
    assert set(features.even) == set(np.flatnonzero(((sizes & (sizes - 1)) == 0).all(1)))
    assert len(features.even) / len(index) < 0.3  # so that by chance one or two of eight are
    for seed in range(5):
        picked = diverse(features.spread, 8, np.random.default_rng(seed), features.even)
        assert len(set(picked)) == 8
        assert set(picked[:4]) <= set(features.even)
        assert not set(picked) <= set(features.even)
    few = features.even[:5]  # too few to choose from: as without them
    alike = [diverse(features.spread, 8, np.random.default_rng(1), rows) for rows in (few, None)]
    assert alike[0] == alike[1]
    assert len(Features(values[1:], index[:32, 1:]).even) > 0
    assert len(Features([[1, 2, 4], [0, 1]], index[:4, 2:]).even) == 0  # all are: nothing to prefer


def _around(best: int) -> Surrogate:
    """A search that knows one good config and two bad ones."""
    model = Surrogate(Features(VALUES, INDEX), INDEX, np.random.default_rng(0))
    for row in (best, len(INDEX) - 2, len(INDEX) - 1):
        model.tell(row, 1.0 if row == best else 2.0)
    return model


MIDDLE = int(np.argmax([((row != INDEX).sum(1) == 1).sum() for row in INDEX]))  # more neighbours than steps below


def test_steps_close_to_the_best_go_farther_when_they_are_in_vain() -> None:
    model = _around(MIDDLE)

    def axes(best: int) -> set[int]:
        return set((INDEX[model._close(best)] != INDEX[best]).sum(1).tolist())

    while model._misses < MISSES:
        assert axes(MIDDLE) == {1}
        model.tell(model.propose(), 2.0)
    assert axes(MIDDLE) == {1, 2}
    better = int(np.flatnonzero(model.free)[0])
    model.tell(better, 0.5)  # from now on this one's neighbours, and only these
    assert axes(better) == {1}
    model.free[(INDEX[better] != INDEX).sum(1) == 1] = False
    assert axes(better) == {2}, "nothing is left on one axis"


def test_axes_take_turns_beside_the_best() -> None:
    """Every second step is for an axis that was tried least, whatever the judges think."""
    model, tried = _around(MIDDLE), [0, 0, 0, 0]
    for misses in (1, 3, 5, 7, 9):
        model._misses = misses
        rows = model._close(MIDDLE)
        axes = {int(np.flatnonzero(INDEX[row] != INDEX[MIDDLE])[0]) for row in rows}
        assert all((INDEX[row] != INDEX[MIDDLE]).sum() == 1 for row in rows)
        left = {a for a in range(4) if any(model.free[r] for r in _beside(a))}
        assert axes == {a for a in left if tried[a] == min(tried[b] for b in left)}
        tried[min(axes)] += 1
        model.tell(next(r for r in _beside(min(axes)) if model.free[r]), 2.0)
    assert min(tried) >= 1


def _beside(axis: int) -> list[int]:
    differs = INDEX[MIDDLE] != INDEX
    return np.flatnonzero(differs[:, axis] & (differs.sum(1) == 1)).tolist()


def test_a_best_config_that_stays_best_loses_its_share_of_steps_and_others_look_elsewhere() -> None:
    model, at, far = _around(MIDDLE), [], []
    while len(at) < 3 * MISSES:
        seen = model._misses
        row = model.propose()
        if model._misses > seen:
            at.append(model._step)
        elif seen >= MISSES:
            far.append(int((INDEX[row] != INDEX[MIDDLE]).sum()))
        model.tell(row, 2.0)
    gaps = np.diff(at).tolist()
    assert gaps == [2] * MISSES + [4] * MISSES + [6] * (MISSES - 1)
    assert len(far) > MISSES
    assert min(far) >= FAR
    model.tell(int(np.flatnonzero(model.free)[0]), 0.5)
    seen = model._step
    while model._misses == 0:
        model.tell(model.propose(), 2.0)
    assert model._step - seen <= 2, "a new best config is looked at closely at once"


@pytest.mark.parametrize("judges", [[0], [1], [0, 1]])
def test_failed_configs_make_those_like_them_less_attractive(judges: list[int]) -> None:
    features = Features(VALUES, INDEX)
    rows, y = sample(50, 5)
    model = Surrogate(features, INDEX, np.random.default_rng(0))
    for row, value in zip(rows[:30], y[:30], strict=True):
        model.tell(int(row), math.exp(value))
    model.propose()
    rest = rows[30:]
    bad = rest[:1]
    none, best = bad[:0], [-1.0, -1.0]
    loss = model._merit(rest, none, best, judges, True) - model._merit(rest, bad, best, judges, True)
    assert (loss > 0).all()
    assert loss.argmax() == 0  # itself first of all
    alike = (INDEX[rest] == INDEX[bad[0]]).sum(1)
    assert np.corrcoef(alike, loss)[0, 1] > 0.3


# --- what is known beforehand ---------------------------------------------------------------------------------------


def test_trend_of_a_full_history_ranks_as_the_history_does() -> None:
    features = Features(VALUES, INDEX)
    past = np.linspace(0.1, 1.0, len(INDEX))
    past[3], past[5] = 0.0, np.nan  # failed, unknown
    known = trend(features, [past], None)
    assert known is not None
    assert known.firsts[:3] == [len(INDEX) - 1, len(INDEX) - 2, len(INDEX) - 3]
    assert known.mean[3] == known.mean.max()
    assert known.mean[5] == pytest.approx(np.median(np.delete(known.mean, 5)), rel=0.02)


def test_trend_of_a_part_is_completed_by_a_model() -> None:
    features = Features(VALUES, INDEX)
    cost = 0.3 * np.abs(INDEX[:, 0] - 4) + 0.5 * (INDEX[:, 2] == 1)
    past = np.exp(-(cost - cost.min()))
    seen = np.random.default_rng(0).choice(len(INDEX), 40, replace=False)
    part = np.full(len(INDEX), np.nan)
    part[seen] = past[seen]
    known = trend(features, [part], None)
    assert known is not None
    assert np.corrcoef(known.mean, steep(cost))[0, 1] > 0.9


def test_trend_of_a_ranking_and_of_nothing() -> None:
    features = Features(VALUES, INDEX)
    times = np.arange(len(INDEX), 0, -1.0)
    times[-1] = np.nan
    known = trend(features, [], times)
    assert known is not None
    assert known.firsts[0] == len(INDEX) - 2
    assert known.mean[-1] == known.mean.max()  # unknown comes last
    few = np.full(len(INDEX), np.nan)
    few[:3] = 1.0
    assert trend(features, [few], np.full(len(INDEX), np.nan)) is None


def test_histories_end_for_the_processes_and_a_ranking_stays() -> None:
    features, rng = Features(VALUES, INDEX), np.random.default_rng(0)
    past, ranking = np.linspace(0.1, 1.0, len(INDEX)), np.arange(len(INDEX), dtype=float)
    both, alone = trend(features, [past, past], ranking), trend(features, [past], None)
    assert both is not None
    assert alone is not None
    model = Surrogate(features, INDEX, rng, both)
    assert model._expected[0] != 0, "histories outweigh the ranking"
    model.forget()
    assert model._expected.tolist() == list(range(len(INDEX)))  # the ranking's order
    assert model._trends(0, np.arange(3)).shape == (3, 1)
    only = Surrogate(features, INDEX, rng, alone)
    only.forget()
    assert len(only._expected) == 0
    assert only._trends(0, np.arange(3)) is None
    for row, value in zip(*sample(12, 1), strict=True):
        only.tell(int(row), math.exp(value))
    assert only.free[only.propose()]
