"""The clock, on simulated time: what it reports must be what the simulation was told."""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from rooftune import clock
from rooftune.core import UsageError

US = 1_000  # nanoseconds


class Host:
    """A host whose time moves only when something takes time; `cpu_ns` is its CPU time."""

    def __init__(self) -> None:
        self.ns = 0
        self.cpu_ns = 0

    def spend(self, ns: int, cpu: float = 1.0) -> None:
        self.ns += ns
        self.cpu_ns += int(ns * cpu)


class Gpu:
    """A device with one timed stream: work starts when it is launched and the work before has ended."""

    def __init__(self, host: Host, blocks: bool = True) -> None:
        self.host, self.blocks = host, blocks
        self.ready = self.side = 0
        self.flushed = 0

    def launch(self, ns: int, cost: int = 0) -> None:
        self.host.spend(cost)
        self.ready = max(self.ready, self.host.ns) + ns

    def synchronize(self) -> None:
        self.host.ns = max(self.host.ns, self.ready, self.side)

    def _sleep(self, cycles: int) -> None:
        self.launch(cycles // 2 if self.blocks else 0)

    def event(self, enable_timing: bool = True) -> Any:
        gpu, self_ = self, SimpleNamespace(at=0)
        self_.record = lambda: setattr(self_, "at", max(gpu.ready, gpu.host.ns))
        self_.query = lambda: self_.at <= gpu.host.ns
        self_.elapsed_time = lambda other: (other.at - self_.at) / 1e6
        return self_


class Junk:
    """The flush buffer."""

    def __init__(self, flush: Any) -> None:
        self.flush = flush

    def add_(self, value: int) -> None:
        self.flush()


class Context:
    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    found = Host()
    fake = SimpleNamespace(perf_counter_ns=lambda: found.ns, process_time_ns=lambda: found.cpu_ns)
    monkeypatch.setattr(clock, "time", fake)
    monkeypatch.setitem(clock.CLOCKS, "wall", fake.perf_counter_ns)
    monkeypatch.setitem(clock.CLOCKS, "cpu", fake.process_time_ns)
    return found


def fake_torch(monkeypatch: pytest.MonkeyPatch, host: Host, gpu: Gpu | None = None, flush_ns: int = 0) -> list[int]:
    """Put a torch in place whose flush takes `flush_ns`; returns the sizes of the flush buffers made."""
    sizes: list[int] = []

    def flush() -> None:
        if gpu:
            gpu.launch(flush_ns)
            gpu.flushed += 1
        else:
            host.spend(flush_ns)

    def randint(low: int, high: int, shape: tuple[int, ...], **options: Any) -> Junk:
        sizes.append(4 * shape[0])
        return Junk(flush)

    cuda = gpu and SimpleNamespace(
        synchronize=gpu.synchronize,
        _sleep=gpu._sleep,
        Event=gpu.event,
        device=lambda d: Context(),
        get_device_properties=lambda d: SimpleNamespace(L2_cache_size=200 * 2**20),
    )
    fake = SimpleNamespace(
        randint=randint, int32="int32", device=lambda d: d, cuda=cuda, version=SimpleNamespace(cuda=None)
    )
    monkeypatch.setitem(sys.modules, "torch", fake)
    return sizes


def test_hot_samples_are_long_enough_and_exact(host: Host) -> None:
    timing = clock.time_calls(lambda: host.spend(7 * US), [()], samples=4, min_sample_s=2e-3)
    assert timing.samples_s == pytest.approx([7e-6] * 4, rel=1e-9)
    assert 2e-3 <= timing.calls_per_sample * 7e-6 <= 5e-3
    assert (timing.clock, timing.cache, timing.wall_s) == ("wall", "hot", None)


def test_calls_can_be_fixed(host: Host) -> None:
    seen: list[int] = []

    def run() -> None:
        seen.append(1)
        host.spend(US)

    clock.time_calls(run, [()], samples=3, calls=11)
    assert len(seen) == 1 + 3 * 11


def test_cpu_clock_counts_all_threads_and_keeps_the_wall(host: Host) -> None:
    timing = clock.time_calls(lambda: host.spend(10 * US, cpu=1.75), [()], clock="cpu")
    assert timing.samples_s == pytest.approx([17.5e-6] * 5)
    assert timing.wall_s == pytest.approx(10e-6)


def test_a_clock_that_sees_nothing_is_an_error_not_a_zero(host: Host) -> None:
    with pytest.raises(UsageError, match="cpu clock saw no time"):
        clock.time_calls(lambda: host.spend(10 * US, cpu=0), [()], clock="cpu")


def test_sets_take_turns(host: Host) -> None:
    used: Counter[str] = Counter()
    order: list[str] = []

    def run(name: str) -> None:
        used[name] += 1
        order.append(name)
        host.spend(100 * US)

    clock.time_calls(run, [("a",), ("b",), ("c",)], samples=5, calls=4)
    assert max(used.values()) - min(used.values()) <= 1
    assert order[:6] == ["a", "b", "c"] * 2


def test_collector_is_off_inside_and_back_on_after_an_error(host: Host) -> None:
    states: list[bool] = []

    def run() -> None:
        states.append(gc.isenabled())
        host.spend(US)
        if len(states) > 5:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        clock.time_calls(run, [()], calls=10)
    assert states[1:] == [False] * 5  # the first call, before any clock is read, may collect
    assert gc.isenabled()


def test_cold_flushes_before_each_call_untimed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rooftune.device_cpu.last_level_bytes", lambda: 100 * 2**20)
    monkeypatch.setattr("rooftune.device_cpu.memory", lambda: (2**35, 2**35))
    sizes = fake_torch(monkeypatch, host, flush_ns=900 * US)
    timing = clock.time_calls(lambda: host.spend(3 * US), [()], samples=3, cache="cold")
    assert timing.samples_s == pytest.approx([3e-6] * 3)
    assert (timing.calls_per_sample, timing.cache, timing.notes) == (1, "cold", [])
    assert sizes == [200 * 2**20]
    assert host.ns == 3 * 900 * US + 4 * 3 * US


def test_cold_with_little_memory_says_so(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rooftune.device_cpu.last_level_bytes", lambda: 2**30)
    monkeypatch.setattr("rooftune.device_cpu.memory", lambda: (2**32, 2**30))
    sizes = fake_torch(monkeypatch, host)
    timing = clock.time_calls(lambda: host.spend(US), [()], cache="cold")
    assert sizes == [2**27]
    assert "little free memory" in timing.notes[0]


@pytest.mark.parametrize("cache", ["hot", "cold"])
def test_gpu_time_is_the_kernels_alone(host: Host, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """A 10 us kernel behind a 100 us launch: without a blocker that is long enough, 100 us would show."""
    gpu = Gpu(host)
    fake_torch(monkeypatch, host, gpu, flush_ns=70 * US)
    timing = clock.time_calls(lambda: gpu.launch(10 * US, cost=100 * US), [()], "cuda", cache=cache)
    assert timing.samples_s == pytest.approx([10e-6] * 5)
    assert timing.calls_per_sample == 5  # 50 us a sample
    assert timing.wall_s == pytest.approx(110e-6)
    assert timing.clock == "device"
    assert (gpu.flushed > 25) == (cache == "cold")
    assert not any("gaps" in note for note in timing.notes)


def test_gpu_long_call_is_timed_alone_and_min_sample_is_ignored(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(host)
    fake_torch(monkeypatch, host, gpu)
    timing = clock.time_calls(lambda: gpu.launch(30 * US, cost=5 * US), [()], "cuda:0", min_sample_s=1.0)
    assert (timing.calls_per_sample, timing.notes) == (1, [])


def test_gpu_flush_is_twice_the_l2(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(host)
    sizes = fake_torch(monkeypatch, host, gpu)
    clock.time_calls(lambda: gpu.launch(30 * US), [()], "cuda", cache="cold")
    assert sizes == [400 * 2**20]


def test_gpu_without_a_blocker_is_noticed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(host, blocks=False)
    fake_torch(monkeypatch, host, gpu)
    timing = clock.time_calls(lambda: gpu.launch(10 * US, cost=100 * US), [()], "cuda")
    assert any("launch gaps" in note for note in timing.notes)


def test_gpu_call_that_waits_is_noticed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(host)
    fake_torch(monkeypatch, host, gpu)

    def run() -> None:
        gpu.launch(50 * US)
        gpu.synchronize()

    assert any("launch gaps" in note for note in clock.time_calls(run, [()], "cuda").notes)


def test_gpu_work_on_another_stream_is_noticed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(host)
    fake_torch(monkeypatch, host, gpu)

    def run() -> None:
        gpu.launch(2 * US)
        gpu.side = max(gpu.side, gpu.host.ns) + 5_000 * US  # the real kernel, where the events do not look

    notes = clock.time_calls(run, [()], "cuda").notes
    assert any("another stream" in note for note in notes)
    assert not any("another process" in note for note in notes)


@pytest.mark.parametrize("hidden_us", [0, 9_000])
def test_gpu_shared_with_another_process_is_no_fault_of_the_kernel(
    host: Host, monkeypatch: pytest.MonkeyPatch, hidden_us: int
) -> None:
    """Checks of several kernels at once on an H200: two of 95 were accused of work on another stream."""
    gpu = Gpu(host)
    fake_torch(monkeypatch, host, gpu)
    waiting = gpu.synchronize

    def turns() -> None:  # after each launch the driver serves the other process for 4 ms
        pending = gpu.ready > host.ns or gpu.side > host.ns
        waiting()
        host.spend(4_000 * US if pending else 0)

    monkeypatch.setattr(sys.modules["torch"].cuda, "synchronize", turns)

    def run() -> None:
        gpu.launch(50 * US)
        gpu.side = max(gpu.side, gpu.host.ns) + hidden_us * US

    notes = clock.time_calls(run, [()], "cuda").notes
    assert any("another process" in note for note in notes)
    assert any("another stream" in note for note in notes) == (hidden_us > 0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cache": "warm"}, "hot, cold"),
        ({"clock": "sundial"}, "wall, cpu"),
        ({"samples": 0}, "at least one"),
        ({"calls": 0}, "at least one"),
    ],
)
def test_senseless_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        clock.time_calls(lambda: None, [()], **options)


def test_on_the_real_clock_a_longer_call_takes_longer() -> None:
    def busy(rounds: int) -> None:
        sum(range(rounds))

    short, long = (min(clock.time_calls(busy, [(n,)], min_sample_s=5e-4).samples_s) for n in (100, 3_000))
    assert 0 < short < long
    assert time.get_clock_info("perf_counter").monotonic
