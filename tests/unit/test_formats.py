"""Recorded tunings of ours and of other tools: read, replayed, written; damage never becomes a wrong time."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_lab import AXES, BEST, DEFAULT, FakeLab, cost, run

from rooftune import bench, registry
from rooftune.autotune import journal, past, search, simulate
from rooftune.autotune.formats import Row, Tuning, load
from rooftune.autotune.job import Job
from rooftune.autotune.limits import Budget
from rooftune.core import ExitCode, Status, UsageError

CACHE: dict[str, Any] = {
    "device_name": "NVIDIA A100",
    "kernel_name": "vector_add",
    "problem_size": "1000",
    "tune_params_keys": ["block_size_x", "vector"],
    "tune_params": {"block_size_x": [64, 32, 128], "vector": [1, 4]},
    "objective": "time",
    "cache": {
        "32,1": {"block_size_x": 32, "vector": 1, "time": 2.0, "times": [2.0, 2.1], "compile_time": 100.0},
        "64,1": {"block_size_x": 64, "vector": 1, "time": 1.0, "times": [1.0], "compile_time": 100.0},
        "128,1": {"block_size_x": 128, "vector": 1, "time": "InvalidConfig"},
        "32,4": {"block_size_x": 32, "vector": 4, "time": "x", "__error__": "CompilationFailedConfig"},
    },
}


def cache_text() -> str:
    """As the tool writes it: the head, then a line for each entry."""
    head = json.dumps({k: v for k, v in CACHE.items() if k != "cache"}, indent="")[:-2]
    entries = ",\n".join(f'"{name}": {json.dumps(entry)}' for name, entry in CACHE["cache"].items())
    return f'{head},\n"cache": {{\n{entries}}}\n}}'


def test_a_kernel_tuner_cache_is_read_with_its_failures(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    path.write_text(cache_text())
    (tuning,) = load(path)
    assert (tuning.kernel, tuning.problem, tuning.device) == ("vector_add", "1000", "NVIDIA A100")
    assert tuning.axes == {"block_size_x": [32, 64, 128], "vector": [1, 4]}
    assert [row.status for row in tuning.rows] == [Status.OK, Status.OK, Status.SKIPPED, Status.FAILED_COMPILE]
    assert tuning.rows[0].time_s == pytest.approx(2e-3)
    assert tuning.rows[0].times_s == pytest.approx((2e-3, 2.1e-3))
    assert tuning.rows[0].compile_s == pytest.approx(0.1)
    assert tuning.best is not None
    assert tuning.best.config == {"block_size_x": 64, "vector": 1}


def rows_of(path: Path) -> list[Row]:
    """None where the file is refused."""
    try:
        return load(path)[0].rows
    except UsageError:
        return []


def test_every_cut_of_a_cache_gives_whole_entries_or_one_clear_line(tmp_path: Path) -> None:
    path, whole = tmp_path / "cache.json", cache_text()
    path.write_text(whole)
    rows = load(path)[0].rows
    most = 0
    for cut in range(1, len(whole)):
        path.write_text(whole[:cut])
        found = rows_of(path)
        assert found == rows[: len(found)]
        most = max(most, len(found))
    assert most == 4
    path.write_text(whole[: whole.index('"128,1"')])  # as the tool leaves it when it is stopped
    assert load(path)[0].rows == rows[:2]


def test_t4_of_two_writers(tmp_path: Path) -> None:
    ours = {"configuration": {"b": 1}, "invalidity": "correct", "correctness": 1, "objectives": ["time"]}
    one = {**ours, "times": {"compilation_time": 5, "runtimes": [9.0]}, "measurements": [
        {"name": "GFLOP/s", "value": 7, "unit": ""}, {"name": "time", "value": 3.0, "unit": "us"}]}  # fmt: skip
    two = {**ours, "times": {"compilation": 5, "runtimes": [2.0, 4.0]}, "configuration": {"b": 2}, "measurements": []}
    bad = {**ours, "times": {}, "invalidity": "timeout", "configuration": {"b": 4}}
    path = tmp_path / "t4.json"
    path.write_text(json.dumps({"schema_version": "1.0.0", "results": [one, two, bad]}))
    (tuning,) = load(path)
    assert [row.time_s for row in tuning.rows] == [pytest.approx(3e-6), pytest.approx(3e-3), None]
    assert [row.compile_s for row in tuning.rows] == [0.005, 0.005, None]
    assert tuning.rows[2].status == Status.TIMEOUT


def cache(entries: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**CACHE, "cache": entries, **changes})


@pytest.mark.parametrize("time", [1e20, sys.float_info.max, 10**400, "", "3.5", None, True])
def test_what_is_no_time_is_a_failure(tmp_path: Path, time: Any) -> None:
    """Kernel Tuner's value for a failure was 1e20 before it had error classes."""
    path = tmp_path / "cache.json"
    path.write_text(cache({"32,1": {"block_size_x": 32, "vector": 1, "time": time}}))
    (row,) = load(path)[0].rows
    assert (row.time_s, row.status) == (None, Status.FAILED_LAUNCH)


def test_an_axis_may_have_values_that_sound_like_failures(tmp_path: Path) -> None:
    """OpenMP's schedule is one of static, dynamic, runtime."""
    path = tmp_path / "cache.json"
    entry = {"schedule": "runtime", "time": 1.0}
    path.write_text(cache({"runtime": entry}, tune_params_keys=["schedule"], tune_params={"schedule": ["runtime"]}))
    assert load(path)[0].rows[0].status == Status.OK


def test_a_list_or_an_object_is_a_value_known_by_its_text(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(cache({"": {"block_size_x": {"b": 1, "a": [2]}, "vector": 1, "time": 1.0}}))
    (tuning,) = load(tmp_path / "c.json")
    assert tuning.rows[0].config["block_size_x"] == '{"a": [2], "b": 1}'
    assert '{"a": [2], "b": 1}' in tuning.axes["block_size_x"]


def test_values_that_are_equal_are_one_and_undeclared_ones_count(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    entries = [{"block_size_x": b, "vector": v, "time": b * (1.0 + v)} for b, v in ((64, True), (32.0, 1), (48, 4))]
    path.write_text(cache({str(i): entry for i, entry in enumerate(entries)}))
    (tuning,) = load(path)
    assert tuning.axes == {"block_size_x": [32, 48, 64, 128], "vector": [1, 4]}
    assert json.dumps([row.config["vector"] for row in tuning.rows]) == "[1, 1, 4]"
    assert simulate.replay(tuning, "exhaustive").shares[-1] == 1.0


def test_damage_in_the_middle_of_a_large_cache_is_found_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "cache.json"
    entries = {str(i): {"block_size_x": i, "vector": 1, "time": 1.0} for i in range(20_000)}
    head, tail = cache(entries).split('"10000": ')
    path.write_text(f'{head}"10000": #{tail}')
    tries: list[int] = []
    whole = json.loads
    monkeypatch.setattr(json, "loads", lambda text: (tries.append(1), whole(text))[1])
    assert len(load(path)[0].rows) == 10_000
    assert len(tries) < 5  # not one for every entry behind it: that took minutes


def test_a_rate_is_no_time(tmp_path: Path) -> None:
    """Kernel Tuner's T4 names GFLOP/s as the objective, without a unit."""
    path = tmp_path / "t4.json"

    def result(n: int, **timed: Any) -> dict[str, Any]:
        rate = {"name": "GFLOP/s", "value": 100.0 * n, "unit": ""}
        said = [rate, {"name": "time", "value": 6.0 / n, "unit": "ms"}] if not timed else [rate]
        out = {"configuration": {"b": n}, "invalidity": "correct", "correctness": 1, "objectives": ["GFLOP/s"]}
        return {**out, "times": timed, "measurements": said}

    path.write_text(json.dumps({"results": [result(1), result(3), result(4, runtimes=[1.0, 2.0]), result(5, x=0)]}))
    (tuning,) = load(path)
    assert [row.time_s for row in tuning.rows] == [pytest.approx(t) for t in (6e-3, 2e-3, 1.5e-3)] + [None]


def test_what_only_some_of_tritons_configs_set_is_none_in_the_others(tmp_path: Path) -> None:
    path = tmp_path / "matmul.autotune.json"
    plain, limited = ({"kwargs": {"B": 1}, "num_warps": 4, "maxnreg": n} for n in (None, 64))
    path.write_text(json.dumps({"key": [], "configs_timings": [[plain, [2.0]], [limited, [1.0]]]}))
    (tuning,) = load(path)
    assert [row.config["maxnreg"] for row in tuning.rows] == [None, 64]
    assert simulate.replay(tuning, "exhaustive").shares == [0.5, 1.0]


def test_tritons_autotune_file(tmp_path: Path) -> None:
    def config(block: int, warps: int) -> dict[str, Any]:
        rest = {"num_ctas": 1, "num_stages": 3, "maxnreg": None, "pre_hook": None, "ir_override": None}
        return {"kwargs": {"BLOCK_M": block}, "num_warps": warps, **rest}

    timings = [[config(64, 4), [0.5, 0.4, 0.6]], [config(128, 8), [float("inf")] * 3], [config(32, 4), 0.25]]
    path = tmp_path / "matmul.autotune.json"
    path.write_text(json.dumps({"key": ["512"], "configs_timings": timings}))
    (tuning,) = load(path)
    assert tuning.kernel == "matmul"
    assert tuning.rows[0].config == {"BLOCK_M": 64, "num_warps": 4, "num_ctas": 1, "num_stages": 3}
    assert [row.time_s for row in tuning.rows] == [5e-4, None, 2.5e-4]


NO_TUNINGS = (
    "", "[]", "{}", "null", '{"cache": 3', '{"results": [{}]}', '{"results": []}', '{"configs_timings": [3]}',
    '{"cache": {"a": {}}, "tune_params_keys": ["x"]}', '{"cache": [], "tune_params_keys": []}', '{"results": 3}',
    '{"cache": {"1": {"x": 1, "time": 1, "times": 2}}, "tune_params_keys": ["x"]}', '{"configs_timings": 3}',
    '{"cache": {"1": {"x": NaN, "time": 1}}, "tune_params_keys": ["x"]}',
    '{"cache": {"1": {"x": 1, "time": 1}}, "tune_params_keys": ["x"], "tune_params": [3]}',
    '{"results": [{"configuration": {"a": 1}, "invalidity": "correct", "times": null}]}',
    '{"results": [{"configuration": {"a": 1}, "invalidity": "correct", "times": {}, "measurements": ["x"]}]}',
)  # fmt: skip


@pytest.mark.parametrize("text", NO_TUNINGS)
def test_what_is_no_tuning_is_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load(path)
    assert "x.json" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path / "none.json")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    path = tmp_path / "j.jsonl"
    fail = lambda verb, c: formats_fail(c)  # noqa: E731
    run(FakeLab(fate=fail), path, "48")
    return path


def formats_fail(config: dict[str, Any]) -> Any:
    from rooftune.lab import Reply

    return Reply(Status.FAILED_LAUNCH, "shared memory") if config["num_warps"] == 8 else None


# --- simulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in search.names() if n != "tpe"])
def test_a_replay_finds_the_best_on_record_and_nothing_else(tuned: Path, name: str) -> None:
    (tuning,) = load(tuned)
    done = simulate.replay(tuning, name)
    assert len(done.shares) == 48
    assert done.failed == 12
    assert done.shares == sorted(done.shares)
    assert done.shares[-1] == 1.0
    assert done.reached(1.0) is not None
    told = simulate.summary(tuning, [done])
    assert told["best_config"] == BEST
    assert told["share_after"]["100"] == 1.0
    assert told["configs_to_99"] == done.reached(0.99)


def test_a_replay_is_the_tuning_again_without_a_device(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    run(FakeLab(noise=0.0), path, "48", search_name="random")
    (tuning,) = load(path)
    order = [journal.canonical(row.config) for row in tuning.rows]
    asked: list[str] = []
    original = search.Outcome
    try:
        search.Outcome = lambda *a: (asked.append("told"), original(*a))[1]  # type: ignore[misc,assignment]
        done = simulate.replay(tuning, "random", budget=20)
    finally:
        search.Outcome = original  # type: ignore[misc]
    assert len(done.shares) == len(asked) == 20
    assert order[0] == journal.canonical(DEFAULT)
    assert done.shares[0] <= 1.0
    assert done.after(10) == pytest.approx(cost(BEST) / min(cost(r.config) for r in tuning.rows), rel=0.5)


def test_a_record_of_failures_only_is_refused(tmp_path: Path) -> None:
    rows = [Row({"a": 1}, None, None, Status.TIMEOUT)]
    with pytest.raises(UsageError, match="no config of k p ran"):
        simulate.replay(Tuning("k", "p", "", {"a": [1]}, rows, "f"), "random")


def test_the_command_line_replays_and_converts_without_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "cache.json", tmp_path / "out"
    path.write_text(cache_text())
    assert bench.main(["tune", "--simulate", str(path), "--search", "random", "--json", "-"]) == 0
    (told,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (told["kernel"], told["recorded"], len(told["seeds"])) == ("vector_add", 4, 5)
    assert told["share_after"]["25"] == 1.0
    assert bench.main(["export", str(path), "--format", "t4", "--out", str(out)]) == 0
    (written,) = out.iterdir()
    assert load(written)[0].rows[1].time_s == pytest.approx(1e-3)
    assert bench.main(["tune", "--simulate", str(path), "--budget", "60s"]) == ExitCode.USAGE
    assert bench.main(["export", "--format", "t4", "--out", str(out)]) == ExitCode.USAGE
    assert bench.main(["export", str(path), "--format", "t4", "--out", str(path / "below a file")]) == ExitCode.USAGE
    assert "takes files with recorded tunings" in capsys.readouterr().err


# --- history --------------------------------------------------------------------------------------------------------


def test_earlier_journals_are_history_for_other_shapes_and_devices(tmp_path: Path) -> None:
    """By themselves: those in the results folder. Nearest shape first, and never the one being written."""
    from fake_lab import IMPL

    def tuned_at(n: int, name: str = "test") -> Job:
        problem = registry.problem(f"softmax[m=64,n={n}]")
        made = Job(FakeLab().lab, IMPL, problem, identity={"kind": "cpu", "name": name}, seed=n)
        made.advance(Budget(configs=12))
        return made

    assert tuned_at(4096).space.history == []
    tuned_at(512)
    near = tuned_at(256).space
    assert len(near.history) == 2
    assert all(np.nanmax(column) == 1.0 and np.isfinite(column).sum() == 12 for column in near.history)
    assert list(np.flatnonzero(near.history[0] == 1.0)) != []
    assert len(tuned_at(256).space.history) == 2  # its own journal, same device: resumed, not history
    assert len(tuned_at(256, "another").space.history) == 2  # it goes into the same file


def test_a_foreign_record_and_a_model_become_columns(tmp_path: Path) -> None:
    rows = [Row(DEFAULT, 2.0, 2.0), Row(BEST, 1.0, 1.0), Row({"a": 1}, 1.0, 1.0)]
    rows.append(Row({**BEST, "unroll": 4}, None, None, Status.TIMEOUT))
    space = past.Known.of(AXES, [DEFAULT, BEST, {**BEST, "unroll": 4}, {**BEST, "unroll": 1}])
    assert isinstance(space, past.Known)
    space.learn([Tuning("k", "p", "", {}, rows, ""), Tuning("k", "p", "", {}, rows[2:3], "")], lambda configs: None)
    assert len(space.history) == 1  # the second knows none of our configs
    np.testing.assert_array_equal(space.history[0], [0.5, 1.0, 0.0, np.nan])
    assert space.prior is None
    space.learn([], lambda configs: [float(i) for i, _ in enumerate(configs)])
    assert space.prior is not None
    assert space.prior.tolist() == [0.0, 1.0, 2.0, 3.0]


# --- the journal under damage ---------------------------------------------------------------------------------------


def recovered(path: Path) -> dict[str, Any]:
    what = json.loads(path.with_name("what.json").read_text())
    return journal.Journal(path, what, lambda text: None).trials


def test_no_cut_and_no_flipped_bits_ever_recover_a_wrong_outcome(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    run(FakeLab(), path, "6")
    whole = path.read_bytes()
    (what,) = [x["what"] for x in journal.store.Log(path).read()[0] if x["event"] == "start"]
    path.with_name("what.json").write_text(json.dumps(what))
    right = recovered(path)
    assert len(right) == 6
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole), 13):  # every line is cut at some 50 places
        path.write_bytes(whole[:cut])
        found = recovered(path)
        lines = sum(end <= cut for end in ends)  # the start line is the first
        assert list(found.items()) == list(right.items())[: max(0, min(6, lines - 1))] or lines == 0
        assert all(right[key] == trial for key, trial in found.items())
    rng = random.Random(1)
    lost = 0
    for _ in range(250):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        found = recovered(path)
        assert all(right[key] == trial for key, trial in found.items())
        lost += len(found) < len(right)
    assert lost > 60  # the damage was real
