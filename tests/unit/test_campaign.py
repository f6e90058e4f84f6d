"""The campaign: who races, who is tuned, and the whole of it, killed and resumed."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_campaign import PROBLEM, home, record, work_on_h200

from rooftune import device, registry
from rooftune.bench import main
from rooftune.commands import campaign as campaign_verb
from rooftune.commands import campaign_phases, campaign_summary, campaign_tune
from rooftune.commands.campaign_plan import Home, Plan
from rooftune.commands.campaign_work import Campaign
from rooftune.core import ExitCode
from rooftune.results import store

ROOT = Path(__file__).resolve().parents[2]
# --- who races ------------------------------------------------------------------------------------------------------


def test_the_models_favourites_race_beside_the_default(tmp_path: Path) -> None:
    tile = {"block_k": 64, "num_warps": 8, "num_stages": 3, "group_m": 8}
    configs = [{"block_m": m, "block_n": n} | tile for m in (64, 128) for n in (64, 128, 256)]
    work = work_on_h200(tmp_path, configs, default=configs[4])
    problem, triton = work.problems[0], registry.impl("gemm/triton")
    chosen = campaign_phases._favourites(work, problem, [registry.impl("gemm/torch"), triton])
    assert len(chosen) == campaign_phases.FAVOURITES
    assert {e.impl.key for e in chosen} == {"gemm/triton"}  # torch has nothing to rank
    assert configs[4] not in [e.config for e in chosen]
    assert chosen[0].config == configs[5]  # 128 x 256
    work.gpu = None
    assert campaign_phases._favourites(work, problem, [triton]) == []


def test_every_torch_call_a_user_could_pick_is_an_entrant(tmp_path: Path) -> None:
    work = work_on_h200(tmp_path, [], {})
    autotuned = campaign_phases._autotuned(work, work.field["gemm"])
    assert [(e.impl.key, e.config) for e in autotuned] == [
        ("gemm/torch_compile", {"mode": "max-autotune-no-cudagraphs"})
    ]
    sources = {op: (registry.impl(f"{op}/torch").path).read_text() for op in ("gemm", "attention")}
    for call in ("matmul", "addmm", "mm_fp32", "int_mm", "scaled_mm", "scaled_mm_fast"):
        assert f'"{call}"' in sources["gemm"]
    for backend in ("default", "math", "flash", "efficient", "cudnn"):
        assert f'"sdpa_{backend}"' in sources["attention"]


def test_a_competitor_that_failed_its_check_races_no_more_until_its_source_changes(tmp_path: Path) -> None:
    work = work_on_h200(tmp_path, [], {})
    triton = registry.impl("gemm/triton")
    about = {"impl": triton.key, "reason": "", "precision": "bf16"}
    work.home.finish("a", "check", "timeout", source_hash="f" * 16, **about)
    assert triton in work.healthy(work.problems[0])
    work.home.finish("b", "check", "timeout", source_hash=triton.source_hash, **about)
    assert triton not in work.healthy(work.problems[0])
    assert triton in work.healthy(work.problems[0].replace(precision="fp8"))


def test_a_final_in_which_nothing_was_timed_does_not_hide_the_first_race(tmp_path: Path) -> None:
    work = work_on_h200(tmp_path, [], {})
    torch = registry.impl("gemm/torch")
    for phase, time_s in (("race", 1e-3), ("final", None)):
        found = record()
        found.problem, found.impl, found.source_hash = str(work.problems[0]), torch.key, torch.source_hash
        found.time_s, found.status, found.regime = time_s, "ok" if time_s else "timeout", {"phase": phase}
        work.home.records.append(found)
        assert [r.time_s for r in work.latest(work.problems[0])] == [1e-3]
    work.home.records.append(replace(work.home.records[0], time_s=2e-3, regime={"phase": "final"}))
    assert [r.time_s for r in work.latest(work.problems[0])] == [2e-3]


def test_what_the_budget_cut_is_told_phase_by_phase(tmp_path: Path) -> None:
    work = work_on_h200(tmp_path, [], {})
    problem, triton = work.problems[0], registry.impl("gemm/triton")

    def cut() -> list[str]:
        return campaign_summary.cut(work, [campaign_summary.row(work, p) for p in work.problems])

    checks = [(i, p) for i, asked in work.to_check() for p in asked]
    assert {p for _, p in checks} == {"bf16"}
    nothing = cut()
    assert nothing[0].startswith(f"{len(checks)} of {len(checks)} checks (")
    assert nothing[1:] == [f"1 of 1 first races ({problem})", f"1 of 1 final races ({problem})"]
    for impl, precision in checks:
        about = {"impl": impl.key, "precision": precision, "source_hash": impl.source_hash}
        work.home.finish(work.check_key(impl, precision), "check", "ok", **about)
    found = replace(record(), problem=str(problem), impl=triton.key, source_hash=triton.source_hash, roof=0.5)
    work.home.records.append(replace(found, regime={"phase": "race"}))
    assert cut() == [f"1 of 1 tunings ({triton.key} {problem})", f"1 of 1 final races ({problem})"]
    work.home.finish(campaign_tune.tune_key(triton, problem), "tune", "ok", impl=triton.key, problem=str(problem))
    work.home.finish(f"tune {triton.key} {problem} older", "tune", "ok", impl=triton.key, problem=str(problem))
    told = campaign_summary.notes(work, [campaign_summary.row(work, p) for p in work.problems])
    assert "tuned: 1 competitors x problems, 0 configs better than their default" in told
    work.home.records.append(replace(found, regime={"phase": "final"}))
    assert cut() == [f"1 of 1 energy readings ({problem})"]
    work.home.finish("energy", "energy", "unavailable", reason="no sensor")
    assert cut() == []


def test_no_time_goes_to_operators_that_only_torch_has_here() -> None:
    chosen = campaign_verb._ops([], "cpu")
    assert chosen[:2] == ["gemm", "attention"]
    assert not [op for op in chosen if op.endswith("_bwd")]  # on a CPU they have no competitor of ours


def test_names_of_what_was_cut_do_not_fill_the_screen() -> None:
    assert campaign_summary._some(list("abcdef")) == "a, b, c, d and 2 more"


# --- the whole ------------------------------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict[str, Any]]:
    logs = list(folder.glob("*-campaign-*.jsonl"))
    return store.Log(logs[0]).read()[0] if logs else []


def steps(folder: Path, phase: str) -> list[str]:
    return [line["key"] for line in lines(folder) if line.get("kind") == "step" and line["phase"] == phase]


def known_ceilings(folder: Path) -> None:
    """As an earlier sitting left them: measuring takes seconds, and is tested elsewhere."""
    place = Home(folder, print)
    place.open("run", device.find("cpu").identity())
    found = {"copy": [{"working_set_bytes": 2**20, "value": 20.0, "unit": "GB/s"}], "matrix": {}}
    place.log.append({"kind": "ceilings", "schema": 1, "run": "run", "ceilings": found})


@pytest.mark.slow
def test_killed_resumed_and_finished(kernel, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """kill -9 after the check; the same command then does the rest, once; a third run has nothing to do."""
    file, folder = kernel(), tmp_path / "out"
    known_ceilings(folder)
    asked = ["campaign", PROBLEM, "--load", str(file), "--only", "mine", "--out", str(folder), "--device", "cpu"]
    asked += ["--threads", "1", "--budget", "600s", "-q"]
    child = subprocess.Popen([sys.executable, "bench.py", *asked], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while not steps(folder, "check") and time.monotonic() < end:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    checked = steps(folder, "check")
    assert len(checked) == 1
    assert not steps(folder, "final")

    assert main(asked) == ExitCode.OK
    after = lines(folder)
    every = [line["key"] for line in after if line.get("kind") == "step"]
    assert steps(folder, "check") == checked
    assert sorted(every) == sorted(set(every))
    assert {len(steps(folder, phase)) for phase in ("race", "tune", "final", "energy")} == {1}
    final = [line for line in after if line.get("regime", {}).get("phase") == "final"]
    assert [line["impl"] for line in final] == ["softmax/mine"]
    assert len(final[0]["rounds"]) == campaign_phases.FINAL_ROUNDS
    assert final[0]["evidence"] == "measured"
    summary = json.loads((folder / "summary.json").read_text())
    row = summary["problems"][0]
    assert (row["phase"], row["best"], row["time_s"]) == ("final", "mine", final[0]["time_s"])
    assert row["source_hash"] == registry.user_impl(file).source_hash
    assert any(note.startswith("energy: unavailable(") for note in summary["notes"])
    assert "Every time below was measured there." in (folder / "summary.md").read_text()
    assert [r.problem for r in store.load_run(next(folder.glob("*-campaign-*.jsonl")))]  # a run as any other

    assert main(asked) == ExitCode.OK
    fresh = lines(folder)[len(after) :]
    assert [line["kind"] for line in fresh] == ["session"]


class FakeTuned:
    """What the tuner found: twice as fast, by a config of its own."""

    def __init__(self, impl: str, problem: str) -> None:
        self.impl, self.problem = impl, problem

    def as_json(self) -> dict[str, Any]:
        about = {"impl": self.impl, "problem": self.problem}
        return about | {"better": True, "config": {"block_n": 256}, "speedup": 2.0}


def test_tuning_takes_the_neediest_first_and_its_winners_race_in_the_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = home(tmp_path)
    now, calls = [0.0], []
    plan = Plan(400.0, clock=lambda: now[0])
    far, near, hopeless = (registry.impl(f"{op}/numba") for op in ("softmax", "layernorm", "softmax"))
    hopeless = replace(hopeless, name="slow")  # the neediest of all, and more than twice as slow as another
    problems = [registry.problem("softmax[m=64,n=256,fp32]"), registry.problem("layernorm[m=64,n=256,fp32]")]

    class FakeLab:
        def space(self, impl: registry.Impl, problem: Any) -> dict[str, Any]:
            return {"configs": [{"block_n": 128}, {"block_n": 256}]}

        def retire(self, impl: registry.Impl) -> None: ...

    def tune(lab: Any, impl: registry.Impl, problem: Any, budget: str, **how: Any) -> FakeTuned:
        calls.append((impl.key, float(budget[:-1])))
        assert how["journal_path"].parent == place.folder / "tune"
        assert how["table"].path == place.folder / "tuned.json"
        now[0] += float(budget[:-1]) + 4.0
        return FakeTuned(impl.key, str(problem))

    FakeLab.until = math.inf  # type: ignore[attr-defined]
    session = SimpleNamespace(lab=FakeLab(), about={"identity": {}}, say=lambda text: None)
    monkeypatch.setattr(campaign_tune.tuner, "tune", tune)
    work = Campaign(session, place, plan, problems, {"softmax": [far, hopeless], "layernorm": [near]}, 0)  # type: ignore[arg-type]
    for impl, problem, roof in ((near, problems[1], 0.8), (far, problems[0], 0.4), (hopeless, problems[0], 0.1)):
        found = record()
        found.time_s = 0.7 if impl is hopeless else 1 / 3
        found.problem, found.impl, found.config, found.roof = str(problem), impl.key, {"block_n": 128}, roof
        found.source_hash = impl.source_hash
        place.records.append(found)
    phase_s = plan.enter("tune")
    campaign_tune.tune(work)
    assert [key for key, _ in calls] == ["softmax/numba", "layernorm/numba"]
    assert calls[0][1] + campaign_tune.FINAL_S == pytest.approx(
        phase_s * 0.6 / 0.8, abs=0.1
    )  # 60 % missing against 20 %
    assert now[0] <= phase_s + 1e-6
    assert campaign_tune.best_config(work, far, problems[0]) == {"block_n": 256}
    campaign_tune.tune(work)  # finished steps are not repeated
    assert len(calls) == 2
    far_tuned = place.done(f"tune {far.key} {problems[0]} {far.source_hash}")
    assert far_tuned is not None
    assert far_tuned["result"]["speedup"] == 2.0


def test_a_wrong_kernel_is_told_and_raced_no_further(kernel, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "out"
    known_ceilings(folder)
    file = kernel("out.zero_()")
    asked = ["campaign", PROBLEM, "--load", str(file), "--only", "mine", "--out", str(folder), "--device", "cpu"]
    assert main([*asked, "--budget", "300s", "--threads", "1", "-q"]) == ExitCode.REGRESSION
    summary = json.loads((folder / "summary.json").read_text())
    assert any("softmax/mine fp32: wrong" in note for note in summary["notes"])
    assert not any(line.get("regime", {}).get("phase") == "race" for line in lines(folder))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "40"], "a campaign needs a time"),
        (["--budget", "1s"], "at least 10 s"),
        (["gem"], "unknown op 'gem'"),
        (["--out", "/proc/nothing/here"], "cannot be made"),
        (["softmax", "--precision", "int8"], "no problem for these"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path / "out")]
    assert main(["campaign", *given, "--device", "cpu"]) == ExitCode.USAGE
    assert words in capsys.readouterr().err
