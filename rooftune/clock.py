"""Timing inside a worker: seconds per call, with the cache state and the clock named.

CPU: batches of calls on the wall clock or on the process's CPU time. GPU: events around the calls, all
of it queued behind a blocker so that no launch gap is inside, and the host's wall time beside it.
Nothing is averaged over samples here: rounds, quantiles and intervals are the parent's business.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rooftune import device_cpu
from rooftune.core import UsageError
from rooftune.device_cuda import LIBCUDA

Run = Callable[..., None]
CLOCKS: dict[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}
CACHES = ("hot", "cold")
FLUSH_MIN_CPU = 64 * 2**20  # twice the largest L2 of a client CPU, where the last level is not told
FLUSH_MIN_GPU = 256 * 2**20  # what Triton flushes; covers twice the L2 of every GPU up to 128 MiB
SHORT_GPU_S = 20e-6  # events resolve about 0.5 us: below this a single call is more than 2.5 % uncertain
BATCH_GPU_S = 50e-6  # ... and at this batch length 1 %
BLOCK_TRIES = 5  # each try blocks four times longer
WARM_GPU_CALLS = 3
CONTROLS = 9  # kernels that do nothing, timed by the wall where a call's wall time is suspicious
LAUNCH_GPU_S = 1e-3  # no launch and wait costs that much more than the kernel: 0.05 ms is usual


@dataclass(frozen=True)
class Timing:
    """Samples of one competitor.

    Attributes:
        samples_s: seconds per call, one figure a sample.
        calls_per_sample: calls that each figure is the mean of.
        clock: `wall`, `cpu` (CPU seconds of all threads) or `device` (GPU events).
        cache: `hot` or `cold`.
        wall_s: median host seconds per call where `clock` is not the wall: on a GPU launch, run and wait,
            so that `wall_s - samples_s` is the launch cost. None where samples_s is that already.
        notes: what a reader must know; the same words every time, so that they can be merged.
    """

    samples_s: list[float]
    calls_per_sample: int
    clock: str
    cache: str
    wall_s: float | None = None
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    """Python's cycle collector off: one run costs milliseconds at a moment of its own choice."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def time_calls(
    run: Run,
    arg_sets: Sequence[tuple[Any, ...]],
    device: str = "cpu",
    samples: int = 5,
    min_sample_s: float = 2e-3,
    cache: str = "hot",
    clock: str = "wall",
    calls: int | None = None,
) -> Timing:
    """Time `run(*arg_sets[i])`, going round the sets from call to call and from sample to sample.

    Args:
        run: launches the kernel. Compiled before, and allocates nothing.
        arg_sets: at least one tuple of arguments (output, inputs...). Several sets defeat a kernel that
            remembers its answer, and on a GPU keep short hot calls honest about their memory traffic.
        device: `cpu`, or a GPU (`cuda`, `cuda:1`, `rocm`).
        samples: figures wanted.
        min_sample_s: CPU, hot: a sample takes so many calls that it lasts at least this long. A GPU
            sample takes more than one call only if a call is shorter than 20 us.
        cache: `cold` puts the last-level cache through more than its size before every call, untimed.
        clock: `wall` or `cpu`; ignored on a GPU, which has its own.
        calls: calls per sample; None chooses.

    Raises:
        UsageError: an argument makes no sense.
    """
    if not arg_sets or samples < 1 or (calls is not None and calls < 1) or min_sample_s < 0:
        raise UsageError("timing needs at least one set of arguments, one sample and one call a sample")
    if cache not in CACHES:
        raise UsageError(f"cache '{cache}' is not a cache state; known: {', '.join(CACHES)}")
    if clock not in CLOCKS:
        raise UsageError(f"clock '{clock}' is not a clock; known: {', '.join(CLOCKS)}")
    rotation = itertools.cycle(arg_sets)
    for args in itertools.islice(rotation, len(arg_sets)):
        run(*args)  # first touch of every set, before any clock is read
    with _no_gc():
        if device != "cpu":
            return _time_gpu(run, rotation, device, samples, cache, calls)
        if cache == "cold":
            return _time_cpu_cold(run, rotation, samples, clock, calls)
        return _time_cpu_hot(run, rotation, samples, min_sample_s, clock, calls)


def _batch(run: Run, rotation: Iterator[tuple[Any, ...]], calls: int, now: Callable[[], int]) -> float:
    """Seconds for a number of calls. The loop itself costs some 50 ns a call, and is in every competitor's time."""
    start = now()
    for args in itertools.islice(rotation, calls):
        run(*args)
    return (now() - start) / 1e9


def _positive(figures: list[float], clock: str) -> None:
    if min(figures) <= 0:
        raise UsageError(f"the {clock} clock saw no time pass in a sample; take the wall clock or more calls a sample")


def _time_cpu_hot(
    run: Run, rotation: Iterator[tuple[Any, ...]], samples: int, min_sample_s: float, clock: str, calls: int | None
) -> Timing:
    now = CLOCKS[clock]
    if calls is None:
        # Double until a batch is long enough; its length, not an estimate from one call, decides. The wall
        # rules here even for the CPU clock: a kernel that only sleeps must not double for ever.
        calls = 1
        while (took := _batch(run, rotation, calls, time.perf_counter_ns)) < min_sample_s:
            calls = max(2 * calls, min(16 * calls, math.ceil(calls * min_sample_s / max(took, 1e-9))))
    figures, walls = [], []
    for _ in range(samples):
        start = time.perf_counter_ns()
        figures.append(_batch(run, rotation, calls, now) / calls)
        walls.append((time.perf_counter_ns() - start) / 1e9 / calls)
    _positive(figures, clock)
    return Timing(figures, calls, clock, "hot", None if clock == "wall" else statistics.median(walls))


def flush_bytes_cpu() -> tuple[int, str]:
    """Bytes that put the last-level cache through, and a note if memory does not allow twice its size."""
    wanted = max(2 * device_cpu.last_level_bytes(), FLUSH_MIN_CPU)
    free = device_cpu.memory()[1]
    allowed = wanted if free is None else max(free // 8, 2**20)
    if wanted <= allowed:
        return wanted, ""
    return allowed, "cold: the flush is smaller than twice the last-level cache (little free memory)"


def _time_cpu_cold(
    run: Run, rotation: Iterator[tuple[Any, ...]], samples: int, clock: str, calls: int | None
) -> Timing:
    import torch

    size, note = flush_bytes_cpu()
    # Random, not constant: compressed or zero pages would pass the cache at another price. In place, so
    # that every line is read and written: dirty lines push out clean and dirty ones alike.
    junk = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32)
    now, calls = CLOCKS[clock], calls or 1
    figures, walls = [], []
    for _ in range(samples):
        taken, wall = 0.0, 0
        for args in itertools.islice(rotation, calls):
            junk.add_(1)
            begin = time.perf_counter_ns()
            start = now()
            run(*args)
            taken += (now() - start) / 1e9
            wall += time.perf_counter_ns() - begin
        figures.append(taken / calls)
        walls.append(wall / 1e9 / calls)
    _positive(figures, clock)
    return Timing(
        figures, calls, clock, "cold", None if clock == "wall" else statistics.median(walls), [note] if note else []
    )


def drop_persisting_l2() -> str:
    """Take back L2 lines that a kernel has pinned: they survive any flush. Returns a note if that was refused.

    One pinned layernorm read 3,530 GB/s on an 864 GB/s board (llm.c issue 851). Acts on the current context.
    """
    try:
        lib = ctypes.CDLL(LIBCUDA)
        codes = lib.cuCtxSetLimit(6, ctypes.c_size_t(0)), lib.cuCtxResetPersistingL2Cache()  # 6: persisting L2 size
    except (OSError, AttributeError):
        return "persisting L2 lines could not be dropped (no such driver call)"
    return "" if not any(codes) else "persisting L2 lines could not be dropped (refused by the driver)"


class _Stream:
    """Timing on one GPU's current stream. Built for one `time_calls`."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch: Any = torch
        self.device = torch.device(device.replace("rocm", "cuda"))
        self.notes: list[str] = []
        self.cycles = 200_000  # some 0.1 ms at 2 GHz, adapted by `behind_blocker`
        self.junk: Any = None

    def flush_with(self) -> None:
        """Prepare the flush: twice the L2, 256 MiB at least."""
        torch = self.torch
        l2 = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)
        size = max(2 * l2, FLUSH_MIN_GPU)
        self.junk = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=self.device)

    def enqueue(self, run: Run, group: Sequence[tuple[Any, ...]]) -> tuple[Any, Any]:
        """Flush if cold, then the calls between two events."""
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.junk is not None:
            self.junk.add_(1)
        start.record()
        for args in group:
            run(*args)
        end.record()
        return start, end

    def behind_blocker(self, run: Run, groups: Sequence[Sequence[tuple[Any, ...]]]) -> float:
        """Device seconds of all groups together, launched while the stream was held.

        If the first start event has passed when the last launch is queued, the device did not wait for
        us and there may be gaps between launches: once more with a longer blocker.
        """
        cuda = self.torch.cuda
        for attempt in range(BLOCK_TRIES):
            cuda.synchronize()
            cuda._sleep(self.cycles)
            pairs = [self.enqueue(run, group) for group in groups]
            held = not pairs[0][0].query()
            cuda.synchronize()
            if held:
                break
            if attempt < BLOCK_TRIES - 1:
                self.cycles *= 4
        else:
            self.note("launch gaps may be inside the time: the call waits for the device, or launches too slowly")
        return float(sum(start.elapsed_time(end) for start, end in pairs)) / 1e3

    def wall(self, run: Run, args: tuple[Any, ...]) -> float:
        """Host seconds to launch a call and wait for the device."""
        self.torch.cuda.synchronize()
        start = time.perf_counter_ns()
        run(*args)
        self.torch.cuda.synchronize()
        return (time.perf_counter_ns() - start) / 1e9

    def note(self, text: str) -> None:
        if text and text not in self.notes:
            self.notes.append(text)


def _time_gpu(
    run: Run, rotation: Iterator[tuple[Any, ...]], device: str, samples: int, cache: str, calls: int | None
) -> Timing:
    import torch

    stream = _Stream(device)
    with torch.cuda.device(stream.device):
        for args in itertools.islice(rotation, WARM_GPU_CALLS):
            run(*args)
        torch.cuda.synchronize()
        if torch.version.cuda:
            stream.note(drop_persisting_l2())
        if cache == "cold":
            stream.flush_with()
        if calls is None:
            once = stream.behind_blocker(run, [[next(rotation)]])
            calls = 1 if once >= SHORT_GPU_S else math.ceil(BATCH_GPU_S / max(once, 1e-6))
        figures = []
        for _ in range(samples):
            group = list(itertools.islice(rotation, calls))
            # Hot: one pair of events around all. Cold: a flush before each call, so a pair around each.
            groups = [group] if cache == "hot" else [[args] for args in group]
            figures.append(stream.behind_blocker(run, groups) / calls)
        if calls > 1 and cache == "cold":
            stream.note("cold and short: mean over several calls, each flushed and timed alone")
        walls = [stream.wall(run, args) for args in itertools.islice(rotation, max(samples, 3))]
        allowed = 3 * max(figures) + LAUNCH_GPU_S
        if min(walls) > allowed:
            nothing = statistics.median(stream.wall(torch.cuda._sleep, (1000,)) for _ in range(CONTROLS))
            if nothing > LAUNCH_GPU_S:
                stream.note("another process computes on this device: it waits for turns, and times may be too long")
            if min(walls) > allowed + nothing:
                stream.note("the device works on long after the timed stream has finished: work on another stream")
    return Timing(figures, calls, "device", cache, statistics.median(walls), stream.notes)
