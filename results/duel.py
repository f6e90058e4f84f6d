"""Two revisions in one session: a few rounds of all cells screen them, fresh rounds of some decide.

Most of a pull request's cells have not changed, so rounds are spent where there is a sign of a change, or where noise
would hide one. Only rounds taken after the screen decide, hence the chance of a false alarm stays what it says,
whatever the screen did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rooftune.results import statistics
from rooftune.results.compare import COMPARED, SUITE, Cell, Verdict, compare, not_compared, worst_first
from rooftune.results.record import Record
from rooftune.results.statistics import Rounds

Key = tuple[str, str]  # problem, competitor
Sides = tuple[Sequence[Record], Sequence[Record]]  # base, candidate


@dataclass(frozen=True)
class Rule:
    """How two revisions are judged.

    Attributes:
        screen, confirm: rounds of all cells, and fresh ones of those that are to be decided.
        margin: a change must exceed this (0.005 = 0.5 %).
        detect: a cell whose 95 % interval leaves room for a change of this size is undecided (0.1 = 10 %).
        flag: one-sided p, uncorrected, from which on the screen sees a sign.
        alpha: chance of one or more false `slower` among all decided cells.
    """

    screen: int = 8
    confirm: int = 32
    margin: float = 0.005
    detect: float = 0.10
    flag: float = 0.10
    alpha: float = 0.01


def launches(cells: int, rule: Rule) -> int:
    """Processes in which the deciding rounds of so many cells are taken: all of these must agree to reach `alpha`
    (Holm), and here is one more. 8 for one cell, 12 for 20."""
    return math.ceil(math.log2(max(cells, 1) / rule.alpha)) + 1


def to_confirm(base: Sequence[Record], candidate: Sequence[Record], rule: Rule) -> list[Key]:
    """Competitors, by problem, with a sign of a change or room for one of `detect`; each with all its calls. All of
    them where the mean changed: the screen's processes may be unlucky, so fresh ones decide on it too."""
    sides = {r.cell: r.rounds for r in base if r.rounds}
    found: list[Key] = []
    all_of_them = moved(base, candidate, rule)
    for record in candidate:
        other = sides.get(record.cell)
        if not record.rounds or other is None:
            continue
        if all_of_them:
            found.append((record.problem, record.impl))
            continue
        sign = statistics.screen({0: (other, record.rounds)}, rule.margin, rule.flag)
        _, low, high = statistics.ratio(record.rounds, other)
        if sign or not _within(low, high, rule):
            found.append((record.problem, record.impl))
    return list(dict.fromkeys(found))


def moved(base: Sequence[Record], candidate: Sequence[Record], rule: Rule) -> bool:
    """Whether the mean of all cells changed in the screen."""
    cells = compare(base, candidate, margin=rule.margin, alpha=rule.alpha)
    return any(c.problem == SUITE and c.verdict in (Verdict.SLOWER, Verdict.FASTER) for c in cells)


def hopeless(base: Rounds, candidate: Rounds, done: int, launches: int, alpha: float, rule: Rule) -> bool:
    """Whether a cell can be neither slower nor faster at `alpha` any more, were all launches to come to agree.

    Processes that are started for nothing are most of what a gate costs: of unchanged cells, whose launches rarely lie
    beyond the margin on one side, most are known after 2 or 3 of 12.
    """
    logs = statistics.launch_logs(candidate, base, done)
    for toward in (logs, -logs):
        beyond = toward - math.log1p(rule.margin)
        agreeing = np.full(launches - done, 1 + np.abs(beyond).max(initial=0.0))
        if statistics.signed_rank_p(np.concatenate([beyond, agreeing])) <= alpha:
            return False
    return True


def verdicts(screened: Sides, decided: Sides, rule: Rule) -> list[Cell]:
    """(base, candidate) of the screen and of the fresh rounds -> cells, worst first.

    The suite's mean is that of all cells: where fresh rounds of all were taken, these decide on it, a test at `alpha`
    like the others. It is no cell of its own where it shows nothing.
    """
    late, early = (compare(*sides, margin=rule.margin, alpha=rule.alpha) for sides in (decided, screened))
    final = [_seen(cell, rule) for cell in late if cell.problem != SUITE]
    done = {(cell.problem, cell.impl) for cell in final}
    rest = [cell for cell in early if cell.problem != SUITE and (cell.problem, cell.impl) not in done]
    final += [_seen(cell, rule) for cell in rest]
    whole = early if any(cell.paired for cell in rest) else late
    means = [_seen(cell, rule) for cell in whole if cell.problem == SUITE]
    return worst_first([*final, *(mean for mean in means if mean.verdict != Verdict.INCONCLUSIVE)])


def explain(cells: Sequence[Cell], rule: Rule, decided: int, launches: int = 1) -> list[str]:
    """What was tested and how, and what was not compared and why.

    Launches: processes in which the fresh rounds were taken.
    """
    timed = [c for c in cells if c.paired and c.verdict in COMPARED and c.problem != SUITE]
    lines = [
        f"{len(timed)} cells in {rule.screen} paired rounds; {decided} of them, with a sign of a change or room for "
        f"one of {rule.detect:.0%}, in {rule.confirm} fresh rounds that alone decide.",
        f"slower/faster: by more than {rule.margin:.1%}, exact signed-rank test, chance of any false 'slower' at most "
        f"{rule.alpha:.0%} (Holm), and {rule.alpha:.0%} for the mean of all; same: 95 % interval within ±2 %; "
        f"{Verdict.UNSEEN}: within ±{rule.detect:.0%}.",
    ]
    if decided and launches > 1:
        lines.append(
            f"The fresh rounds were taken in up to {launches} processes a side, which must agree; in no more once they "
            "did not."
        )
    elif decided:
        lines.append("The fresh rounds were taken in one process a side: its luck may pass for a change (--launches).")
    effects = sorted(c.mde for c in timed if c.mde is not None)
    if effects:
        lines.append(
            f"Smallest change that such fresh rounds find 19 times of 20: {effects[0]:.1%} to {effects[-1]:.1%}."
        )
    lines += not_compared(cells)
    if any(c.reason.startswith("skipped: runs on") for c in cells):
        lines.append("For competitors whose device is not here: python bench.py static --baseline FILE")
    return lines


def _within(low: float | None, high: float | None, rule: Rule) -> bool:
    """Whether a slow-down and a speed-up of `detect` are outside of an interval."""
    return low is not None and high is not None and 1 / (1 + rule.detect) < low and high < 1 + rule.detect


def _seen(cell: Cell, rule: Rule) -> Cell:
    """Undecided, but the interval leaves no room for a change worth knowing: then none was seen."""
    if cell.verdict != Verdict.INCONCLUSIVE:
        return cell
    if _within(cell.lo, cell.hi, rule):
        return replace(cell, verdict=Verdict.UNSEEN, reason="")
    return replace(cell, reason=f"{cell.rounds} rounds leave room for a change of {rule.detect:.0%}; more: --confirm")
