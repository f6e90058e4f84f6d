"""A suite's goal beside what was measured: reached or not, and whether it lies above this machine's roof.

Torch's own time over the floor of the measured roof is the ratio that a kernel at the roof would have. Where the
goal is larger, it asks for more than the machine was seen to do: sgemm, where torch is at 88 % of the FMA rate.
"""

from __future__ import annotations

from collections.abc import Sequence

from rooftune.results.record import Record


def outcome(record: Record) -> str:
    """`reached`; `above the roof` where a kernel at the roof would miss the goal; `missed`; `open` where the
    interval holds the goal or there is none. Empty without a goal or a ratio."""
    if record.goal is None or record.ratio_to_torch is None:
        return ""
    low, high = record.ratio_ci or (0.0, None)
    if low >= record.goal:
        return "reached"
    if record.ratio_at_roof is not None and record.ratio_at_roof < record.goal:
        return "above the roof"
    return "missed" if high is not None and high < record.goal else "open"


def explain(records: Sequence[Record]) -> str:
    """One line about a problem's goal, or nothing if it has none."""
    mine = next((r for r in records if r.goal is not None), None)
    if mine is None or mine.goal is None:
        return ""
    text = f"goal: {mine.goal:g}x of torch"
    if mine.ratio_at_roof is None:
        return f"{text}; whether that is below the roof is not known without a roof and a torch call"
    why = mine.regime.get("roof")
    name = f" ({why})" if why else ""
    text += f"; a kernel at the measured roof{name} would be at {mine.ratio_at_roof:.2f}x, as torch is at "
    text += f"{1 / mine.ratio_at_roof:.0%} of it"
    return text if mine.ratio_at_roof >= mine.goal else text + ": the goal is above the roof of this machine"
