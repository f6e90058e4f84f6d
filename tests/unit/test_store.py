"""The log under damage, two writers and full disks; and how runs are found."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rooftune.core import UsageError
from rooftune.results import store
from rooftune.results.record import SCHEMA, Record

ROOT = Path(__file__).resolve().parents[2]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def result(**changes: Any) -> Record:
    return Record("softmax[m=1,n=2,fp32]", "softmax", "m=1,n=2", "fp32", "softmax/numba", {}, True, "ok", **changes)


def log_of(path: Path, count: int = 3) -> list[dict[str, Any]]:
    log = store.Log(path)
    lines = [
        {"kind": "trial", "number": i, "text": 'é ,"crc":"00000000"} \n', "nested": {"crc": "x"}} for i in range(count)
    ]
    for line in lines:
        log.append(line)
    return lines


@given(st.dictionaries(st.text().filter(lambda k: k != "crc"), JSON, min_size=1, max_size=4))
def test_what_is_sealed_comes_back(data: dict[str, Any]) -> None:
    line = store.seal(data)
    assert list(json.loads(line))[-1] == "crc"
    assert "\n" not in line
    assert store.unseal(line.encode()) == data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({}, "needs a field"),
        ({"crc": 1}, "crc"),
        ({"rounds": [[1.0], [2.0, float("nan")]]}, "rounds[1][1]"),
        ({"a": {"b": float("inf")}}, "a.b"),
        ({"a": object()}, "plain data"),
    ],
)
def test_what_json_cannot_say_is_refused(data: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        store.seal(data)


def test_every_cut_point_gives_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = log_of(path)
    whole = path.read_bytes()
    ends = [i for i in range(len(whole) + 1) if i == 0 or whole[i - 1 : i] == b"\n" or whole[i : i + 1] == b"\n"]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        found, damaged = store.Log(path).read()
        assert found == lines[: len(found)]
        assert damaged == (cut not in ends)


def test_random_flips_never_give_a_wrong_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = log_of(path)
    whole, rng = path.read_bytes(), random.Random(7)
    lost = 0
    for _ in range(3000):
        broken = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        with path.open("r+b") as file:  # in place: truncating first makes some file systems flush each time
            file.write(broken)
        found, damaged = store.Log(path).read()
        assert all(line in lines for line in found)
        lost += bool(damaged)
    assert lost > 2900  # the rest: two flips that undo each other, or the last newline


def test_a_torn_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = log_of(path)
    path.write_bytes(path.read_bytes()[:-9])
    store.Log(path).append({"after": 1})
    assert store.Log(path).read() == ([*lines[:-1], {"after": 1}], 1)


def test_two_processes_append_one_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    code = (
        "import sys; from rooftune.results.store import Log\n"
        "log = Log(sys.argv[1], sync_s=1.0)\n"
        "for i in range(200): log.append({'who': sys.argv[2], 'i': i, 'pad': 'x' * (i * 37 % 5000)})"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), who], env=env) for who in "ab"]
    assert [w.wait(60) for w in writers] == [0, 0]
    lines, damaged = store.Log(path).read()
    assert damaged == 0
    for who in "ab":
        assert [line["i"] for line in lines if line["who"] == who] == list(range(200))


def test_syncs_can_be_batched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = store.Log(tmp_path / "log.jsonl", sync_s=1e6)
    log.append({"a": 1})
    first = len(synced)
    log.append({"a": 2})
    assert len(synced) == first
    for done in (1, 2):
        store.Log(tmp_path / "log.jsonl").append({"a": 3})  # by itself, every line is
        assert len(synced) == first + done


def test_a_full_disk_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    lines, before, write = log_of(path), path.read_bytes(), os.write
    calls: list[int] = []

    def full(fd: int, data: bytes) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:10])  # as a disk does that fills up: short, then the error

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UsageError, match=r"cannot write \d+ bytes to .*log\.jsonl: No space left"):
        store.Log(path).append({"a": 1})
    monkeypatch.undo()
    assert path.read_bytes() == before
    store.Log(path).append({"a": 1})
    assert store.Log(path).read() == ([*lines, {"a": 1}], 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_device_that_is_full() -> None:
    with pytest.raises(UsageError, match="/dev/full: No space left on device"):
        store.Log("/dev/full").append({"a": 1})


def test_atomic_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new folder" / "ü.json"
    store.atomic_write(path, "one")
    store.atomic_write(path, "två")
    assert path.read_text() == "två"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot write 5 bytes to .*No space left"):
        store.atomic_write(path, "three")
    assert path.read_text() == "två"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_write_keeps_links(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    store.atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_load_run_leaves_other_lines_out(tmp_path: Path) -> None:
    log = store.Log(tmp_path / "run.jsonl")
    one = result(time_s=1e-3)
    log.append({"kind": "session", "schema": SCHEMA})
    log.append(one.to_json())
    assert store.load_run(log.path) == [one]


def test_a_truncated_run_says_what_was_dropped(tmp_path: Path) -> None:
    log = store.Log(tmp_path / "run.jsonl")
    for _ in range(3):
        log.append(result().to_json())
    log.path.write_bytes(log.path.read_bytes()[:-30])
    said: list[str] = []
    assert len(store.load_run(log.path, said.append)) == 2
    assert said == [f"{log.path}: 1 damaged or cut line dropped, 2 results kept"]


def edited(record: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps(record | changes).encode()


RECORD = result().to_json()
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "blank": (b"\n\n", "not JSON Lines"),
    "list": (b"[]", "holds a list"),
    "null": (b"null", "holds null"),
    "number": (b"12", "holds a number"),
    "future": (edited(RECORD, schema=SCHEMA + 1), "newer than ours"),
    "sealed future": (store.seal(RECORD | {"schema": SCHEMA + 1}).encode(), "line 1: schema 2 is newer"),
    "not utf-8": (b'{"schema": 1, "x": "\xff\xfe"}', "not UTF-8 text (byte 20 is 0xff)"),
    "zeros": (bytes(100_000), "is binary"),
    "nan": (edited(RECORD, time_s=float("nan")), "'time_s' is not a finite number"),
    "nested nan": (edited(RECORD, rounds=[[1.0, float("inf")]]), "'rounds[0][1]' is not a finite"),
    "not ours": (b'{"benchmarks": []}', "no field 'schema'"),
    "sealed, not ours": (store.seal({"a": 1}).encode(), "no field 'schema'"),
    "text": (b"hello\nworld", "not JSON Lines"),
    "deep": (b"[" * 100_000, "not JSON Lines"),
    "edited": (store.seal(RECORD).replace("numba", "torch").encode(), "damaged or edited"),
    "cut": (store.seal(RECORD).encode()[:-40], "no whole record is left"),
    "journal": (store.seal({"kind": "trial"}).encode(), "only lines of kind trial"),
    "wrong type": (store.seal(RECORD | {"config": 3}).encode(), "'config' is 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(BAD[name][0])
    with pytest.raises(UsageError) as caught:
        store.load_run(path)
    text = str(caught.value)
    assert BAD[name][1] in text
    assert str(path) in text
    assert "\n" not in text


def test_a_huge_line_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_LINE", 1000)
    path = tmp_path / "log.jsonl"
    path.write_bytes(bytes(10_500) + b"\n")
    store.Log(path).append({"a": 1})
    assert store.Log(path).read() == ([{"a": 1}], 1)


def _missing(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _closed(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.chmod(0)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [(_missing, "No such file"), (_folder, "Is a directory"), (_closed, "Permission denied")],
)
def test_files_that_cannot_be_read(spoil: Callable[[Path], None], text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    store.Log(path).append(result().to_json())
    spoil(path)
    with pytest.raises(UsageError, match=rf"cannot read .*run\.jsonl: {text}"):
        store.load_run(path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write \d+ bytes to .*run\.jsonl: (Not a directory|File exists)"):
        store.Log(tmp_path / "file" / "run.jsonl").append({"a": 1})
    with pytest.raises(UsageError, match="cannot write"):
        store.atomic_write(tmp_path, "text")


def test_where_results_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROOFTUNE_RESULTS_DIR", raising=False)
    assert store.results_dir() == ROOT / "results" / "runs"
    monkeypatch.setattr(store, "__file__", str(tmp_path / "site-packages" / "rooftune" / "results" / "store.py"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert store.results_dir() == tmp_path / "rooftune" / "runs"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.results_dir() == tmp_path / "home" / ".local" / "share" / "rooftune" / "runs"
    monkeypatch.setenv("ROOFTUNE_RESULTS_DIR", str(tmp_path / "mine"))
    assert store.results_dir() == tmp_path / "mine"


def test_runs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOFTUNE_RESULTS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(store, "REFERENCE", tmp_path / "reference")
    with pytest.raises(UsageError, match=r"no run latest: .* holds 0"):
        store.resolve("latest")
    paths = [store.new_run_path(f"soft max/{i}") for i in range(3)]
    for age, path in enumerate(reversed(paths)):
        store.Log(path).append({"kind": "session"})
        store.Log(path).append({"kind": "result"})
        os.utime(path, (1e9 - age, 1e9 - age))
    store.Log(store.new_run_path("tune")).append({"kind": "session"})  # the newest, and nothing to show
    committed = tmp_path / "reference" / "h200.jsonl"
    store.Log(committed).append({"kind": "session"})
    assert store.resolve("latest") == store.latest_run() == paths[2]
    assert store.resolve("latest~1") == paths[1]
    foreign = tmp_path / "runs" / "foreign.jsonl"
    foreign.write_text("no run of ours: whoever reads it says so")
    assert store.resolve("latest") == foreign
    foreign.unlink()
    assert store.resolve(paths[0].stem) == store.resolve(str(paths[0])) == paths[0]
    assert "soft-max-0" in paths[0].name
    assert store.resolve("h200") == store.resolve("h2") == committed
    (tmp_path / "reference" / paths[2].name).write_bytes(paths[2].read_bytes())  # the same run, committed
    assert store.resolve(paths[2].stem[:-1]) == paths[2]
    with pytest.raises(UsageError) as caught:
        store.resolve("other")
    assert str(caught.value).count(paths[2].stem) == 1
    for text in ("latest~3", "20", "other"):
        with pytest.raises(UsageError, match="run") as caught:
            store.resolve(text)
        assert "\n" not in str(caught.value)


def test_a_source_hash_of_the_former_rule_is_read_as_todays(tmp_path: Path) -> None:
    same = json.loads(store.SAME_SOURCES.read_text())
    assert len(set(same.values())) == len(same) > 40  # one to one
    assert not set(same) & set(same.values())
    before, today = next(iter(same.items()))
    log = store.Log(tmp_path / "run.jsonl")
    for source in (before, today, "0" * 16, 7):
        log.append({"kind": "trial", "source_hash": source})
    assert [line["source_hash"] for line in log.read()[0]] == [today, today, "0" * 16, 7]
