"""Verdicts of two runs: what counts as a regression, what only as a suspicion, what cannot be compared."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rooftune.core import ExitCode
from rooftune.results import statistics
from rooftune.results.compare import SUITE, Cell, Verdict, compare, explain, gate, remeasure
from rooftune.results.record import Record

IDENTITY = {"kind": "cpu", "name": "Example 9000", "governor": "performance"}


def record(name: str = "numba", mean: float | None = 0.0, seed: int = 0, n: int = 12, **changes: Any) -> Record:
    """`mean`: log of the time in units of 1 ms; None: no time. Rounds have a spread of 0.2 %."""
    plain: dict[str, Any] = {
        "problem": "softmax[m=8,n=500,fp32]",
        "op": "softmax",
        "shape": "m=8,n=500",
        "precision": "fp32",
        "impl": f"softmax/{name}",
        "config": {},
        "default": True,
        "status": "ok",
        "run": "one",
        "device": {"name": "Example 9000", "identity": IDENTITY},
        "regime": {"clock": "wall", "cache": "hot", "threads": 2},
    }
    if mean is not None:
        rng = np.random.default_rng([seed, *name.encode()])
        samples = 1e-3 * np.exp(rng.normal(mean, 0.002, (n, 5)))
        plain["rounds"] = samples.tolist()
        plain["time_s"], lo, hi = statistics.summary(plain["rounds"])
        plain["time_ci_s"] = None if lo is None else [lo, hi]
    return Record(**(plain | changes))


def later(name: str = "numba", mean: float | None = 0.0, **changes: Any) -> Record:
    """The same in another session."""
    return record(name, mean, seed=1, **({"run": "two"} | changes))


def only(cells: list[Cell]) -> Cell:
    assert len(cells) == 1
    return cells[0]


def test_a_call_of_torch_that_is_not_its_default_is_not_called_tuned() -> None:
    run = [record("torch", config={"call": "softmax"}, default=False), record("numba", default=False)]
    assert {c.impl for c in compare(run, run)} == {"geometric mean", "softmax/torch:softmax", "softmax/numba (tuned)"}


def test_a_run_against_itself_is_the_same() -> None:
    run = [record("a"), record("b"), record("c", None, status="skipped", reason="no CUDA device")]
    cells = compare(run, run)
    assert {c.verdict for c in cells} == {Verdict.SAME, Verdict.UNMEASURED}
    assert gate(cells) == ExitCode.OK


@pytest.mark.parametrize(
    ("mean", "verdict", "code"),
    [
        (0.10, Verdict.SUSPECT_SLOWER, ExitCode.INCONCLUSIVE),
        (0.03, Verdict.INCONCLUSIVE, ExitCode.INCONCLUSIVE),
        (0.0, Verdict.SAME, ExitCode.OK),
        (-0.03, Verdict.INCONCLUSIVE, ExitCode.INCONCLUSIVE),
        (-0.10, Verdict.SUSPECT_FASTER, ExitCode.OK),
    ],
)
def test_two_sessions_are_never_more_than_suspect(mean: float, verdict: Verdict, code: ExitCode) -> None:
    cell = only(compare([record()], [later(mean=mean)]))
    assert (cell.verdict, cell.paired) == (verdict, False)
    assert cell.ratio == pytest.approx(math.exp(mean), rel=0.005)
    assert gate([cell]) == code


@pytest.mark.parametrize("how", [{"run": "one"}, {"regime": {"session": "s", "clock": "wall"}}])
@pytest.mark.parametrize(
    ("mean", "verdict", "code"),
    [
        (0.03, Verdict.SLOWER, ExitCode.REGRESSION),
        (0.0, Verdict.SAME, ExitCode.OK),
        (-0.03, Verdict.FASTER, ExitCode.OK),
    ],
)
def test_paired_rounds_decide(how: dict[str, Any], mean: float, verdict: Verdict, code: ExitCode) -> None:
    base = record(regime=how.get("regime", {}))
    cell = only(compare([base], [later(mean=mean, **how)]))
    assert (cell.verdict, cell.paired, cell.rounds) == (verdict, True, 12)
    assert cell.mde is not None
    assert cell.mde < 0.02
    assert gate([cell]) == code


@pytest.mark.parametrize("mean", [0.2, -0.2])
def test_beyond_five_per_cent_but_within_the_interval_is_undecided(mean: float) -> None:
    wide = np.exp(mean + np.array([[-0.6], [-0.4], [-0.2], [0.0], [0.2], [0.4], [0.6]]))
    sides = [record(n=7, rounds=(1e-3 * scale).tolist()) for scale in (wide / np.exp(mean), wide)]
    cell = only(compare([sides[0]], [replace(sides[1], run="two")]))
    assert cell.ratio == pytest.approx(math.exp(mean))
    assert (cell.verdict, cell.reason) == (Verdict.INCONCLUSIVE, "the interval is too wide")


def test_records_that_name_no_run_are_not_of_one_session() -> None:
    (cell,) = compare([record(run="")], [later(mean=0.2, run="")])
    assert (cell.verdict, cell.paired) == (Verdict.SUSPECT_SLOWER, False)


def test_rounds_that_do_not_pair_fall_back_and_say_so() -> None:
    cell = only(compare([record()], [later(mean=0.1, run="one", n=11)]))
    assert cell.verdict == Verdict.SUSPECT_SLOWER
    assert "do not pair" in cell.reason


def test_a_small_change_everywhere_shows_in_the_mean() -> None:
    names = [f"k{i}" for i in range(30)]
    base = [record(name, n=11) for name in names]
    candidate = [record(name, 0.012, seed=1, n=11) for name in names]
    cells = compare(base, candidate)
    assert cells[0].problem == SUITE
    assert cells[0].verdict == Verdict.SLOWER
    assert {c.verdict for c in cells[1:]} == {Verdict.SAME}
    assert gate(cells) == ExitCode.REGRESSION


def test_without_samples_there_is_no_interval() -> None:
    base, slow, near = (replace(r, rounds=None) for r in (record(), later(mean=0.2), later(mean=0.01)))
    assert only(compare([base], [slow])).verdict == Verdict.SUSPECT_SLOWER
    cell = only(compare([base], [near]))
    assert (cell.verdict, cell.reason, cell.lo) == (Verdict.INCONCLUSIVE, "no samples stored", None)
    few = only(compare([record(n=3)], [later(n=3)]))
    assert few.reason == "too few rounds for an interval"


def test_a_wide_interval_is_not_a_verdict() -> None:
    base = [[t] for t in (1.0, 2.0, 1.1, 2.2, 1.0, 2.1)]
    cell = only(compare([replace(record(), rounds=base)], [replace(later(), rounds=base)]))
    assert (cell.verdict, cell.reason) == (Verdict.INCONCLUSIVE, "the interval is too wide")


def lost(status: str, reason: str = "why") -> Record:
    return later(mean=None, status=status, reason=reason)


@pytest.mark.parametrize("status", ["failed(compile)", "failed(launch)", "failed(crash)", "timeout"])
def test_what_was_ok_and_fails_is_broken(status: str) -> None:
    cell = only(compare([record()], [lost(status)]))
    assert (cell.verdict, cell.reason) == (Verdict.BROKEN, f"{status}: why")
    assert gate([cell, *compare([record("b")], [record("b")])]) == ExitCode.REGRESSION


@pytest.mark.parametrize(
    ("before", "reason"),
    [([record()], "why"), ([], "new: why"), ([lost("wrong", "x")], "as before: why"), ([lost("skipped")], "as before")],
)
def test_a_wrong_result_is_always_broken(before: list[Record], reason: str) -> None:
    cell = only(compare(before, [lost("wrong")]))
    assert cell.verdict == Verdict.BROKEN
    assert cell.reason.startswith(reason)


@pytest.mark.parametrize(
    ("base", "candidate", "verdict"),
    [
        ([record()], [], Verdict.GONE),
        ([record()], [lost("skipped")], Verdict.GONE),
        ([], [later()], Verdict.NEW),
        ([lost("skipped")], [later()], Verdict.NEW),
        ([lost("timeout")], [later()], Verdict.FIXED),
        ([lost("wrong")], [later()], Verdict.FIXED),
        ([lost("skipped")], [lost("skipped")], Verdict.UNMEASURED),
        ([lost("timeout")], [lost("failed(crash)")], Verdict.UNMEASURED),
        ([], [lost("skipped")], Verdict.UNMEASURED),
        ([lost("skipped")], [], Verdict.UNMEASURED),
        ([record()], [later(mean=None)], Verdict.UNMEASURED),
    ],
)
def test_presence(base: list[Record], candidate: list[Record], verdict: Verdict) -> None:
    assert only(compare(base, candidate)).verdict == verdict


def test_nothing_compared_is_not_ok() -> None:
    assert gate([]) == ExitCode.INCONCLUSIVE
    assert gate(compare([], [later()])) == ExitCode.INCONCLUSIVE
    assert gate(compare([record()], [])) == ExitCode.INCONCLUSIVE
    assert gate([], inconclusive=ExitCode.OK) == ExitCode.OK


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device": {"identity": IDENTITY | {"governor": "powersave"}}}, "governor performance -> powersave"),
        ({"device": {}}, "kind cpu -> unknown"),
        ({"regime": {"clock": "wall", "cache": "cold", "threads": 2}}, "cache hot -> cold"),
        ({"regime": {"clock": "wall", "cache": "hot", "threads": 1}}, "threads 2 -> 1"),
    ],
)
def test_unlike_measurements_are_not_compared(changes: dict[str, Any], text: str) -> None:
    cell = only(compare([record()], [later(mean=0.5, **changes)]))
    assert cell.verdict == Verdict.INCOMPARABLE
    assert text in cell.reason
    assert cell.ratio is None
    assert gate([cell]) == ExitCode.INCONCLUSIVE


def test_a_wrong_result_on_another_device_is_still_broken() -> None:
    assert only(compare([record()], [lost("wrong")])).verdict == Verdict.BROKEN


def test_evidence_is_matched_with_its_own_kind() -> None:
    base = [record(), record(mean=None, evidence="emulated"), record(mean=None, evidence="compiled")]
    candidate = [later(), later(mean=None, evidence="emulated", status="wrong"), later(mean=None, evidence="compiled")]
    cells = {c.evidence: c for c in compare(base, candidate)}
    assert {e: c.verdict for e, c in cells.items()} == {
        "measured": Verdict.SAME,
        "emulated": Verdict.BROKEN,
        "compiled": Verdict.SAME,
    }
    assert gate(compare(base[2:], candidate[2:])) == ExitCode.OK


def test_tuned_meets_tuned_and_a_lone_config_meets_the_other() -> None:
    tuned = {"config": {"block_n": 64}, "default": False}
    both = compare([record(), record(mean=-0.3, **tuned)], [later(), later(mean=-0.3, **tuned)])
    assert {(c.impl, c.verdict) for c in both} == {
        ("softmax/numba", Verdict.SAME),
        ("softmax/numba (tuned)", Verdict.SAME),
    }
    cell = only(compare([record()], [later(mean=-0.3, **tuned)]))
    assert cell.verdict == Verdict.SUSPECT_FASTER
    assert cell.changed == ("block_n unknown -> 64",)


def test_calls_of_the_baseline_are_cells_of_their_own() -> None:
    run = [record("torch", config={"call": call}) for call in ("softmax", "log_softmax")]
    assert len([c for c in compare(run, run) if c.problem != SUITE]) == 2


def test_changes_are_named() -> None:
    base = record(source_hash="a", versions={"triton": "3.6", "torch": "2.11"})
    cell = only(compare([base], [later(source_hash="b", versions={"triton": "3.9", "torch": "2.11"})]))
    assert cell.changed == ("kernel source", "triton 3.6 -> 3.9")


def test_worst_first() -> None:
    names = ("a", "b", "c", "d")
    base = [record(name) for name in names]
    candidate = [later("a"), later("b", 0.1), later("c", None, status="wrong"), later("d", 0.2)]
    cells = compare(base, candidate)
    assert [c.impl[-1] for c in cells] == ["c", "d", "b", "a"]


def test_explanation_and_command() -> None:
    base = [record("a"), record("b"), record("c"), record("d")]
    unlike = later("c", device={"identity": IDENTITY | {"governor": "powersave"}})
    cells = compare(base, [later("a", 0.2), later("b"), unlike, later("e")])
    text = "\n".join(explain(cells))
    assert "2 cells compared: 0 in paired rounds, 2 between two sessions." in text
    assert "Not compared, incomparable: 1 (governor performance -> powersave)." in text
    assert "Not compared, gone: 1 (in the base only)." in text
    assert "Not compared, new: 1" in text
    command = "python bench.py run --problem 'softmax[m=8,n=500,fp32]' --only a --rounds 32"
    assert remeasure(cells) == command
    assert text.endswith(command)
    assert remeasure(compare(base, base)) == ""
    paired = "\n".join(explain(compare(base, base)))
    assert "chance of any false 'slower' at most 1%" in paired
    assert "Smallest change found with 95 % power" in paired
    few = "\n".join(explain(compare([record(n=6)], [record(n=6)])))
    assert "1 of the paired cells have too few rounds" in few


@pytest.mark.parametrize(("launches", "verdict"), [(1, Verdict.SLOWER), (4, Verdict.INCONCLUSIVE)])
def test_the_rounds_of_a_process_are_one_witness_in_cells_and_in_their_mean(launches: int, verdict: Verdict) -> None:
    """Three of four processes are 5 % slower, the fourth is faster: 12 of 16 rounds are much, or one quarter is not."""
    how = {"run": "", "regime": {"session": "one", "launches": launches}}
    slow = [[1e-3 * (1.05 + i / 1000)] for i in range(12)] + [[1e-3 * (0.99 + i / 1000)] for i in range(4)]
    base = [record(name, rounds=[[1e-3]] * 16, **how) for name in "ab"]
    cells = compare(base, [record(name, rounds=slow, **how) for name in "ab"])
    assert [c.problem == SUITE for c in cells].count(True) == 1
    assert {c.verdict for c in cells} == {verdict}


def test_what_measures_again_times_it_the_same_way() -> None:
    """With other threads or another cache the new run would be incomparable; beside a GPU, it would run there."""
    about = {"name": "Example 9000", "kind": "cpu", "identity": IDENTITY}
    cold = {"device": about, "regime": {"clock": "cpu", "cache": "cold", "threads": 1}}
    cells = compare([record("a"), record("b", **cold)], [later("a", 0.2), later("b", 0.3, **cold)])
    plain = "python bench.py run --problem 'softmax[m=8,n=500,fp32]' --only {} --rounds 32"
    again = plain.format("b") + " --cache cold --clock cpu --device cpu --threads 1"
    assert remeasure(cells) == f"{again} && {plain.format('a')}"


def test_false_alarms_of_many_unchanged_paired_cells() -> None:
    """40 runs of 20 cells that share a drift of 2 % per round: at margin 0 at most one run may be red."""
    rng, red = np.random.default_rng(11), 0
    for _ in range(40):
        drift = rng.normal(0, 0.02, (12, 1))
        sides: list[list[Record]] = [[], []]
        for i in range(20):
            for side in sides:
                times = 1e-3 * np.exp(drift + rng.normal(0, 0.005, (12, 1)) + rng.exponential(0.003, (12, 5)))
                side.append(replace(record(f"k{i}"), rounds=times.tolist()))
        red += gate(compare(*sides, margin=0.0)) == ExitCode.REGRESSION
    assert red <= 1
