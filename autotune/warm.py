"""What is known before the first measurement: the same kernel on other devices and shapes, an analytic ranking.

Each source becomes a column of expected slow-downs, one per config, in the search's own units. The process takes the
columns as trends whose slopes it learns (a prior mean and deviation each), so a source that proves wrong fades, and
of several devices the one that resembles this one counts most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rooftune.autotune.features import Array, Features
from rooftune.autotune.process import Process, compress

FAILED = 3.0  # log slow-down a failure elsewhere counts as
FULL = 0.5  # a table that knows this share of the configs needs no model to fill its gaps
FEW = 8  # outcomes below this teach nothing about other configs
MOST = 200  # outcomes a model of a history learns from, the fastest first: the cost grows with the cube
RANKED = 2.0  # slow-down, in the search's units, from the first to the last config of a ranking
TRUST = 1.0, 0.5  # mean of the slopes of all histories together, and of a ranking


@dataclass(frozen=True)
class Trend:
    """Columns of expected slow-downs.

    Attributes:
        columns: [configs, sources], compressed log slow-downs.
        slope: [sources], how much each is trusted at first.
        firsts: rows worth trying first, best first.
        histories: how many sources, the first ones, are histories.
    """

    columns: Array
    slope: Array
    firsts: list[int]
    histories: int

    @property
    def mean(self) -> Array:
        """Expected slow-down of each config before anything is measured: [configs]."""
        out: Array = self.columns @ self.slope
        return out

    def without_histories(self) -> Trend | None:
        """What is known besides; None if nothing is."""
        rest = slice(self.histories, None)
        return Trend(self.columns[:, rest], self.slope[rest], [], 0) if self.histories < len(self.slope) else None


def trend(features: Features, history: Sequence[Array], ranking: Array | None) -> Trend | None:
    """From histories ([configs]: best time / time, 0 failed, NaN unknown) and an expected time per config.

    None where nothing is known.
    """
    columns = [column for past in history if (column := _slowdown(features, np.asarray(past, dtype=float))) is not None]
    histories = len(columns)
    slopes = [TRUST[0] / max(histories, 1)] * histories
    if ranking is not None and np.isfinite(ranking).any():
        place = np.argsort(np.argsort(np.where(np.isfinite(ranking), ranking, np.inf), kind="stable"), kind="stable")
        columns.append(RANKED * place / max(len(place) - 1, 1))
        slopes.append(TRUST[1])
    if not columns:
        return None
    table, slope = np.stack(columns, axis=1), np.array(slopes)
    order = np.argsort(table @ slope, kind="stable")
    own = [int(np.argmin(column)) for column in columns]
    return Trend(table, slope, list(dict.fromkeys([int(order[0]), *own, *(int(row) for row in order[1:8])])), histories)


def _slowdown(features: Features, past: Array) -> Array | None:
    """Compressed log slow-down of every config, from one history; None if it teaches nothing."""
    known, ran = np.isfinite(past), np.isfinite(past) & (past > 0)
    if ran.sum() < FEW:
        return None
    logs = np.where(ran, -np.log(np.where(ran, past, 1.0)), FAILED)
    logs = np.maximum(logs - logs[ran].min(), 0.0)
    seen = compress(np.minimum(logs, FAILED))
    if known.mean() >= FULL:
        return np.where(known, seen, np.median(seen[known]))
    rows = np.flatnonzero(known)
    rows = rows[np.argsort(seen[rows], kind="stable")[:MOST]]
    middle, scale = seen[rows].mean(), seen[rows].std() + 1e-9
    model = Process(features)
    model.fit(features.at[rows], (seen[rows] - middle) / scale, 40)
    filled = np.concatenate([model.predict(part)[0] for part in np.array_split(features.at, 1 + len(past) // 2000)])
    return np.where(known, seen, np.maximum(middle + scale * filled, 0.0))
