"""What a run builds before it times anything, on a device that only says that it is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rooftune import race, registry, worker
from rooftune.commands import run
from rooftune.core import Status
from rooftune.lab import Lab
from rooftune.registry import Impl

Kernel = Callable[..., Path]
PROBLEMS = [registry.problem(f"softmax[m={m},n=96,fp32]") for m in (48, 72)]


def on_gpu(lab: Lab, kind: str = "cuda", free: int | None = None) -> Any:
    memory = SimpleNamespace(free=free)
    device = SimpleNamespace(kind=kind, memory_bytes=lambda: memory)
    return SimpleNamespace(lab=lab, device=device, say=lambda text: None)


def with_diary(file: Path, diary: Path) -> Impl:
    """A kernel that notes what it is built for, and says that it runs on GPUs too."""
    head = "def build(problem, config):"
    note = f"    with open({str(diary)!r}, 'a') as diary: print(problem, file=diary)"
    text = file.read_text().replace(head, f"{head}\n{note}").replace('("cpu",)', '("cpu", "cuda")')
    file.write_text(text)
    return registry.user_impl(file)


def ahead(session: Any, impls: list[Impl], seen: set[Any]) -> dict[str, dict[str, Any]]:
    return run.build_ahead(session, PROBLEMS, {"softmax": impls}, race.Options(seed=1), {}, seen)


@pytest.mark.parametrize("free", [None, 1])
def test_a_race_finds_everything_built_and_checked(kernel: Kernel, tmp_path: Path, free: int | None) -> None:
    """Also where memory has room for one at a time."""
    diary, seen = tmp_path / "diary", set[Any]()
    impl = with_diary(kernel(), diary)
    with Lab("cpu") as lab:
        found = ahead(on_gpu(lab, free=free), [impl], seen)
        built = diary.read_text().splitlines()
        assert {str(p) for p in PROBLEMS} < set(built)  # and ragged relatives
        (first, second) = (found[f"{p} {impl.key} {{}}"] for p in PROBLEMS)
        assert len(first["cases"]) > len(second["cases"]) == 1  # one config is checked thoroughly once
        for problem in PROBLEMS:
            (record,) = race.race(lab, problem, [impl], race.Options(rounds=6, samples=1), None, (), seen)
            assert record.status == Status.OK
        assert diary.read_text().splitlines() == built


def test_no_more_is_built_ahead_than_a_worker_keeps(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.MOST_AHEAD < worker.KEPT
    monkeypatch.setattr(run, "MOST_AHEAD", 1)
    impl = with_diary(kernel(), tmp_path / "diary")
    with Lab("cpu") as lab:
        assert [key.split()[0] for key in ahead(on_gpu(lab), [impl], set())] == [str(PROBLEMS[0])]


def test_what_fails_is_told_by_its_race(kernel: Kernel, tmp_path: Path) -> None:
    right, wrong = with_diary(kernel(name="right"), tmp_path / "a"), with_diary(kernel("out.zero_()"), tmp_path / "b")
    seen: set[Any] = set()
    with Lab("cpu") as lab:
        found = ahead(on_gpu(lab), [wrong, right], seen)
        assert {key.split()[1] for key in found} == {right.key}
        records = race.race(lab, PROBLEMS[0], [wrong, right], race.Options(rounds=6, samples=1), None, (), seen)
    assert [r.status for r in records] == [Status.WRONG, Status.OK]


def test_on_a_cpu_and_for_one_problem_nothing_is_built_ahead(kernel: Kernel, tmp_path: Path) -> None:
    impl = with_diary(kernel(), tmp_path / "diary")
    with Lab("cpu") as lab:
        assert ahead(on_gpu(lab, kind="cpu"), [impl], set()) == {}
        one = run.build_ahead(on_gpu(lab), PROBLEMS[:1], {"softmax": [impl]}, race.Options(), {}, set())
    assert one == {}
    assert not (tmp_path / "diary").exists()
