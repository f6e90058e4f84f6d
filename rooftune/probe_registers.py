"""What a CPU's registers allow: FMA, dot products and AMX's tiles without memory; and a copy past the caches.

Written with the building blocks of the Numba competitors, so what the probe can emit is what a kernel can.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
import time
from collections.abc import Callable
from typing import Any

from rooftune.probe import Entry, entry, missing

CHAINS = 12  # two pipes of latency 4 or 5 need 8 to 10; 16 and the two constants would spill with AVX2's 16 registers
ROUNDS = 500_000
GRAIN = 256  # bytes that `streamed_copy` moves at a time


def in_threads(work: Callable[[int], Any], threads: int) -> None:
    """Run `work(0)`, `work(1)`... at once, the last one in this thread."""
    others = [threading.Thread(target=work, args=(i,)) for i in range(threads - 1)]
    for thread in others:
        thread.start()
    work(threads - 1)
    for thread in others:
        thread.join()


def no_numba() -> str:
    """Why numba cannot be used here; empty if it can."""
    if not all(importlib.util.find_spec(package) for package in ("numba", "llvmlite")):
        return "numba is not installed"
    try:
        importlib.import_module("numba")
    except ImportError as error:  # numba refuses a numpy newer than it knows
        return f"numba cannot be imported: {error}"
    return ""


def chained(precision: str) -> Callable[[int], float]:
    """Compile `loop(n)`: n rounds of `CHAINS` independent products and sums that never leave the registers.

    fp32: FMA of a vector; bf16, int8: the CPU's dot product of pairs or fours. The GIL is dropped.
    """
    import numba
    from llvmlite import ir
    from numba.core import types

    from rooftune.kernels.common import numba as blocks
    from rooftune.kernels.common import numba_dot

    def emit(e: blocks.Emit, count: Any) -> Any:
        floats = precision != "int8"
        kind = e.vector if floats else e.ints
        # x = x * a + b tends to 1: finite and normal for ever. Every chain starts elsewhere, so none is shared.
        a, b = e.splat(0.875), e.splat(0.125)
        word = e.int_splat(0x3C003C00 if precision == "bf16" else 0x01010101)  # two of 2^-7; four of 1

        def step(_: Any, state: list[Any]) -> list[Any]:
            if precision == "fp32":
                return [e.fma(x, a, b) for x in state]
            dot = numba_dot.bf16_pairs if precision == "bf16" else numba_dot.int8_fours
            return [dot(e, x, word, word) for x in state]

        start = [ir.Constant(kind, [2.0 + i if floats else i] * e.width) for i in range(CHAINS)]
        _, ends = e.loop(e.index(0), count, 1, start, step)
        total = e.builder.extract_element(
            e.tree(ends, e.builder.fadd if floats else e.builder.add), ir.Constant(ir.IntType(32), 0)
        )
        return total if floats else e.builder.sitofp(total, ir.FloatType())

    loop = blocks.intrinsic([types.int64], emit, types.float32)

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def rounds(count: int) -> Any:
        return loop(count)

    rounds(1)  # compiled here, not in two threads at once
    compiled: Callable[[int], float] = rounds
    return compiled


def vector(threads: int, samples: int) -> Entry:
    """fp32 FMA rate, all threads at once: what no kernel on the vector units exceeds."""
    if why := no_numba():
        return missing("TFLOP/s", why)
    from rooftune.kernels.common.numba_cpu import vector_width

    width, loop = vector_width(), chained("fp32")
    rates = _from_registers(lambda: loop(ROUNDS), 2 * width * CHAINS * ROUNDS / 1e12, threads, samples)
    return entry(rates, "TFLOP/s", f"{CHAINS} chains of {width} lanes, threads={threads}, thread CPU time")


def dots(precision: str, threads: int, samples: int) -> Entry:
    """Rate of `vdpbf16ps` (bf16) or `vpdpbusd` (int8), all threads at once."""
    unit = "TOP/s" if precision == "int8" else "TFLOP/s"
    if why := no_numba():
        return missing(unit, why)
    from rooftune.kernels.common.numba_cpu import dot_formats, vector_width

    if precision not in dot_formats():
        return missing(unit, f"no AVX-512 dot product of {precision} here")
    width, loop, steps = vector_width(), chained(precision), 4 if precision == "int8" else 2
    rates = _from_registers(lambda: loop(ROUNDS), 2 * steps * width * CHAINS * ROUNDS / 1e12, threads, samples)
    return entry(rates, unit, f"{CHAINS} chains of dot products, threads={threads}, thread CPU time")


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


def tiles(precision: str, threads: int, samples: int) -> Entry:
    """Rate of AMX's products from tile registers, all threads at once."""
    unit = "TOP/s" if precision == "int8" else "TFLOP/s"
    if why := no_numba():
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


def split(int8: Entry) -> Entry:
    """fp32 products as six of int8 (a number in fixed point is three digits): a sixth of that rate, more than FMA's."""
    if not int8["value"]:
        return {**int8, "unit": "TFLOP/s"}
    how = f"a sixth of the int8 rate ({int8['how']}): six products for one"
    return {**int8, "value": int8["value"] / 6, "unit": "TFLOP/s", "how": how}


def streamed_copy() -> Callable[[int, int, int], None] | None:
    """copy(target, source, bytes): whole GRAINs between aligned addresses, stored past the caches; None without numba.

    A line that is stored whole past the caches is not read first: a third less traffic than a plain copy.
    """
    if no_numba():
        return None
    import numba
    from numba.core import types

    from rooftune.kernels.common import numba as blocks

    def emit(e: blocks.Emit, target: Any, source: Any, count: Any) -> None:
        size = 4 * e.width

        def several(at: Any, _: Any) -> list[Any]:
            places = [e.builder.add(at, e.index(i * size)) for i in range(GRAIN // size)]
            values = [e.load_raw(e.builder.add(source, place), e.ints, 4) for place in places]
            for value, place in zip(values, places, strict=True):
                e.store_raw(value, e.builder.add(target, place), size, stream=True)
            return []

        e.loop(e.index(0), count, GRAIN, [], several)

    moved = blocks.intrinsic([types.int64] * 3, emit)

    @numba.njit("void(int64, int64, int64)", nogil=True)  # type: ignore[untyped-decorator]
    def copy(target: int, source: int, count: int) -> None:
        moved(target, source, count)

    compiled: Callable[[int, int, int], None] = copy
    return compiled
