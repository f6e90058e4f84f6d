"""A Gaussian process over configs. numpy only.

The covariance of two configs is a product over axes of (1 - a) + a k: k is a Matern 5/2 correlation of the two values
on that axis (or whether they are the same, for values without order), `a` how much the axis matters. With small `a`
the product is close to a sum over axes plus weak interactions, which is what few configs can teach; with `a` near 1
it is the usual product. A `joint` process takes one Matern correlation of the distance over all axes instead: it
generalises over axes that do not matter, and errs elsewhere, which is why a search asks both. Values are few, so what
an axis contributes is a table, looked up for every pair of configs.

What is known of configs beforehand (`warm.py`) enters as trends: linear terms whose slopes have a prior and are learned
with the rest (Rasmussen and Williams, section 2.7).

Sources: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), eqs. 2.25, 2.26, 5.9 and 4.17
(Matern 5/2); Durrande, Ginsbourger, Roustant, Ann. Fac. Sci. Toulouse 21 (2012) for products of 1 + k as sums of
interactions; Riedmiller and Braun, ICNN 1993 (Rprop); Jones, Schonlau, Welch, J. Global Optimization 13 (1998) for
the expected improvement.
"""

from __future__ import annotations

import math

import numpy as np

from rooftune.autotune.features import WIDTH, Array, Features, Rows

# Prior means of the logs of: length scale of sizes and of the other coordinates (all span [0, 1]), noise deviation.
SIZE, JOINT_SIZE, OTHER, NOISE = math.log(0.4), 0.0, math.log(1.4), math.log(0.05)
# Bounds of the log-odds of `a` and of the logs of length scales, signal and noise deviation. Prior deviations are 1.
LENGTH, SIGNAL, NOISES = (0.05, 20.0), (0.1, 5.0), (0.005, 0.7)
ODDS = (-5.0, 5.0)
APART = 1e4  # squared distance of two values without order, where `a` says how far apart they are
JITTER = 1e-6
SLACK = 0.5  # prior deviation of a trend's slope
BEND = 0.3  # a log slow-down of this counts half as much more as the first


class Process:
    """Posterior of standardised targets; parameters by maximum a posteriori.

    Parameters: one row per axis, then two. Row: log-odds of `a`, WIDTH log length scales; then log signal deviation,
    log noise deviation.

    Args:
        features: of the space.
        joint: one correlation of the distance over the space's own axes, not a product over all of them.
        slope: [trends], prior means of the slopes.
    """

    def __init__(self, features: Features, joint: bool = False, slope: Array | None = None) -> None:
        self._joint = joint
        self._slope = np.zeros(0) if slope is None else slope
        coords, there = features.coords()
        count = self._count = features.given if joint else len(coords)
        coords, there = coords[:count], there[:count]
        self._gaps = (coords[:, :, None] - coords[:, None]) ** 2  # [axes, values, values, WIDTH]
        loose = ~there.any(1)
        self._gaps[loose, :, :, 0] = (1.0 if joint else APART) * (1 - np.eye(coords.shape[1]))
        mean = np.tile([0.0, JOINT_SIZE if joint else SIZE, *[OTHER] * (WIDTH - 1)], (count, 1))
        mean[loose, 1] = OTHER
        free = np.hstack([np.full((count, 1), not joint), there])
        free[loose, 1] = joint
        self._free = np.r_[free.ravel(), True, True]
        self._mean = np.r_[mean.ravel(), 0.0, NOISE]
        self._low, self._high = (
            np.r_[np.tile([ODDS[i], *[math.log(LENGTH[i])] * WIDTH], count), np.log([SIGNAL[i], NOISES[i]])]
            for i in (0, 1)
        )
        self.log = self._mean.copy()
        self.ready = False  # whether it was fitted

    def _tables(self, log: Array, gaps: Array) -> tuple[Array, Array, Array]:
        """What axes contribute [axes, values, values], and its slopes by `a` and by length scales [..., WIDTH]."""
        rows = log[:-2].reshape(self._count, 1 + WIDTH)
        parts = gaps * np.exp(-2 * rows[:, 1:])[:, None, None]
        if self._joint:
            table = parts.sum(-1)
            return table, np.zeros_like(table), parts
        share = (1 / (1 + np.exp(-rows[:, 0])))[:, None, None]
        k, fall = _matern(parts.sum(-1))
        return 1 - share + share * k, share * (1 - share) * (k - 1), (share * fall)[..., None] * parts

    def _loss(self, log: Array, y: Array, gaps: Array, pairs: Rows, fixed: Array) -> tuple[float, Array]:
        """Negative log posterior and its gradient.

        Args:
            gaps: of the values in use.
            pairs: [axes, n * n], places in such tables.
            fixed: [n, n], covariance besides.
        """
        n = len(y)
        tables, by_share, by_length = self._tables(log, gaps)
        looked = tables.ravel()[pairs]
        signal, noise = math.exp(2 * log[-2]), math.exp(2 * log[-1])
        correlation, fall = _matern(looked.sum(0)) if self._joint else (looked.prod(0), None)
        smooth = signal * correlation.reshape(n, n)
        try:
            lower = np.linalg.cholesky(smooth + fixed + (noise + JITTER) * np.eye(n))
        except np.linalg.LinAlgError:
            return math.inf, np.zeros_like(log)
        half = np.linalg.inv(lower)
        inverse = half.T @ half
        alpha = inverse @ y
        away = log - self._mean
        loss = 0.5 * float(y @ alpha) + float(np.log(np.diag(lower)).sum()) + 0.5 * float(away @ away)
        pull = 0.5 * (inverse - np.outer(alpha, alpha))
        weight = pull * smooth
        if fall is None:
            each = weight.ravel() / looked
        else:
            each = np.broadcast_to(signal * pull.ravel() * fall, pairs.shape)
        by_value = np.bincount(pairs.ravel(), each.ravel(), tables.size).reshape(tables.shape)
        grad = np.empty_like(log)
        rows = grad[:-2].reshape(self._count, 1 + WIDTH)
        rows[:, 0] = (by_value * by_share).sum((1, 2))
        rows[:, 1:] = np.einsum("auv,auvp->ap", by_value, by_length)
        grad[-2] = 2 * float(weight.sum())
        grad[-1] = 2 * noise * float(np.trace(pull))
        return loss, (grad + away) * self._free

    def _used(self, at: Rows) -> tuple[Array, Rows]:
        """Gaps between the values that occur in `at`, and for every pair of rows its place in such tables."""
        most = max(1, max((len(np.unique(column)) for column in at.T[: self._count]), default=1))
        gaps = np.zeros((self._count, most, most, WIDTH))
        pairs = np.empty((self._count, len(at) ** 2), dtype=np.int64)
        for axis, column in enumerate(at.T[: self._count]):
            values, place = np.unique(column, return_inverse=True)
            gaps[axis, : len(values), : len(values)] = self._gaps[axis][np.ix_(values, values)]
            pairs[axis] = (axis * most * most + place[:, None] * most + place).ravel()
        return gaps, pairs

    def fit(self, at: Rows, y: Array, steps: int, trends: Array | None = None) -> None:
        """Improve the parameters by sign-based steps from where they are, then take the data in."""
        gaps, pairs = self._used(at)
        rest, fixed = self._detrend(y, trends)
        step = np.full(len(self.log), 0.15)
        log, (best, grad) = self.log, self._loss(self.log, rest, gaps, pairs, fixed)
        for _ in range(steps):
            trial = np.clip(log - step * np.sign(grad), self._low, self._high)
            loss, new = self._loss(trial, rest, gaps, pairs, fixed)
            step = np.where(new * grad > 0, np.minimum(step * 1.4, 0.8), np.maximum(step * 0.5, 1e-3))
            if loss < best + 0.5:  # a step may cost a little: it only has to lead on
                log, grad = trial, new
                if loss < best:
                    best, self.log = loss, trial
            else:
                step = step * 0.5
        self.condition(at, y, trends)
        self.ready = True

    def _detrend(self, y: Array, trends: Array | None) -> tuple[Array, Array]:
        """(y less the expected trends, covariance that the slopes' doubt adds)."""
        if trends is None:
            return y, np.zeros((len(y), len(y)))
        return y - trends @ self._slope, SLACK**2 * trends @ trends.T

    def condition(self, at: Rows, y: Array, trends: Array | None = None) -> None:
        """Take the data in, with the parameters there are.

        Args:
            at: [n, axes], positions of values.
            y: [n], standardised.
            trends: [n, trends], in the units of y.
        """
        self._at, self._signal = at, math.exp(2 * self.log[-2])
        self._looked = self._tables(self.log, self._gaps)[0]
        noise = math.exp(2 * self.log[-1]) + JITTER
        rest, fixed = self._detrend(y, trends)
        self._trends = trends
        kernel = self._signal * self.closeness(at, at) + fixed + noise * np.eye(len(y))
        self._half = np.linalg.inv(np.linalg.cholesky(kernel))
        self._alpha = self._half.T @ (self._half @ rest)

    def closeness(self, at: Rows, to: Rows) -> Array:
        """Correlation of configs: [len(at), len(to)]."""
        out = np.full((len(at), len(to)), 0.0 if self._joint else 1.0)
        for table, a, b in zip(self._looked, at.T, to.T, strict=False):  # a joint process has fewer axes
            part = table[:, b][a]
            if self._joint:
                out += part
            else:
                out *= part
        return _matern(out)[0] if self._joint else out

    def predict(self, at: Rows, trends: Array | None = None) -> tuple[Array, Array, Array]:
        """Mean [c], deviation [c], and correlation with the data [c, n]."""
        near = self.closeness(at, self._at)
        cross, own, mean = self._signal * near, np.full(len(at), self._signal), np.zeros(len(at))
        if trends is not None and self._trends is not None:
            cross = cross + SLACK**2 * trends @ self._trends.T
            own, mean = own + SLACK**2 * (trends * trends).sum(1), trends @ self._slope
        v = self._half @ cross.T
        return mean + cross @ self._alpha, np.sqrt(np.maximum(own - (v * v).sum(0), 1e-9)), near


def _matern(squared: Array) -> tuple[Array, Array]:
    """Matern 5/2 correlation at a squared distance, and its slope by the log of a length scale over that distance."""
    r = np.sqrt(5 * squared)
    decay = np.exp(-r)
    return (1 + r + r * r / 3) * decay, (5 / 3) * (1 + r) * decay


def compress(slowdown: Array) -> Array:
    """Log slow-downs with the large ones compressed: how slow a bad config is does not matter."""
    out: Array = np.log1p(slowdown / BEND)
    return out


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
