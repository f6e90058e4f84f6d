"""CUDA C++ kernels on the CPU: compiled by a C++ compiler, one fiber per CUDA thread (cuda/host.hpp)."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from rooftune.core import CompileError, Unavailable, UsageError
from rooftune.kernels.common.cupy_kernel import HEADERS, Kernel, Launch, cache_dir, first_errors, pointer, put
from rooftune.kernels.common.cupy_tensormap import BYTES, TensorMap, emulated

ORDERS = ("forward", "reverse", "random")

_order: ContextVar[tuple[str, int]] = ContextVar("order", default=("forward", 1))


@contextmanager
def thread_order(order: str, seed: int = 1) -> Iterator[None]:
    """Within it, emulated threads take turns `forward`, in `reverse`, or at `random` from a seed.

    Raises:
        UsageError: unknown order.
    """
    if order not in ORDERS:
        raise UsageError(f"unknown order of threads '{order}'; known: {', '.join(ORDERS)}")
    token = _order.set((order, seed))
    try:
        yield
    finally:
        _order.reset(token)


@cache
def compiler() -> str:
    """The C++ compiler: $CXX, g++ or clang++.

    Raises:
        Unavailable: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise Unavailable("no C++ compiler for the emulation of CUDA; install g++ or clang++, or set CXX")


def compile_host(kernel: Kernel) -> Path:
    """Shared library with the kernel and the fibers that run it.

    Raises:
        CompileError: the source does not compile; the text has the first messages.
    """
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", f"-I{HEADERS}"]
    # Emulation is compiled once and run for a second: 2.2 s of CPU instead of 3.5 at -O2 for gemm/cupy_wgmma.
    options += ["-fno-exceptions", "-fno-rtti"]
    target = cache_dir() / f"{kernel.key(compiler(), platform.machine(), *options)}.so"
    if target.exists():
        return target
    text = f'#include "{kernel.source}"\nROOFTUNE_HOST_ENTRY({kernel.entry})\n'
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        command = [compiler(), *options, *kernel.defines, "-x", "c++", "-", "-o", str(library)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{compiler()} failed on {kernel.source.name}: {first_errors(done.stderr)}")
        put(target, library.read_bytes())
    return target


def host(kernel: Kernel) -> Launch:
    """The kernel on CPU tensors, one fiber per CUDA thread: correctness only (see cuda/host.hpp).

    A deadlock, a collective that not all lanes reach, or a write behind the shared memory ends the
    process with a message on stderr.
    """
    function = ctypes.CDLL(str(compile_host(kernel))).rooftune_launch
    function.restype = None

    def value(arg: Any) -> Any:
        if isinstance(arg, TensorMap):
            return ctypes.create_string_buffer(emulated(arg), BYTES)
        if isinstance(arg, int):
            return ctypes.c_int(arg)
        if isinstance(arg, float):
            return ctypes.c_float(arg)
        return ctypes.c_void_p(None if arg is None else pointer(arg))

    def launch(grid: int, *args: Any) -> None:
        values = [value(a) for a in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        order, seed = _order.get()
        function(
            ctypes.c_uint(grid),
            ctypes.c_uint(kernel.threads),
            ctypes.c_size_t(kernel.shared_bytes),
            ctypes.c_int(ORDERS.index(order)),
            ctypes.c_uint(seed),
            pointers,
        )

    return launch
