"""Repairs of Triton's interpreter, which holds bf16 and fp8 as bit patterns and does not model tf32.

In Triton 3.6 to 3.9 `tl.dot` on bf16 multiplies the bit patterns (relative error 1e9), fp32 -> bf16
truncates where the hardware rounds to nearest even, arithmetic and comparisons on bf16 act on the bits,
fp8 rounds half up, decodes NaN as 480, and tf32 is full fp32. Torch's conversions, which are right,
take their place. Triton 3.6 also fails on numpy >= 2.4 in every loop with a bound known at run time.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter

TF32_MASK = 0xFFFFE000  # tensor cores ignore the low 13 bits of an fp32 operand: truncation, no rounding

# Formats the interpreter keeps as unsigned integers, with torch's type of the same bits.
AS_BITS = {
    tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
    tl.float8e5: (torch.float8_e5m2, torch.uint8, np.uint8),
}


def decode(bits: Any, dtype: Any) -> Any:
    """Bit patterns of a bf16 or fp8 array -> float32, exactly."""
    value, storage, _ = AS_BITS[dtype]
    signed = np.ascontiguousarray(bits).view(np.int16 if storage is torch.int16 else np.uint8)
    return torch.from_numpy(signed.copy()).view(value).float().numpy().reshape(np.shape(bits))


def encode(values: Any, dtype: Any) -> Any:
    """float -> bit patterns, to nearest even; fp8 saturates as the hardware's conversion does."""
    value, storage, unsigned = AS_BITS[dtype]
    exact = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    if storage is torch.uint8:  # cvt.rn.satfinite: infinities too become the largest finite value
        limit = torch.finfo(value).max
        exact = exact.clamp(-limit, limit)
    return exact.to(value).view(storage).numpy().view(unsigned).reshape(np.shape(values))


def _widen(handle: Any) -> Any:
    """The same values as float32, if they are kept as bits; else the handle itself."""
    kind = handle.dtype.scalar
    return interpreter.TensorHandle(decode(handle.data, kind), tl.float32) if kind in AS_BITS else handle


def _convert(source: Any, target: Any) -> Any | None:
    """A conversion that involves a format kept as bits; None if it does not."""
    old, new = source.dtype.scalar, target.scalar
    if old == new or not (old in AS_BITS or new in AS_BITS):
        return None
    values = decode(source.data, old) if old in AS_BITS else source.data
    if new in AS_BITS:
        return interpreter.TensorHandle(encode(values, new), new)
    return interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(new)), new)


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cast(self: Any, source: Any, target: Any, *rest: Any) -> Any:
        done = _convert(source, target)  # a handle's truth value is its data's: compare with None
        return original(self, source, target, *rest) if done is None else done

    return cast


def _arithmetic(original: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of two or three operands, computed in fp32 and rounded once, as the hardware does."""

    @functools.wraps(original)
    def compute(self: Any, *args: Any) -> Any:
        handles = [a for a in args if isinstance(a, interpreter.TensorHandle)]
        kept = next((h.dtype.scalar for h in handles if h.dtype.scalar in AS_BITS), None)
        if kept is None:
            return original(self, *args)
        wide = [_widen(a) if isinstance(a, interpreter.TensorHandle) else a for a in args]
        result = original(self, *wide)
        if result.data.dtype == np.bool_:  # a comparison
            return result
        return interpreter.TensorHandle(encode(result.data, kept), kept)

    return compute


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if a.dtype.scalar == tl.float32 and str(input_precision).endswith("TF32"):
            a, b = _truncate(a), _truncate(b)
        return original(self, _widen(a), _widen(b), d, input_precision, max_num_imprecise_acc)

    return dot


def _truncate(handle: Any) -> Any:
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    kept = np.where(np.isnan(handle.data), np.uint32(0x7FC00000), bits & np.uint32(TF32_MASK))
    return interpreter.TensorHandle(kept.view(np.float32), tl.float32)


def _loop_bounds(original: Callable[..., Any]) -> Callable[..., Any]:
    """Triton 3.6 turns one-element arrays of one dimension into loop bounds; numpy 2.4 refuses that."""

    @functools.wraps(original)
    def patch(tensor: Any, *rest: Any) -> Any:
        result = original(tensor, *rest)

        def index(self: Any) -> int:
            return int(self.handle.data.item())

        if rest:
            rest[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return result

    return patch


def repair() -> None:
    """Repair the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "rooftune_repaired", False):
        return
    builder.create_dot = _dot(builder.create_dot)
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _cast(builder.create_fp_to_fp)
    for name in ("binary_op", "ternary_op", "unary_op"):
        setattr(builder, name, _arithmetic(getattr(builder, name)))
    interpreter._patch_lang_tensor = _loop_bounds(interpreter._patch_lang_tensor)
    builder.rooftune_repaired = True


def quiet(run: Callable[..., None]) -> Callable[..., None]:
    """The run without numpy's warnings: NaN and infinity in a tile are inputs here, not accidents."""

    @functools.wraps(run)
    def silent(*tensors: Any) -> None:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            run(*tensors)

    return silent
