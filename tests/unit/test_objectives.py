"""Precisions with the whole error, and energy as an objective: only where there is a sensor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_lab import BEST, DEFAULT, HERE, IMPL, PROBLEM, FakeLab, cost, run

from rooftune import bench, sensors
from rooftune.autotune.precisions import Point, front, input_error, tune_precisions
from rooftune.autotune.table import Table
from rooftune.core import Config, ExitCode, Status, Unavailable
from rooftune.energy import Energy
from rooftune.lab import Reply


def test_the_error_of_rounding_the_inputs_is_that_of_the_format() -> None:
    found = {p: input_error(f"gemm[m=64,n=64,k=256,transpose=nt,{p}]") for p in ("fp32", "fp16", "bf16", "fp8", "int8")}
    assert found["fp32"] == 0.0
    assert found["fp16"] < found["bf16"] < found["fp8"]
    # Two operands, each rounded with a uniform error of half a unit: sqrt(2) * u / sqrt(3) within a factor of two.
    assert found["fp16"] == pytest.approx(2**-11 * (2 / 3) ** 0.5, rel=0.5)
    assert found["bf16"] == pytest.approx(2**-8 * (2 / 3) ** 0.5, rel=0.5)
    assert 5e-3 < found["int8"] < 5e-2
    assert 1e-2 < found["fp8"] < 1e-1
    assert input_error("attention[b=1,h=2,sq=32,d=16,causal,bf16]") < 0.02


def test_a_precision_whose_inputs_alone_are_too_coarse_costs_no_device_time(tmp_path: Path) -> None:
    fake = FakeLab()
    points = tune_precisions(
        fake.lab, [IMPL], PROBLEM, ["fp32", "bf16"], 1e-3, budget="6", identity=HERE, table=Table(tmp_path / "t")
    )
    coarse = next(p for p in points if p.precision == "bf16")
    assert coarse.time_s is None
    assert "rounding the inputs alone changes the result by" in coarse.reason
    fine = next(p for p in points if p.precision == "fp32")
    assert fine.front
    assert fine.error == fine.rel_fro == 1e-7


def test_both_parts_of_the_error_count_and_joules_join_the_front_where_all_have_them() -> None:
    def point(time_s: float, error: float, joules: float | None) -> Point:
        return Point("fp32", "x/y", time_s, error, None, None, error=error, joules=joules)

    frugal = [point(1, 1e-3, 3.0), point(2, 1e-3, 1.0), point(3, 1e-3, 2.0)]
    assert [p.front for p in front(frugal)] == [True, True, False]
    assert [p.front for p in front([*frugal[:2], point(3, 1e-3, None)])] == [True, False, False]


class Metered(FakeLab):
    """Joules that do not follow the time: `num_warps=8` is frugal and slow."""

    def measure_energy(self, impl: Any, handle: int, seed: int, deadline_s: float = 300.0) -> Reply:
        config = self.live[handle]
        joules = 1.0 if config["num_warps"] == 8 else 3.0
        made = Energy(joules, method="counter", label="measured", u95_rel=0.02)
        return Reply(Status.OK, "", {"energy": made.as_json()})


def slower_with_more_warps(config: Config) -> float:
    return cost(config) * (0.9 if config["num_warps"] == 8 else 1.0)


@pytest.fixture
def sensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "find_sensor", lambda device: object())


def test_the_frugal_one_wins_by_energy_and_stays_out_of_the_table_of_times(tmp_path: Path, sensor: None) -> None:
    by_time = run(Metered(), tmp_path / "t.jsonl", "48")
    assert by_time.config == BEST
    assert by_time.joules is None
    Table(tmp_path / "tuned.json").path.unlink()
    frugal = run(Metered(cost=slower_with_more_warps), tmp_path / "e.jsonl", "48", objective="energy")
    assert frugal.config["num_warps"] == 8
    assert frugal.better
    assert frugal.joules == 1.0
    assert "joules: at least" in frugal.reason
    assert Table(tmp_path / "tuned.json").entries() == []
    assert run(Metered(), tmp_path / "p.jsonl", "48", objective="edp").better  # faster at the same joules


def test_equal_joules_are_no_win(tmp_path: Path, sensor: None) -> None:
    result = run(Metered(), tmp_path / "j.jsonl", "48", objective="energy", where=["num_warps<8"])
    assert not result.better
    assert result.config == DEFAULT


def test_without_a_sensor_one_line_says_so_and_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Energy.unavailable("no RAPL (VM)", "vm-guest")
    monkeypatch.setattr(sensors, "find_sensor", lambda device: gone)
    fake = Metered()
    with pytest.raises(Unavailable, match=r"--objective edp needs an energy sensor: no RAPL"):
        run(fake, tmp_path / "j.jsonl", "4", objective="edp")
    assert not fake.prepared
    assert bench.main(["tune", "softmax", "--objective", "energy", "-q"]) == ExitCode.NOTHING_RAN
    assert capsys.readouterr().err.strip().splitlines() == [
        "rooftune: --objective energy needs an energy sensor: no RAPL (VM)"
    ]


@pytest.mark.parametrize(
    "arguments",
    [["--search", "magic"], ["--budget", "soon"], ["--weight", "softmax=much"], ["--rounds", "6"], ["--clock", "cpu"]],
)
def test_what_is_not_understood_is_refused_before_the_device_is_touched(arguments: list[str]) -> None:
    assert bench.main(["tune", "softmax", "-q", *arguments]) == ExitCode.USAGE
