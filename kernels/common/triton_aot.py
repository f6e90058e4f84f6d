"""Triton to machine code for an architecture that is not here, and what that code takes.

Registers and spills come from the assembler that Triton's wheel uses for the architecture, shared memory
from Triton's metadata, matrix instructions from the disassembled machine code (from the PTX where the
wheel's disassembler does not know the architecture). Verified for Triton 3.6 and 3.9.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rooftune.core import Resources, UsageError

CAPABILITY = {"sm_80": 80, "sm_89": 89, "sm_90a": 90, "sm_100a": 100, "sm_120a": 120}
WARP = 32

# Matrix instructions in machine code (SASS) and in PTX: warp-wide, warpgroup-wide, Blackwell's.
_SASS = re.compile(r"\b((?:U?[HIQBD]G?MMA|UTC[A-Z]*MMA|OMMA)(?:\.[A-Z0-9_x]+)*)")
_PTX = re.compile(r"\b(mma\.sync\.aligned|wgmma\.mma_async|tcgen05\.mma)")
_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


class _Named:
    """What Triton's launcher asks of a driver, for a device of which there is only the architecture."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.capability, self.target = capability, GPUTarget("cuda", capability, WARP)

    def get_current_device(self) -> int:
        return self.capability  # no device's number: its kernels have a cache of their own in this process

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compile_kernel(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], keywords: Mapping[str, Any], arch: str
) -> Resources:
    """Compile one kernel and read its resources; needs neither GPU nor driver.

    Triton's own launcher does it, up to the launch: what it specialises on is part of its cache's key, in another way
    in every version, and a launch on the device has to find what was compiled here.

    Args:
        kernel: what `triton.jit` returned.
        arguments: as for a launch; tensors may lie anywhere.
        keywords: constants of the kernel, num_warps, num_stages and other compiler options.
        arch: "sm_80", "sm_90a", "sm_100a" or "sm_120a".
    Raises:
        UsageError: unknown architecture, or an interpreted kernel.
        triton.errors.TritonError, RuntimeError: Triton or its assembler refused the kernel.
    """
    if arch not in CAPABILITY:
        raise UsageError(f"Triton kernels compile for {', '.join(CAPABILITY)}; not for '{arch}'")
    if not hasattr(kernel, "cache_key"):
        raise UsageError("kernel is interpreted (TRITON_INTERPRET=1); compile in a process without that variable")
    import triton
    from triton.runtime.driver import driver

    stand_in, before = _Named(CAPABILITY[arch]), driver._active  # `driver.active` would look for a real one
    driver.set_active(stand_in)
    try:
        built = kernel.warmup(*arguments, grid=grid, **keywords)
    finally:
        driver._active = before
        kernel.device_caches.pop(stand_in.capability, None)  # some MB a kernel; what counts is on disk
    registers, spilled, assembler = assemble(built.asm["ptx"], CAPABILITY[arch])
    return Resources(
        arch=arch,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=int(built.metadata.shared),
        tensor_core=matrix_instructions(built.asm["cubin"], built.asm["ptx"]),
        toolchain=f"triton {triton.__version__}, {assembler}",
        threads=int(built.metadata.num_warps) * WARP,
        binary=hashlib.sha256(built.asm["cubin"]).hexdigest()[:16],
    )


def assemble(ptx: str, capability: int) -> tuple[int | None, int | None, str]:
    """Registers per thread, bytes of spill stores and loads, and the assembler's name, by `ptxas -v`.

    The wheel holds two assemblers and newer PTX than a toolkit on the machine may read: Triton's own
    choice is asked for.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(capability)
    target = re.search(r"^\.target\s+(sm_\w+)", ptx, re.MULTILINE)
    assert target is not None, "Triton's PTX names its target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas {tool.version}: {done.stderr.strip().splitlines()[-1:]}")
    log = done.stderr + done.stdout
    used, spilled = _USED.search(log), _SPILLED.search(log)
    return (
        int(used[1]) if used else None,
        int(spilled[1]) + int(spilled[2]) if spilled else None,
        f"ptxas {tool.version}",
    )


def matrix_instructions(cubin: bytes, ptx: str) -> tuple[str, ...]:
    """Matrix instructions of the machine code; of the PTX if the wheel cannot disassemble it."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 0 and done.stdout:
        return tuple(sorted(set(_SASS.findall(done.stdout))))
    return tuple(sorted(set(_PTX.findall(ptx))))
