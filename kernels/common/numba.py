"""Building blocks of the Numba CPU competitors: LLVM vectors as Numba intrinsics.

Numba compiles loops; what keeps values in vector registers here is written as LLVM vectors by `Emit`, at
the width of the CPU found, and becomes part of a Numba function through `intrinsic`. Kernels take addresses
(`tensor.data_ptr()`), not arrays: no typing of arrays per call, and bf16 needs no view. One compilation
serves every shape of an operator, precision and config.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as numba_intrinsic

from rooftune.kernels.common.numba_cpu import native, vector_width
from rooftune.kernels.common.numba_exp2 import EXP2, EXP2_FLOOR

REQUIRES = ("numba",)
# OpenMP first: its threads wait by spinning a while, so a kernel of 20 us still gains from a second core.
# `workqueue`, numba's own pool, is always there. torch keeps a pool of its own: endless spinning
# (OMP_WAIT_POLICY=ACTIVE) would starve ours on the cores they share after torch computed a reference.
ENV = {"native": {"NUMBA_THREADING_LAYER_PRIORITY": "omp workqueue tbb"}}

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
HALF, I16, I8, I1 = ir.HalfType(), ir.IntType(16), ir.IntType(8), ir.IntType(1)
ITEM = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
LINE = 64  # bytes of a cache line, and the widest vector

Value = Any  # an LLVM value
State = Sequence[Value]

LOG2E = 1.4426950408889634
ROUND = 12582912.0 + 127  # 1.5 * 2^23: adding it leaves the nearest whole number, with fp32's bias, in the low bits


def threads() -> int:
    """How many threads a parallel kernel uses: the worker's NUMBA_NUM_THREADS."""
    return int(numba.get_num_threads())


def intrinsic(signature: Sequence[Any], emit: Callable[..., Value | None], returns: Any = types.void) -> Any:
    """A Numba function of these argument types whose body is written by emit(Emit, *arguments)."""
    names = [f"a{i}" for i in range(len(signature))]

    def typing(context: Any, *arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
            result = emit(Emit(builder), *values)
            return context.get_dummy_value() if result is None else result

        return returns(*signature), generate

    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("context", *names)]
    typing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    made = numba_intrinsic(typing)
    made.emit = emit  # the code for another CPU can be made, and read, from it
    return made


@dataclass(frozen=True)
class Chunk:
    """A vector's worth of a row: where it begins and which lanes are new. `mask` None means all of them."""

    emit: Emit
    at: Value
    mask: Value | None
    last: Value | None = None  # set on a row shorter than a vector: the index no lane may exceed

    def load(self, base: Value, dtype: str) -> Value:
        """The elements as fp32; lanes that are not new hold other elements of the same row."""
        e = self.emit
        if self.last is None:
            return e.load(e.offset(base, self.at, ITEM[dtype]), dtype)
        return e.gather([e.offset(base, index, ITEM[dtype]) for index in self._indices()], dtype)

    def store(self, value: Value, base: Value, dtype: str, stream: bool = False, short_nans: bool = False) -> None:
        """Write fp32 values, rounded. A lane that is not new writes what its element already got, so the
        value may depend on nothing but the element and the row."""
        e = self.emit
        if self.last is None:
            place = e.offset(base, self.at, ITEM[dtype])
            e.store(value, place, dtype, stream and self.mask is None, short_nans)
        else:
            e.scatter(value, [e.offset(base, index, ITEM[dtype]) for index in self._indices()], dtype)

    def only_new(self, value: Value, neutral: float = 0.0) -> Value:
        """The value in new lanes, the neutral element of a reduction in others."""
        return value if self.mask is None else self.emit.builder.select(self.mask, value, self.emit.splat(neutral))

    def _indices(self) -> list[Value]:
        b = self.emit.builder
        lanes = [ir.Constant(I64, lane) for lane in range(self.emit.width)]
        return [b.select(b.icmp_signed("<", lane, self.last), lane, self.last) for lane in lanes]


class Emit:
    """Writes LLVM vector code into a function under construction. Floating point without fast-math flags:
    NaN and infinity behave as IEEE 754 says, and sums have one order. `instructions`: features of the CPU that
    is compiled for, by default this one; what it lacks is spelled out."""

    def __init__(self, builder: Any, width: int | None = None, instructions: Collection[str] | None = None) -> None:
        self.builder = builder
        self.width = width or vector_width()
        self.instructions = native() if instructions is None else instructions
        self.vector = ir.VectorType(F32, self.width)
        self.ints = ir.VectorType(I32, self.width)

    # -- scalars and addresses ------------------------------------------------
    def index(self, value: int) -> Value:
        return ir.Constant(I64, value)

    def offset(self, base: Value, index: Value, item: int) -> Value:
        """Address of element `index`."""
        return self.builder.add(base, self.builder.mul(index, self.index(item)))

    def call(self, name: str, returns: Any, arguments: State) -> Value:
        """Call an LLVM intrinsic by its full name."""
        kind = ir.FunctionType(returns, [a.type for a in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    # -- memory ---------------------------------------------------------------
    def load_raw(self, address: Value, kind: Any, align: int) -> Value:
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), typ=kind)
        value.align = align
        return value

    def store_raw(self, value: Value, address: Value, align: int, stream: bool = False) -> None:
        place = self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()))
        place.align = align
        if stream:
            place.set_metadata("nontemporal", self.builder.module.add_metadata([ir.Constant(I32, 1)]))

    def load(self, address: Value, dtype: str) -> Value:
        """A vector of fp32 from memory of a precision."""
        kind = {"fp32": F32, "fp16": HALF, "bf16": I16, "int8": I8}[dtype]
        return self.widen(self.load_raw(address, ir.VectorType(kind, self.width), ITEM[dtype]), dtype)

    def store(self, value: Value, address: Value, dtype: str, stream: bool = False, short_nans: bool = False) -> None:
        """Round to the precision, to nearest even, and write. `stream` past the caches: aligned only."""
        narrow = self.narrow(value, dtype, short_nans)
        self.store_raw(narrow, address, self.width * ITEM[dtype] if stream else ITEM[dtype], stream)

    def prefetch(self, address: Value, write: bool = False, near: bool = False) -> None:
        """Ask for the line at an address, which need not exist: into the L2 cache; into the L1 if `near` or to be
        written."""
        b = self.builder
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        fetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        how = (int(write), 3 if write or near else 2, 1)  # write, locality (3: L1, 2: L2), data
        b.call(fetch, [b.inttoptr(address, I8.as_pointer()), *(ir.Constant(I32, x) for x in how)])

    def to_aligned(self, address: Value, dtype: str) -> Value:
        """How many elements after this address a vector may first be streamed."""
        item = ITEM[dtype]
        rest = self.builder.and_(self.builder.neg(address), self.index(self.width * item - 1))
        return self.builder.udiv(rest, self.index(item))

    def gather(self, addresses: State, dtype: str) -> Value:
        kind = {"fp32": F32, "fp16": HALF, "bf16": I16, "int8": I8}[dtype]
        value = ir.Constant(ir.VectorType(kind, self.width), ir.Undefined)
        for lane, address in enumerate(addresses):
            value = self.builder.insert_element(
                value, self.load_raw(address, kind, ITEM[dtype]), ir.Constant(I32, lane)
            )
        return self.widen(value, dtype)

    def scatter(self, value: Value, addresses: State, dtype: str) -> None:
        narrow = self.narrow(value, dtype)
        for lane, address in enumerate(addresses):
            self.store_raw(self.builder.extract_element(narrow, ir.Constant(I32, lane)), address, ITEM[dtype])

    def widen(self, value: Value, dtype: str) -> Value:
        """Stored values as fp32 (bf16 is the upper half of one); scalar or vector."""
        b, vector = self.builder, isinstance(value.type, ir.VectorType)
        wide, ints = (ir.VectorType(t, value.type.count) if vector else t for t in (F32, I32))
        if dtype == "bf16":
            sixteen = ir.Constant(ints, [16] * value.type.count) if vector else ir.Constant(I32, 16)
            return b.bitcast(b.shl(b.zext(value, ints), sixteen), wide)
        if dtype == "int8":
            return b.sitofp(value, wide)
        return b.fpext(value, wide) if dtype == "fp16" else value

    def narrow(self, value: Value, dtype: str, short_nans: bool = False) -> Value:
        """fp32 vectors rounded to a precision, to nearest even; a NaN stays one.

        `short_nans`: NaNs come from values of the precision itself or from arithmetic, so the bits that bf16
        has not are clear and rounding leaves them NaN (saves 4 of 9 operations with AVX2).
        """
        b = self.builder
        if dtype == "fp16":
            return b.fptrunc(value, ir.VectorType(HALF, self.width))
        if dtype == "fp32":
            return value
        rounded = b.lshr(self.rounded(value), self.int_splat(16))
        if short_nans:
            return b.trunc(rounded, ir.VectorType(I16, self.width))
        nan = b.fcmp_unordered("uno", value, value)
        return b.trunc(b.select(nan, self.int_splat(0x7FC0), rounded), ir.VectorType(I16, self.width))

    def rounded(self, value: Value) -> Value:
        """Words whose upper halves are the values in bf16; NaNs have no bits to carry."""
        b, bits = self.builder, self.builder.bitcast(value, self.ints)
        odd = b.and_(b.lshr(bits, self.int_splat(16)), self.int_splat(1))
        return b.add(bits, b.add(odd, self.int_splat(0x7FFF)))

    def widen_pairs(self, word: Value) -> list[Value]:
        """The two bf16 of every 4 bytes as fp32, the lower halves first."""
        b, bits = self.builder, self.builder.bitcast(word, self.ints)
        return [
            b.bitcast(x, self.vector) for x in (b.shl(bits, self.int_splat(16)), b.and_(bits, self.int_splat(-65536)))
        ]

    # -- arithmetic -----------------------------------------------------------
    def splat(self, value: Value | float) -> Value:
        """All lanes alike, from a number or a scalar fp32 value."""
        if isinstance(value, int | float):
            return ir.Constant(self.vector, [float(value)] * self.width)
        return self.broadcast(value, self.width)

    def broadcast(self, value: Value, count: int) -> Value:
        kind = ir.VectorType(value.type, count)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, count), [0] * count)
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    def int_splat(self, value: int) -> Value:
        return ir.Constant(self.ints, [value] * self.width)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z, fused where the CPU can (llvm.fma would call the C library elsewhere)."""
        return self.call(f"llvm.fmuladd.v{self.width}f32", self.vector, (x, y, z))

    def max(self, x: Value, y: Value) -> Value:
        """The larger; y if either is NaN: one instruction on x86, the form of which is exactly this."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def exp2(self, t: Value, degree: int = 6) -> Value:
        """2^t within 1 ulp (degree 6) for t < 127; 0 below -126.5 (also for -inf), NaN for NaN.

        Round to whole n and rest f, a polynomial in f, times 2^n made from the bits of n + ROUND.
        """
        b = self.builder
        if degree < 6 and self.width == 16 and {"avx512f", "avx512dq"} <= set(self.instructions):
            return self._exp2_scaled(t, degree)
        t = self.max(self.splat(-127.0), t)
        shifted = b.fadd(t, self.splat(ROUND))
        f = b.fsub(t, b.fsub(shifted, self.splat(ROUND)))
        p = self.splat(EXP2[degree][-1])
        for c in (*EXP2[degree][-2::-1], 1.0):
            p = self.fma(p, f, self.splat(c))
        power = b.shl(b.bitcast(shifted, self.ints), self.int_splat(23))
        return b.fmul(p, b.bitcast(power, self.vector))

    def _exp2_scaled(self, t: Value, degree: int) -> Value:
        """By AVX-512's `vreduceps` (t less the next whole number below) and `vscalefps`: 3 operations about the
        polynomial instead of 6, one of which was a shift at half their rate. 0 below -126: no subnormal numbers.
        """
        b, every = self.builder, ir.Constant(ir.IntType(16), 0xFFFF)
        zero, down, current = self.splat(0.0), ir.Constant(I32, 1), ir.Constant(I32, 4)
        f = self.call("llvm.x86.avx512.mask.reduce.ps.512", self.vector, (t, down, zero, every, current))
        p = self.splat(EXP2_FLOOR[degree][-1])
        for c in EXP2_FLOOR[degree][-2::-1]:
            p = self.fma(p, f, self.splat(c))
        normal = b.bitcast(b.fcmp_unordered(">=", t, self.splat(-126.0)), ir.IntType(16))  # and NaN
        return self.call("llvm.x86.avx512.mask.scalef.ps.512", self.vector, (p, t, zero, normal, current))

    def reduce(self, value: Value, join: Callable[[Value, Value], Value]) -> Value:
        """One scalar from all lanes, by halves: always the same order."""
        half = self.width // 2
        while half:
            order = ir.Constant(self.ints, [(i + half) % self.width for i in range(self.width)])
            value = join(self.builder.shuffle_vector(value, value, order), value)
            half //= 2
        return self.builder.extract_element(value, ir.Constant(I32, 0))

    def total(self, values: State) -> Value:
        """Sum of all lanes of several vectors."""
        return self.reduce(self.tree(values, self.builder.fadd), self.builder.fadd)

    @staticmethod
    def tree(values: State, join: Callable[[Value, Value], Value]) -> Value:
        """Join pairwise."""
        values = list(values)
        while len(values) > 1:
            pairs = zip(values[::2], values[1::2], strict=False)
            values = [join(x, y) for x, y in pairs] + ([values[-1]] if len(values) % 2 else [])
        return values[0]

    # -- control --------------------------------------------------------------
    def branch(self, condition: Value, then: Callable[[], State], other: Callable[[], State]) -> list[Value]:
        """The values of the branch taken."""
        b = self.builder
        blocks = [b.append_basic_block(name) for name in ("then", "else", "join")]
        b.cbranch(condition, *blocks[:2])
        ends = []
        for block, body in zip(blocks, (then, other), strict=False):
            b.position_at_end(block)
            values = list(body())
            ends.append((values, b.block))
            b.branch(blocks[2])
        b.position_at_end(blocks[2])
        return [self._phi(incoming) for incoming in zip(*([(v, end) for v in vs] for vs, end in ends), strict=True)]

    def _phi(self, incoming: Sequence[tuple[Value, Any]]) -> Value:
        phi = self.builder.phi(incoming[0][0].type)
        for value, block in incoming:
            phi.add_incoming(value, block)
        return phi

    def loop(
        self, start: Value, stop: Value, step: int, state: State, body: Callable[[Value, list[Value]], State]
    ) -> tuple[Value, list[Value]]:
        """While index + step <= stop: state = body(index, state). Returns the index reached and the state."""
        b = self.builder
        before, head, inside, after = b.block, *(b.append_basic_block(n) for n in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        index = self._phi([(start, before)])
        values = [self._phi([(value, before)]) for value in state]
        following = b.add(index, self.index(step))
        b.cbranch(b.icmp_signed("<=", following, stop), inside, after)
        b.position_at_end(inside)
        for phi, value in zip(values, body(index, values), strict=True):
            phi.add_incoming(value, b.block)
        index.add_incoming(following, b.block)
        b.branch(head)
        b.position_at_end(after)
        return index, values

    def row(
        self,
        n: Value,
        neutral: Sequence[float],
        body: Callable[[Chunk, State], State],
        unroll: int = 1,
        begin: Value | None = None,
    ) -> list[list[Value]]:
        """Visit a row of n elements by vectors: state = body(chunk, state), `unroll` independent states.

        A rest is visited as the last `width` elements with those seen before masked; a row shorter than a
        vector lane by lane. Returns for each value of the state its `unroll` vectors. `begin`, for a body
        without state: vectors begin at this element (less than a vector from 0), after one at 0.
        """
        width, b, zero = self.width, self.builder, self.index(0)
        count = len(neutral)
        start = [self.splat(value) for value in neutral]

        def long() -> State:
            def several(at: Value, state: list[Value]) -> State:
                parts = (state[u * count : (u + 1) * count] for u in range(unroll))
                chunks = (Chunk(self, b.add(at, self.index(u * width)), None) for u in range(unroll))
                return list(itertools.chain(*(body(c, s) for c, s in zip(chunks, parts, strict=True))))

            if begin is not None:
                every = ir.Constant(ir.VectorType(I1, width), [True] * width)
                head = Chunk(self, zero, every)
                self.branch(b.icmp_signed(">", begin, zero), lambda: body(head, []), list)
            at, state = self.loop(zero if begin is None else begin, n, unroll * width, start * unroll, several)
            if unroll > 1:
                at, first = self.loop(at, n, width, state[:count], lambda i, s: body(Chunk(self, i, None), s))
                state = [*first, *state[count:]]
            rest = b.sub(n, at)

            def tail() -> State:
                mask = b.icmp_signed(">=", self._lanes(), self._limit(b.sub(self.index(width), rest)))
                return body(Chunk(self, b.sub(n, self.index(width)), mask), state[:count])

            ends = self.branch(b.icmp_signed(">", rest, zero), tail, lambda: state[:count])
            return [*ends, *state[count:]]

        def short() -> State:
            mask = b.icmp_signed("<", self._lanes(), self._limit(n))
            only = Chunk(self, zero, mask, b.sub(n, self.index(1)))
            return [*body(only, start), *(start * (unroll - 1))]

        flat = self.branch(b.icmp_signed(">=", n, self.index(width)), long, short)
        return [flat[i::count] for i in range(count)]

    def _lanes(self) -> Value:
        return ir.Constant(self.ints, list(range(self.width)))

    def _limit(self, count: Value) -> Value:
        return self.broadcast(self.builder.trunc(count, I32), self.width)
