"""A campaign at a device that is not here, for tests of its parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rooftune import registry
from rooftune.autotune.ranking import Gpu
from rooftune.commands.campaign_plan import Home, Plan
from rooftune.commands.campaign_work import Campaign
from rooftune.results.record import Record

PROBLEM = "softmax[m=64,n=256,fp32]"


def record(number: int = 0, rounds: int = 6) -> Record:
    return Record(
        problem=PROBLEM,
        op="softmax",
        shape="m=64,n=256",
        precision="fp32",
        impl="softmax/torch",
        config={"call": f"c{number}"},
        default=True,
        status="ok",
        time_s=1 / 3,
        rounds=[[1 / 3] * 5] * rounds,
    )


def home(tmp_path: Path, said: list[str] | None = None) -> Home:
    return Home(tmp_path / "out", (said if said is not None else []).append)


def work_on_h200(tmp_path: Path, configs: list[dict[str, Any]], default: dict[str, Any]) -> Campaign:
    """A campaign at a device that is not here, as far as the choice of entrants goes."""
    space = {"configs": configs, "default": default}
    session = SimpleNamespace(
        lab=SimpleNamespace(space=lambda impl, problem: space), device=SimpleNamespace(kind="cuda"), say=print
    )
    field = {"gemm": list(registry.impls("gemm"))}
    problems = [registry.problem("gemm[m=4096,n=4096,k=4096,bf16]")]
    made = Campaign(session, home(tmp_path), Plan(100.0), problems, field, 0)  # type: ignore[arg-type]
    made.gpu = Gpu.named("NVIDIA H200")
    return made
