"""What production should use: never slower than torch, from records of this device, with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rooftune import device, registry
from rooftune.autotune import dispatch, inprocess, production
from rooftune.autotune.journal import toolchain
from rooftune.autotune.table import Entry, Table
from rooftune.core import Evidence, Status, UsageError
from rooftune.results.record import Record
from rooftune.results.store import Log, new_run_path

PROBLEM = registry.problem("softmax[m=8,n=64,fp32]")
TORCH, NUMBA = registry.impl("softmax/torch"), registry.impl("softmax/numba")
CALL = {"call": "softmax_out"}


@pytest.fixture(autouse=True)
def _steady_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint's load-dependent parts must not make two looks at this machine differ."""
    found = device.find("cpu").identity()
    monkeypatch.setattr(device.Device, "identity", lambda self: dict(found))
    production.forget()


def record(who: Any, config: dict[str, Any], ratio: float | None, low: float = 0.0, **changes: Any) -> Record:
    made = Record(
        problem=str(PROBLEM),
        op=PROBLEM.op,
        shape=PROBLEM.shape,
        precision=PROBLEM.precision,
        impl=who.key,
        config=config,
        default=True,
        status=Status.OK,
        time_s=1e-5 / (ratio or 1.0),
        ratio_to_torch=ratio,
        ratio_ci=None if ratio is None else [low, 2 * ratio - low],
        source_hash=who.source_hash,
        device={"name": "here", "identity": device.find("cpu").identity()},
        versions=toolchain(who),
        regime={"threads": 1, "cache": "hot", "clock": "wall"},
        run="r1",
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def store(*records: Record) -> Path:
    path = new_run_path()
    log = Log(path)
    for each in records:
        log.append(each.to_json())
    return path


DEFAULT = registry.impl("softmax/numba").load().SPACE.default_for(PROBLEM)


def test_nothing_measured_means_torch_and_the_command_that_changes_it() -> None:
    answer = dispatch.choose(PROBLEM).as_json()
    assert answer["impl"] == "softmax/torch"
    assert answer["source"] == "default"
    assert "nothing was measured" in answer["why"]
    assert answer["next"] == 'python bench.py run "softmax[m=8,n=64,fp32]" --device cpu'


def test_the_faster_one_is_used_with_its_evidence() -> None:
    store(record(TORCH, CALL, None), record(NUMBA, DEFAULT, 1.5, 1.4))
    answer = dispatch.choose(PROBLEM).as_json()
    assert answer["impl"] == "softmax/numba"
    assert answer["config"] == DEFAULT
    assert answer["ratio_to_torch"] == 1.5
    assert answer["ratio_ci"] == (1.4, 1.6)
    assert answer["run"] == "r1"
    assert "1.50x torch's speed (1.40 to 1.60)" in answer["why"]
    assert "tune" in answer["next"]
    assert [c["impl"] for c in answer["considered"]] == ["softmax/torch"]


@pytest.mark.parametrize("low", [0.9, 1.0])
def test_without_confidence_it_is_torch(low: float) -> None:
    store(record(TORCH, CALL, None), record(NUMBA, DEFAULT, 1.5, low))
    answer = dispatch.choose(PROBLEM).as_json()
    assert answer["impl"] == "softmax/torch"
    assert answer["config"] == CALL
    assert "nothing beats torch with confidence (softmax/numba: 1.50x" in answer["why"]
    assert [c["impl"] for c in answer["considered"]] == ["softmax/numba"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"source_hash": "0"}, "its source changed"),
        ({"versions": {"torch": "1.0"}}, "another toolchain (torch 1.0 -> "),
        ({"device": {"name": "elsewhere", "identity": {"kind": "cpu"}}}, "another device (elsewhere)"),
        ({"status": Status.WRONG, "reason": "bad rows", "time_s": None}, "wrong bad rows"),
        ({"regime": {"threads": 8, "cache": "hot", "clock": "wall"}}, "8 threads"),
        ({"impl": "softmax/gone"}, "its file is not here"),
    ],
)
def test_what_does_not_apply_here_is_listed_and_not_used(changes: dict[str, Any], why: str) -> None:
    store(record(NUMBA, DEFAULT, 1.5, 1.4, **changes), record(TORCH, CALL, None))
    answer = dispatch.choose(PROBLEM).as_json()
    assert answer["impl"] == "softmax/torch"
    assert any(why in c["reason"] for c in answer["considered"]), answer["considered"]


def test_where_torch_has_no_record_of_use_the_reason_is_torchs_and_the_next_command_makes_one() -> None:
    """A user's own kernel was the newest record: `because its file is not here; torch is the safe choice`."""
    store(record(TORCH, CALL, None), record(NUMBA, {}, 1.5, 1.4, impl="softmax/mine"))
    threads = record(TORCH, CALL, None).regime["threads"] + 1
    answer = dispatch.choose(PROBLEM, threads=threads).as_json()
    assert answer["why"] == f"measured with {threads - 1} threads; torch is the safe choice"
    assert answer["next"].endswith(f"--device cpu --threads {threads}")


def test_it_does_not_say_that_nothing_was_measured_where_only_torch_was_not() -> None:
    store(record(NUMBA, DEFAULT, None))
    assert dispatch.choose(PROBLEM).use.why.startswith("torch was not measured for this problem on this device")


def test_no_threads_are_refused() -> None:
    with pytest.raises(UsageError, match="threads must be positive, not 0"):
        dispatch.choose(PROBLEM, threads=0)


def test_emulated_and_compiled_records_are_no_evidence_of_speed() -> None:
    store(record(TORCH, CALL, None), record(NUMBA, DEFAULT, 1.5, 1.4, evidence=Evidence.EMULATED))
    assert dispatch.choose(PROBLEM).as_json()["impl"] == "softmax/torch"


def test_the_newest_record_of_a_competitor_counts() -> None:
    old = store(record(TORCH, CALL, None), record(NUMBA, DEFAULT, 1.5, 1.4))
    os.utime(old, (1, 1))
    store(record(TORCH, CALL, None, run="r2"), record(NUMBA, DEFAULT, 0.8, 0.7, run="r2"))
    assert dispatch.choose(PROBLEM).as_json()["impl"] == "softmax/torch"


def test_a_newer_failure_vetoes_but_another_machines_record_does_not() -> None:
    old = store(record(TORCH, CALL, None), record(NUMBA, DEFAULT, 1.5, 1.4))
    os.utime(old, (1, 1))
    store(record(NUMBA, DEFAULT, 9.0, 8.0, device={"name": "elsewhere", "identity": {}}))
    assert dispatch.choose(PROBLEM).as_json()["ratio_to_torch"] == 1.5
    store(record(NUMBA, DEFAULT, None, status=Status.WRONG, reason="bad rows", time_s=None))
    answer = dispatch.choose(PROBLEM).as_json()
    assert answer["impl"] == "softmax/torch"
    assert any(c["reason"] == "wrong bad rows" for c in answer["considered"])


def tuned(config: dict[str, Any], low: float) -> Entry:
    return Entry(
        op="softmax",
        problem=str(PROBLEM),
        precision="fp32",
        impl=NUMBA.key,
        source_hash=NUMBA.source_hash,
        toolchain=toolchain(NUMBA),
        device=device.find("cpu").identity(),
        threads=1,
        config=config,
        default=DEFAULT,
        time_s=1e-5,
        default_time_s=2e-5,
        speedup=2.0,
        speedup_ci=[low, 2.2],
        rel_fro=1e-7,
        journal="",
        unix_time=1e9,
    )


def test_a_tuned_config_beats_torch_by_way_of_its_default() -> None:
    config = {"other": 1}
    store(record(TORCH, CALL, None), record(NUMBA, DEFAULT, 0.8, 0.7))
    Table().put(tuned(config, 1.8))
    answer = dispatch.choose(PROBLEM).as_json()
    assert (answer["impl"], answer["config"], answer["source"]) == ("softmax/numba", config, "tuned")
    assert answer["ratio_to_torch"] == pytest.approx(1.6)
    assert answer["ratio_ci"] == pytest.approx((0.7 * 1.8, 0.9 * 2.2))
    assert answer["next"] == ""
    Table().put(tuned(config, 1.2))  # 0.7 * 1.2 < 1: not sure
    assert dispatch.choose(PROBLEM).as_json()["impl"] == "softmax/torch"


def test_a_tuned_config_whose_default_was_not_raced_is_not_used() -> None:
    store(record(TORCH, CALL, None))
    Table().put(tuned({"other": 1}, 1.8))
    answer = dispatch.choose(PROBLEM).as_json()
    assert answer["impl"] == "softmax/torch"
    assert any("not raced against torch" in c["reason"] for c in answer["considered"])


def test_winners_of_one_run_use_its_rounds_and_count_the_rivals() -> None:
    slow = [[2e-5 * (1 + 0.001 * i)] * 5 for i in range(10)]
    fast = [[1e-5 * (1 + 0.001 * i)] * 5 for i in range(10)]
    pair = [record(TORCH, CALL, None, rounds=slow), record(NUMBA, DEFAULT, 2.0, 1.9, rounds=fast)]
    assert dispatch.winners(pair)[str(PROBLEM)].impl == "softmax/numba"
    pair[1].rounds = slow
    assert dispatch.winners(pair)[str(PROBLEM)].impl == "softmax/torch"  # the stored interval is not believed
    assert dispatch.winners([pair[1]]) == {}


# --- in the calling process -----------------------------------------------------------------------------------------


def test_best_returns_a_callable_that_computes() -> None:
    x, out = torch.randn(8, 64), torch.empty(8, 64)
    store(record(TORCH, CALL, None), record(NUMBA, DEFAULT, 1.5, 1.4))
    run = production.best("softmax", x)
    run(out, x)
    assert run.impl == "softmax/numba"
    assert run.config == DEFAULT
    assert "1.50x" in run.why
    torch.testing.assert_close(out, torch.softmax(x, -1))


def test_best_without_records_is_torch() -> None:
    x, out = torch.randn(8, 64), torch.empty(8, 64)
    run = production.best(PROBLEM, device="cpu")
    run(out, x)
    assert run.impl == "softmax/torch"
    torch.testing.assert_close(out, torch.softmax(x, -1))


def test_a_choice_that_cannot_be_built_becomes_torch_with_a_warning() -> None:
    store(record(TORCH, CALL, None), record(NUMBA, {"nonsense": 1}, 1.5, 1.4))
    with pytest.warns(UserWarning, match="softmax/numba was chosen .* but cannot be built"):
        run = production.best(PROBLEM, device="cpu")
    assert run.impl == "softmax/torch"
    assert "cannot be built" in run.why


@pytest.mark.parametrize(
    "text",
    [
        "softmax[m=8,n=64,bf16]",
        "layernorm[m=8,n=64,fp16]",
        "gemm[m=5,n=7,k=9,fp32]",
        "gemm[m=5,n=7,k=9,transpose=nt,epilogue=bias,bf16]",
        "gemm[m=16,n=32,k=16,transpose=nt,fp8]",
        "attention[b=2,h=4,hkv=2,sq=16,sk=24,d=64,causal,fp16]",
    ],
)
def test_the_problem_is_read_off_the_tensors(text: str) -> None:
    from rooftune.check import generator

    problem = registry.problem(text)
    tensors = registry.op(problem.op).inputs(problem, generator("cpu", 1), "cpu", "normal")
    assert inprocess.problem_of(problem.op, tensors, dict(problem.flags)) == problem


def test_tensors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="k=3, another has 4"):
        inprocess.problem_of("gemm", (torch.zeros(2, 4), torch.zeros(3, 5)), {})
    with pytest.raises(UsageError, match="takes 2 tensors"):
        inprocess.problem_of("gemm", (torch.zeros(2, 4),), {})
    with pytest.raises(UsageError, match="3 dimensions, expected 2"):
        inprocess.problem_of("softmax", (torch.zeros(2, 4, 1),), {})
    with pytest.raises(UsageError, match="does not take int64"):
        inprocess.problem_of("softmax", (torch.zeros(2, 4, dtype=torch.int64),), {})
    x, vector = torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(4)
    with pytest.raises(UsageError, match="tensor 1 is float32, expected bfloat16"):
        inprocess.problem_of("layernorm", (x, vector, vector), {})
    with pytest.raises(UsageError, match="tensor 1 is on meta, another on cpu"):
        inprocess.problem_of("gemm", (vector[None], torch.zeros(4, 4, device="meta")), {})
    with pytest.raises(UsageError, match="needs its input tensors"):
        inprocess.problem_of("softmax", (), {})


def test_choosing_imports_no_gpu_library() -> None:
    code = (
        "import sys\nfrom rooftune.autotune import dispatch\n"
        "dispatch.choose('softmax[m=8,n=64,fp32]')\n"
        "assert not {'torch', 'triton', 'numba', 'cupy'} & set(sys.modules), 'heavy'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
