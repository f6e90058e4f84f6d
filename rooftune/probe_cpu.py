"""CPU ceilings: copy by working set, torch's matrix product by precision, and what registers allow."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from typing import Any

from rooftune import device_cpu, probe_registers
from rooftune.probe import Entry, entry, missing

# one core's L2 and below, L2, then L3s: a problem's roof is that of the nearest, and from one to the next a Zen 4 with
# 32 MiB falls from 75 GB/s to 37
TOGETHER = 2**28  # bytes to move before threads are joined: 32 MiB take 0.4 ms, the start of a thread 0.1
COPY_SETS = (2**18, 2**21, 2**24, 2**25, 2**26, 2**27)
BEYOND_MIN = 2**28  # the largest set, where twice the last-level cache is less
COPY_SAMPLE_S = 2e-3
LIMIT_S = 0.25
MATRIX_SIZES = (512, 1024, 2048)
MATRIX_BUDGET_S = 0.3  # a precision; the first size always runs


def best_rates(
    call: Callable[[], Any], work: float, samples: int, sample_s: float, now: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Work a second in each of the samples, each some calls long; the first call is not timed.

    `now` may be `time.thread_time` where one thread does all the work: waiting for a core that others
    use is then not in the rate (a 128 MiB copy on two cores at load 7: 4.6 GB/s by the wall clock).

    Three samples at least, and then no more once they have taken `LIMIT_S`: a loaded machine is no
    reason to wait for it ten times as long.
    """
    call()
    once = math.inf
    rates: list[float] = []
    for _ in range(3):
        start = now()
        call()
        once = min(once, now() - start)
    calls, begun = max(1, math.ceil(sample_s / max(once, 1e-7))), time.perf_counter()
    while len(rates) < 3 or (len(rates) < samples and time.perf_counter() - begun < LIMIT_S):
        start = now()
        for _ in range(calls):
            call()
        rates.append(calls * work / max(now() - start, 1e-9))
    return rates


def _by_threads(
    name: str, call: Callable[[], Any], work: float, threads: int, samples: int, sample_s: float
) -> dict[str, list[float]]:
    """Rates of a torch call on one thread, by its CPU time, and on all of them, by the wall clock."""
    import torch

    torch.set_num_threads(1)  # needs no waking of others: wins at 256 KiB, and on a loaded machine
    ways = {f"{name}, threads=1, CPU time": best_rates(call, work, samples, sample_s, time.thread_time)}
    torch.set_num_threads(threads)
    if threads > 1:
        ways[f"{name}, threads={threads}"] = best_rates(call, work, samples, sample_s)
    return ways


def _in_parts(
    move: Callable[[int, int, int], Any], target: int, source: int, part: int, times: int, threads: int
) -> Callable[[], None]:
    """A call that moves a part of so many bytes in each thread, `times` times."""

    def own(thread: int) -> None:
        for _ in range(times):
            move(target + thread * part, source + thread * part, part)

    return lambda: probe_registers.in_threads(own, threads)


def _copies(threads: int, samples: int) -> list[dict[str, Any]]:
    """Copy bandwidth, bytes read and written, of source and destination of several sizes together."""
    import torch

    free = device_cpu.memory()[1] or 2**31
    beyond = min(max(2 * device_cpu.last_level_bytes(), BEYOND_MIN), free // 4)
    found, past = [], probe_registers.streamed_copy()
    for size in sorted({*(s for s in COPY_SETS if s < beyond), beyond}):
        source = torch.full((size // 2,), 85, dtype=torch.uint8)  # written once, so every page is its own
        target = torch.zeros_like(source)

        def copy(target: Any = target, source: Any = source) -> None:
            target.copy_(source)

        ways = _by_threads("torch copy_", copy, size / 1e9, threads, samples, COPY_SAMPLE_S)
        if size > 2**24:  # the C library may write past the cache, which saves a third of the traffic
            part, times = (
                size // 2 // threads // probe_registers.GRAIN * probe_registers.GRAIN,
                max(1, TOGETHER // size),
            )
            work, now = times * part * threads * 2 / 1e9, time.thread_time if threads == 1 else time.perf_counter
            for name, move in (("memmove", ctypes.memmove), ("stores past the caches", past)):
                if move is not None:
                    call = _in_parts(move, target.data_ptr(), source.data_ptr(), part, times, threads)
                    ways[f"{name}, threads={threads}"] = best_rates(call, work, samples, COPY_SAMPLE_S, now)
        how = max(ways, key=lambda w: max(ways[w]))
        found.append({"working_set_bytes": size, **entry(ways[how], "GB/s", how)})
    return found


def _product(precision: str, size: int) -> Callable[[], Any]:
    """A square matrix product on random data, into a given output."""
    import torch

    if precision == "int8":
        a = torch.randint(-127, 128, (size, size), dtype=torch.int8)
        out = torch.empty(size, size, dtype=torch.int32)
        return lambda: torch._int_mm(a, a, out=out)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a = torch.randn(size, size).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out)


def _matrix(precision: str, threads: int, samples: int, quick: bool) -> Entry:
    """Best torch matrix product over square sizes, as long as the time of a size allows the next."""
    unit = "TOP/s" if precision == "int8" else "TFLOP/s"
    best: Entry | None = None
    left = MATRIX_BUDGET_S if quick else 8 * MATRIX_BUDGET_S
    for size in MATRIX_SIZES if quick else (*MATRIX_SIZES, 4096):
        # A size costs a first call, three to count and the samples, on one thread and on all.
        if best is not None and 2 * size**3 / (best["value"] * 1e12) * (samples + 4) * 2 > left:
            break
        start = time.perf_counter()
        name = f"{'torch._int_mm' if precision == 'int8' else 'torch.mm'} {size}x{size}x{size}"
        try:
            ways = _by_threads(name, _product(precision, size), 2 * size**3 / 1e12, threads, samples, 0.0)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            return missing(unit, f"torch does not multiply {precision} on this CPU: {str(error).splitlines()[0][:120]}")
        left -= time.perf_counter() - start
        how = max(ways, key=lambda w: max(ways[w]))
        found = entry(ways[how], unit, how)
        best = found if best is None or found["value"] > best["value"] else best
    assert best is not None
    return best


def ceilings(threads: int, quick: bool = True) -> dict[str, Any]:
    """See `rooftune.probe.ceilings`. Sets torch's threads for the rest of the process."""
    import torch

    torch.set_num_threads(threads)
    samples = 5 if quick else 20
    matrix = {p: _matrix(p, threads, samples, quick) for p in ("fp32", "bf16", "fp16", "int8")}
    many = 10 * samples  # of 2 ms each: a rate comes and goes with other threads, torch's that still spin among them
    vector = probe_registers.vector(threads, many)
    best = max((matrix["fp32"], vector), key=lambda e: e["value"] or 0.0)
    for precision in ("bf16", "fp16"):  # 16-bit values turn into fp32 on the way in, so fp32's rate is a floor
        if (matrix[precision]["value"] or 0.0) < best["value"]:
            note = f"fp32 rate ({best['how']}): torch.mm in {precision} is slower"
            matrix[precision] = {**best, "how": note}
    if (matrix["int8"]["value"] or 0.0) < 2 * (vector["value"] or 0.0):  # Zen 3: 1.4 GOP/s a core, and 146 are reached
        note = f"twice the fp32 FMA rate ({vector['how']}): pmaddwd adds two products a lane; torch._int_mm is slower"
        matrix["int8"] = {**vector, "value": 2 * vector["value"], "unit": "TOP/s", "how": note}
    dots = {p: probe_registers.dots(p, threads, many) for p in ("bf16", "int8")}
    tiles = {p: probe_registers.tiles(p, threads, many) for p in ("bf16", "int8")}
    tiles["fp32"] = probe_registers.split(tiles["int8"])
    matrix["tf32"] = missing("TFLOP/s", "a CPU has no tf32")
    matrix["fp8"] = missing("TFLOP/s", "torch does not multiply fp8 on a CPU")
    return {
        "copy": _copies(threads, samples),
        "matrix": matrix,
        "vector": {"fp32": vector, **dots},
        "tiles": tiles,
        "datasheet": None,
    }
