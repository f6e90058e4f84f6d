"""CPU ceilings: copy by working set, torch's matrix product by precision, fp32 FMA and AMX's tiles from registers."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from rooftune import device_cpu
from rooftune.probe import Entry, entry, missing

COPY_SETS = (2**18, 2**21, 2**24, 2**27)  # one core's L2 and below, L2, one L3 slice, a large L3
BEYOND_MIN = 2**28  # the largest set, where twice the last-level cache is less
COPY_SAMPLE_S = 2e-3
LIMIT_S = 0.25
MATRIX_SIZES = (512, 1024, 2048)
MATRIX_BUDGET_S = 0.3  # a precision; the first size always runs
FMA_CHAINS = 12  # two pipes of latency 4 need 8; 16 and the two constants would spill with AVX2's 16 registers


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


def in_threads(work: Callable[[int], Any], threads: int) -> None:
    """Run `work(0)`, `work(1)`... at once, the last one in this thread."""
    others = [threading.Thread(target=work, args=(i,)) for i in range(threads - 1)]
    for thread in others:
        thread.start()
    work(threads - 1)
    for thread in others:
        thread.join()


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


def _copies(threads: int, samples: int) -> list[dict[str, Any]]:
    """Copy bandwidth, bytes read and written, of source and destination of several sizes together."""
    import torch

    free = device_cpu.memory()[1] or 2**31
    beyond = min(max(2 * device_cpu.last_level_bytes(), BEYOND_MIN), free // 4)
    found = []
    for size in sorted({*(s for s in COPY_SETS if s < beyond), beyond}):
        source = torch.full((size // 2,), 85, dtype=torch.uint8)  # written once, so every page is its own
        target = torch.zeros_like(source)
        step = size // 2 // threads

        def copy(target: Any = target, source: Any = source) -> None:
            target.copy_(source)

        def move(target: Any = target, source: Any = source, step: int = step) -> None:
            here, there = source.data_ptr(), target.data_ptr()
            in_threads(lambda i: ctypes.memmove(there + i * step, here + i * step, step), threads)

        ways = _by_threads("torch copy_", copy, size / 1e9, threads, samples, COPY_SAMPLE_S)
        if size > 2**24:  # the C library may write past the cache, which saves a third of the traffic
            ways[f"memmove, threads={threads}"] = best_rates(move, step * threads * 2 / 1e9, samples, COPY_SAMPLE_S)
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


def lanes(flags: set[str]) -> int:
    """fp32 lanes of the widest vector unit."""
    return 16 if "avx512f" in flags else 8 if "fma" in flags else 4


def _fma_loop(width: int) -> Callable[[int], float]:
    """Compile `loop(n)`: n rounds of `FMA_CHAINS` independent FMAs that never leave the registers; drops the GIL."""
    import numba
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    vector, integer = ir.VectorType(ir.FloatType(), width), ir.IntType(64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        form = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, form, f"llvm.fma.v{width}f32")
        before = builder.block
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        left = builder.phi(integer)
        chains = [builder.phi(vector) for _ in range(FMA_CHAINS)]
        # x = x*a + b tends to 1: finite and normal for ever. Every chain starts elsewhere, so none is shared.
        a, b = (ir.Constant(vector, [value] * width) for value in (0.875, 0.125))
        after = [builder.call(fma, [x, a, b]) for x in chains]
        fewer = builder.sub(left, ir.Constant(integer, 1))
        builder.cbranch(builder.icmp_signed(">", fewer, ir.Constant(integer, 0)), loop, done)
        left.add_incoming(args[0], before)
        left.add_incoming(fewer, loop)
        for number, (x, next_x) in enumerate(zip(chains, after, strict=True)):
            x.add_incoming(ir.Constant(vector, [2.0 + number] * width), before)
            x.add_incoming(next_x, loop)
        builder.position_at_end(done)
        total = after[0]
        for x in after[1:]:
            total = builder.fadd(total, x)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    @intrinsic  # type: ignore[untyped-decorator]
    def chained(typing_context: Any, count: Any) -> Any:
        return types.float32(types.int64), generate

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def rounds(count: int) -> Any:
        return chained(count)

    rounds(1)  # compiled here, not in two threads at once
    compiled: Callable[[int], float] = rounds
    return compiled


def _no_numba() -> str:
    """Why numba cannot be used here; empty if it can."""
    if not all(importlib.util.find_spec(package) for package in ("numba", "llvmlite")):
        return "numba is not installed"
    try:
        importlib.import_module("numba")
    except ImportError as error:  # numba refuses a numpy newer than it knows
        return f"numba cannot be imported: {error}"
    return ""


def _vector(threads: int, samples: int) -> Entry:
    """fp32 FMA rate from registers, all threads at once: what no kernel on the vector units exceeds."""
    if why := _no_numba():
        return missing("TFLOP/s", why)
    width, count = lanes(device_cpu.flags()), 500_000
    loop = _fma_loop(width)
    rates = _from_registers(lambda: loop(count), 2 * width * FMA_CHAINS * count / 1e12, threads, samples)
    return entry(rates, "TFLOP/s", f"{FMA_CHAINS} chains of {width} lanes, threads={threads}, thread CPU time")


def _from_registers(call: Callable[[], Any], work: float, threads: int, samples: int) -> list[float]:
    """Work a second of all threads at once, each on its own CPU clock: waiting for a core is not the core's rate."""
    rates = []

    def timed(index: int) -> None:
        start = time.thread_time()
        call()
        speeds[index] = work / (time.thread_time() - start)

    for _ in range(samples):
        speeds = [0.0] * threads
        in_threads(timed, threads)
        rates.append(sum(speeds))
    return rates


def _tiles(precision: str, threads: int, samples: int) -> Entry:
    """Rate of AMX's products from tile registers, all threads at once."""
    unit = "TOP/s" if precision == "int8" else "TFLOP/s"
    if why := _no_numba():
        return missing(unit, why)
    import numba

    from rooftune.kernels.common import numba_cpu, numba_tmul

    if precision not in numba_cpu.tile_formats():
        return missing(unit, "no AMX here")
    form, count = numba_tmul.FORMATS[precision], 20_000
    enter, leave, products = numba_tmul.configure(), numba_tmul.release(), numba_tmul.products(form)

    @numba.njit("void(int64)", nogil=True)  # type: ignore[untyped-decorator]
    def rounds(count: int) -> None:
        enter()
        products(count)
        leave()

    side = numba_tmul.SIDE
    work = 2 * side**3 * form.steps * numba_tmul.PRODUCTS * count / 1e12
    rates = _from_registers(lambda: rounds(count), work, threads, samples)
    return entry(rates, unit, f"{numba_tmul.PRODUCTS} tiles of AMX, threads={threads}, thread CPU time")


def _split(int8: Entry) -> Entry:
    """fp32 products as six of int8 (a number in fixed point is three digits): a sixth of that rate, more than FMA's."""
    if not int8["value"]:
        return {**int8, "unit": "TFLOP/s"}
    how = f"a sixth of the int8 rate ({int8['how']}): six products for one"
    return {**int8, "value": int8["value"] / 6, "unit": "TFLOP/s", "how": how}


def ceilings(threads: int, quick: bool = True) -> dict[str, Any]:
    """See `rooftune.probe.ceilings`. Sets torch's threads for the rest of the process."""
    import torch

    torch.set_num_threads(threads)
    samples = 5 if quick else 20
    matrix = {p: _matrix(p, threads, samples, quick) for p in ("fp32", "bf16", "fp16", "int8")}
    vector = _vector(threads, samples)
    best = max((matrix["fp32"], vector), key=lambda e: e["value"] or 0.0)
    for precision in ("bf16", "fp16"):  # 16-bit values turn into fp32 on the way in, so fp32's rate is a floor
        if (matrix[precision]["value"] or 0.0) < best["value"]:
            note = f"fp32 rate ({best['how']}): torch.mm in {precision} is slower"
            matrix[precision] = {**best, "how": note}
    if (matrix["int8"]["value"] or 0.0) < 2 * (vector["value"] or 0.0):  # Zen 3: 1.4 GOP/s a core, and 146 are reached
        note = f"twice the fp32 FMA rate ({vector['how']}): pmaddwd adds two products a lane; torch._int_mm is slower"
        matrix["int8"] = {**vector, "value": 2 * vector["value"], "unit": "TOP/s", "how": note}
    tiles = {p: _tiles(p, threads, 4 * samples) for p in ("bf16", "int8")}  # some ms each: the rate comes and goes
    tiles["fp32"] = _split(tiles["int8"])
    matrix["tf32"] = missing("TFLOP/s", "a CPU has no tf32")
    matrix["fp8"] = missing("TFLOP/s", "torch does not multiply fp8 on a CPU")
    return {
        "copy": _copies(threads, samples),
        "matrix": matrix,
        "vector": {"fp32": vector},
        "tiles": tiles,
        "datasheet": None,
    }
