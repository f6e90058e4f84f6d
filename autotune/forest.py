"""A random forest that is grown in a few array operations: the second opinion of a search. numpy only.

Source: Geurts, Ernst, Wehenkel, "Extremely randomized trees", Machine Learning 63 (2006).
"""

from __future__ import annotations

import math

import numpy as np

from rooftune.autotune.features import Array, Rows


class Forest:
    """Extremely randomised regression trees, all grown together, level by level.

    Every tree sees all data; a node tries `share` of the features at one random threshold each and keeps
    the split that lowers the squared error most. Leaves hold one value (or equal ones).
    """

    def __init__(self, x: Array, y: Array, rng: np.random.Generator, trees: int = 20, share: float = 0.6) -> None:
        count, width = x.shape
        tries = max(1, math.ceil(share * width))
        feature: list[Rows] = []
        left: list[Rows] = []
        cut: list[Array] = []
        value: list[Array] = []
        rows = np.tile(np.arange(count), trees)  # sorted by node: a node is a slice
        starts = np.arange(trees) * count
        made = trees
        while len(starts):
            sizes = np.diff(np.r_[starts, len(rows)])
            total = np.add.reduceat(y[rows], starts)
            picked = np.argsort(rng.random((len(starts), width)), axis=1)[:, :tries]
            owner = np.repeat(np.arange(len(starts)), sizes)
            seen = x[rows[:, None], picked[owner]]
            low, high = np.minimum.reduceat(seen, starts), np.maximum.reduceat(seen, starts)
            at = low + rng.random(low.shape) * (high - low)
            goes = seen <= at[owner]
            n_left = np.add.reduceat(goes, starts, dtype=np.int64)
            s_left = np.add.reduceat(goes * y[rows][:, None], starts)
            n_right, s_right = sizes[:, None] - n_left, total[:, None] - s_left
            gain = s_left**2 / np.maximum(n_left, 1) + s_right**2 / np.maximum(n_right, 1)
            gain = np.where((high > low) & (n_left > 0) & (n_right > 0), gain, -np.inf)
            best = gain.argmax(1)
            node = np.arange(len(starts))
            mean = total / sizes
            spread = np.maximum.reduceat(y[rows], starts) - np.minimum.reduceat(y[rows], starts)
            splits = np.isfinite(gain[node, best]) & (spread > 1e-12)
            children = made + 2 * (np.cumsum(splits) - 1)
            feature.append(np.where(splits, picked[node, best], -1))
            cut.append(at[node, best])
            left.append(np.where(splits, children, -1))
            value.append(mean)
            made += 2 * int(splits.sum())
            keep = splits[owner]
            side = np.where(goes[np.arange(len(rows)), best[owner]], 0, 1)
            child = (2 * (np.cumsum(splits) - 1)[owner] + side)[keep]
            order = np.argsort(child, kind="stable")
            rows = rows[keep][order]
            starts = np.flatnonzero(np.r_[True, np.diff(child[order]) > 0]) if len(rows) else np.zeros(0, np.int64)
        self._feature, self._cut = np.concatenate(feature), np.concatenate(cut)
        self._left, self._value = np.concatenate(left), np.concatenate(value)
        self._trees = trees

    def predict(self, z: Array) -> tuple[Array, Array]:
        """Mean [c] and deviation [c] over the trees."""
        node = np.repeat(np.arange(self._trees)[:, None], len(z), axis=1)
        row = np.broadcast_to(np.arange(len(z)), node.shape)
        while True:
            f = self._feature[node]
            inner = f >= 0
            if not inner.any():
                break
            right = z[row, np.maximum(f, 0)] > self._cut[node]
            node = np.where(inner, self._left[node] + right, node)
        votes = self._value[node]
        return votes.mean(0), votes.std(0)
