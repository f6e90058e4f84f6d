"""The tuned table: exact lookups, reasons for what is not used, files that are not tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rooftune import registry
from rooftune.autotune.journal import toolchain
from rooftune.autotune.table import Entry, Table, default_path
from rooftune.core import UsageError

IMPL = registry.impl("softmax/torch")
PROBLEM = registry.problem("softmax[m=64,n=512,fp32]")
HERE = {"kind": "cpu", "name": "test", "cores": 2}


def entry(**changes: Any) -> Entry:
    made = Entry(
        op="softmax",
        problem=str(PROBLEM),
        precision="fp32",
        impl=IMPL.key,
        source_hash=IMPL.source_hash,
        toolchain=toolchain(IMPL),
        device=dict(HERE),
        threads=1,
        config={"block_m": 64},
        default={"block_m": 16},
        time_s=1e-3,
        default_time_s=2e-3,
        speedup=2.0,
        speedup_ci=[1.9, 2.1],
        rel_fro=1e-7,
        journal="x.jsonl",
        unix_time=1_700_000_000.0,
    )
    return replace(made, **changes)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path / "tuned.json")


def test_round_trip_and_exact_lookup(table: Table) -> None:
    assert table.entries() == []
    assert table.lookup(IMPL, PROBLEM, HERE).why == "not tuned for this problem"
    table.put(entry())
    assert table.entries() == [entry()]
    found = table.lookup(IMPL, PROBLEM, HERE, 1)
    assert found.entry == entry()
    assert found.why == "tuned 2023-11-14: 2.00x the default's speed (1.90 to 2.10)"
    assert table.lookup(IMPL, PROBLEM.replace(m=65), HERE).entry is None  # neighbours are not guessed


def test_the_same_key_is_replaced_and_others_stay(table: Table) -> None:
    table.put(entry())
    table.put(entry(threads=2))
    table.put(entry(speedup=3.0))
    assert [(e.threads, e.speedup) for e in table.entries()] == [(2, 2.0), (1, 3.0)]


def test_of_several_that_fit_the_newest_answers_and_gives_the_reason(table: Table) -> None:
    for threads, day in ((1, 1e9), (2, 3e9), (3, 2e9)):
        table.put(entry(threads=threads, unix_time=day))
    found = table.lookup(IMPL, PROBLEM, HERE).entry
    assert found is not None
    assert found.threads == 2
    assert table.lookup(IMPL, PROBLEM, HERE, 4).why == "a tuned entry is not used: tuned with 2 threads, not 4"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"source_hash": "0" * 16}, "source changed"),
        ({"toolchain": {"torch": "1.0"}}, r"toolchain changed \(torch 1.0 -> "),
        ({"device": {**HERE, "name": "other"}}, r"another device \(name other -> test\)"),
        ({"threads": 4}, "tuned with 4 threads, not 1"),
    ],
)
def test_stale_entries_are_not_used_and_say_why(table: Table, changes: dict[str, Any], why: str) -> None:
    table.put(entry(**changes))
    found = table.lookup(IMPL, PROBLEM, HERE, 1)
    assert found.entry is None
    assert re.search(why, found.why)
    table.put(entry())
    assert table.lookup(IMPL, PROBLEM, HERE, 1).entry == entry()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("[]", "no list 'entries'"),
        ("null", "no list 'entries'"),
        ('{"schema": 99, "entries": []}', "schema 99"),
        ('{"schema": 1, "entries": [3]}', "entry 0 is 3"),
        ('{"schema": 1, "entries": [{}]}', "field 'op' is None"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_file_that_is_no_table_is_one_clear_line(table: Table, text: str, why: str) -> None:
    table.path.write_text(text)
    with pytest.raises(UsageError, match=why) as error:
        table.entries()
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError):
        table.put(entry())
    assert table.path.read_text() == text  # what cannot be read is not overwritten


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("speedup", -1),
        ("time_s", "fast"),
        ("time_s", 10**400),
        ("speedup_ci", [1]),
        ("speedup_ci", [1, 10**400]),
        ("config", []),
        ("unix_time", float("nan")),
        ("problem", "softmax[m=0]"),
    ],
)
def test_bad_fields_are_named(table: Table, field: str, value: object) -> None:
    table.put(entry())
    data = json.loads(table.path.read_text())
    data["entries"][0][field] = value
    table.path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=f"entry 0: field '{field}'"):
        table.entries()


def test_binary_and_folders_are_refused(table: Table, tmp_path: Path) -> None:
    table.path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        table.entries()
    with pytest.raises(UsageError, match="cannot be read"):
        Table(tmp_path).entries()


def test_where_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_path() == tmp_path / "results" / "tuned.json"
    monkeypatch.setenv("ROOFTUNE_TABLE", str(tmp_path / "mine.json"))
    assert Table().path == tmp_path / "mine.json"


def test_two_processes_lose_no_entry(table: Table) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom test_table import Table, entry\n"
        "for i in range(10): Table(Path(sys.argv[2])).put(entry(threads=int(sys.argv[3]) + i))\n"
    )
    here = str(Path(__file__).parent)
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, here, str(table.path), str(start)], cwd=Path(here).parents[1])
        for start in (100, 200)
    ]
    assert [job.wait(60) for job in jobs] == [0, 0]
    assert len(table.entries()) == 20
