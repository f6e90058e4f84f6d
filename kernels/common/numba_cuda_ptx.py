"""What Numba-CUDA kernels call, on a GPU: loads, number formats and tensor cores as PTX instructions.

Every name has a twin of the same meaning in `numba_cuda_sim.py`. Indexing goes through here rather than
through `array[i]`, because Numba guards that against negative indices, which costs a compare and a select
per access, and because 16-byte accesses and `cp.async` have no spelling in Python.

Instructions need sm_80: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type", "ldmatrix",
"cp.async".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cuda, types
from numba.cuda.extending import intrinsic

from rooftune.kernels.common.numba_cuda_sim import ERF_A, ERF_P

F32, I16, I32 = ir.FloatType(), ir.IntType(16), ir.IntType(32)
HALF = ir.HalfType()
SHARED = 3  # LLVM's number of the shared address space
float32, uint16, uint32 = types.float32, types.uint16, types.uint32


def device(function: Callable[..., Any]) -> Any:
    """A function for kernels, always inlined: its register arrays must not become memory."""
    return cuda.jit(device=True, inline="always")(function)


def pointer_to(context: Any, builder: Any, array_type: Any, array: Any, index: Any, to: Any, space: int = 0) -> Any:
    """Address of element `index` (no wrap-around), as a pointer to `to`; in shared memory the index has 32 bits."""
    data = context.make_array(array_type)(context, builder, array).data
    if space:
        data = builder.addrspacecast(data, data.type.pointee.as_pointer(space))
        index = builder.trunc(index, I32)
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer(space))


def emit(builder: Any, result: Any, args: Any, text: str, constraints: str, volatile: bool = False) -> Any:
    """One PTX instruction; volatile ones touch memory or other lanes and are neither moved nor merged."""
    constraints = ",".join(filter(None, (constraints, "~{memory}" if volatile else "")))
    call = ir.InlineAsm(ir.FunctionType(result, [a.type for a in args]), text, constraints, side_effect=volatile)
    return builder.call(call, args, attrs=("convergent",) if volatile else ())


def _unary(name: str, instruction: str, doc: str) -> Any:
    @intrinsic
    def op(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return emit(builder, F32, list(args), f"{instruction} $0, $1;", "=f,f")

        return float32(float32), codegen

    op.__doc__ = doc
    return op


exp2 = _unary("exp2", "ex2.approx.ftz.f32", "2^x, within 2 ulp; results below 2^-126 become 0.")
rsqrt = _unary("rsqrt", "rsqrt.approx.f32", "1/sqrt(x), relative error below 2^-22.9.")


@intrinsic
def fmax(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger; of a number and a NaN, the number."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit(builder, F32, list(args), "max.f32 $0, $1, $2;", "=f,f,f")

    return float32(float32, float32), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fma(*args)

    return float32(float32, float32, float32), codegen


def _hex(value: float) -> str:
    """A number as PTX writes fp32 constants."""
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


GELU = " ".join(
    [
        "{ .reg .f32 a, t, p, e; abs.f32 a, $1;",
        f"mul.f32 a, a, {_hex(math.sqrt(0.5))};",
        f"fma.rn.f32 t, a, {_hex(ERF_P)}, {_hex(1.0)}; rcp.approx.ftz.f32 t, t;",
        f"mov.f32 p, {_hex(ERF_A[0])};",
        *(f"fma.rn.f32 p, p, t, {_hex(c)};" for c in ERF_A[1:]),
        "mul.f32 p, p, t; mul.f32 e, a, a;",
        f"mul.f32 e, e, {_hex(-math.log2(math.e))}; ex2.approx.ftz.f32 e, e;",
        f"neg.f32 p, p; fma.rn.f32 p, p, e, {_hex(1.0)}; copysign.f32 p, $1, p;",
        f"mul.f32 a, $1, {_hex(0.5)}; fma.rn.f32 $0, a, p, a; }}",
    ]
)


@intrinsic
def gelu(typingctx: Any, x: Any) -> Any:
    """x * (1 + erf(x / sqrt 2)) / 2, the error function to 5e-7.

    One block of PTX, not `math.erf`: inlined 64 times that stopped the compiler from unrolling the epilogue
    of a matrix product, and its sums went to local memory (256 bytes a thread).
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit(builder, F32, list(args), GELU, "=f,f")

    return float32(float32), codegen


@intrinsic
def shfl_xor(typingctx: Any, value: Any, mask: Any) -> Any:
    """The value of the lane whose number differs in the bits of the mask."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        text = "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        return emit(builder, F32, list(args), text, "=f,f,r", volatile=True)

    return float32(float32, types.int32), codegen


# --- number formats: (decode a stored element to fp32, encode) as LLVM ---------------------------------


def _bf16_decode(builder: Any, bits: Any) -> Any:
    wide = builder.shl(builder.zext(bits, I32), ir.Constant(I32, 16))
    return builder.bitcast(wide, F32)


def _bf16_encode(builder: Any, value: Any) -> Any:
    return emit(builder, I16, [value], "cvt.rn.bf16.f32 $0, $1;", "=h,f")


def _f16_decode(builder: Any, bits: Any) -> Any:
    return builder.fpext(builder.bitcast(bits, HALF), F32)


def _f16_encode(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.fptrunc(value, HALF), I16)


def _same(builder: Any, value: Any) -> Any:
    return value


def _access(stored: Any, decode: Any, encode: Any, pack: str | None, space: int = 0) -> tuple[Any, ...]:
    """load, store (one element), load16, store16 (16 bytes at once), store2 for one number format."""
    per_word = 32 // (16 if pack else 32)
    words = ir.VectorType(I32, 4)

    @intrinsic
    def load(typingctx: Any, array: Any, i: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return decode(
                builder, builder.load(pointer_to(context, builder, sig.args[0], args[0], args[1], stored, space))
            )

        return float32(array, types.int64), codegen

    @intrinsic
    def store(typingctx: Any, array: Any, i: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            builder.store(
                encode(builder, args[2]), pointer_to(context, builder, sig.args[0], args[0], args[1], stored, space)
            )
            return context.get_dummy_value()

        return types.void(array, types.int64, float32), codegen

    def two(builder: Any, low: Any, high: Any) -> Any:
        """Two values in one 32-bit word, the first in the low half."""
        return emit(builder, I32, [high, low], f"cvt.rn.{pack}.f32 $0, $1, $2;", "=r,f,f")

    @intrinsic
    def load16(typingctx: Any, array: Any, i: Any, local: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            vector = builder.load(pointer_to(context, builder, sig.args[0], args[0], args[1], words, space), align=16)
            for w in range(4):
                word = builder.extract_element(vector, ir.Constant(I32, w))
                for half in range(per_word):
                    bits = builder.trunc(builder.lshr(word, ir.Constant(I32, 16 * half)), I16) if pack else None
                    value = decode(builder, bits) if pack else builder.bitcast(word, F32)
                    place = builder.add(args[3], ir.Constant(args[3].type, w * per_word + half))
                    builder.store(value, pointer_to(context, builder, sig.args[2], args[2], place, F32))
            return context.get_dummy_value()

        return types.void(array, types.int64, local, types.int64), codegen

    @intrinsic
    def store16(typingctx: Any, array: Any, i: Any, local: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            vector = ir.Constant(words, ir.Undefined)
            for w in range(4):
                values = []
                for half in range(per_word):
                    place = builder.add(args[3], ir.Constant(args[3].type, w * per_word + half))
                    values.append(builder.load(pointer_to(context, builder, sig.args[2], args[2], place, F32)))
                word = two(builder, *values) if pack else builder.bitcast(values[0], I32)
                vector = builder.insert_element(vector, word, ir.Constant(I32, w))
            builder.store(vector, pointer_to(context, builder, sig.args[0], args[0], args[1], words, space), align=16)
            return context.get_dummy_value()

        return types.void(array, types.int64, local, types.int64), codegen

    @intrinsic
    def store2(typingctx: Any, array: Any, i: Any, low: Any, high: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            word = two(builder, args[2], args[3])
            builder.store(word, pointer_to(context, builder, sig.args[0], args[0], args[1], I32, space), align=4)
            return context.get_dummy_value()

        return types.void(array, types.int64, float32, float32), codegen

    return load, store, load16, store16, store2


ACCESS = {
    "fp32": _access(F32, _same, _same, None),
    "fp16": _access(I16, _f16_decode, _f16_encode, "f16x2"),
    "bf16": _access(I16, _bf16_decode, _bf16_encode, "bf16x2"),
}

SHARED_ACCESS = _access(F32, _same, _same, None, SHARED)  # fp32 in shared memory
