"""Numba-CUDA: what its kernels share. Python compiled to PTX, tensor cores and asynchronous copies included.

A kernel file imports `cuda`, `device` and the operations from here; with NUMBA_ENABLE_CUDASIM=1, read once
at import, they are those of `numba_cuda_sim` (CPU), else those of `numba_cuda_ptx` and `numba_cuda_mma`.
Either way the kernel's Python code is the same. All arrays are flat; fp16 and bf16 travel as their bits
(uint16); sizes and strides are constants of the kernel, which is compiled for one problem and one config.

What emulation does not prove: the PTX text behind an operation, alignment, and that the machine code keeps
register arrays in registers; `compile_for` proves the last.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from rooftune.check import Run
from rooftune.core import PRECISIONS, Resources, Unavailable, UsageError

REQUIRES = ("numba", "numba_cuda")
ENV = {"emulate": {"NUMBA_ENABLE_CUDASIM": "1"}}

EMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
cuda: Any
ops: Any  # numbers and memory
warps: Any  # asynchronous copies and tensor cores
if EMULATED:
    from rooftune.kernels.common import numba_cuda_sim

    ops = warps = numba_cuda_sim
    cuda = numba_cuda_sim.cuda
else:
    import numpy

    if not hasattr(numpy, "row_stack"):  # NumPy 2.5 dropped the alias; numba-cuda 0.30 cannot compile without it
        numpy.row_stack = numpy.vstack
    import numba.cuda

    from rooftune.kernels.common import numba_cuda_mma, numba_cuda_ptx

    ops, warps = numba_cuda_ptx, numba_cuda_mma
    cuda = numba.cuda

STATIC_SHARED = 49152  # bytes; more needs an opt-in per function that Numba's launch does not make
MAX_THREADS = 1024
ARCHES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100a": (10, 0), "sm_120a": (12, 0)}

device = ops.device
fmax, fma, exp2, rsqrt, gelu, shfl_xor = ops.fmax, ops.fma, ops.exp2, ops.rsqrt, ops.gelu, ops.shfl_xor
copy16, copy_commit, copy_wait = warps.copy16, warps.copy_commit, warps.copy_wait
ldmatrix, ldmatrix_t, MMA, PACK = warps.ldmatrix, warps.ldmatrix_t, warps.MMA, warps.PACK
grid_mma, grid_finish, grid_add, grid_store = warps.grid_mma, warps.grid_finish, warps.grid_add, warps.grid_store
ACCESS, SHARED_ACCESS = ops.ACCESS, ops.SHARED_ACCESS
float32, uint16, uint32 = ops.float32, ops.uint16, ops.uint32


def element(precision: str) -> Any:
    """The type in which a precision is stored: float32, or uint16 holding its bits."""
    return float32 if PRECISIONS[precision].bytes_in == 4 else uint16


def per_vector(precision: str) -> int:
    """Elements in one 16-byte access."""
    return 16 // PRECISIONS[precision].bytes_in


@dataclass(frozen=True)
class Launch:
    """A kernel function, ready for a launch: `blocks` blocks of `threads` threads.

    `arrays` holds the precision of each argument in order (an output first, then the inputs).
    `max_registers` a thread, None for the compiler's choice.
    """

    function: Callable[..., None]
    blocks: int
    threads: int
    arrays: tuple[str, ...]
    max_registers: int | None = None

    @property
    def signature(self) -> Any:
        """Numba's signature: flat contiguous arrays."""
        from numba import types

        stored = {4: types.float32, 2: types.uint16}
        return types.void(*(types.Array(stored[PRECISIONS[p].bytes_in], 1, "C") for p in self.arrays))


def emulate(launch: Launch) -> Run:
    """run(out, *inputs) on CPU tensors.

    Raises:
        UsageError: the process was not started for emulation.
    """
    if not EMULATED:
        raise UsageError("emulating Numba-CUDA kernels needs NUMBA_ENABLE_CUDASIM=1 set before the import")

    def run(*tensors: Any) -> None:
        ops.launch(launch.function, launch.blocks, launch.threads, [_as_numpy(t) for t in tensors])

    return run


def _as_numpy(tensor: Any) -> Any:
    """A flat numpy view of a contiguous CPU tensor, without a copy; 16-bit floats as uint16."""
    import torch

    _require_contiguous(tensor)
    flat = tensor.view(-1)
    return (flat.view(torch.int16).numpy().view("uint16")) if tensor.element_size() == 2 else flat.numpy()


def _require_contiguous(tensor: Any) -> None:
    if not tensor.is_contiguous():
        raise UsageError(f"Numba-CUDA kernels take contiguous tensors, not strides {tuple(tensor.stride())}")


def build(launch: Launch) -> Run:
    """run(out, *inputs) on CUDA tensors, on torch's current stream; compiled here, for the current device.

    Raises:
        Unavailable: no CUDA driver on this machine.
    """
    if EMULATED:
        raise UsageError("NUMBA_ENABLE_CUDASIM=1 is set: this process can only emulate Numba-CUDA kernels")
    if not has_driver():
        raise Unavailable("no CUDA driver: libcuda.so.1 cannot be loaded")
    import torch

    torch.cuda.current_stream()  # torch makes the primary context current; Numba then uses the same one
    kernel = cuda.jit(launch.signature, max_registers=launch.max_registers)(launch.function)

    def run(*tensors: Any) -> None:
        handle = torch.cuda.current_stream().cuda_stream
        stream = cuda.external_stream(handle) if handle else 0
        arrays = [_as_device_array(t.data_ptr(), t.numel(), t.element_size(), t.is_contiguous()) for t in tensors]
        kernel[launch.blocks, launch.threads, stream](*arrays)

    return run


class _View:
    """The CUDA array interface of flat memory: torch's own does not know every dtype we pass."""

    def __init__(self, pointer: int, count: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": {4: "<f4", 2: "<u2"}[size],
            "data": (pointer, False),
            "strides": None,
            "version": 3,
            "stream": None,  # launches go to the stream the data lives on: nothing to wait for
        }


@lru_cache(maxsize=4096)
def _as_device_array(pointer: int, count: int, size: int, contiguous: bool) -> Any:
    """A flat device array over a tensor's memory. It owns nothing, so keeping it is harmless."""
    if not contiguous:
        raise UsageError("Numba-CUDA kernels take contiguous tensors")
    if pointer % 16:
        raise UsageError("Numba-CUDA kernels take tensors whose memory is aligned to 16 bytes")
    return cuda.as_cuda_array(_View(pointer, count, size), sync=False)


@cache
def has_driver() -> bool:
    """Whether libcuda loads. Asked first always: without it, driver calls of cuda.core may hang for ever."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


_SHARED = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+[\w$.]+\[(\d+)\]")
_TENSOR = re.compile(r"\b(mma\.sync\.aligned\.[\w.]+)")


def resources(launch: Launch, arch: str) -> Resources:
    """Machine code for an architecture through NVVM and nvJitLink; needs neither driver nor GPU.

    Spills include the stack frame: a register array that stayed in memory costs the same.

    Raises:
        UsageError: unknown architecture, or the process was started for emulation.
        Unavailable: a compiler library is missing.
    """
    if arch not in ARCHES:
        raise UsageError(f"unknown architecture '{arch}'; known: {', '.join(ARCHES)}")
    if EMULATED:
        raise UsageError("NUMBA_ENABLE_CUDASIM=1 is set: this process can only emulate Numba-CUDA kernels")
    try:
        from cuda.core import Linker, LinkerOptions, ObjectCode
    except ImportError as error:
        raise Unavailable(f"cuda-core is missing ({error}); install rooftune[offline]") from error
    cc = ARCHES[arch]
    try:
        ptx, _ = cuda.compile(launch.function, launch.signature, cc=cc, device=False, abi="numba", output="ptx")
    except (ImportError, OSError, RuntimeError) as error:  # numba-cuda looks for NVVM and NVRTC only now
        text = str(error).partition("\n")[0]
        raise Unavailable(f"NVVM or NVRTC is missing ({text}); install rooftune[offline]") from error
    limit = launch.max_registers
    options = LinkerOptions(arch=arch, max_register_count=limit, ptxas_options=["-v"], verbose=True)
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    linker.link("cubin")
    found = _read_log(linker.get_info_log(), ptx, arch, launch.threads)
    return replace(found, binary=f"{hashlib.sha256(ptx.encode()).hexdigest()[:16]} {launch.blocks} {limit}")


def _read_log(log: str, ptx: str, arch: str, threads: int) -> Resources:
    """Figures from the assembler's verbose output."""

    def figure(pattern: str) -> int:
        found = re.findall(pattern, log)
        return max(map(int, found), default=0)

    registers = figure(r"Used (\d+) registers")
    stack = figure(r"(\d+) bytes stack frame")
    spills = figure(r"(\d+) bytes spill stores") + figure(r"(\d+) bytes spill loads")
    import numba_cuda

    return Resources(
        arch=arch,
        registers=registers or None,
        spill_bytes=max(stack, spills) if registers else None,
        shared_bytes=sum(map(int, _SHARED.findall(ptx))),  # ptxas would add what the system reserves
        tensor_core=tuple(sorted(set(_TENSOR.findall(ptx)))),
        toolchain=f"numba-cuda {numba_cuda.__version__}",
        threads=threads,
    )


def ceil_div(a: int, b: int) -> int:
    """The quotient rounded up."""
    return -(-a // b)


def static_shared(counts: Sequence[tuple[int, int]]) -> bool:
    """Whether (elements, bytes each) of shared memory fit without an opt-in."""
    return sum(n * size for n, size in counts) <= STATIC_SHARED


def register_limit(threads: int, blocks: int) -> int:
    """Registers a thread may use so that `blocks` blocks fit in the 65536 of a multiprocessor, in steps of 8."""
    return min(255, 65536 // (threads * blocks) // 8 * 8)
