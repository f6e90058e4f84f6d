"""What earlier tunings know: outcomes at other shapes, on other devices, from other tools: where a search starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rooftune.autotune import formats, search
from rooftune.autotune.formats import Tuning
from rooftune.autotune.nearest import distance
from rooftune.core import Config, Problem, UsageError
from rooftune.registry import Impl
from rooftune.results import store

Column = npt.NDArray[np.float64]
Prior = Callable[[list[Config]], Sequence[float] | None]  # configs -> expected seconds, or nothing
MOST = 4  # tunings, the nearest shapes first: each is a column for the search's model


class Known(search.SearchSpace):
    """The configs of a problem with what is known before anything is measured.

    Attributes:
        prior: [configs], expected seconds of a model; None without one.
        history: per earlier tuning [configs]: best time there over this config's, 0 if it failed, NaN if not tried.
    """

    def learn(self, tunings: Sequence[Tuning], prior: Prior | None) -> None:
        """Take in earlier tunings and a model's ranking."""
        columns = [self._column(tuning) for tuning in tunings]
        self.history = [column for column in columns if column is not None]
        expected = prior([self.config(row) for row in range(len(self))]) if prior is not None else None
        if expected is not None:
            self.prior = np.asarray(expected, dtype=np.float64)

    def _column(self, tuning: Tuning) -> Column | None:
        """None if it says nothing about any of our configs."""
        best = tuning.best
        if best is None or best.value is None:
            return None
        out = np.full(len(self), np.nan)
        for row in tuning.rows:
            try:
                place = self.row(row.config)
            except (KeyError, ValueError):  # other axes, or values that are not valid here
                continue
            out[place] = 0.0 if row.value is None else best.value / row.value
        return out if np.isfinite(out).any() else None


def journals(impl: Impl, problem: Problem, device: str, but: Path) -> list[Tuning]:
    """Our own journals of this competitor in the same precision and with the same flags, the nearest shapes first;
    on the same shape those of other devices only, and never the journal that is being written (`but`)."""
    folder = store.results_dir() / "tune"
    slug = re.sub(r"[^a-z0-9]+", "-", impl.key.lower()).strip("-")
    found: list[tuple[float, str, Tuning]] = []
    for path in sorted(folder.glob(f"{slug}-*{store.SUFFIX}")) if folder.is_dir() else ():
        try:
            tunings = formats.load(path, say=lambda text: None) if path != but else []  # nobody asked for it by name
        except UsageError:  # damaged, or without a config: nothing to learn from
            continue
        for tuning in tunings:
            gap = distance(problem, Problem.parse(tuning.problem)) if tuning.kernel == impl.key else np.inf
            if np.isfinite(gap) and (gap > 0 or tuning.device != device):
                found.append((gap, str(path), tuning))
    return [tuning for _, _, tuning in sorted(found, key=lambda x: x[:2])[:MOST]]
