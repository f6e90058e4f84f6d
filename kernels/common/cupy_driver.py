"""What is asked of the CUDA driver directly: a launch, for half of what CuPy's costs, and how many clusters fit."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_uint, c_uint64, c_void_p
from functools import cache
from typing import Any

from rooftune.core import Unavailable
from rooftune.kernels.common.cupy_kernel import pointer
from rooftune.kernels.common.cupy_tensormap import TensorMap, encoded

CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding to 8 bytes, a union of 64, of which a cluster takes three numbers."""

    _fields_ = [("id", c_int), ("padding", c_int), ("value", c_uint * 16)]


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", c_uint),
    ]


@cache
def driver() -> Any:
    """The driver's library.

    Raises:
        Unavailable: there is none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"no CUDA driver: {error}") from error


class Launcher:
    """launch(grid, *args) of one function on the current stream: tensors, None (no pointer), int (int32), float or
    TensorMap, each argument of the same kind in every call.

    Arguments are written into places that stay: a launch of twelve takes 12 us of an H200's host, CuPy's took 28.

    Args:
        function: CuPy's, which keeps its module loaded; `ptr` is the CUfunction. threads: of a block. shared_bytes:
            dynamic.
        stream: tells the address of the current stream.
        launch: cuLaunchKernel; another one in tests.
    """

    def __init__(
        self, function: Any, threads: int, shared_bytes: int, stream: Callable[[], int], launch: Any = None
    ) -> None:
        self.function, self.threads, self.shared_bytes = function, c_uint(threads), c_uint(shared_bytes)
        self._address, self.stream, self.launch = c_void_p(function.ptr), stream, launch or driver().cuLaunchKernel
        self._places: list[Any] = []  # of arguments; a tensor map is its own, held here as long as the table names it
        self._table: Any = None  # addresses of the arguments
        self._lock = threading.Lock()  # between writing the arguments and the driver's copying them

    def _place(self, arg: Any) -> Any:
        if isinstance(arg, TensorMap):
            return encoded(arg)
        return c_int(0) if isinstance(arg, int) else c_float(0) if isinstance(arg, float) else c_uint64(0)

    def __call__(self, grid: int, *args: Any) -> None:
        with self._lock:
            if self._table is None:
                self._places = [self._place(arg) for arg in args]
                self._table = (c_void_p * len(args))(*map(ctypes.addressof, self._places))
            for number, (place, arg) in enumerate(zip(self._places, args, strict=True)):
                if isinstance(arg, TensorMap):
                    self._places[number] = found = encoded(arg)
                    self._table[number] = ctypes.addressof(found)
                elif isinstance(arg, (int, float)):
                    place.value = arg
                    if isinstance(arg, int) and place.value != arg:
                        raise OverflowError(f"argument {number} of a launch is {arg}: beyond 32 bits")
                else:
                    place.value = 0 if arg is None else pointer(arg)
            block, stream = (self.threads, 1, 1), c_void_p(self.stream())
            failed = self.launch(
                self._address, c_uint(grid), 1, 1, *block, self.shared_bytes, stream, self._table, None
            )
        if failed:
            raise RuntimeError(f"the CUDA driver refuses the launch of {grid} blocks (CUresult {failed})")


def active_clusters(function: int, threads: int, shared_bytes: int, cluster: int) -> int:
    """Clusters of `cluster` blocks of a kernel (a CUfunction) that the current device can hold at once.

    Raises:
        Unavailable: the driver is older than CUDA 11.8, or refuses the question.
    """
    try:
        ask = driver().cuOccupancyMaxActiveClusters
    except AttributeError as error:
        raise Unavailable(f"the CUDA driver knows no clusters ({error}); it must be of CUDA 11.8 or newer") from error
    attribute = _Attribute(CLUSTER_DIMENSION, 0, (c_uint * 16)(cluster, 1, 1))
    launch = _Launch((cluster, 1, 1), (threads, 1, 1), shared_bytes, None, ctypes.pointer(attribute), 1)
    found = c_int()
    if failed := ask(byref(found), c_void_p(function), byref(launch)):
        raise Unavailable(f"the CUDA driver does not say how many clusters run at once (CUresult {failed})")
    return found.value
