"""Replays of a search on a recorded tuning: how good it gets after how many configs, without a device."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rooftune.autotune import search
from rooftune.autotune.formats import Tuning
from rooftune.autotune.journal import canonical
from rooftune.core import UsageError

AFTER = (10, 25, 50, 100, 200)  # configs, as the field's yardsticks count


@dataclass(frozen=True)
class Replay:
    """One search with one seed.

    Attributes:
        shares: best time on record over the best found, after each config.
        failed: of the configs tried, those without a time.
    """

    search: str
    seed: int
    shares: list[float]
    failed: int

    def reached(self, share: float) -> int | None:
        """Configs tried until that share of the optimum was reached."""
        return next((i + 1 for i, got in enumerate(self.shares) if got >= share), None)

    def after(self, configs: int) -> float:
        """Share of the optimum after that many configs, or after all there are."""
        return self.shares[min(configs, len(self.shares)) - 1]


def replay(tuning: Tuning, search_name: str, budget: int | None = None, seed: int = 0) -> Replay:
    """Run a search over what was recorded; configs that were not recorded do not exist for it.

    Raises:
        UsageError: no config on record ran, or the record's configs differ in their axes.
    """
    outcomes = {canonical(row.config): row for row in tuning.rows}
    best = tuning.best
    if best is None or best.value is None:
        raise UsageError(
            f"{tuning.source}: no config of {tuning.kernel} {tuning.problem} ran, so nothing can be searched"
        )
    configs = [row.config for row in outcomes.values()]
    if any(set(config) != set(tuning.axes) for config in configs):
        raise UsageError(f"{tuning.source}: configs of {tuning.kernel} do not all have the same axes")
    space = search.SearchSpace.of(tuning.axes, configs)
    steps = search.find(search_name)(space, np.random.default_rng(seed))
    shares: list[float] = []
    failed, top = 0, 0.0
    config = next(steps, None)
    while config is not None and (budget is None or len(shares) < budget):
        row = outcomes[canonical(config)]
        failed += row.value is None
        top = max(top, 0.0 if row.value is None else best.value / row.value)
        shares.append(top)
        try:
            config = steps.send(search.Outcome(row.value, row.status, row.reason))
        except StopIteration:
            config = None
    steps.close()
    return Replay(search_name, seed, shares, failed)


def summary(tuning: Tuning, replays: Sequence[Replay]) -> dict[str, Any]:
    """Medians over the seeds, as plain data."""
    best = tuning.best
    needed = {share: [r.reached(share) for r in replays] for share in (0.95, 0.99)}
    return {
        "kind": "simulated",
        "kernel": tuning.kernel,
        "problem": tuning.problem,
        "device": tuning.device,
        "source": tuning.source,
        "search": replays[0].search,
        "seeds": [r.seed for r in replays],
        "recorded": len(tuning.rows),
        "best_config": best.config if best else None,
        "share_after": {str(n): statistics.median(r.after(n) for r in replays) for n in AFTER},
        "worst_after": {str(n): min(r.after(n) for r in replays) for n in AFTER},
        "configs_to_95": _middle(needed[0.95]),
        "configs_to_99": _middle(needed[0.99]),
        "tried": max(len(r.shares) for r in replays),
    }


def _middle(counts: list[int | None]) -> int | None:
    """The median; None where more than half of the searches never got there."""
    known = sorted(c for c in counts if c is not None)
    return known[len(counts) // 2] if len(known) > len(counts) // 2 else None
