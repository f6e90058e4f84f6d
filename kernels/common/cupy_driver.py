"""Questions to the CUDA driver that CuPy does not ask: how many clusters run at once."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_uint, c_void_p

from rooftune.core import Unavailable

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


def active_clusters(function: int, threads: int, shared_bytes: int, cluster: int) -> int:
    """Clusters of `cluster` blocks of a kernel (a CUfunction) that the current device can hold at once.

    Raises:
        Unavailable: the driver is older than CUDA 11.8, or refuses the question.
    """
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuOccupancyMaxActiveClusters
    except (OSError, AttributeError) as error:
        raise Unavailable(f"the CUDA driver knows no clusters ({error}); it must be of CUDA 11.8 or newer") from error
    attribute = _Attribute(CLUSTER_DIMENSION, 0, (c_uint * 16)(cluster, 1, 1))
    launch = _Launch((cluster, 1, 1), (threads, 1, 1), shared_bytes, None, ctypes.pointer(attribute), 1)
    found = c_int()
    if failed := ask(byref(found), c_void_p(function), byref(launch)):
        raise Unavailable(f"the CUDA driver does not say how many clusters run at once (CUresult {failed})")
    return found.value
