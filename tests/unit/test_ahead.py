"""What is known from machine code alone costs no device time."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_lab import BEST, DEFAULT, HERE, IMPL, PROBLEM, FakeLab, config_lines

from rooftune import registry
from rooftune.autotune import ahead, job, tuner
from rooftune.autotune.ahead import Ahead
from rooftune.autotune.journal import Trial, canonical
from rooftune.autotune.table import Table
from rooftune.core import Config, Status
from rooftune.lab import Lab, Reply


class Compiler:
    """The part of a Lab that compiles; counts what it was asked."""

    def __init__(self, answer: Any, asked: list[Config], sleep_s: float = 0.0) -> None:
        self.answer, self.asked, self.sleep_s = answer, asked, sleep_s

    def ask(self, impl: Any, verb: str, deadline_s: float, mode: str, **arguments: Any) -> Reply:
        assert (verb, mode, arguments["arch"]) == ("compile", "compile", "sm_90a")
        time.sleep(self.sleep_s)
        self.asked.append(arguments["config"])
        return cast(Reply, self.answer(arguments["config"]))

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


def fine(config: Config) -> Reply:
    return Reply(Status.OK, "", {"spill_bytes": 0, "binary": canonical(config)})


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "architecture", lambda lab, impl: ("sm_90a", ""))


def make(answer: Any, asked: list[Config], **options: Any) -> Ahead:
    return Ahead(FakeLab().lab, IMPL, PROBLEM, DEFAULT, lambda: cast(Lab, Compiler(answer, asked, **options)))


def test_spilling_and_broken_configs_never_reach_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_gpu: None
) -> None:
    def answer(config: Config) -> Reply:
        if config["num_warps"] == 8:
            return Reply(Status.OK, "", {"spill_bytes": 64, "binary": canonical(config)})
        if config["block_m"] == 128:
            return Reply(Status.FAILED_COMPILE, "ptxas: too much shared data")
        return fine(config)

    asked: list[Config] = []
    monkeypatch.setattr(job, "Ahead", lambda lab, impl, problem, default: make(answer, asked))
    fake = FakeLab()
    result = tuner.tune(
        fake.lab,
        IMPL,
        PROBLEM,
        "48",
        journal_path=tmp_path / "j.jsonl",
        identity=HERE,
        table=Table(tmp_path / "t.json"),
    )
    assert result.config == BEST
    assert all(c["num_warps"] != 8 and c["block_m"] != 128 for c in fake.prepared)
    trials = {canonical(t["config"]): t for t in config_lines(tmp_path / "j.jsonl")}
    assert len(trials) == 48
    spilled = [t for t in trials.values() if "spills 64 bytes of registers on sm_90a" in t["reason"]]
    assert len(spilled) == 12
    assert all(t["status"] == Status.SKIPPED and t["time_s"] is None for t in spilled)
    assert sum(t["status"] == Status.FAILED_COMPILE for t in trials.values()) == 9


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({"shared_bytes": 232449}, "needs 232449 bytes of shared memory, sm_90a has 232448"),
        ({"registers": 255, "threads": 512}, "needs 130560 registers for a block"),
        ({"registers": 128, "threads": 512, "shared_bytes": 232448, "spill_bytes": 0}, ""),
        ({"registers": None, "threads": None, "shared_bytes": None, "spill_bytes": None}, ""),
    ],
)
def test_what_cannot_launch_is_known_from_its_resources(on_gpu: None, found: dict[str, Any], why: str) -> None:
    with make(lambda config: Reply(Status.OK, "", dict(found)), []) as known:
        trial = known.judge(BEST, {})
    assert (trial is None) == (why == "")
    assert trial is None or (trial.status == Status.SKIPPED and why in trial.reason)


def test_identical_machine_code_is_measured_once(on_gpu: None) -> None:
    def answer(config: Config) -> Reply:
        return Reply(Status.OK, "", {"binary": str(config["block_m"])})

    first, twin = {**DEFAULT, "block_m": 32}, {**DEFAULT, "block_m": 32, "unroll": 4}
    with make(answer, []) as known:
        assert known.judge(first, {}) is None
        assert known.judge(twin, {}) is None  # the first has no outcome yet
        trials = {canonical(first): Trial(first, ratio=0.5, time_s=1e-3, spent_s=3.0)}
        got = known.judge(twin, trials)
        assert got is not None
        assert (got.config, got.ratio, got.time_s, got.spent_s) == (twin, 0.5, 1e-3, 0.0)
        assert "the same machine code as" in got.reason
        assert known.judge({**DEFAULT, "block_m": 64}, trials) is None


def test_what_is_expected_is_compiled_meanwhile(monkeypatch: pytest.MonkeyPatch, on_gpu: None) -> None:
    monkeypatch.setattr(ahead, "cores", lambda: 4)
    asked: list[Config] = []
    likely = [{**DEFAULT, "block_m": m} for m in (32, 64, 128)]
    with make(fine, asked, sleep_s=0.01) as known:
        known.expect(likely)
        until = time.monotonic() + 30
        while len(known.found) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        before = len(asked)
        assert [known.judge(config, {}) for config in likely] == [None] * 3
        assert len(asked) == before == 4  # the default and these three, each once
    assert known._threads == []


def test_the_first_of_what_is_expected_are_compiled_and_none_twice(
    monkeypatch: pytest.MonkeyPatch, on_gpu: None
) -> None:
    monkeypatch.setattr(ahead, "LOOK_AHEAD", 2)
    asked: list[Config] = []
    with make(fine, asked) as known:
        known._threads = [threading.Thread()]  # none that would empty the queue
        known._threads[0].start()
        known.expect(DEFAULT | {"block_m": m} for m in (16, 32, 64, 128))  # the default is compiled already
        waiting = [known._queue.get_nowait() for _ in range(known._queue.qsize())]
    assert [config["block_m"] for config in waiting] == [32, 64]


@pytest.mark.parametrize("search", ["exhaustive", "random"])
def test_what_is_expected_next(tmp_path: Path, search: str) -> None:
    """All in turn: what follows. Else neighbours of the best, then any: each config once at least."""
    fake = FakeLab()
    made = job.Job(fake.lab, IMPL, PROBLEM, search, journal_path=tmp_path / "j.jsonl", identity=HERE)
    likely = list(made._likely())
    if search == "exhaustive":
        assert likely == [made.space.config(row) for row in range(1, len(made.space))]
        return
    near = {axis: sum(c[axis] != DEFAULT[axis] for c in likely[:8]) for axis in DEFAULT}
    assert near == {"block_m": 3, "num_warps": 3, "unroll": 2}
    assert {canonical(c) for c in likely} >= {canonical(made.space.config(row)) for row in range(len(made.space))}


def test_the_default_is_measured_whatever_its_code_looks_like(on_gpu: None) -> None:
    with make(lambda config: Reply(Status.OK, "", {"spill_bytes": 8, "binary": "x"}), []) as known:
        assert known.judge(DEFAULT, {}) is None


def test_where_a_launch_compiles_anew_only_what_is_known_is_judged(
    monkeypatch: pytest.MonkeyPatch, on_gpu: None
) -> None:
    monkeypatch.setattr(ahead, "cores", lambda: 2)  # nobody compiles meanwhile
    asked: list[Config] = []
    with make(lambda config: Reply(Status.OK, "", {"spill_bytes": 8 * (config != DEFAULT)}), asked) as known:
        known.impl = replace(known.impl, language="numba_cuda")
        assert known.judge(BEST, {}) is None
        assert asked == [DEFAULT]
        known.found[canonical(BEST)] = Reply(Status.OK, "", {"spill_bytes": 8})
        trial = known.judge(BEST, {})
        assert trial is not None
        assert "spills 8 bytes" in trial.reason


def test_an_architecture_that_cannot_be_compiled_for_switches_it_off(on_gpu: None) -> None:
    asked: list[Config] = []
    with make(lambda config: Reply(Status.SKIPPED, "not for sm_86"), asked) as known:
        assert known.why == "the default config does not compile for sm_90a: not for sm_86"
        assert known.judge(BEST, {}) is None
    assert asked == [DEFAULT]


def test_a_crashed_compiler_is_no_verdict_on_the_config(on_gpu: None) -> None:
    def answer(config: Config) -> Reply:
        return fine(config) if config == DEFAULT else Reply(Status.FAILED_CRASH, "killed")

    with make(answer, []) as known:
        assert known.judge(BEST, {}) is None


def test_on_a_cpu_nothing_is_compiled_beside_a_timing() -> None:
    arch, why = ahead.architecture(FakeLab().lab, IMPL)
    assert arch == ""
    assert "disturb" in why


@pytest.mark.parametrize("key", ["softmax/triton"])
def test_a_real_compiler_tells_twins_apart(key: str) -> None:
    """The same config gives the same digest, another one another: as the real compiling process says it."""
    impl, problem = registry.impl(key), registry.problem("softmax[m=64,n=512,fp32]")
    if impl.missing:
        pytest.skip(impl.missing)
    with Lab("cpu", 1) as lab:
        space = lab.space(impl, problem, "compile")
        other = next(c for c in space["configs"] if c["num_warps"] != space["default"]["num_warps"])
        replies = [
            lab.ask(impl, "compile", 300.0, "compile", problem=str(problem), config=config, arch="sm_90a")
            for config in (space["default"], space["default"], other)
        ]
    assert all(reply.ok for reply in replies), replies
    binaries = [reply.data["binary"] for reply in replies]
    assert binaries[0] == binaries[1] != binaries[2]
