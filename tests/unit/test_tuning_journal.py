"""The journal of a tuning: what it keeps, whose it is, and what cuts, kills and moves do to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_lab import BEST, HERE, IMPL, FakeLab, config_lines, run

from rooftune.autotune import formats, journal
from rooftune.results.store import Log


def test_resume_measures_nothing_twice_and_ends_at_the_same_config(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    run(FakeLab(), path, "12")
    said: list[str] = []
    again = FakeLab()
    result = run(again, path, "30", event=lambda kind, text: said.append(f"{kind} {text}"))
    assert result.resumed == 12
    assert result.measured == 30
    trials = config_lines(path)
    assert len({journal.canonical(t["config"]) for t in trials}) == len(trials) == 30
    assert any("12 configs measured before are not measured again" in text for text in said)


def test_a_spent_budget_is_answered_from_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first = run(FakeLab(), path, "12")
    again = FakeLab()
    result = run(again, path, "12")
    assert again.prepared == []
    assert result.as_json() == {**first.as_json(), "resumed": 12}
    moved = path.rename(tmp_path / "moved.jsonl")
    assert run(FakeLab(), moved, "12").journal == str(moved)
    assert str(tmp_path) not in moved.read_text()


def test_another_key_starts_afresh_and_says_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    run(FakeLab(), path, "5")
    said: list[str] = []
    result = run(FakeLab(), path, "5", seed=1, event=lambda kind, text: said.append(text))
    assert result.resumed == 0
    assert any("another seed" in text for text in said)
    said.clear()
    assert run(FakeLab(), path, "5", identity={"kind": "cpu", "name": "other"}).resumed == 0
    assert run(FakeLab(), path, "5").resumed == 5  # the first key's outcomes are still there


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_truncated_last_line_costs_one_config(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j.jsonl"
    run(FakeLab(), path, "6")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1])[:-cut])  # without the final, and the last config cut
    result = run(FakeLab(), path, "6")
    assert result.resumed == (6 if cut == 1 else 5)  # the newline alone carries nothing
    assert result.measured == 6


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from fake_lab import IMPL, PROBLEM, FakeLab
from rooftune.autotune.tuner import tune
tune(FakeLab(sleep_s=0.02).lab, IMPL, PROBLEM, "48", journal_path=Path({path!r}), identity={here!r})
"""


@pytest.mark.parametrize("after", [1, 7, 20])
def test_kill_9_loses_nothing_that_was_finished(tmp_path: Path, after: int) -> None:
    path = tmp_path / "j.jsonl"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path), here=HERE)
    root = str(Path(__file__).resolve().parents[2])
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root})
    until = time.monotonic() + 60
    while time.monotonic() < until and not (path.exists() and len(path.read_bytes().splitlines()) > after):
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = config_lines(path)
    assert len(kept) >= after
    fake = FakeLab()
    result = run(fake, path, "48")
    assert result.resumed == len(kept)
    trials = config_lines(path)
    assert len({journal.canonical(t["config"]) for t in trials}) == len(trials) == 48
    assert trials[: len(kept)] == kept
    assert result.config == BEST == run(FakeLab(), tmp_path / "whole.jsonl", "48").config


def test_the_key_names_all_that_a_time_depends_on(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    run(FakeLab(), path, "2")
    start = Log(path).read()[0][0]
    assert start["event"] == "start"
    assert start["what"]["source_hash"] == IMPL.source_hash
    assert "torch" in start["what"]["toolchain"]
    assert start["what"]["device"] == HERE
    assert {"problem", "space", "search", "seed", "threads", "timing"} <= set(start["what"])


def test_a_damaged_start_line_is_written_again(tmp_path: Path) -> None:
    """The outcomes behind it are whole and are resumed; without it they could be neither replayed nor exported."""
    path = tmp_path / "j.jsonl"
    run(FakeLab(), path, "12")
    damaged = bytearray(path.read_bytes())
    damaged[30] ^= 1
    path.write_bytes(damaged)
    assert run(FakeLab(), path, "12").resumed == 12
    said: list[str] = []
    assert len(formats.load(path, said.append)[0].rows) == 12
    assert said == [f"{path}: 1 damaged or cut line dropped"]


def test_a_cache_that_is_cut_is_read_and_that_is_said(tmp_path: Path) -> None:
    path, said = tmp_path / "cache.json", list[str]()
    entry = '"{0}": {{"b": {0}, "time": {0}.5, "times": [{0}.5]}},'
    head = '{"device_name": "D", "kernel_name": "k", "problem_size": [1], "tune_params_keys": ["b"], "cache": {'
    path.write_text(head + entry.format(1) + entry.format(2) + '"3": {"b"')
    assert len(formats.load(path, said.append)[0].rows) == 2
    assert said == [f"{path}: its end is missing; 2 whole entries are read"]


def test_lines_of_another_schema_and_a_second_writers_are_read_as_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    run(FakeLab(), path, "6")
    (again,) = [x for x in Log(path).read()[0] if x["event"] == "config"][3:4]
    Log(path).append(again | {"trial": again["trial"] | {"time_s": 5.0, "ratio": 7.0}})
    Log(path).append({"kind": "tune", "event": "start", "schema": 2, "key": "f", "what": "later"})
    Log(path).append({"kind": "tune", "event": "config", "schema": 2, "key": "f", "trial": 3})
    (tuning,) = formats.load(path)
    assert [row.value for row in tuning.rows][3] == 7.0
    assert len(tuning.rows) == 6
    assert run(FakeLab(), path, "6").resumed == 6
