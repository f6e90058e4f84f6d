"""Energy: what may be claimed, the protocol on simulated meters, and the readers on files made for the test."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from rooftune import clock, metering
from rooftune.core import Unavailable, UsageError
from rooftune.energy import Energy, refused


class Meter:
    """A meter, its clock and its load in one: the counter is brought up to date at every tick only.

    `load_w` and `idle_w` are the true powers, `call_s` the time of a call, `gain` falsifies instant power.
    """

    method = "counter"
    scope = "board"
    systematic = 0.05

    def __init__(self, tick_s: float = 0.1, phase_s: float = 0.0, load_w: float = 500.0, gain: float = 1.0) -> None:
        self.tick_s, self.next, self.gain = tick_s, phase_s or tick_s, gain
        self.load_w, self.idle_w, self.call_s = load_w, 100.0, 2e-3
        self.t = self.spent = self.shown = 0.0
        self.power = self.idle_w

    def now(self) -> float:
        return self.t

    def sleep(self, seconds: float) -> None:
        self._pass(seconds, self.idle_w)

    def work(self) -> int:
        self._pass(2 * self.call_s, self.load_w)
        return 2

    def _pass(self, seconds: float, watts: float) -> None:
        end, self.power = self.t + seconds, watts
        while self.next <= end:
            self.spent += (self.next - self.t) * watts
            self.t, self.shown = self.next, self.spent
            self.next += self.tick_s
        self.spent += (end - self.t) * watts
        self.t = end

    def joules(self) -> float | None:
        return self.shown

    def watts(self) -> float | None:
        return self.power * self.gain


def measured(**changes: Any) -> Energy:
    return Energy(**{"value": 1.5, "method": "counter-aligned", "label": "measured", "windows": (1.4, 1.6), **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"value": 0.0}, "the counter did not move"),
        ({"value": -1.0}, "the counter did not move"),
        ({"value": math.nan}, "not finite"),
        ({"net": math.inf}, "not finite"),
        ({"value": None}, "value None with method 'counter-aligned'"),
        ({"method": "unavailable"}, "value 1.5 with method 'unavailable'"),
        ({"method": "guess"}, "unknown method 'guess'"),
        ({"method": "model"}, "estimates, and only they"),
        ({"label": "est."}, "estimates, and only they"),
        ({"value": None, "method": "unavailable"}, "no value and no reason"),
        ({"value": None, "method": "unavailable", "reason": "x", "code": "?"}, "unknown reason code"),
    ],
)
def test_what_may_not_be_claimed(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        measured(**changes)


@pytest.mark.parametrize(
    "energy",
    [
        measured(u95_rel=0.01, window_s=5.0, ticks=51, net=1.2, cross_rel=-0.01),
        measured(method="model", label="est."),
        Energy.unavailable("no RAPL (VM)", "vm-guest"),
    ],
)
def test_json_and_back(energy: Energy) -> None:
    data = json.loads(json.dumps(energy.as_json(), allow_nan=False))
    assert Energy.from_json({**data, "from_a_newer_version": 1}) == energy
    assert (data["joules"] is None) == (energy.method in ("model", "unavailable"))
    assert data["joules_model"] == (1.5 if energy.method == "model" else None)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"joules": 0, "method": "counter"},
        {"joules": "1", "method": "rapl"},
        {"joules": True, "method": "rapl"},
        {"joules": None, "method": "unavailable"},
        {"joules": 2.0, "method": "model", "label": "est."},
        {"joules": 2.0, "method": "rapl", "windows": 7},
        {"joules": 2.0, "method": "rapl", "net": "cheap"},
    ],
)
def test_bad_data_is_refused(data: Any) -> None:
    with pytest.raises(UsageError, match="energy"):
        Energy.from_json(data)


def test_derived_figures() -> None:
    energy = measured(net=1.0)
    token = energy.per_token(10)
    assert (token.value, token.net, *token.windows) == pytest.approx((0.15, 0.1, 0.14, 0.16))
    assert token.unit == "J/token"
    assert Energy.unavailable("off", "off").per_token(10).unit == "J/token"


def test_aligned_windows_beat_naive_reads() -> None:
    """100 ms ticks, any phase: naive reads around 5 s are 0.75 % off (sd), aligned ones under 0.05 %."""
    rng = random.Random(1)
    aligned, naive = [], []
    for _ in range(30):
        meter = Meter(phase_s=rng.uniform(0.001, 0.1))
        meter.work()
        seen = metering.window(meter, meter, meter.work, at_least_s=5.0)
        aligned.append(seen.joules / seen.calls - 1.0)
        start, before = meter.t, meter.shown
        length = rng.uniform(5.0, 6.0)
        meter._pass(length, meter.load_w)
        naive.append((meter.shown - before) / (meter.t - start) / meter.load_w - 1)
        assert seen.ticks >= metering.TICKS
    assert statistics.pstdev(naive) > 0.004
    assert max(map(abs, aligned)) < 0.001


def test_the_whole_protocol() -> None:
    meter = Meter(phase_s=0.037)
    energy = metering.measure(meter, meter.work, meter, windows=8, window_s=5.0)
    assert energy.value == pytest.approx(1.0, rel=1e-3)  # 500 W for 2 ms
    assert energy.net == pytest.approx(0.8, rel=1e-3)
    assert energy.watts == pytest.approx(500, rel=1e-3)
    assert energy.idle_w == pytest.approx(100, rel=1e-2)
    assert (energy.method, energy.label, len(energy.windows)) == ("counter-aligned", "measured", 8)
    assert energy.ticks is not None
    assert energy.ticks >= 50
    assert energy.u95_rel is not None
    assert abs(energy.windows[0] - 1) < 3 * energy.u95_rel < 0.01
    assert abs(energy.cross_rel or 0) < 0.01
    assert Energy.from_json(energy.as_json()) == energy


def test_no_meter_is_the_answer_and_the_load_never_runs() -> None:
    energy = Energy.unavailable("no RAPL (VM)", "vm-guest")
    assert metering.measure(energy, lambda: 1 // 0) is energy


def test_idle_that_moved_leaves_no_net() -> None:
    meter = Meter()

    def warming() -> int:
        meter.idle_w = 100.0 + 10.0 * (meter.t > 20)
        return meter.work()

    energy = metering.measure(meter, warming, meter, windows=3, window_s=5.0)
    assert energy.net is None
    assert energy.net_reason == "idle power moved from 100.0 to 110.0 W"
    assert energy.value == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("fault", ["still", "backwards", "vanishes", "after a while"])
def test_a_counter_that_lies_is_unavailable_never_zero(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter()
    true = meter.joules

    def lying() -> float | None:
        if fault == "still":
            return 7.0
        if fault == "after a while":
            return min(true() or 0.0, 3000.0)
        late = meter.t > 14.3  # inside the first window
        return true() if not late else None if fault == "vanishes" else (true() or 0.0) - 1e6

    monkeypatch.setattr(meter, "joules", lying)
    energy = metering.measure(meter, meter.work, meter, windows=2, window_s=1.0)
    assert energy.value is None
    assert energy.code == "counter-frozen"
    assert meter.t < 60


def test_cross_check() -> None:
    liar = Meter(gain=1.2)
    flagged = metering.measure(liar, liar.work, liar, windows=2, window_s=1.0)
    assert flagged.label == "flagged"
    assert flagged.value == pytest.approx(1.0, rel=1e-3)
    assert flagged.cross_rel == pytest.approx(1 / 1.2 - 1, rel=0.02)


def test_a_call_longer_than_a_window() -> None:
    meter = Meter()

    def slow() -> int:
        meter._pass(0.5, meter.load_w)
        return 0

    energy = metering.measure(meter, slow, meter, windows=2, window_s=1.0)
    assert energy.code == "window-too-short"


def test_a_meter_of_power_alone_is_integrated() -> None:
    meter = Meter()
    meter.method = "instant-integral"
    meter.joules = lambda: None  # type: ignore[method-assign]
    energy = metering.measure(meter, meter.work, meter, windows=2, window_s=2.0, idle_s=1.0)
    assert energy.value == pytest.approx(1.0, rel=1e-2)
    assert (energy.method, energy.label) == ("instant-integral", "measured")
    meter.gain = 0.0
    assert metering.measure(meter, meter.work, meter).code == "counter-frozen"


def test_the_integral_of_a_power_that_rises_is_exact_by_trapezoids() -> None:
    """Looks are 0.1 s apart: rectangles would be off by 5 J in each of them."""
    meter = Meter()
    meter.method = "instant-integral"
    meter.joules = lambda: None  # type: ignore[method-assign]
    meter.watts = lambda: 100 + 1000 * meter.t  # type: ignore[method-assign]

    def work() -> int:
        meter._pass(0.1, 0.0)
        return 1

    found = metering.window(meter, meter, work, at_least_s=1.0)
    start, end = meter.t - found.seconds, meter.t
    assert found.joules == pytest.approx(100 * found.seconds + 500 * (end**2 - start**2), rel=1e-9)
    assert found.ticks == found.calls  # a reading that differs from the one before
    meter.watts = lambda: 100.0  # type: ignore[method-assign]
    assert metering.window(meter, meter, work, at_least_s=1.0).ticks == 0


def test_the_longest_gap_between_two_looks_is_the_windows_jitter() -> None:
    meter, done = Meter(), []

    def work() -> int:
        done.append(1)
        meter._pass(0.04 if len(done) == 100 else 0.004, meter.load_w)
        return 2

    found = metering.window(meter, meter, work, at_least_s=1.0)
    assert found.calls > 200
    assert found.jitter_s == pytest.approx(0.04)


@pytest.mark.parametrize(("tick_s", "seconds"), [(0.01, 1.0), (0.05, 2.5), (0.1, 4.0)])
def test_a_window_holds_fifty_ticks_or_is_four_times_as_long(tick_s: float, seconds: float) -> None:
    meter = Meter(tick_s)
    found = metering.window(meter, meter, meter.work, at_least_s=1.0)
    assert found.seconds == pytest.approx(seconds, abs=0.02)
    assert found.joules == pytest.approx(found.seconds * meter.load_w, rel=0.01)


def test_a_counter_that_falls_once_and_goes_on_is_not_believed() -> None:
    meter = Meter()
    meter.joules = lambda: meter.shown - (10.0 if meter.t > 1.05 else 0.0) - (60.0 if meter.t > 1.15 else 0.0)  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="ran backwards"):
        metering.window(meter, meter, meter.work, at_least_s=2.0)


def test_the_interval_covers() -> None:
    """Eight windows with 1 % noise: the 95 % interval holds the truth in about 95 % of 400 trials."""
    rng = random.Random(3)
    hits = 0
    for _ in range(400):
        windows = [metering.Window(500 * rng.gauss(1, 0.01), 1.0, 500, 50, 0.0) for _ in range(8)]
        energy = metering.summarise(windows, Meter(), None, "not asked for")
        assert energy.value is not None
        assert energy.u95_rel is not None
        hits += abs(energy.value - 1) <= energy.u95_rel * energy.value
    assert 0.92 <= hits / 400 <= 0.98


def test_one_window_has_no_interval() -> None:
    energy = metering.summarise([metering.Window(500.0, 1.0, 500, 50, 0.0)], Meter(), None, "not asked for")
    assert (energy.value, energy.u95_rel, energy.net_reason) == (1.0, None, "not asked for")


def test_refusals_keep_their_code() -> None:
    assert refused(Unavailable("mig: not per slice")) == Energy.unavailable("not per slice", "mig")
    assert refused(Unavailable("driver gone: sorry")) == Energy.unavailable("driver gone: sorry", "no-sensor")


def test_the_cpu_load_counts_its_calls() -> None:
    ran: list[int] = []

    def run() -> None:
        ran.append(sum(range(2000)))

    work = metering.load(run, [()])
    before = len(ran)
    assert work() + work() == len(ran) - before


def test_the_gpu_load_keeps_a_slice_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a slice is waited for, the next one has been launched already: the device does not rest."""
    launched, waited, log = [0], [0], []

    class Event:
        def record(self) -> None:
            self.at = launched[0]

        def synchronize(self) -> None:
            waited[0] = self.at
            log.append(launched[0] - self.at)

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(Event=Event)))
    monkeypatch.setattr(clock, "time_calls", lambda *a, **o: clock.Timing([1e-3], 1, "device", "hot"))

    def run() -> None:
        launched[0] += 1

    work = metering.load(run, [()], "cuda")
    done = sum(work() for _ in range(10))
    assert done == waited[0] == 50  # 5 ms slices of 1 ms calls
    assert set(log) == {5}


def test_the_interval_of_few_windows_is_students() -> None:
    """Two windows, one degree of freedom: 12.71 standard errors; three, two degrees: 4.303."""
    found = [metering.Window(joules, 1.0, 1, 50, 0.0) for joules in (99.0, 101.0, 100.0)]
    assert metering.summarise(found[:2], Meter(), None).u95_rel == pytest.approx(12.71 * math.sqrt(2 / 2) / 100)
    assert metering.summarise(found, Meter(), None).u95_rel == pytest.approx(4.303 / math.sqrt(3) / 100)
    still = [*found, metering.Window(0.0, 1.0, 1, 0, 0.0)]
    assert metering.summarise(still, Meter(), None).code == "counter-frozen"


def test_the_first_window_opens_when_the_load_has_run_for_a_while() -> None:
    meter, began = Meter(), []

    def settling() -> int:
        began.append(meter.t)
        meter._pass(4e-3, 1000.0 if meter.t - began[0] < 2.5 else 500.0)
        return 2

    assert metering.measure(meter, settling, meter, windows=1, window_s=1.0).value == pytest.approx(1.0, rel=1e-3)


def test_a_load_that_draws_no_more_than_idling_has_no_net_figure() -> None:
    found = metering.summarise([metering.Window(500.0, 1.0, 500, 50, 0.0)] * 2, Meter(), (500.0, 501.0))
    assert (found.net, found.net_reason) == (None, "the load draws no more than the idle device")


def test_the_ticks_are_those_of_the_window_with_the_fewest() -> None:
    found = metering.summarise([metering.Window(9.0, 1.0, 9, ticks, 0.0) for ticks in (60, 50, 70)], Meter(), None)
    assert found.ticks == 50


def test_rare_looks_at_the_counter_widen_the_interval() -> None:
    """Windows that agree exactly, each end seen up to 10 ms late in 1 s."""
    same = [metering.Window(500.0, 1.0, 500, 50, 0.01)] * 8
    assert metering.summarise(same, Meter(), None).u95_rel == pytest.approx(0.01 * math.sqrt(2 / 8))
