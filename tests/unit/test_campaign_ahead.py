"""What a campaign builds while competitors are checked, and what then races."""

from __future__ import annotations

import math
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_campaign import home, work_on_h200

from rooftune import registry
from rooftune.commands import campaign_phases
from rooftune.commands.campaign_plan import Plan
from rooftune.commands.campaign_work import Campaign
from rooftune.lab import Lab, OutOfTime


class Building:
    """A lab that notes what is to be built; the last of `most` finds the plan's end."""

    until = math.inf

    def __init__(self, configs: list[dict[str, Any]], most: int = 99) -> None:
        self.configs, self.most = configs, most
        self.asked: list[str] = []
        self.released: list[int] = []

    def space(self, impl: Any, problem: Any) -> dict[str, Any]:
        return {"configs": self.configs, "default": self.configs[0]}

    def prepare(self, impl: Any, problem: Any, config: Any, seed: int, thorough: bool) -> Any:
        assert not thorough
        self.asked.append(f"{impl.key} {problem} {config}")
        if len(self.asked) == self.most:
            raise OutOfTime("over")
        return SimpleNamespace(ok=True, data={"handle": len(self.asked)})

    def release(self, impl: Any, handle: int) -> None:
        self.released.append(handle)


def build_ahead(work: Campaign, impl: registry.Impl, stop: bool = False, few: bool = False) -> None:
    events = (threading.Event(), threading.Event())
    for event, is_set in zip(events, (stop, few), strict=True):
        if is_set:
            event.set()
    campaign_phases._build_ahead(work, impl, *events, threading.Lock())


def test_a_gpu_compiles_for_shapes_while_others_are_checked(tmp_path: Path) -> None:
    lab = Building([{"call": "compile"}], most=2)
    work = work_on_h200(tmp_path, [], {})
    work.session.lab = lab  # type: ignore[assignment]
    names = (
        "gemm[m=64,n=64,k=64,bf16]",
        "softmax[m=64,n=64,bf16]",
        "gemm[m=32,n=32,k=32,bf16]",
        "gemm[m=16,n=16,k=16,bf16]",
    )
    work.problems = [registry.problem(name) for name in names]
    work.field["softmax"] = list(registry.impls("softmax"))
    compilers = campaign_phases._compilers(work)
    assert [impl.key for impl in compilers] == ["gemm/torch_compile", "softmax/torch_compile"]
    work.home.finish(f"race {work.problems[0]} digest", "race", "ok")  # raced in an earlier sitting
    build_ahead(work, compilers[0])
    told = "gemm/torch_compile {} {{'call': 'compile'}}"
    assert lab.asked == [told.format(names[2]), told.format(names[3])]  # no softmax, and no error from the plan's end
    assert lab.released == [1]
    build_ahead(work, compilers[0], stop=True)
    assert len(lab.asked) == 2
    work.session.device.kind = "cpu"  # type: ignore[misc]
    assert campaign_phases._compilers(work) == []


def test_favourites_of_what_builds_slowly_race_if_they_were_built_ahead(tmp_path: Path) -> None:
    """Defaults of all problems come first: every race has them."""
    tile = {"block_k": 64, "num_warps": 8, "num_stages": 3, "group_m": 8}
    lab = Building([{"block_m": m, "block_n": n} | tile for m in (64, 128) for n in (64, 128, 256)])
    work = work_on_h200(tmp_path, [], {})
    work.session.lab = lab  # type: ignore[assignment]
    work.problems = [registry.problem(f"gemm[m=4096,n=4096,k={k},bf16]") for k in (4096, 8192)]
    triton = registry.impl("gemm/triton")
    build_ahead(work, triton, few=True)
    assert len(lab.asked) == 2
    lab.asked.clear()
    lab.released.clear()
    build_ahead(work, triton)
    each = 1 + campaign_phases.FAVOURITES
    assert len(lab.asked) == len(lab.released) == 2 * each
    assert all(asked.endswith(str(lab.configs[0])) for asked in lab.asked[:2])
    first = campaign_phases._favourites(work, work.problems[0], [triton])
    assert len(first) == campaign_phases.FAVOURITES
    work.built(triton, work.problems[0], lab.configs[0], 2 * campaign_phases.SLOW_BUILD_S)
    assert campaign_phases._favourites(work, work.problems[0], [triton]) == first
    unseen = registry.problem("gemm[m=1024,n=4096,k=4096,bf16]")
    assert campaign_phases._favourites(work, unseen, [triton]) == []


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_checks_go_on_to_build_what_the_races_need(kernel, tmp_path: Path, kind: str) -> None:  # type: ignore[no-untyped-def]
    """With workers that run, on a device that only says that it is a GPU; on a CPU nothing is built beside."""
    file, diary = kernel(), tmp_path / "diary"
    head = "def build(problem, config):"
    note = f"    with open({str(diary)!r}, 'a') as diary: print(problem, file=diary)"
    file.write_text(file.read_text().replace(head, f"{head}\n{note}"))
    impl = registry.user_impl(file)
    problems = [registry.problem(f"softmax[m={m},n=96,fp32]") for m in (48, 72)]
    with Lab("cpu") as lab:
        session = SimpleNamespace(lab=lab, device=SimpleNamespace(kind=kind), say=print, keep=lambda records: None)
        work = Campaign(session, home(tmp_path), Plan(600.0), problems, {"softmax": [impl]}, 0)  # type: ignore[arg-type]
        work.plan.enter("check")
        campaign_phases.check(work)
        (step,) = work.home.of("check")
        assert step["status"] == "ok"
        built = diary.read_text().splitlines()
        ahead = [p for p in problems if work.is_built(impl, p, {})]
        assert ahead == [p for p in problems if str(p) in built] == (problems if kind == "cuda" else [])
        for problem in problems:
            assert lab.prepare(impl, problem, {}, 1, thorough=False).ok
    assert len(diary.read_text().splitlines()) == len(built) + 2 * (kind == "cpu")
