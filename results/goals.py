"""A suite's goal beside what was measured: reached or not, and whether it lies above this machine's roof.

Torch's own time over the floor of the measured roof is the ratio that a kernel at the roof would have. Where the
goal is larger, it asks for more than the machine was seen to do: sgemm, where torch is at 88 % of the FMA rate.
A roof that a kernel of the same problem exceeds was measured in a slow spell of the machine: it excuses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from rooftune.results.record import Record

SLACK = 1.03  # of the roof: what noise alone puts a kernel above it


def refuted(records: Sequence[Record]) -> bool:
    """Whether one of a problem's kernels was faster than the roof."""
    return any(r.roof is not None and r.roof > SLACK for r in records)


def outcome(record: Record, problem: Sequence[Record] = ()) -> str:
    """`reached`; `above the roof` where a kernel at the roof would miss the goal; `missed`; `open` where the
    interval holds the goal or there is none. Empty without a goal or a ratio.

    `problem`: the records of the same problem and run.
    """
    if record.goal is None or record.ratio_to_torch is None:
        return ""
    low, high = record.ratio_ci or (0.0, None)
    if low >= record.goal:
        return "reached"
    if record.ratio_at_roof is not None and record.ratio_at_roof < record.goal and not refuted([record, *problem]):
        return "above the roof"
    return "missed" if high is not None and high < record.goal else "open"


def explain(records: Sequence[Record]) -> str:
    """One line about a problem's goal, or nothing if it has none. The records are those of one problem and run."""
    mine = next((r for r in records if r.goal is not None), None)
    if mine is None or mine.goal is None:
        return ""
    text = f"goal: {mine.goal:g}x of torch"
    if mine.ratio_at_roof is None:
        return f"{text}; whether that is below the roof is not known without a roof and a torch call"
    why = mine.regime.get("roof")
    name = f" ({why})" if why else ""
    if refuted(records):
        top = max(r.roof for r in records if r.roof is not None)
        return f"{text}; the measured roof{name} is too low, as a kernel is at {top:.0%} of it: measure it again"
    text += f"; a kernel at the measured roof{name} would be at {mine.ratio_at_roof:.2f}x, as torch is at "
    text += f"{1 / mine.ratio_at_roof:.0%} of it"
    return text if mine.ratio_at_roof >= mine.goal else text + ": the goal is above the roof of this machine"
