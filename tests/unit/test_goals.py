"""A suite's goals in tables, Markdown and CSV: reached, missed, open, or above the roof of the machine."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from test_report import RACE, lost, record, row_of, shown

from rooftune.results import export

WITH_GOAL = [
    record(
        "torch", 5e-4, config={"call": "softmax"}, ratio_to_torch=1.0, ratio_ci=[1.0, 1.0], roof=0.5, ratio_at_roof=2.0
    ),
    record("a", 4e-4, ratio_to_torch=1.25, ratio_ci=[1.21, 1.3], ratio_at_roof=2.0, goal=1.2, tie=True),
    record("b", 4.1e-4, ratio_to_torch=1.22, ratio_ci=[1.19, 1.25], ratio_at_roof=2.0, goal=1.2),
    record("c", 4.9e-4, ratio_to_torch=1.02, ratio_ci=[1.01, 1.03], ratio_at_roof=2.0, goal=1.2),
    record("few", 4.9e-4, ratio_to_torch=1.02, ratio_ci=None, ratio_at_roof=2.0, goal=1.2),
    lost("bad", "failed(compile)", "no such header"),
]


def test_a_suites_goal_is_reached_open_or_missed_in_every_row() -> None:
    text = shown(WITH_GOAL)
    assert [row_of(text, name)[6] for name in ("a ", "b ", "c ", "few", "torch", "bad")] == [
        *("reached", "open", "missed", "open", "", ""),
    ]
    assert row_of(text, "competitor")[6] == "goal 1.2x"
    assert "goal: 1.2x of torch; a kernel at the measured roof would be at 2.00x, as torch is at 50% of it" in text
    assert "above the roof" not in text
    assert "goal" not in shown(RACE)


def test_a_goal_above_the_roof_is_said_to_be() -> None:
    near = [
        replace(WITH_GOAL[0], roof=0.88, ratio_at_roof=1 / 0.88),
        *(replace(r, ratio_at_roof=1 / 0.88, regime=r.regime | {"roof": "matrix rate fp32"}) for r in WITH_GOAL[1:4]),
    ]
    text = shown(near)
    assert [row_of(text, name)[6] for name in ("a ", "b ", "c ")] == ["reached", "above the roof", "above the roof"]
    assert "(matrix rate fp32) would be at 1.14x, as torch is at 88% of it: the goal is above the roof of this" in text
    unknown = shown([record("a", ratio_at_roof=None, goal=1.2)])
    assert "whether that is below the roof is not known" in unknown


def test_a_roof_that_a_kernel_exceeds_excuses_no_miss() -> None:
    """It was measured while the machine was slow: every share is too large, and no goal is above it by that."""
    low = [
        replace(WITH_GOAL[0], roof=1.25, ratio_at_roof=0.8),
        *(replace(r, roof=roof, ratio_at_roof=0.8) for r, roof in zip(WITH_GOAL[1:4], (1.56, 1.5, 1.02), strict=True)),
    ]
    text = shown(low)
    assert [row_of(text, name)[6] for name in ("a ", "b ", "c ")] == ["reached", "open", "missed"]
    assert "the measured roof is too low, as a kernel is at 156% of it: measure it again" in text
    assert "above the roof" not in text + export.to_markdown(low)
    noise = [replace(WITH_GOAL[0], roof=1.02, ratio_at_roof=1 / 1.02), replace(WITH_GOAL[3], ratio_at_roof=1 / 1.02)]
    assert row_of(shown(noise), "c ")[6] == "above the roof"


def test_markdown_and_csv_of_a_suite_with_goals() -> None:
    lines = export.to_markdown(WITH_GOAL).splitlines()
    assert lines[0].split(" | ")[-3:-1] == ["at roof", "goal"]
    assert [line.split(" | ")[-3:-1] for line in (lines[3], lines[4])] == [
        ["2.00x", "1.2x reached"],
        ["2.00x", "1.2x open"],
    ]
    assert len({line.count("|") for line in lines}) == 1
    rows = list(csv.DictReader(io.StringIO(export.to_csv(WITH_GOAL))))
    assert (rows[1]["ratio_at_roof"], rows[1]["goal"], rows[0]["goal"]) == ("2.0", "1.2", "")
    assert "at roof" not in export.to_markdown(RACE)
