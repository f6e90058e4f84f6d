"""Tensor maps: how TMA finds a tensor in memory, as 128 bytes that are a kernel's argument.

On the GPU the driver makes them (`cuTensorMapEncodeTiled`); the emulation gets the same numbers packed
for `rt::TensorMap` of cuda/hopper_host.hpp.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from rooftune.core import Unavailable, UsageError
from rooftune.kernels.common.cupy_kernel import pointer

BYTES = 128
MAGIC = 0x70616D726F736E74
ALIGNMENT = 16  # bytes: of the tensor, and of the distance between its lines and batches
BOX_LIMIT = 256  # elements of a box in each direction
# CUtensorMapDataType; elements without a float format of TMA's are copied as integers of their size
DATA_TYPE = {"int8": 0, "float8_e4m3fn": 0, "int32": 3, "float16": 6, "float32": 7, "bfloat16": 9, "tfloat32": 11}
SWIZZLE = {32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle by the bytes of a line of the box
L2_PROMOTION_256B = 3
KEPT_MAPS = 256  # of one layout: tensors come and go


@dataclass(frozen=True)
class Layout:
    """What of a tensor map does not depend on the address. Sizes in elements, the inner dimension first.

    A tensor is batches of lines of elements; `strides` are bytes from line to line and from batch to batch. Loads of
    "tfloat32" round float32 to the nearest tf32, ties to even (triton-lang/triton#11751, seen on sm_120).
    A box has one batch; its inner extent is a whole swizzled line of 32, 64 or 128 bytes.
    """

    dtype: str
    element_bytes: int
    sizes: tuple[int, int, int]
    strides: tuple[int, int]
    box: tuple[int, int]
    encoded: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)  # address -> the driver's bytes

    @property
    def line_bytes(self) -> int:
        return self.box[0] * self.element_bytes


@dataclass(frozen=True)
class TensorMap:
    """An argument of a launch: a layout on a tensor's memory."""

    address: int
    layout: Layout


def layout(dtype: Any, element_bytes: int, lines: int, length: int, box: tuple[int, int], batches: int = 1) -> Layout:
    """Of a contiguous tensor [batches, lines, length]; `box` is (elements, lines).

    Raises:
        UsageError: TMA cannot address it.
    """
    stride = length * element_bytes
    if stride % ALIGNMENT:
        what = f"{length} elements of {element_bytes} bytes are {stride}"
        raise UsageError(f"TMA needs lines of a multiple of {ALIGNMENT} bytes; {what}")
    assert box[0] * element_bytes in SWIZZLE, box
    assert 0 < box[1] <= BOX_LIMIT, box
    name = str(dtype).removeprefix("torch.")
    return Layout(name, element_bytes, (length, lines, batches), (stride, stride * lines), box)


def bind(tensor: Any, made: Layout) -> TensorMap:
    """The layout on a tensor's memory. Raises UsageError if the tensor is not contiguous and aligned."""
    return TensorMap(pointer(tensor), made)


def emulated(argument: TensorMap) -> bytes:
    """The record that the emulation reads."""
    made = argument.layout
    numbers = (MAGIC, argument.address, *made.sizes, *made.strides)
    rest = (*made.box, 1, made.element_bytes, made.line_bytes, made.dtype == "tfloat32")
    record = struct.pack("<7Q", *numbers) + struct.pack("<6I", *rest)
    return record.ljust(BYTES, b"\0")


@cache
def _encode() -> Any:
    """The driver's function.

    Raises:
        Unavailable: no driver, or one older than CUDA 12.
    """
    try:
        function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise Unavailable(f"the CUDA driver makes no tensor maps ({error}); it must be of CUDA 12 or newer") from error
    function.restype = ctypes.c_int
    return function


def encoded(argument: TensorMap) -> Any:
    """The driver's 128 bytes, as a ctypes array. Kept by the tensor's address until there are too many: whoever uses
    the array's address keeps the array.

    Raises:
        UsageError: the driver refuses the layout.
    """
    made, kept = argument.layout, argument.layout.encoded
    if (found := kept.get(argument.address)) is not None:
        return found
    if len(kept) >= KEPT_MAPS:
        kept.clear()
    room = ctypes.create_string_buffer(BYTES + 64)  # the driver wants its place aligned to 64 bytes
    place = -(-ctypes.addressof(room) // 64) * 64
    failed = _encode()(
        ctypes.c_void_p(place),
        ctypes.c_int(DATA_TYPE[made.dtype]),
        ctypes.c_uint32(3),
        ctypes.c_void_p(argument.address),
        (ctypes.c_uint64 * 3)(*made.sizes),
        (ctypes.c_uint64 * 2)(*made.strides),
        (ctypes.c_uint32 * 3)(*made.box, 1),
        (ctypes.c_uint32 * 3)(1, 1, 1),
        ctypes.c_int(0),  # no interleaving
        ctypes.c_int(SWIZZLE[made.line_bytes]),
        ctypes.c_int(L2_PROMOTION_256B),
        ctypes.c_int(0),  # outside the tensor: zeros
    )
    if failed:
        raise UsageError(f"the driver makes no tensor map for {made} (CUresult {failed})")
    kept[argument.address] = ctypes.create_string_buffer(ctypes.string_at(place, BYTES), BYTES)
    return kept[argument.address]
