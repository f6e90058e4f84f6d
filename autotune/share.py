"""Many problems on one budget: the next slice goes where the expected gain times the problem's weight is largest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rooftune.autotune.job import Event, Job
from rooftune.autotune.limits import Budget
from rooftune.core import Unavailable

SLICES = 8  # a job gets on average; fewer would hardly shift anything, more would prepare the default too often
FADE = 0.5  # weight of the newest slice in the expectation


@dataclass
class Account:
    """What a job got and gave.

    Attributes:
        expected: gain of the next slice, in log time saved per unit of budget; infinite before the first.
    """

    job: Job
    weight: float
    expected: float = math.inf
    ended: str = ""

    def settle(self, gain: float, cost: float) -> None:
        """Learn from a slice: the expectation is a fading mean of what slices brought."""
        rate = gain / max(cost, 1e-9)
        self.expected = rate if math.isinf(self.expected) else FADE * rate + (1 - FADE) * self.expected


def share(
    jobs: Sequence[Job],
    total: Budget,
    weights: Mapping[str, float] | None = None,
    event: Event = lambda kind, text: None,
) -> list[Account]:
    """Advance jobs until the budget of them all is spent or none has anything left to try.

    Args:
        total: of all jobs together; what earlier runs spent on them counts.
        weights: problem -> how much of the program's time it stands for; 1 where not given. Gains are
            relative to each problem's own time.
    """
    accounts = [Account(job, (weights or {}).get(str(job.problem), 1.0)) for job in jobs]
    while open_ := [a for a in accounts if not a.ended]:
        spent_s = sum(a.job.journal.spent_s for a in accounts)
        tried = sum(len(a.job.journal.trials) for a in accounts)
        if _spent(total, spent_s, tried):
            break
        # Ties, as before anyone's first slice, go to whoever got least.
        chosen = max(open_, key=lambda a: (a.expected * a.weight, -a.job.journal.spent_s))
        _slice(chosen, total, len(jobs), event)
    return accounts


def _spent(total: Budget, spent_s: float, tried: int) -> bool:
    return (total.seconds is not None and spent_s >= total.seconds) or (
        total.configs is not None and tried >= total.configs
    )


def _slice(account: Account, total: Budget, jobs: int, event: Event) -> None:
    """One slice for one job."""
    job, journal = account.job, account.job.journal
    before, spent_s, tried = job.best, journal.spent_s, len(journal.trials)
    budget = Budget()
    if total.seconds is not None:
        budget = replace(budget, seconds=spent_s + total.seconds / (SLICES * jobs))
    if total.configs is not None:
        budget = replace(budget, configs=tried + max(2, total.configs // (SLICES * jobs)))
    if budget == Budget():
        budget = Budget(configs=tried + 16)  # no limit at all: slices still keep the jobs side by side
    try:
        job.advance(budget, others=False)
    except Unavailable as error:
        account.ended = str(error)
        event("failed", str(error))
        return
    if job.exhausted:
        account.ended = "every config was tried"
    cost = journal.spent_s - spent_s if total.seconds is not None else len(journal.trials) - tried
    # The default is the first config of a search: what it gains in its first slice is measured from there.
    start = before if before is not None else 1.0
    after = job.best
    account.settle(math.log(start / after) if after else 0.0, cost)
    event("share", f"{job.impl.key} {job.problem}: {len(journal.trials)} configs, expects {account.expected:.2g}")
