"""What is said of a competitor on record: the best evidence of today's source first, an older one only as stale."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rooftune import evidence, registry
from rooftune.bench import main
from rooftune.commands import run
from rooftune.core import Evidence, ExitCode
from rooftune.results import store
from rooftune.results.record import Record

TRITON, TORCH = registry.impl("softmax/triton"), registry.impl("softmax/torch")
OLD = "f" * 16


def record(
    impl: registry.Impl = TRITON,
    kind: str = "measured",
    source: str = "",
    status: str = "ok",
    judge: str | None = None,
) -> Record:
    made = Record(
        problem="softmax[m=8,n=64,bf16]",
        op="softmax",
        shape="m=8,n=64",
        precision="bf16",
        impl=impl.key,
        config={},
        default=True,
        status=status,
        evidence=kind,
        source_hash=source or impl.source_hash,
        judge_hash=registry.judge_hash(impl.op) if judge is None else judge,
    )
    if kind == "measured":
        made.device = {"name": "Example 9000"}
        if status == "ok":
            made.time_s, made.rounds = 1e-3, [[1e-3]] * 6
    return made


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOFTUNE_CACHE_DIR", str(tmp_path / "cache"))


def standing(tmp_path: Path, *records: Record) -> evidence.Standing:
    path = tmp_path / "run.jsonl"
    for each in records:
        store.Log(path).append(each.to_json())
    return evidence.on_record([TRITON], [path] if records else [])["softmax/triton"]


def test_nothing_on_record_is_said_so(tmp_path: Path) -> None:
    assert str(standing(tmp_path)) == "nothing on record"
    assert not standing(tmp_path, record(kind="emulated", status="wrong")).kinds


def test_proof_is_not_called_a_run(tmp_path: Path) -> None:
    found = standing(tmp_path, record(kind="compiled"), record(kind="emulated"))
    assert found.kinds == (Evidence.EMULATED, Evidence.COMPILED)
    assert str(found) == f"emulated and compiled, never run on hardware (source {TRITON.source_hash[:8]})"


def test_todays_proof_goes_before_an_older_run_which_is_not_forgotten(tmp_path: Path) -> None:
    found = standing(tmp_path, record(source=OLD), record(kind="compiled"))
    assert not found.stale
    assert "not run on hardware since it changed" in str(found)


def test_an_older_source_is_stale(tmp_path: Path) -> None:
    found = standing(tmp_path, record(source=OLD), record(kind="emulated", source=OLD))
    assert found.stale
    assert str(found) == "STALE: measured on Example 9000 (older source ffffffff)"
    assert str(standing(tmp_path, record())).startswith("measured on Example 9000 (source ")


def test_comparing_stored_runs_names_stale_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, source in (("a", OLD), ("b", "")):
        store.Log(tmp_path / name).append(record(TORCH, source=source).to_json())
    code = main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert code in (ExitCode.OK, ExitCode.INCONCLUSIVE)
    out = capsys.readouterr().out
    assert "stale: the base's softmax/torch is of source ffffffff" in out
    assert "stale: the candidate" not in out


def test_large_problems_of_every_operator_have_its_own_flags() -> None:
    for name in registry.op_names():
        for precision in registry.op(name).precisions:
            made = evidence.compile_problem(name, precision)
            assert registry.problem(str(made)) == made
    assert evidence.compile_problem("gemm", "fp8").flag("transpose") == "nt"


def test_what_was_proven_before_ctrl_c_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three competitors are done when the user stops: minutes of compilers are not lost."""
    calls: list[str] = []

    def compile_all(lab: object, impl: registry.Impl, problem: object, archs: object) -> Record:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(impl.key)
        return record(impl, "compiled")

    monkeypatch.setattr(evidence, "compile_all", compile_all)
    monkeypatch.setattr(evidence, "emulate", lambda lab, impl, *_: record(impl, "emulated"))
    impls = [registry.impl(key) for key in ("softmax/triton", "layernorm/triton", "gemm/triton")]
    kept: list[Record] = []
    lab = SimpleNamespace(retire=lambda *_: None, halt=lambda: None)
    session = SimpleNamespace(lab=lab, device=SimpleNamespace(kind="cpu"), say=lambda text: None, keep=kept.extend)
    with pytest.raises(KeyboardInterrupt):
        run.prove(session, {"": impls}, ["bf16"], seed=1, thorough=True)  # type: ignore[arg-type]
    assert [r.impl for r in kept if r.evidence == "compiled"] == calls
    assert len(calls) == 2


def test_what_an_earlier_gate_let_pass_is_said_so(tmp_path: Path) -> None:
    """Its times hold, as the source is today's; that it is right was asked with other inputs."""
    before = record(judge="")
    found = standing(tmp_path, before)
    assert found.said == "measured on Example 9000, by an earlier gate"
    assert not found.stale
    found = standing(tmp_path, before, record(kind="emulated", judge=OLD))
    assert found.said == "measured on Example 9000, by an earlier gate"
    found = standing(tmp_path, record(kind="emulated"), record(kind="compiled", judge=""))
    assert found.said == "emulated and compiled; measured on Example 9000, by an earlier gate"
    found = standing(tmp_path, record())
    assert found.said == "measured on Example 9000"
    alone = tmp_path / "alone.jsonl"
    store.Log(alone).append(record(kind="emulated", judge=OLD).to_json())
    assert evidence.on_record([TRITON], [alone])["softmax/triton"].said == (
        "emulated, by an earlier gate, never run on hardware"
    )
