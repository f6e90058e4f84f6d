"""Which CPU the Numba competitors write code for: its lanes, its special instructions; for tests, those of another."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Collection
from functools import cache

import llvmlite.binding
import numba

from rooftune.core import UsageError

X86 = ("x86_64", "AMD64")
PAIRS = {  # lanes -> (feature, LLVM's name of pmaddwd)
    4: ("sse2", "sse2.pmadd.wd"),
    8: ("avx2", "avx2.pmadd.wd"),
    16: ("avx512bw", "avx512.pmaddw.d.512"),
}

_pretended: frozenset[str] | None = None


@cache
def native() -> frozenset[str]:
    """What this CPU can do, in LLVM's names; NUMBA_CPU_FEATURES is obeyed as numba itself does."""
    given = numba.config.CPU_FEATURES  # "" if NUMBA_CPU_NAME is generic
    if given is not None:
        names = frozenset(name[1:] for name in given.split(",") if name.startswith("+"))
    else:
        names = frozenset(name for name, there in llvmlite.binding.get_host_cpu_features().items() if there)
    return names if "amx-tile" not in names or _tiles_allowed() else names - {n for n in names if n.startswith("amx-")}


def _tiles_allowed() -> bool:
    """Ask Linux for AMX's tiles, for all threads of this process: without, their first use is an illegal instruction
    (Documentation/arch/x86/xstate.rst)."""
    if not sys.platform.startswith("linux"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def features() -> frozenset[str]:
    """What kernels are written for: what this CPU can do, unless a test pretends another."""
    return native() if _pretended is None else _pretended


def pretend(names: Collection[str]) -> None:
    """Write kernels as for a CPU with these features and no others, and run them here all the same.

    LLVM splits vectors that are wider than this CPU's, and instructions that it lacks are spelled out
    (`numba_dot`): the values are those of the other CPU, the time is not. So nothing but this call turns it on,
    in a process that measures nothing.

    Raises:
        RuntimeError: a kernel is imported already; its space follows the CPU.
    """
    global _pretended
    common = "rooftune.kernels.common."
    late = [n for n in sys.modules if n.startswith("rooftune.kernels.") and n.endswith(".numba") and common not in n]
    if late:
        raise RuntimeError(f"too late to pretend another CPU: {', '.join(late)} is imported")
    _pretended = frozenset(names)


def vector_width() -> int:
    """fp32 lanes of a vector register: 16 with AVX-512, 8 with AVX2, else 4 (SSE, NEON)."""
    return 16 if "avx512f" in features() else 8 if {"avx2", "fma"} <= features() else 4


def require(dtype: str) -> None:
    """LLVM converts fp16 by a C function that is not in the process where the CPU has no instruction for it.

    Raises:
        UsageError: the precision cannot be computed on this CPU.
    """
    if dtype == "fp16" and platform.machine() in X86 and "f16c" not in native():
        raise UsageError("fp16 needs a CPU with F16C")


def tile_formats() -> tuple[str, ...]:
    """Precisions for which this CPU has instructions that multiply tiles of 16 rows (AMX)."""
    wide = vector_width() == 16  # a vector is a row of a tile
    return tuple(dtype for dtype in ("bf16", "int8") if wide and f"amx-{dtype}" in features())


def dot_formats() -> tuple[str, ...]:
    """Precisions for which this CPU has an instruction that multiplies and adds several steps of k."""
    wide = vector_width() == 16
    names = {"bf16": "avx512bf16", "int8": "avx512vnni"}
    return tuple(dtype for dtype, feature in names.items() if wide and feature in features())


def dot_is_fast(dtype: str) -> bool:
    """Intel's `vdpbf16ps` has a quarter of the rate of AMD's (84 against 477 GFLOP/s measured on an Emerald
    Rapids and a Zen 5 core), half that of fp32; `vpdpbusd` is fast on both."""
    return dtype == "int8" or zen()


def zen(version: int | None = None) -> bool:
    """Whether this is one of AMD's Zen, or that one (Zen 4: one FMA and one load of 512 bits a cycle; Zen 5: two)."""
    name = llvmlite.binding.get_host_cpu_name()
    return name.startswith("znver") if version is None else name == f"znver{version}"


def int8_pairs() -> bool:
    """Whether this CPU multiplies pairs of 16-bit numbers and adds them to 32 bits (`pmaddwd`: exact on int8)."""
    return PAIRS[vector_width()][0] in features() and platform.machine() in X86
