"""CUDA C++ kernels: compiled by NVRTC, launched through CuPy on the current GPU, or read for their resources.

A competitor describes one `Kernel`; `device` runs it on the GPU, `host` (cupy_host.py) on the CPU, fiber
by fiber, and `resources` says what its machine code takes. No CUDA header and no driver is needed to compile.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
from functools import cache, partial
from pathlib import Path
from typing import Any

from rooftune.core import CompileError, Resources, Unavailable, UsageError
from rooftune.kernels.common.cupy_driver import Launcher, active_clusters
from rooftune.kernels.common.cupy_host import host, thread_order
from rooftune.kernels.common.cupy_kernel import (
    HEADERS,
    PRECISION_CODE,
    REGISTERS,
    SHARED_LIMIT,
    SHARED_PORTABLE,
    Kernel,
    Launch,
    axes,
    bytes_in,
    cache_dir,
    chunk,
    first_errors,
    put,
)

__all__ = [
    "PRECISION_CODE",
    "REGISTERS",
    "SHARED_LIMIT",
    "SHARED_PORTABLE",
    "Kernel",
    "Launch",
    "axes",
    "bytes_in",
    "chunk",
    "device",
    "hopper_resources",
    "host",
    "require_arch",
    "resident_blocks",
    "resources",
    "thread_order",
]

REQUIRES = ("cupy",)
ENV: dict[str, dict[str, str]] = {"emulate": {}, "native": {}, "compile": {}}


# ---- machine code ----


def _nvrtc(kernel: Kernel, arch: str, *extra: str) -> tuple[Any, Any, str]:
    """(nvrtc module, compiled program, log). The caller destroys the program."""
    from cupy.cuda import nvrtc

    try:
        program = nvrtc.createProgram(kernel.source.read_text(), kernel.source.name, (), ())
    except RuntimeError as error:  # CuPy found no library
        raise Unavailable(f"NVRTC is not usable ({error}); install nvidia-cuda-nvrtc") from error
    # -default-device: NVRTC 13.0 takes a generic lambda of a kernel for a host function, 13.5 does not
    options = (f"-arch={arch}", "-std=c++17", "-default-device", f"-I{HEADERS}", *extra, *kernel.defines)
    try:
        nvrtc.compileProgram(program, options)
    except Exception as error:
        log = str(nvrtc.getProgramLog(program)) or str(error)
        nvrtc.destroyProgram(program)
        raise CompileError(f"NVRTC failed on {kernel.source.name} for {arch}: {first_errors(log)}") from error
    return nvrtc, program, str(nvrtc.getProgramLog(program)).rstrip("\0")


@cache
def toolchain() -> str:
    """Which NVRTC compiles, as `nvrtc 13.0`."""
    from cupy.cuda import nvrtc

    try:
        return "nvrtc " + ".".join(str(part) for part in nvrtc.getVersion())
    except RuntimeError as error:
        raise Unavailable(f"NVRTC is not usable ({error}); install nvidia-cuda-nvrtc") from error


def compile_cubin(kernel: Kernel, arch: str) -> tuple[Path, str, str]:
    """Machine code for an architecture such as `sm_90a`, ptxas' report, and the PTX. No driver is needed.

    Raises:
        CompileError: the source does not compile for it. Unavailable: no NVRTC.
    """
    target = cache_dir() / f"{kernel.key(toolchain(), arch)}.cubin"
    report, text = target.with_suffix(".log"), target.with_suffix(".ptx")
    if not (target.exists() and report.exists() and text.exists()):
        nvrtc, program, log = _nvrtc(kernel, arch, "--ptxas-options=-v")
        try:
            ptx = nvrtc.getPTX(program)
            put(text, ptx if isinstance(ptx, bytes) else ptx.encode())
            put(report, log.encode())
            put(target, _whole(bytes(nvrtc.getCUBIN(program))))
        finally:
            nvrtc.destroyProgram(program)
    return target, report.read_text(), text.read_text()


def _whole(cubin: bytes) -> bytes:
    """CuPy 14 takes the last byte, a zero, for the end of a string and drops it: the driver does not mind, nvdisasm
    does. The ELF header says how long the file is."""
    start, (size, count) = struct.unpack_from("<Q", cubin, 32)[0], struct.unpack_from("<HH", cubin, 54)  # e_ph*
    return cubin.ljust(start + size * count, b"\0")


def _disassemble(cubin: Path) -> str:
    """SASS by nvdisasm of the PATH or of the triton package; empty if neither can read this file."""
    places = [shutil.which("nvdisasm")]
    if (spec := importlib.util.find_spec("triton")) and spec.submodule_search_locations:
        places.append(str(Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "nvdisasm"))
    for tool in places:
        if tool and Path(tool).exists():
            done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout
    return ""


def _matrix_instructions(cubin: Path, ptx: str) -> tuple[str, ...]:
    """Tensor-core instructions: of the machine code if it can be read, else of the PTX it was made from."""
    found = re.findall(r"\b((?:HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA)(?:\.\w+)*)", _disassemble(cubin))
    found = found or re.findall(r"\b((?:mma\.sync|wgmma\.mma_async)[.\w]*)", ptx)
    return tuple(sorted(set(found)))


def require_arch(arch: str, needed: str, who: str) -> None:
    """Raises UsageError if it is another architecture: wgmma exists on sm_90a only."""
    if arch != needed:
        raise UsageError(f"{who} is made of instructions of {needed}, which {arch} does not have")


def reported(log: str, entry: str) -> tuple[int | None, int | None, int]:
    """Registers, spilled bytes and static shared bytes of one kernel, by ptxas' report on a file of several.

    Functions that are no kernels are somebody's: their spills count for every kernel of the file.
    """
    sections = re.split(r"Compiling entry function '(\w+)'", log)
    kernels = dict(zip(sections[1::2], sections[2::2], strict=True))
    own = kernels.get(entry, "")
    registers, static = re.search(r"Used (\d+) registers", own), re.search(r"(\d+) bytes smem", own)
    properties = re.findall(r"Function properties for (\w+)\n(.* bytes stack frame,.*)", log)
    lines = [line for name, line in properties if name == entry or name not in kernels]
    spills = [int(count) for line in lines for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", line)]
    return int(registers[1]) if registers else None, max(spills, default=None), int(static[1]) if static else 0


def resources(kernel: Kernel, arch: str) -> Resources:
    """Registers and spilled bytes a thread, shared bytes a block; tensor-core instructions of the whole file."""
    cubin, log, ptx = compile_cubin(kernel, arch)
    registers, spills, static = reported(log, kernel.entry)
    return Resources(
        arch=arch,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=kernel.shared_bytes + static,
        tensor_core=_matrix_instructions(cubin, ptx),
        toolchain=toolchain(),
        threads=kernel.threads,
    )


def hopper_resources(kernel: Kernel, arch: str) -> Resources:
    """As `resources`, of a kernel that lives from wgmma and TMA.

    Raises:
        RuntimeError: it does not use them, or ptxas gave up on what makes them fast: it serializes wgmma whose
            registers are touched too early (C7510, C7514), or ignores setmaxnreg (C7508).
    """
    _, log, ptx = compile_cubin(kernel, arch)
    if wrong := re.search(r".*(?:C7508|C751[04]|are serialized|setmaxnreg ignored).*", log):
        raise RuntimeError(f"ptxas on {kernel.source.name}: {wrong[0].strip()}")
    for needed in ("wgmma.mma_async", "cp.async.bulk.tensor", "mbarrier.try_wait"):
        if needed not in ptx:
            raise RuntimeError(f"{kernel.source.name} compiles to no {needed}")
    return resources(kernel, arch)


# ---- on the GPU ----


def current_arch() -> str:
    """Architecture of torch's current device, with the suffix that opens all of its instructions."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise UsageError(f"compute capability {major}.{minor} is not supported; these kernels need 8.0 or newer")
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def _load(kernel: Kernel) -> Any:
    """CuPy's function, compiled for torch's current device and loaded into torch's context."""
    import cupy
    import torch

    cubin = compile_cubin(kernel, current_arch())[0]
    torch.cuda.current_stream()  # makes torch's context, which CuPy then shares
    with cupy.cuda.Device(torch.cuda.current_device()):
        raw = cupy.RawModule(path=str(cubin)).get_function(kernel.entry)
        if kernel.shared_bytes > 48 * 1024:  # above this a kernel must ask
            raw.max_dynamic_shared_size_bytes = kernel.shared_bytes
        return raw.kernel


def resident_blocks(kernel: Kernel, cluster: int) -> int:
    """Blocks of a kernel of one block a multiprocessor that run at once on torch's current device.

    In clusters that are fewer than multiprocessors: a cluster lies within one GPC, and not every GPC has a multiple
    of `cluster` left. A persistent grid that is larger runs its last clusters after all others: twice the time.

    Raises:
        UsageError: not one cluster fits.
    """
    import torch

    count = int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)
    if cluster == 1:
        return count
    found = active_clusters(_load(kernel).ptr, kernel.threads, kernel.shared_bytes, cluster)
    if not found:
        raise UsageError(f"no cluster of {cluster} blocks with {kernel.shared_bytes} bytes of shared memory fits here")
    return min(found * cluster, count)


def device(kernel: Kernel) -> Launch:
    """The kernel on torch's current CUDA device; a launch goes to torch's current stream.

    Raises:
        UsageError: the device cannot hold one block.
    """
    import cupy
    import torch

    index = torch.cuda.current_device()
    limit = cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index)
    if kernel.shared_bytes > limit:
        raise UsageError(f"needs {kernel.shared_bytes} bytes of shared memory a block; this device has {limit}")
    # what Triton asks too: current_stream() makes an object of it, which takes as long as the driver's launch
    stream = partial(torch._C._cuda_getCurrentRawStream, index)
    return Launcher(_load(kernel), kernel.threads, kernel.shared_bytes, stream)
