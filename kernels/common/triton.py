"""Triton: launching, warming and offline compiling of kernels, the same on a GPU and in the interpreter.

A competitor describes its launch once, as a `Launch`; from it come the native run, the interpreted run
and the machine code for an architecture that is not here. Nothing here uses `triton.autotune`: configs
are the tuner's business.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import triton
import triton.language as tl

from rooftune.check import Run
from rooftune.core import PRECISIONS, Config, Problem, Resources, Space, Unavailable, UsageError

REQUIRES = ("triton",)
# Triton reads these when it is imported. Contraction to FMA is on by default up to 3.9 and off after:
# stated, so that speed and rounding do not change with the version.
ENV = {
    "emulate": {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"},
    "native": {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"},
    "compile": {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"},
}
# Most shared memory one block may have. A config above the largest can launch nowhere; defaults stay
# below the smallest of the architectures we compile for (sm_120).
SHARED_LIMIT = {"sm_80": 166912, "sm_90a": 232448, "sm_100a": 232448, "sm_120a": 101376}
SHARED_MAX, SHARED_MIN = max(SHARED_LIMIT.values()), min(SHARED_LIMIT.values())
ELEMENT_LIMIT = 2**20  # Triton refuses larger tensors (language.core.TRITON_MAX_TENSOR_NUMEL)


@triton.jit
def round_tf32(x):  # type: ignore[no-untyped-def]
    """fp32 to the nearest tf32, ties away from zero (cvt.rna.tf32.f32), kept as fp32.

    Tensor cores only drop the low 13 bits: that shrinks every operand by 3.5e-4 on average, and a
    product's relative error would be 7.7e-4 instead of 2.9e-4. NaN has no room to round.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Operand:
    """A tensor argument: torch dtype name, and for access through a TMA descriptor its shape and box."""

    dtype: str
    shape: tuple[int, ...] = ()
    box: tuple[int, ...] = ()

    @classmethod
    def of(cls, problem: Problem, role: str) -> Operand:
        """An operand in the problem's storage format (`role` "in") or output format ("out")."""
        p = PRECISIONS[problem.precision]
        return cls(p.out if role == "out" else p.storage)

    def bind(self, tensor: Any) -> Any:
        """What the kernel is given for a contiguous tensor."""
        if not self.box:
            return tensor
        from triton.tools.tensor_descriptor import TensorDescriptor

        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * size)
        return TensorDescriptor(tensor, list(self.shape), strides, list(self.box))


@dataclass(frozen=True)
class Launch:
    """One kernel launch: parameters in the kernel's order are operands, then scalars, then constants.

    An operand of None is an argument that this problem does not have.
    """

    kernel: Any
    grid: tuple[int, ...]
    operands: tuple[Operand | None, ...]
    scalars: tuple[int | float, ...]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keywords(self) -> dict[str, Any]:
        """Constants and compiler options, as a launch takes them."""
        return {**self.constants, **self.options, "enable_fp_fusion": True}

    def runner(self) -> Callable[..., None]:
        """launch(*tensors) on the current stream; only the operands that there are."""
        launch, operands, scalars, keywords = self.kernel[self.grid], self.operands, self.scalars, self.keywords
        if all(o is not None and not o.box for o in operands):

            def direct(*tensors: Any) -> None:
                launch(*tensors, *scalars, **keywords)

            return direct

        def bound(*tensors: Any) -> None:
            given = iter(tensors)
            arguments = [None if o is None else o.bind(next(given)) for o in operands]
            launch(*arguments, *scalars, **keywords)

        return bound

    def _arguments(self, device: str) -> list[Any]:
        """One element stands for a tensor: Triton specialises on type and alignment, not on size."""
        import torch

        stand_in = [
            None if o is None else o.bind(torch.empty(16, dtype=getattr(torch, o.dtype), device=device))
            for o in self.operands
        ]
        return [*stand_in, *self.scalars]

    def warm(self) -> None:
        """Compile for the current device and load the code, so that a run does neither.

        Raises:
            triton.runtime.errors.OutOfResources: the config does not fit this device.
        """
        compiled = self.kernel.warmup(*self._arguments("cuda"), grid=self.grid, **self.keywords)
        compiled._init_handles()

    def compile(self, arch: str) -> Resources:
        """Machine code for `arch` and what it takes; needs neither GPU nor driver. A launch finds it in the cache."""
        from rooftune.kernels.common.triton_aot import compile_kernel

        found = compile_kernel(self.kernel, self.grid, self._arguments("cpu"), self.keywords, arch)
        return replace(found, binary=f"{found.binary} {self.grid}")


def multiprocessors() -> int:
    """Of the current device.

    Raises:
        Unavailable: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("no GPU that torch can use: Triton has no CPU backend, only its interpreter")
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


@cache
def roomy() -> bool:
    """Whether this process serves a device on which a block may have all of SHARED_MAX, such as an H200 or a B200.

    Defaults that are good there do not launch on smaller ones; those that launch everywhere had 0.90 (GEMM), 0.68
    (attention) and 0.29 (its backward) of torch's best call on an H200, where these had 1.00, 0.76 and 0.72.
    """
    import torch

    if interpreted() or not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "shared_memory_per_block_optin", 0)) >= SHARED_MAX


def native(*launches: Launch) -> None:
    """Make launches ready on the device.

    Raises:
        Unavailable: no device, or Triton runs interpreted in this process.
    """
    if interpreted():
        raise Unavailable("Triton is interpreted in this process (TRITON_INTERPRET=1); start a fresh one to build")
    multiprocessors()
    for launch in launches:
        launch.warm()


def interpreted() -> bool:
    """Whether kernels decorated in this process are interpreted (read by Triton when it is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def emulated(run: Run) -> Run:
    """The run on CPU tensors, in an interpreter that does bf16, fp8 and tf32 as the hardware does.

    Raises:
        UsageError: the variable was not set before Triton was imported.
    """
    if not interpreted():
        raise UsageError("emulating Triton needs TRITON_INTERPRET=1 in the environment before it is imported")
    from rooftune.kernels.common.triton_interpret import quiet, repair

    repair()
    return quiet(run)


def row_space(held: int = 64, wanted: int = 16) -> Space:
    """The space of kernels over rows of [m, n]: whole rows in registers, or chunks of one row in a loop.

    `block_n` 0 holds `block_m` whole rows at a time; another value walks a single row in chunks of that
    many columns, and `num_stages` is the depth of that loop's software pipeline. `held`: fp32 values of
    x a thread may hold (half of that with 1024 threads, which have 64 registers each); `wanted`: how many
    it holds by default. 16 are two 16-byte loads of bf16.
    """

    def shaped(config: Config, problem: Problem) -> bool:
        if config["block_n"]:
            return config["block_m"] == 1 and bool(config["block_n"] < problem["n"])
        return config["num_stages"] == 1

    def holds(config: Config, problem: Problem) -> bool:
        """No spills; and for rows that matter no threads that only repeat what others hold."""
        block = config["block_n"] or row_block(problem["n"])
        per_thread = config["block_m"] * block / (32 * config["num_warps"])
        return (per_thread >= 2 or block <= 1024) and per_thread <= (held if config["num_warps"] <= 16 else held // 2)

    def default(problem: Problem) -> Config:
        whole = row_block(problem["n"])
        if whole > 32 * 16 * held:
            # 1.6 times as fast on an H200 as 4096 columns by 16 warps in two stages
            return {"block_m": 1, "block_n": 2048, "num_warps": 8, "num_stages": 4}
        rows = min(power_of_two(problem["m"]), max(1, 1024 // whole), 16)
        warps = min(16, max(1, rows * whole // (32 * wanted)))
        if whole > 32 * 16 * held // 2:  # softmax's backward spilled 8 bytes at 16384 by 16 warps
            warps = 32
        return {"block_m": rows, "block_n": 0, "num_warps": warps, "num_stages": 1}

    axes = {
        "block_m": (1, 2, 4, 8, 16),
        "block_n": (0, 1024, 2048, 4096),
        "num_warps": (1, 2, 4, 8, 16, 32),
        "num_stages": (1, 2, 3, 4),
    }
    return Space(axes=axes, where=(shaped, holds), default=default)


def row_block(n: int) -> int:
    """The block that holds a row of n: a power of two of at least 16."""
    return power_of_two(max(n, 16))
