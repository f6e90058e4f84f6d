"""A campaign's time and its folder: shares, overruns, what a crash costs, how small it stays; and a plan's end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_campaign import PROBLEM, home, record

from rooftune import locks, registry
from rooftune.commands import campaign_plan
from rooftune.commands.campaign_plan import SHARES, Plan, shares_of
from rooftune.core import Status, UsageError
from rooftune.lab import Lab, OutOfTime

# --- time and folder ------------------------------------------------------------------------------------------------


def test_every_phase_has_its_share_and_what_is_left_over_goes_on() -> None:
    now = [100.0]
    plan = Plan(540.0, clock=lambda: now[0])
    dealt = {}
    for phase, share in SHARES.items():
        dealt[phase] = plan.enter(phase)
        assert dealt[phase] >= 540 * share - 1e-9
        now[0] += 5.0  # each leaves most of its time
    assert dealt["probe"] == pytest.approx(540 * SHARES["probe"])
    assert dealt["energy"] == pytest.approx(540 - 25.0)
    assert sum(SHARES.values()) == pytest.approx(1.0)
    now[0] = 100.0
    late = Plan(540.0, clock=lambda: now[0])
    late.enter("probe")
    now[0] += 400.0  # one phase took nearly everything: the others share the rest and the end stays where it was
    for phase in list(SHARES)[1:]:
        now[0] += late.enter(phase)
    assert now[0] == pytest.approx(100 + 540)
    assert late.enter("energy") == pytest.approx(0.0)


def test_a_step_that_overruns_leaves_the_later_phases_half_of_theirs() -> None:
    now = [0.0]
    plan = Plan(100.0, without="energy", clock=lambda: now[0])
    for phase, share in SHARES.items():
        seconds = plan.enter(phase)
        if phase == "energy":
            assert seconds == 0.0  # no sensor: its share went to the others
            continue
        assert seconds >= 100 * share / (1 - SHARES["energy"]) * (0.5 if phase != "probe" else 1.0) - 1e-9
        later = plan.end - plan.until
        assert plan.break_off() <= plan.until + later / 2 + 1e-9
        now[0] = plan.until
    assert plan.break_off() == pytest.approx(100.0)  # the last phase ends with the plan
    now[0] = 0.0
    late = Plan(100.0, clock=lambda: now[0])
    late.enter("tune")
    now[0] = late.break_off()  # every tuning overran
    assert late.enter("final") > 10.0


def test_a_small_budgets_tuning_leaves_time_for_a_final_race() -> None:
    now = [0.0]
    plan = Plan(100.0, "energy", clock=lambda: now[0])
    plan.enter("race")
    plan.keep("final", 0.0)
    free = plan.enter("tune")
    assert free == pytest.approx(100 * 0.3 / 0.44)
    plan.keep("final", 20.0)  # less than its share
    assert plan.enter("tune") == pytest.approx(free)
    plan.keep("final", 45.0)
    assert plan.enter("tune") == pytest.approx(55.0)
    plan.keep("final", 90.0)  # not more than half
    assert plan.enter("tune") == pytest.approx(50.0)
    assert plan.break_off() == pytest.approx(50.0)  # nor does a tuning that overruns take it
    now[0] = 60.0
    assert plan.enter("final") == pytest.approx(40.0)


def test_tuning_time_goes_to_what_is_missing() -> None:
    dealt = dict(shares_of({"a": 0.6, "b": 0.3, "at the roof": 0.0, "c": 0.1}, 100.0, 5.0))
    assert dealt == pytest.approx({"a": 60.0, "b": 30.0, "c": 10.0})
    few = dict(shares_of({"a": 0.6, "b": 0.3, "c": 0.1}, 30.0, 12.0))  # c would get 3 s, then b 10 s: neither starts
    assert few == pytest.approx({"a": 30.0})
    assert shares_of({"a": 1.0}, 4.0, 5.0) == []
    assert shares_of({}, 100.0, 5.0) == []


def test_the_folder_remembers_steps_and_whose_it_is(tmp_path: Path) -> None:
    first = home(tmp_path)
    first.open("run", {"name": "Example 9000"})
    first.finish("check a", "check", "timeout", reason="no answer within 30 s; killed")
    second = home(tmp_path)
    assert second.path == first.path
    assert second.steps["check a"]["status"] == "timeout"
    assert [s["key"] for s in second.of("check")] == ["check a"]
    assert second.done("check b") is None
    second.open("run", {"name": "Example 9000"})
    with pytest.raises(UsageError, match="holds a campaign of Example 9000"):
        second.open("run", {"name": "Example 9001"})


def test_a_line_cut_by_a_crash_costs_its_own_step_only(tmp_path: Path) -> None:
    first = home(tmp_path)
    for number in range(3):
        first.finish(f"step {number}", "race", "ok")
    data = first.path.read_bytes()
    first.path.write_bytes(data[:-7])
    said: list[str] = []
    again = home(tmp_path, said)
    assert list(again.steps) == ["step 0", "step 1"]
    assert "1 damaged" in said[0]
    again.finish("step 2", "race", "ok")
    assert list(home(tmp_path).steps) == ["step 0", "step 1", "step 2"]


def test_the_folder_stays_small_enough_to_carry_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    place = home(tmp_path, said)
    kept = place.compact([record()])[0]
    assert kept.rounds is not None
    assert kept.rounds[0][0] == 0.33333
    monkeypatch.setattr(campaign_plan, "LEAN_BYTES", 4000)
    monkeypatch.setattr(campaign_plan, "FULL_BYTES", 5500)
    monkeypatch.setattr(campaign_plan, "LIMIT_BYTES", 8000)
    for name, size in (("small", 1000), ("large", 5000)):
        (place.folder / "tune" / name).write_bytes(b"x" * size)
    lean = place.compact([record(1), record(2)])
    assert [r.rounds for r in lean] == [None, None]
    assert [r.time_s for r in lean] == [1 / 3] * 2  # the result stays
    assert sum("no raw rounds" in text for text in said) == 1
    assert place.full()
    place.log.append({"kind": "x", "pad": "y" * 3000})
    place.fit()
    assert place.used() <= 8000
    assert not (place.folder / "tune" / "large").exists()
    assert any("large" in text for text in said)
    assert (place.folder / "tune" / "small").exists()


# --- a plan's end ---------------------------------------------------------------------------------------------------

HANGS = '''"""A file that never finishes loading."""
import time
OP = "softmax"
DEVICES = ("cpu",)
PRECISIONS = ("fp32",)
SPACE = None
time.sleep(600)
def build(problem, config): ...
'''


def test_a_hung_kernel_costs_the_plans_patience_and_the_plans_end_blames_nobody(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "hangs.py"
    path.write_text(HANGS)
    impl = registry.user_impl(path)
    lab.worker(impl)  # its start may take longer than the patience that is tried
    lab.patience_s = 1.0
    reply = lab.ask(impl, "space", 60.0, problem=PROBLEM)
    assert (reply.status, reply.reason) == (Status.TIMEOUT, "no answer within 1 s; killed")
    lab.patience_s = 60.0
    lab.worker(impl)
    lab.until = time.monotonic() + 0.5
    with pytest.raises(OutOfTime):
        lab.ask(impl, "space", 60.0, problem=PROBLEM)
    with pytest.raises(OutOfTime):  # and at once, without a process
        lab.ask(impl, "space", 60.0, problem=PROBLEM)


def test_a_lock_that_another_run_keeps_is_waited_for_until_the_plans_end(tmp_path: Path) -> None:
    with locks.held(tmp_path / "lock", "cpu") as first:
        assert first
        begin = time.monotonic()
        with locks.held(tmp_path / "lock", "cpu", until=begin + 0.2) as second:
            assert not second
        assert time.monotonic() - begin >= 0.2
    with locks.held(tmp_path / "lock", "cpu", until=time.monotonic()) as third:
        assert third
