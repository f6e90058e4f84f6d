"""Sums of products of the small numbers in a word: the CPU's instruction, or the same spelled out where it has none.

All take and give vectors of 4-byte words. What is spelled out gives the instruction's values (in several times its
time): so the kernels for a CPU with these instructions run, and are tested, on one without.
"""

from __future__ import annotations

from llvmlite import ir

from rooftune.kernels.common.numba import I16, I32, Emit, State, Value
from rooftune.kernels.common.numba_cpu import PAIRS

SMALLEST = 2.0**-126  # normal number of fp32


def _flushed(e: Emit, value: Value) -> Value:
    b, size = e.builder, e.call(f"llvm.fabs.v{e.width}f32", e.vector, [value])
    return b.select(b.fcmp_ordered("<", size, e.splat(SMALLEST)), b.fmul(value, e.splat(0.0)), value)


def _halves(e: Emit, word: Value) -> tuple[Value, Value]:
    """The two bf16 of every word, the upper first."""
    lower, upper = e.widen_pairs(word)
    return _flushed(e, upper), _flushed(e, lower)


def bf16_pairs(e: Emit, total: Value, x: Value, y: Value) -> Value:
    """total + x1 y1 + x0 y0 of two bf16 a word: `vdpbf16ps`.

    Two fused steps, the upper half first, and subnormal numbers count as 0, as Intel's manual writes it.
    """
    if e.width == 16 and "avx512bf16" in e.instructions:
        return e.call("llvm.x86.avx512bf16.dpbf16ps.512", e.vector, (total, y, x))
    total = _flushed(e, total)
    for left, right in zip(_halves(e, x), _halves(e, y), strict=True):
        total = _flushed(e, e.fma(left, right, total))
    return total


def int8_fours(e: Emit, total: Value, x: Value, y: Value) -> Value:
    """total + the sum of four products of unsigned bytes of x with signed bytes of y: `vpdpbusd`."""
    if e.width == 16 and "avx512vnni" in e.instructions:
        return e.call("llvm.x86.avx512.vpdpbusd.512", e.ints, (total, x, y))
    b = e.builder
    for step in range(4):
        unsigned = b.and_(b.lshr(x, e.int_splat(8 * step)), e.int_splat(255))
        signed = b.ashr(b.shl(y, e.int_splat(24 - 8 * step)), e.int_splat(24))
        total = b.add(total, b.mul(unsigned, signed))
    return total


def bf16_sixteen(e: Emit, total: Value, xs: State, ys: State) -> Value:
    """total + the sum of the products of two bf16 in each of 16 words: a row of AMX's `tdpbf16ps`.

    Upper and lower halves are added up apart, then to each other, then to the total; subnormal numbers count as 0.
    """
    sums = [e.splat(0.0), e.splat(0.0)]
    for x, y in zip(xs, ys, strict=True):
        pairs = zip(_halves(e, x), _halves(e, y), sums, strict=True)
        sums = [_flushed(e, e.fma(left, right, part)) for left, right, part in pairs]
    b = e.builder
    return _flushed(e, b.fadd(_flushed(e, total), _flushed(e, b.fadd(sums[1], sums[0]))))


def int8_sixteen(e: Emit, total: Value, xs: State, ys: State) -> Value:
    """total + the sum of the products of four signed bytes in each of 16 words: a row of AMX's `tdpbssd`."""
    b = e.builder
    for x, y in zip(xs, ys, strict=True):
        for step in range(4):
            left, right = (b.ashr(b.shl(w, e.int_splat(24 - 8 * step)), e.int_splat(24)) for w in (x, y))
            total = b.add(total, b.mul(left, right))
    return total


def int16_pairs(e: Emit, total: Value, x: Value, y: Value) -> Value:
    """total + the sum of two products of signed 16-bit numbers: `pmaddwd` and an addition."""
    b, (feature, name) = e.builder, PAIRS[e.width]
    if feature in e.instructions:
        halves = ir.VectorType(I16, 2 * e.width)
        return b.add(total, e.call(f"llvm.x86.{name}", e.ints, (b.bitcast(x, halves), b.bitcast(y, halves))))
    sixteen = e.int_splat(16)
    lower = b.mul(*(b.ashr(b.shl(word, sixteen), sixteen) for word in (x, y)))
    upper = b.mul(*(b.ashr(word, sixteen) for word in (x, y)))
    return b.add(total, b.add(lower, upper))


def round_pairs(e: Emit, first: Value, second: Value) -> Value:
    """Two vectors of fp32 as words of two bf16, the first in the lower halves. Nearest, halves away from 0 (one
    operation instead of three); a NaN that came from bf16 or from arithmetic stays one: it has no bits to carry."""
    b, half = e.builder, e.int_splat(0x8000)
    low, high = (b.add(b.bitcast(value, e.ints), half) for value in (first, second))
    return b.or_(b.lshr(low, e.int_splat(16)), b.and_(high, e.int_splat(0xFFFF0000)))


def nearest_pairs(e: Emit, first: Value, second: Value) -> Value:
    """Two vectors of fp32 as words of two bf16, the first in the lower halves: to nearest even, a NaN stays one (if it
    came from bf16 or from arithmetic). `vcvtne2ps2bf16` writes subnormal numbers as 0; what is spelled out keeps them.
    """
    b = e.builder
    if e.width == 16 and "avx512bf16" in e.instructions:
        halves = ir.VectorType(I16, 2 * e.width)
        rounded = e.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", halves, (second, first))
        order = [lane // 2 + e.width * (lane % 2) for lane in range(2 * e.width)]
        places = ir.Constant(ir.VectorType(I32, 2 * e.width), order)
        return b.bitcast(b.shuffle_vector(rounded, rounded, places), e.vector)
    low, high = (e.rounded(value) for value in (first, second))
    word = b.or_(b.lshr(low, e.int_splat(16)), b.and_(high, e.int_splat(-65536)))
    return b.bitcast(word, e.vector)
