"""What a search has learned: features of configs, a Gaussian process and a random forest. numpy only.

Arrays: configs are rows, [n, features]; targets are standardised log times, [n].
Sources: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), eqs. 2.25, 2.26, 5.9 and
4.17 (Matern 5/2); Jones, Schonlau, Welch, J. Global Optimization 13 (1998) for expected improvement; Geurts,
Ernst, Wehenkel, "Extremely randomized trees", Machine Learning 63 (2006).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

SQRT5 = math.sqrt(5.0)
# Bounds and prior means of the logs of: length scales (features span [0, 1]), signal and noise deviation.
SCALE, SIGNAL, NOISE = (
    (math.log(0.05), math.log(20.0)),
    (math.log(0.1), math.log(5.0)),
    (math.log(0.005), math.log(0.7)),
)
FIT_STEPS = 30  # gradient steps per fit; fits start from the last one, so few are enough


# --- features -------------------------------------------------------------------------------------------------------


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(v, bool | int | float) for v in values)


def _unit(column: Array) -> Array:
    low, high = column.min(), column.max()
    return (column - low) / (high - low) if high > low else column * 0.0


def _alignment(value: float) -> int:
    """How often 2 divides a whole number, up to 64: 48 -> 4."""
    n, count = int(value), 0
    while n and n % 2 == 0 and count < 6:
        n, count = n // 2, count + 1
    return count


def features(axes: Sequence[Sequence[Any]], index: Rows) -> tuple[Array, Array]:
    """(for distances, for trees): both [configs, features]; the second adds products and ratios of sizes.

    A numeric axis is its log2 where it spans at least a factor 3, else its value, scaled to [0, 1]; names
    become one column each. Axes that mix powers of two with other sizes also get how often 2 divides the value
    and whether it is a power: hardware prefers aligned sizes, and nearby unaligned ones say little about them.
    """
    columns: list[Array] = []
    logs: list[Array] = []
    for axis, values in enumerate(axes):
        if len(values) < 2:
            continue
        if not _numeric(values):
            columns += [0.5 * (index[:, axis] == k) for k in range(len(values))]
            continue
        raw = np.array([float(v) for v in values])
        wide = raw.min() > 0 and raw.max() / raw.min() >= 3
        columns.append(_unit(np.log2(raw) if wide else raw)[index[:, axis]])
        if wide:
            logs.append(np.log2(raw)[index[:, axis]])
        if len(values) >= 4 and raw.min() > 0 and (raw == np.floor(raw)).all():
            power = np.array([float(int(v) & (int(v) - 1) == 0) for v in raw])
            if not power.all():
                columns.append(0.5 * _unit(np.array([float(_alignment(v)) for v in raw]))[index[:, axis]])
            if len(values) >= 8 and 3 <= power.sum() < len(values):
                columns.append(0.5 * power[index[:, axis]])
    near = np.stack(columns, axis=1) if columns else np.zeros((len(index), 1))
    mixed = [part for i, a in enumerate(logs) for b in logs[:i] for part in (a + b, a - b)]
    mixed += [np.sum(logs, axis=0)] if len(logs) > 2 else []
    return near, np.column_stack([near, *mixed])


# --- Gaussian process -----------------------------------------------------------------------------------------------


def matern(a: Array, b: Array) -> Array:
    """Matern 5/2 correlation of rows that are already divided by their length scales: [len(a), len(b)]."""
    squared = np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T, 0.0)
    r = SQRT5 * np.sqrt(squared)
    out: Array = (1 + r + r * r / 3) * np.exp(-r)
    return out


class Process:
    """Gaussian process with a length scale per feature, fitted by maximum a posteriori."""

    def __init__(self, width: int) -> None:
        self.log = np.array([math.log(0.7)] * width + [0.0, math.log(0.05)])
        self._mean = np.array([0.0] * width + [0.0, math.log(0.05)])
        bounds = np.array([SCALE] * width + [SIGNAL, NOISE])
        self._low, self._high = bounds[:, 0], bounds[:, 1]

    def _loss(self, log: Array, y: Array, squares: Array) -> tuple[float, Array]:
        """Negative log posterior and its gradient; squares: [n, n, features] of squared differences."""
        width = squares.shape[2]
        weight = np.exp(-2 * log[:width])
        r = np.sqrt(5 * (squares @ weight))
        decay = np.exp(-r)
        signal, noise = math.exp(2 * log[width]), math.exp(2 * log[width + 1])
        smooth = signal * (1 + r + r * r / 3) * decay
        try:
            lower = np.linalg.cholesky(smooth + (noise + 1e-6) * np.eye(len(y)))
        except np.linalg.LinAlgError:
            return math.inf, np.zeros_like(log)
        half = np.linalg.inv(lower)
        inverse = half.T @ half
        alpha = inverse @ y
        away = log - self._mean
        loss = 0.5 * float(y @ alpha) + float(np.log(np.diag(lower)).sum()) + 0.5 * float(away @ away)
        w = 0.5 * (inverse - np.outer(alpha, alpha))
        slope = w * (signal * 5 / 3 * (1 + r) * decay)
        grad = np.empty_like(log)
        grad[:width] = np.tensordot(slope, squares, axes=2) * weight
        grad[width] = 2 * float((w * smooth).sum())
        grad[width + 1] = 2 * noise * float(np.trace(w))
        return loss, grad + away

    def fit(self, x: Array, y: Array) -> None:
        """Improve the length scales by sign-based steps (Rprop: Riedmiller and Braun, ICNN 1993), then condition."""
        squares = (x[:, None, :] - x[None]) ** 2
        step = np.full(len(self.log), 0.15)
        log, (best, grad) = self.log, self._loss(self.log, y, squares)
        for _ in range(FIT_STEPS):
            trial = np.clip(log - step * np.sign(grad), self._low, self._high)
            loss, new = self._loss(trial, y, squares)
            step = np.where(new * grad > 0, np.minimum(step * 1.4, 0.8), np.maximum(step * 0.5, 1e-3))
            if loss < best + 0.5:  # a step may cost a little: it only has to lead on
                log, grad = trial, new
                if loss < best:
                    best, self.log = loss, trial
            else:
                step = step * 0.5
        self.condition(x, y)

    def condition(self, x: Array, y: Array) -> None:
        """Take the data in, with the length scales there are."""
        width = x.shape[1]
        self._scale, self._signal = np.exp(self.log[:width]), math.exp(2 * self.log[width])
        self._at = x / self._scale
        noise = math.exp(2 * self.log[width + 1]) + 1e-6
        kernel = self._signal * matern(self._at, self._at) + noise * np.eye(len(y))
        self._half = np.linalg.inv(np.linalg.cholesky(kernel))
        self._alpha = self._half.T @ (self._half @ y)

    def predict(self, z: Array) -> tuple[Array, Array, Array]:
        """Mean [c], deviation [c], and correlation with the data [c, n]."""
        near = matern(z / self._scale, self._at)
        v = self._half @ (self._signal * near.T)
        spread = np.sqrt(np.maximum(self._signal - (v * v).sum(0), 1e-9))
        return self._signal * near @ self._alpha, spread, near

    def closeness(self, z: Array, x: Array) -> Array:
        """Sum of the correlations of each z with all x: [c]."""
        return np.asarray(matern(z / self._scale, x / self._scale).sum(1))


_erfc = np.frompyfunc(math.erfc, 1, 1)


def log_improvement(mean: Array, spread: Array, best: float) -> Array:
    """Log of the expected improvement below `best`; far from it the asymptote, which does not underflow."""
    z = (best - mean) / spread
    near = np.maximum(z, -6.0)
    below = 0.5 * np.asarray(_erfc(-near / math.sqrt(2)), dtype=np.float64)
    value = spread * (near * below + np.exp(-0.5 * near * near) / math.sqrt(2 * math.pi))
    far = np.log(spread) - 0.5 * z * z - 2 * np.log(np.maximum(-z, 1.0)) - 0.92
    out: Array = np.where(z > -6, np.log(np.maximum(value, 1e-300)), far)
    return out


# --- forest ---------------------------------------------------------------------------------------------------------


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
