"""What people and programs are shown: every figure in its place, nothing lost, nothing invented."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import pytest
from rich.console import Console

from rooftune import race, registry
from rooftune.lab import Lab
from rooftune.results import export, report, store
from rooftune.results.compare import Cell, Verdict
from rooftune.results.record import Record

SOURCE = "01234567"
LONG = "attention[b=16,h=32,hk=8,sq=16384,sk=16384,d=128,causal,bf16]"


def record(name: str = "numba", time_s: float | None = 4.123e-4, **changes: Any) -> Record:
    timed: dict[str, Any] = {}
    if time_s is not None:
        timed = {
            "time_s": time_s,
            "time_ci_s": [time_s * 0.99, time_s * 1.02],
            "ratio_to_torch": 1.234,
            "ratio_ci": [1.2, 1.25],
            "tflops": 0.05,
            "gbps": 81.9,
            "roof": 0.812,
            "rounds": [[time_s]] * 10,
        }
    plain: dict[str, Any] = {
        "problem": "softmax[m=8,n=500,bf16]",
        "op": "softmax",
        "shape": "m=8,n=500",
        "precision": "bf16",
        "impl": f"softmax/{name}",
        "config": {},
        "default": True,
        "status": "ok",
        "error": {"rel_fro": 1.3e-3},
        "device": {"name": "Example 9000"},
        "regime": {"clock": "wall", "cache": "hot", "threads": 2},
        "source_hash": "0123456789abcdef",
    }
    return Record(**(plain | timed | changes))


def lost(name: str, status: str, reason: str) -> Record:
    return record(name, None, status=status, reason=reason, error=None)


def emulated(status: str = "ok", reason: str = "", **changes: Any) -> Record:
    return record("triton", None, evidence="emulated", status=status, reason=reason, **changes)


def compiled(rows: list[dict[str, Any]]) -> Record:
    return record("triton", None, evidence="compiled", error=None, resources=rows)


RACE = [
    record("torch", 5e-4, config={"call": "softmax"}, ratio_to_torch=1.0, ratio_ci=[1.0, 1.0]),
    record(tie=True),
    record(time_s=4.2e-4, config={"block_n": 128, "num_warps": 8}, default=False, tie=True),
    lost("cupy", "wrong", "error 3.4x the allowed (0.123 instead of 0.125 at (0, 3), [bold]normal[/bold] input)"),
    lost("bad", "failed(compile)", "no such header"),
    lost("triton", "skipped", "runs on cuda, not on cpu"),
    lost("numba_cuda", "skipped", "runs on cuda, not on cpu"),
]


def shown(records: list[Record], width: int = 100, **options: Any) -> str:
    out = io.StringIO()
    report.race_table(records, report.make_console(out, width), **options)
    return out.getvalue()


def row_of(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [cell.strip() for cell in line.split("|")]


def test_race_table_at_100_columns() -> None:
    text = shown(RACE)
    assert row_of(text, "numba ") == ["numba", "ok ≈", "412.3 µs ±2%", "81.9", "81.2%", "1.234x ±2.8%", "1.3e-03"]
    assert row_of(text, "numba bn128 nw8")[1] == "ok ≈"
    assert row_of(text, "torch:softmax")[1] == "ok"
    assert row_of(text, "cupy")[1:3] == ["wrong", "see below"]
    assert "cupy: wrong: error 3.4x the allowed (0.123 instead of 0.125 at (0, 3), [bold]normal[/bold] input)" in text
    assert "bad: failed(compile): no such header" in text
    assert "no winner: these 2 cannot be told apart" in text
    assert "skipped (runs on cuda, not on cpu): triton, numba_cuda" in text
    told = shown(RACE, standing={"softmax/triton": "compiled, never run on hardware (source 01234567)"})
    assert "triton [compiled, never run on hardware (source 01234567)], numba_cuda" in told
    assert "Example 9000 · wall clock, hot cache, 2 threads, 10 rounds" in text
    assert all(len(line) <= 100 for line in text.splitlines() if "|" in line)
    assert "\x1b" not in text


def test_wide_tables_show_whole_intervals_and_energy() -> None:
    text = shown([record(energy={"joules": 0.0123}), record("b", energy={"joules": None, "reason": "no"})], 140)
    assert row_of(text, "numba")[2] == "412.3 µs [408.2, 420.5]"
    assert row_of(text, "numba")[5:7] == ["1.234x [1.200, 1.250]", "12.3"]
    assert row_of(text, "b ")[6] == ""
    assert "mJ/call" not in shown([record(energy={"joules": 0.0123})], 100)


def test_a_single_winner_gets_the_star() -> None:
    text = shown([record(tie=True), record("torch", 5e-4)])
    assert row_of(text, "numba")[1] == "ok ★"
    assert "no winner" not in text


def test_the_unit_follows_the_arithmetic_intensity() -> None:
    assert "GB/s" in shown([record()])
    assert "TFLOP/s" in shown([record(tflops=20.0, gbps=100.0)])


def test_missing_columns_say_why() -> None:
    text = shown([record(roof=None, ratio_to_torch=None, ratio_ci=None, regime={"roof": "no rate for fp8"})])
    assert "no roof: no rate for fp8" in text
    assert "no ratio: no torch call was timed" in text
    text = shown([lost("triton", "skipped", "why")])
    assert "nothing was timed" in text
    few = [record(tie=True, time_ci_s=None), record("b", tie=True, time_ci_s=None)]
    assert "too few rounds" in shown(few)


def test_devices_and_evidence_are_never_mixed() -> None:
    other = record("b", device={"name": "Other"})
    text = shown([record(), other, emulated(), compiled([])])
    assert text.count("competitor") == 2
    assert "triton" not in text


def test_long_names_give_way_figures_do_not() -> None:
    text = shown([record("a_very_long_competitor_name_of_a_user_that_goes_on_and_on_and_on", time_s=1.0)])
    line = next(line for line in text.splitlines() if line.startswith("a_very"))
    assert len(line) <= 100
    assert "1.000 s ±2%" in line
    assert "…" in line


def test_a_terminal_gets_colour_unless_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def on_terminal() -> str:
        out = io.StringIO()
        report.race_table(RACE, Console(file=out, width=100, force_terminal=True))
        return out.getvalue()

    assert "\x1b[32m" in on_terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in on_terminal()


def test_off_a_terminal_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = io.StringIO()
    report.compare_table(CELLS, report.make_console(out))
    assert all(cell.problem in out.getvalue() for cell in CELLS)
    assert "…" not in out.getvalue()


def test_an_ascii_terminal_gets_ascii() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    report.race_table([*RACE, lost("x", "wrong", "ü → 漢")], report.make_console(out, 100))
    out.flush()
    text = raw.getvalue().decode("ascii")
    assert "ok =" in text
    assert "412.3 us +-2%" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.5, "1.500 s"), (0.0123456, "12.35 ms"), (9.9999e-7, "1000 ns"), (1e-6, "1.000 µs"), (2e-10, "0.2000 ns")],
)
def test_format_time(seconds: float, text: str) -> None:
    assert report.format_time(seconds) == text


def test_evidence_tables() -> None:
    rows: list[dict[str, Any]] = [
        {"arch": "sm_90a", "registers": 64, "spill_bytes": 0, "shared_bytes": 1536, "tensor_core": ["HGMMA"]},
        {"arch": "sm_80", "registers": 255, "spill_bytes": 16, "shared_bytes": None, "toolchain": "ptxas 13.0"},
        {"arch": "sm_120a", "status": "failed(compile)", "reason": "too much shared memory"},
    ]
    found = [
        emulated(precision="fp32"),
        emulated("wrong", "error 3x"),
        emulated(problem="softmax[m=1,n=1,bf16]"),
        record("numba_cuda", None, evidence="emulated", status="skipped", reason="not installed"),
        compiled(rows),
        record("late", None, evidence="compiled", status="timeout", reason="above 180 s"),
        record("measured"),
    ]
    out = io.StringIO()
    report.evidence_table(found, report.make_console(out, 100))
    text = out.getvalue()
    assert row_of(text, "softmax/triton") == [
        "softmax/triton",
        "ok 1.3e-03",
        "wrong 1.3e-03",
        SOURCE,
    ]  # the worst problem
    assert "softmax/triton bf16: wrong: error 3x" in text
    assert "softmax/numba_cuda bf16: skipped: not installed" in text
    table = [[c.strip() for c in line.split("|")] for line in text.splitlines() if "sm_" in line and "|" in line]
    assert table[0][1:] == ["bf16", "sm_90a", "64", "0", "1.5", "HGMMA", SOURCE]
    assert table[1][1:] == ["bf16", "sm_80", "255", "16", "", "no", SOURCE]
    assert table[2][1:] == ["bf16", "sm_120a", "", "", "", "failed", SOURCE]
    assert "softmax/triton bf16 sm_120a: failed(compile): too much shared memory" in text
    assert "compiled by: ptxas 13.0" in text
    assert "softmax/late bf16: timeout: above 180 s" in text
    assert "measured" not in text
    empty = io.StringIO()
    report.evidence_table([record()], report.make_console(empty, 100))
    assert empty.getvalue() == ""


CELLS = [
    Cell(LONG, "attention/cupy", Verdict.BROKEN, "error 3x\nthe allowed, 100%"),
    Cell(LONG, "attention/numba", Verdict.SLOWER, "", "measured", 1e-3, 1.1e-3, 1.1, 1.08, 1.12, 1e-4, 0.01, 12, True,
         ("kernel source",)),
    Cell("softmax[m=8,n=500,bf16]", "softmax/b", Verdict.SUSPECT_SLOWER, "measure again", ratio=1.2),
    Cell("softmax[m=8,n=500,bf16]", "softmax/c", Verdict.SAME, ratio=1.0, lo=0.99, hi=1.01),
    Cell("softmax[m=8,n=500,bf16]", "softmax/d", Verdict.UNMEASURED, "skipped: no CUDA device"),
]  # fmt: skip


@pytest.mark.parametrize("width", [100, 140])
def test_compare_table(width: int) -> None:
    out = io.StringIO()
    report.compare_table(CELLS, report.make_console(out, width))
    text = out.getvalue()
    rows = [line for line in text.splitlines() if "|" in line]
    assert all(len(line) <= width for line in rows)
    assert [line.split()[0] for line in rows[1:]] == ["broken", "slower", "suspect-slower", "same"]
    assert rows[1].split("|")[1].strip().startswith("attention[b=16")
    assert rows[1].split("|")[1].strip().endswith("bf16]")
    assert "1.000 ms" in rows[2]
    assert ("1.100x ±1.8%" if width == 100 else "1.100x [1.080, 1.120]") in rows[2]
    assert "slower (changed: kernel source)" in text
    assert "Not compared, unmeasured: 1 (skipped: no CUDA device)." in text
    assert "Measure again: python bench.py run --problem" in text


def test_json_lines_are_a_run(tmp_path: Path) -> None:
    text = export.to_json_lines(RACE)
    assert len(text.splitlines()) == len(RACE)
    assert json.loads(text.splitlines()[0])["impl"] == "softmax/torch"
    (tmp_path / "out.jsonl").write_text(text)
    assert store.load_run(tmp_path / "out.jsonl") == RACE


def test_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(export.to_csv(RACE))))
    assert tuple(rows[0]) == export.COLUMNS
    assert float(rows[1]["time_s"]) == RACE[1].time_s
    assert (rows[1]["time_lo_s"], rows[1]["tie"]) == (str(4.123e-4 * 0.99), "true")
    assert json.loads(rows[2]["config"]) == RACE[2].config
    assert (rows[3]["time_s"], rows[3]["reason"]) == ("", RACE[3].reason)


def test_markdown_keeps_evidence_apart_and_cells_closed() -> None:
    rows = [{"arch": "sm_80", "registers": 40, "spill_bytes": 0, "tensor_core": []}]
    text = export.to_markdown([*RACE, lost("x", "wrong", "a|b\n<script>`c`"), emulated(), compiled(rows)])
    measured, emulated_part, compiled_part = text.split("\n\n")[0], text.index("Emulated"), text.index("Compiled")
    assert len({line.replace("\\|", "").count("|") for line in measured.splitlines()}) == 1
    assert "412.3 µs" in measured
    assert "1.234x [1.200, 1.250]" in measured
    assert "wrong: a\\|b &lt;script>'c'" in measured
    assert 0 < emulated_part < compiled_part
    assert "sm_80: 40 registers, 0 B spilled, no tensor core" in text
    assert export.to_markdown([]) == ""


def test_junit_of_results() -> None:
    suite = ElementTree.fromstring(export.junit([*RACE, lost("x", "wrong", "bell \x07 <&>")]))
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors"), suite.get("skipped")) == (
        "8",
        "2",
        "1",
        "2",
    )
    message = suite.findall("testcase/failure")[1].get("message")
    assert message == "wrong: bell \ufffd <&>"


def test_junit_of_a_comparison() -> None:
    suite = ElementTree.fromstring(export.junit(CELLS))
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("1", "1", "2")
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.get("message") == "slower: 1.100x [1.080, 1.120], 1.000 ms -> 1.100 ms"


def test_annotations_are_escaped_capped_and_worst_first() -> None:
    lines = export.github_annotations([CELLS[2]] * 12 + CELLS)
    assert len(lines) == 10
    title = "broken%3A attention/cupy " + LONG.replace(",", "%2C")
    assert lines[0] == f"::error title={title}::error 3x%0Athe allowed, 100%25"
    assert lines[1].startswith("::error title=slower")
    assert all(line.startswith("::warning title=suspect-slower") for line in lines[2:])
    assert export.github_annotations(CELLS[3:]) == []


def test_step_summary_is_capped() -> None:
    text = export.step_summary(CELLS)
    assert text.count("| slower |") == 1
    assert "unmeasured |" not in text
    assert "are shown" not in text
    text = export.step_summary([CELLS[2]] * 500)
    assert text.count("| suspect-slower |") == 200
    assert "The worst 200 of 500 rows are shown." in text
    huge = Cell("p", "op/x", Verdict.BROKEN, "é" * 20_000)
    text = export.step_summary([huge] * 300)
    assert len(text.encode()) <= 1024 * 1024
    assert "The worst 25 of 300 rows are shown." in text


def test_the_race_gives_every_row_the_ratio_of_a_kernel_at_the_roof() -> None:
    op, problem = registry.op("softmax"), registry.problem("softmax[m=64,n=512,fp32]")
    field = [
        race.Entrant(registry.impl(f"softmax/{name}"), {}, True, rounds=[[time_s]] * 6)
        for name, time_s in (("torch", 4e-3), ("numba", 1e-3))
    ]
    copy = {"working_set_bytes": 2**18, "value": op.bytes(problem) / 1e9 / 5e-4}  # the floor: 0.5 ms
    lab = cast(Lab, SimpleNamespace(threads=1))
    for ceilings, at_roof in (({"copy": [copy]}, 8.0), ({"copy": []}, None), (None, None)):
        for found in race.judge(op, problem, field, race.Options(), ceilings, lab):
            assert found.ratio_at_roof == (at_roof and pytest.approx(at_roof))
