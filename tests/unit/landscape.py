"""Landscapes for tests of searches: shaped like a kernel's times, with a known best."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from rooftune.autotune import search

AXES: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 48, 64, 96, 128, 192, 256),
    "block_n": (16, 32, 48, 64, 96, 128, 192, 256),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "order": ("row", "column", "tile"),
    "vector": (False, True),
}


class View:
    """A space in the form of recorded tables: `keys`, `values`, `idx`, `history`."""

    history: tuple[Any, ...] = ()

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


def share(times: list[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A table as another device's history: best time / time, 0 where it failed."""
    best = min(t for t in times if t is not None)
    return np.array([0.0 if t is None else best / t for t in times])


def quality(name: str, seed: int, budget: int, history: tuple[Any, ...] = (), noise: float = 0.0) -> float:
    """Best time of the table over that of the config a search believes best."""
    view = View()
    view.history = history
    table, rng = times(view, seed), np.random.default_rng(seed)
    got: list[tuple[float, float]] = []  # (measured, true)

    def evaluate(row: int) -> float | None:
        true = table[row]
        seen = None if true is None else true * math.exp(noise * rng.normal())
        got.append((math.inf if seen is None else seen, math.inf if true is None else true))
        return seen

    search.replay(view, evaluate, budget, seed, name)
    return min(t for t in table if t is not None) / min(got)[1]
