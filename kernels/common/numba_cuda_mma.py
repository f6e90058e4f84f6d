"""Numba-CUDA's asynchronous copies and tensor cores: `cp.async`, `ldmatrix`, `mma.sync` as intrinsics.

Needs sm_80. Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type". Twins of
the same meaning for the CPU are in `numba_cuda_sim.py`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic

from rooftune.kernels.common.numba_cuda_ptx import F32, GELU, I32, SHARED, device, emit, float32, pointer_to, uint32


def _shared_address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """The 32-bit shared-space address that `cp.async` and `ldmatrix` take.

    All in 32 bits: with 64-bit indices the fp16 product of 128x128 tiles needed 155 registers.
    """
    data = context.make_array(array_type)(context, builder, array).data
    base = builder.ptrtoint(builder.addrspacecast(data, data.type.pointee.as_pointer(SHARED)), I32)
    size = ir.Constant(I32, array_type.dtype.bitwidth // 8)
    return builder.add(base, builder.mul(builder.trunc(index, I32), size))


@intrinsic
def copy16(typingctx: Any, target: Any, i: Any, source: Any, j: Any, inside: Any) -> Any:
    """Begin to copy 16 bytes from global to shared memory; zeros if not inside (then nothing is read)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        to = _shared_address(context, builder, sig.args[0], args[0], args[1])
        begin = pointer_to(context, builder, sig.args[2], args[2], args[3], ir.IntType(8))
        begin = builder.addrspacecast(begin, ir.IntType(8).as_pointer(1))  # cp.async reads the global space
        size = builder.select(args[4], ir.Constant(I32, 16), ir.Constant(I32, 0))
        text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        emit(builder, ir.VoidType(), [to, begin, size], text, "r,l,r", volatile=True)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64, types.boolean), codegen


@intrinsic
def copy_commit(typingctx: Any) -> Any:
    """Close the group of copies begun since the last one."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit(builder, ir.VoidType(), [], "cp.async.commit_group;", "", volatile=True)
        return context.get_dummy_value()

    return types.void(), codegen


def copy_wait(newest: int) -> Any:
    """Make wait(): wait for this thread's groups of copies, except the `newest` ones (part of the instruction)."""

    @intrinsic
    def wait(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            emit(builder, ir.VoidType(), [], f"cp.async.wait_group {newest};", "", volatile=True)
            return context.get_dummy_value()

        return types.void(), codegen

    return wait


def _ldmatrix(suffix: str) -> Any:
    @intrinsic
    def load(typingctx: Any, local: Any, at: Any, array: Any, i: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            row = _shared_address(context, builder, sig.args[2], args[2], args[3])
            text = f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
            four = emit(builder, ir.LiteralStructType([I32] * 4), [row], text, "=r,=r,=r,=r,r", volatile=True)
            for w in range(4):
                place = builder.add(args[1], ir.Constant(args[1].type, w))
                word = builder.extract_value(four, w)
                builder.store(word, pointer_to(context, builder, sig.args[0], args[0], place, I32))
            return context.get_dummy_value()

        return types.void(local, types.int64, array, types.int64), codegen

    return load


ldmatrix = _ldmatrix("")
ldmatrix_t = _ldmatrix(".trans")


def multiply(builder: Any, kind: str, operands: list[Any]) -> Any:
    """One mma.sync: four words of A, two of B, four sums; returns the structure of the four new sums."""
    text = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, "
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    return emit(builder, ir.LiteralStructType([F32] * 4), operands, text + "{$10,$11,$12,$13};", constraints)


def _mma(kind: str) -> Any:
    @intrinsic
    def tile(typingctx: Any, acc: Any, c: Any, a: Any, ai: Any, b: Any, bi: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def slots(which: int, count: int, what: Any) -> list[Any]:
                index = args[which + 1]
                at = [builder.add(index, ir.Constant(index.type, w)) for w in range(count)]
                return [pointer_to(context, builder, sig.args[which], args[which], p, what) for p in at]

            sums = slots(0, 4, F32)
            words = [builder.load(p) for p in slots(2, 4, I32) + slots(4, 2, I32) + sums]
            result = multiply(builder, kind, words)
            for w, pointer in enumerate(sums):
                builder.store(builder.extract_value(result, w), pointer)
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(acc, i64, a, i64, b, i64), codegen

    @device
    def mma(acc: Any, c: Any, a: Any, ai: Any, b: Any, bi: Any, count: Any) -> None:
        """acc += a @ b for one 16x16 tile against `count` 16x8 tiles."""
        for n in range(count):
            tile(acc, c + 4 * n, a, ai, b, bi + 2 * n)

    return mma


MMA = {"fp16": _mma("f16"), "bf16": _mma("bf16")}


def _pack(kind: str) -> Any:
    @intrinsic
    def pack(typingctx: Any, low: Any, high: Any) -> Any:
        """Two fp32 values rounded to 16 bits in one word, the first in the low half."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return emit(builder, I32, [args[1], args[0]], f"cvt.rn.{kind}.f32 $0, $1, $2;", "=r,f,f")

        return uint32(float32, float32), codegen

    return pack


PACK = {"fp16": _pack("f16x2"), "bf16": _pack("bf16x2")}


# --- whole accumulators ------------------------------------------------------------------------------
# A warp's sums as MT x NT tiles: acc[(i * NT + j) * 4 + 2 * half + e] is row 16i + 8 half + lane // 4, column
# 8j + lane % 4 * 2 + e. Unrolled here, with constant indices: left to the compiler's unrolling, some of
# sm_80..sm_120a kept the sums of some transposes and epilogues in local memory (256 bytes a thread).


def _slot(context: Any, builder: Any, array_type: Any, array: Any, index: int, kind: Any) -> Any:
    return pointer_to(context, builder, array_type, array, ir.Constant(ir.IntType(64), index), kind)


def grid_mma(precision: str, mt: int, nt: int) -> Any:
    """Make mma(acc, a, b): all tiles, from mt A operands (4 words each) and nt B operands (2 words each)."""
    kind = {"fp16": "f16", "bf16": "bf16"}[precision]

    @intrinsic
    def mma(typingctx: Any, acc: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def words(which: int, first: int, count: int, what: Any) -> list[Any]:
                at = range(first, first + count)
                return [_slot(context, builder, sig.args[which], args[which], x, what) for x in at]

            for i in range(mt):
                left = [builder.load(p) for p in words(1, 4 * i, 4, I32)]
                for j in range(nt):
                    sums = words(0, (i * nt + j) * 4, 4, F32)
                    operands = left + [builder.load(p) for p in words(2, 2 * j, 2, I32) + sums]
                    result = multiply(builder, kind, operands)
                    for w, pointer in enumerate(sums):
                        builder.store(builder.extract_value(result, w), pointer)
            return context.get_dummy_value()

        return types.void(acc, a, b), codegen

    return mma


def grid_finish(epilogue: str, mt: int, nt: int) -> Any:
    """Make finish(acc, bias): add bias[2j + e] to every sum, then nothing, `relu` or `gelu`."""

    @intrinsic
    def finish(typingctx: Any, acc: Any, bias: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            for x in range(mt * nt * 4):
                pointer = _slot(context, builder, sig.args[0], args[0], x, F32)
                column = _slot(context, builder, sig.args[1], args[1], x // 4 % nt * 2 + x % 2, F32)
                value = builder.fadd(builder.load(pointer), builder.load(column))
                if epilogue == "bias_relu":
                    negative = builder.fcmp_ordered("<", value, ir.Constant(F32, 0.0))  # false for a NaN, which stays
                    value = builder.select(negative, ir.Constant(F32, 0.0), value)
                elif epilogue == "bias_gelu":
                    value = emit(builder, F32, [value], GELU, "=f,f")
                builder.store(value, pointer)
            return context.get_dummy_value()

        return types.void(acc, bias), codegen

    return finish


def grid_add(precision: str, mt: int, nt: int, m: int, n: int) -> Any:
    """Make add(acc, matrix, row, column): add to every sum its element of a 16-bit matrix [m, n].

    row, column: where the thread's first sum belongs; a sum outside gets the first element, and is not stored.
    """
    i64 = ir.IntType(64)

    @intrinsic
    def add(typingctx: Any, acc: Any, matrix: Any, row: Any, column: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.HalfType() if precision == "fp16" else ir.IntType(16)
            for x in range(mt * nt * 4):
                r = builder.add(args[2], ir.Constant(i64, x // 4 // nt * 16 + x // 2 % 2 * 8))
                s = builder.add(args[3], ir.Constant(i64, x // 4 % nt * 8 + x % 2))
                below, left = (builder.icmp_signed("<", y, ir.Constant(i64, end)) for y, end in ((r, m), (s, n)))
                index = builder.add(builder.mul(r, ir.Constant(i64, n)), s)
                index = builder.select(builder.and_(below, left), index, ir.Constant(i64, 0))
                value = builder.load(pointer_to(context, builder, sig.args[1], args[1], index, kind))
                if precision == "fp16":
                    value = builder.fpext(value, F32)
                else:
                    value = builder.bitcast(builder.shl(builder.zext(value, I32), ir.Constant(I32, 16)), F32)
                pointer = _slot(context, builder, sig.args[0], args[0], x, F32)
                builder.store(builder.fadd(builder.load(pointer), value), pointer)
            return context.get_dummy_value()

        return types.void(acc, matrix, types.int64, types.int64), codegen

    return add


def grid_store(precision: str, mt: int, nt: int, m: int, n: int, exact: bool) -> Any:
    """Make store(c, acc, row, column): round the sums to 16 bits and write those inside c: [m, n].

    row, column: where the thread's first sum belongs. `exact`: nothing lies outside. Pairs of columns are
    written together if n is even.
    """
    kind = {"fp16": "f16", "bf16": "bf16"}[precision]
    i64 = ir.IntType(64)

    @intrinsic
    def store(typingctx: Any, c: Any, acc: Any, row: Any, column: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def put(value: Any, index: Any, inside: Any, bits: int) -> None:
                place = pointer_to(context, builder, sig.args[0], args[0], index, value.type)
                place = builder.addrspacecast(place, value.type.as_pointer(1))
                if exact:
                    builder.store(value, place, align=bits // 8)
                    return
                text = f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.b{bits} [$0], $1; }}"
                constraints = "l,r,r" if bits == 32 else "l,h,r"
                guard = builder.zext(inside, I32)
                emit(builder, ir.VoidType(), [place, value, guard], text, constraints, volatile=True)

            def shifted(base: Any, by: int) -> Any:
                return builder.add(base, ir.Constant(i64, by))

            for i in range(mt):
                for half in range(2):
                    r = shifted(args[2], 16 * i + 8 * half)
                    row_inside = builder.icmp_signed("<", r, ir.Constant(i64, m))
                    start = builder.mul(r, ir.Constant(i64, n))
                    for j in range(nt):
                        at = (i * nt + j) * 4 + 2 * half
                        low, high = (
                            builder.load(_slot(context, builder, sig.args[1], args[1], at + e, F32)) for e in range(2)
                        )
                        word = emit(builder, I32, [high, low], f"cvt.rn.{kind}x2.f32 $0, $1, $2;", "=r,f,f")
                        for e in range(1 if n % 2 == 0 else 2):
                            s = shifted(args[3], 8 * j + e)
                            inside = builder.and_(row_inside, builder.icmp_signed("<", s, ir.Constant(i64, n)))
                            value = word
                            if n % 2:
                                value = builder.trunc(builder.lshr(word, ir.Constant(I32, 16 * e)), ir.IntType(16))
                            put(value, builder.add(start, s), inside, 16 if n % 2 else 32)
            return context.get_dummy_value()

        return types.void(c, acc, types.int64, types.int64), codegen

    return store
