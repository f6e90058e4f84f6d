"""Recorded tunings written for other tools: nothing is lost on the way, and what those tools look up is there."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_lab import AXES, FakeLab, run

from rooftune import bench
from rooftune.autotune.formats import Row, Tuning, load
from rooftune.autotune.written import write
from rooftune.core import ExitCode, Status, UsageError
from rooftune.lab import Reply


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A journal in which some configs cannot launch."""
    path = tmp_path / "j.jsonl"
    fail = lambda verb, c: Reply(Status.FAILED_LAUNCH, "shared memory") if c["num_warps"] == 8 else None  # noqa: E731
    run(FakeLab(fate=fail), path, "48")
    return path


@pytest.mark.parametrize("form", ["kernel-tuner", "t4"])
def test_ours_survive_the_way_through_another_format(tmp_path: Path, tuned: Path, form: str) -> None:
    (ours,) = load(tuned)
    (path,) = write(form, [ours], tmp_path / "out")
    (back,) = load(path)
    assert (back.kernel, back.problem, back.device) == ("softmax/torch", "softmax[m=64,n=512,fp32]", "test")
    assert back.axes == ours.axes == {a: list(v) for a, v in AXES.items()}
    for mine, theirs in zip(ours.rows, back.rows, strict=True):
        assert theirs.config == mine.config
        assert theirs.time_s == (None if mine.time_s is None else pytest.approx(mine.time_s))
        assert theirs.status == mine.status
        assert theirs.unix_time is not None if form == "kernel-tuner" else True
    assert write(form, [ours, ours], tmp_path / "two")[0] != write(form, [ours, ours], tmp_path / "two")[1]


# What its schema 1.1.0 requires of every entry, beside its date; a simulation under a time limit
# adds up three of them, of failures too.
REQUIRED = {"time", "compile_time", "verification_time", "benchmark_time", "strategy_time", "framework_time"}


def test_kernel_tuner_finds_what_it_looks_up(tmp_path: Path, tuned: Path) -> None:
    (ours,) = load(tuned)
    (path,) = write("kernel-tuner", [ours], tmp_path)
    data = json.loads(path.read_text())
    assert data["schema_version"] == "1.1.0"
    assert len(data["cache"]) == len(ours.rows)
    assert {row.status for row in ours.rows} == {Status.OK, Status.FAILED_LAUNCH}
    for row, (key, entry) in zip(ours.rows, data["cache"].items(), strict=True):
        assert set(entry) >= REQUIRED | {"timestamp"}
        assert key == ",".join(str(entry[axis]) for axis in data["tune_params_keys"])
        assert row.spent_s is not None
        assert entry["benchmark_time"] == pytest.approx(row.spent_s * 1e3)
        assert datetime.fromisoformat(entry["timestamp"]).tzinfo is not None
    (again,) = write("kernel-tuner", load(path), tmp_path / "again")
    for mine, theirs in zip(data["cache"].values(), json.loads(again.read_text())["cache"].values(), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert theirs[name] == (value if isinstance(value, str) else pytest.approx(value)), name


@pytest.mark.parametrize("size", [1000, [4096, 4096], "1000"])
def test_a_problem_size_stays_what_it_was(tmp_path: Path, size: Any) -> None:
    """Kernel Tuner refuses to resume a cache of "1000" for a problem of 1000."""
    cache = {"1": {"vector": 1, "time": 1.0}}
    head = {"device_name": "A100", "kernel_name": "k", "problem_size": size, "tune_params_keys": ["vector"]}
    (tmp_path / "theirs.json").write_text(json.dumps({**head, "tune_params": {"vector": [1]}, "cache": cache}))
    (path,) = write("kernel-tuner", load(tmp_path / "theirs.json"), tmp_path / "out")
    assert json.loads(path.read_text())["problem_size"] == size


@pytest.mark.parametrize("when", ["0001-01-01T00:00:00+14:00", "yesterday", "2026-01-01", 7, None, ["x"]])
def test_what_is_no_date_is_none(tmp_path: Path, when: Any) -> None:
    cache = {"1": {"vector": 1, "time": 1.0, "timestamp": when}}
    head = {"kernel_name": "k", "tune_params_keys": ["vector"], "cache": cache}
    (tmp_path / "theirs.json").write_text(json.dumps(head))
    (path,) = write("kernel-tuner", load(tmp_path / "theirs.json"), tmp_path / "out")
    data = json.loads(path.read_text())
    assert "schema_version" not in data
    assert "timestamp" not in data["cache"]["1"]


def test_what_a_record_does_not_say_is_not_made_up(tmp_path: Path) -> None:
    rows = [Row({"block_m": 64}, 2e-3, 2e-3, times_s=(2e-3, 3e-3))]
    rows.append(Row({"block_m": 32}, None, None, Status.FAILED_LAUNCH))
    tuning = Tuning("k", "1000", "NVIDIA A100", {"block_m": [32, 64]}, rows, "x")
    (path,) = write("kernel-tuner", [tuning], tmp_path)
    data = json.loads(path.read_text())
    assert "schema_version" not in data  # it promises a date of every entry
    ran, failed = data["cache"].values()
    assert "timestamp" not in ran
    assert ran["benchmark_time"] == pytest.approx(5.0)  # at least what its readings took
    assert failed["benchmark_time"] == 0
    assert "timestamp" not in json.loads(write("t4", [tuning], tmp_path)[0].read_text())["results"][0]


def test_a_device_name_makes_no_folders(tmp_path: Path) -> None:
    row = Row({"block_m": 64}, 1e-3, 1e-3)
    tuning = Tuning("gemm/triton", "gemm[m=64,n=64,k=64]", "../A/B 9", {"block_m": [64]}, [row], "x")
    (path,) = write("vllm", [tuning], tmp_path / "out")
    assert path.parent == tmp_path / "out" / "gemm-triton"
    for odd in (replace(tuning, kernel=".."), replace(tuning, problem="gemm[m=64,n=64,k=64,a=../../../b]")):
        assert write("vllm", [odd], tmp_path / "out")[0].resolve().parent.parent == tmp_path / "out"


def test_a_tuning_that_a_format_cannot_hold_is_named(tmp_path: Path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "500")
    for name, size in (("theirs", "1000"), ("named", "softmax[m=64,n=512]")):
        tuning = Tuning("vector_add", size, "A100", {"vector": [1]}, [Row({"vector": 1}, 1e-3, 1e-3)], "x")
        (path,) = write("kernel-tuner", [tuning], tmp_path)
        path.rename(tmp_path / f"{name}.json")
    form = ["export", "--format", "vllm", "--out", str(tmp_path), str(tmp_path / "theirs.json")]
    assert bench.main(form) == ExitCode.USAGE
    assert "nothing to write as vllm: a table is named by sizes, which '1000' does not name" in capsys.readouterr().err
    assert bench.main([*form, str(tmp_path / "named.json")]) == ExitCode.OK
    assert f"left out {form[-1]}: vector_add: a table is named by sizes" in capsys.readouterr().out


def test_vllm_tables_hold_what_was_decided(tmp_path: Path) -> None:
    def tuning(m: int, chosen: Any) -> Tuning:
        rows = [Row({"block_m": 64, "num_warps": 4}, 1e-3, 1.0), Row({"block_m": 32, "num_warps": 4}, 2e-3, 2.0)]
        about = {"toolchain": {"triton": "3.6.0"}}
        problem = f"gemm[m={m},n=4096,k=1024,transpose=nt,bf16]"
        return Tuning("gemm/triton", problem, "NVIDIA H100 80GB HBM3", {}, rows, "", chosen, about)

    tunings = [tuning(16, {"block_m": 32, "num_warps": 4}), tuning(2, None)]
    (path,) = write("vllm", tunings, tmp_path)
    assert path.name == "N=4096,K=1024,transpose=nt,device_name=NVIDIA_H100_80GB_HBM3,dtype=bf16.json"
    data = json.loads(path.read_text())
    assert list(data) == ["triton_version", "2", "16"]
    assert data["16"] == {"BLOCK_SIZE_M": 32, "num_warps": 4}  # decided: the default, though another had looked faster
    assert data["2"] == {"BLOCK_SIZE_M": 64, "num_warps": 4}
    with pytest.raises(UsageError, match="nothing to write"):
        write("vllm", [Tuning("k", "1000", "", {}, tunings[0].rows, "")], tmp_path)
