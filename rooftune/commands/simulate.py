"""`tune --simulate`: a search replayed on recorded tunings."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from rooftune.autotune import formats, simulate
from rooftune.commands import common
from rooftune.commands.tune import Plan, config_text, write
from rooftune.core import ExitCode, UsageError

SEEDS = 5  # of a replay: one search alone may be lucky


def simulated(chosen: argparse.Namespace) -> ExitCode:
    """Replay the search on recorded tunings with several seeds; no device is touched."""
    plan = Plan.of(chosen)
    if chosen.budget and plan.budget.seconds is not None:
        raise UsageError(f"--budget {chosen.budget}: a replay takes no time; give configs, such as --budget 100")
    console = common.console(chosen)
    results: list[dict[str, Any]] = []
    for path in chosen.simulate:
        for tuning in formats.load(Path(path)):
            replays = [
                simulate.replay(tuning, plan.search, plan.budget.configs, plan.seed + extra) for extra in range(SEEDS)
            ]
            told = simulate.summary(tuning, replays)
            results.append(told)
            what = f"{tuning.kernel} {tuning.problem} {tuning.device}".strip() or tuning.source  # T4 need not say
            console.print(f"\n{what}", style="bold", markup=False)
            console.print(f"  {told['recorded']} configs on record, {plan.search}, {SEEDS} seeds", markup=False)
            tried = told["tried"]
            shares = [f"{n}: {share:.3f}" for n, share in told["share_after"].items() if int(n) < tried]
            shares.append(f"{tried}: {statistics.median(r.after(tried) for r in replays):.3f}")
            console.print(f"  share of the best time after so many configs, median: {'  '.join(shares)}")
            needed = [told[key] or "not reached" for key in ("configs_to_95", "configs_to_99")]
            console.print(f"  configs to 95 % of it: {needed[0]}, to 99 %: {needed[1]}", markup=False)
            console.print(f"  best on record: {config_text(told['best_config'])}", style="dim", markup=False)
    write(chosen, results)
    return ExitCode.OK
