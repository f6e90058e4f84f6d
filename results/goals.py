"""A suite's goal beside what was measured: reached or not, and whether any kernel could reach it on this machine.

The floor of the measured roof is the shortest time a call could take; torch's own time over it is the largest ratio
to torch that there can be. Where that is below the goal, the goal asks for more than the machine has.
"""

from __future__ import annotations

from collections.abc import Sequence

from rooftune.results.record import Record


def outcome(record: Record) -> str:
    """`reached`; `out of reach` where the roof itself would miss the goal; `missed`; `open` where the interval
    holds the goal or there is none. Empty without a goal or a ratio."""
    if record.goal is None or record.ratio_to_torch is None:
        return ""
    low, high = record.ratio_ci or (0.0, None)
    if low >= record.goal:
        return "reached"
    if record.possible is not None and record.possible < record.goal:
        return "out of reach"
    return "missed" if high is not None and high < record.goal else "open"


def explain(records: Sequence[Record]) -> str:
    """One line about a problem's goal, or nothing if it has none."""
    mine = next((r for r in records if r.goal is not None), None)
    if mine is None:
        return ""
    text = f"goal: {mine.goal:g}x of torch; "
    if mine.possible is None:
        return text + "whether it can be reached is not known without a roof and a torch call"
    text += f"at most {mine.possible:.2f}x is possible, as torch is at {1 / mine.possible:.0%} of the measured roof"
    why = mine.regime.get("roof")
    text += f" ({why})" if why else ""
    return text if mine.possible >= (mine.goal or 0.0) else text + ": out of reach on this machine"
