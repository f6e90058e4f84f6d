"""Theoretical occupancy: how many blocks of a kernel one multiprocessor holds, from registers, shared memory, threads.

Arithmetic only, no device. Limits are those of the CUDA programming guide's table of compute capabilities;
granularities those of the toolkit's `cuda_occupancy.h` (13.0), against which a test compares this file where
that header is installed: registers are given to warps in units of 256 within one of four sub-partitions, shared
memory to blocks in units of 128 bytes after 1 KiB that the driver keeps for itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from rooftune.core import UsageError

WARP = 32
SUB_PARTITIONS = 4  # each with its own register file and scheduler
REGISTER_UNIT = 256  # registers, per warp
SHARED_UNIT = 128  # bytes, per block
RESERVED_SHARED = 1024  # bytes a block, from compute capability 8.0 on
MAX_THREADS = 1024  # a block
MAX_REGISTERS = 255  # a thread


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor can hold at a time. `shared_per_block` is the opt-in limit."""

    warps: int
    blocks: int
    shared_bytes: int
    shared_per_block: int
    registers: int = 65536


_GA100 = Multiprocessor(64, 32, 164 * 1024, 163 * 1024)
_GA10X = Multiprocessor(48, 16, 100 * 1024, 99 * 1024)
_AD10X = Multiprocessor(48, 24, 100 * 1024, 99 * 1024)
_HOPPER = Multiprocessor(64, 32, 228 * 1024, 227 * 1024)
MULTIPROCESSORS: dict[int, Multiprocessor] = {  # compute capability times ten
    80: _GA100,
    86: _GA10X,
    87: Multiprocessor(48, 16, 164 * 1024, 163 * 1024),
    89: _AD10X,
    90: _HOPPER,
    100: _HOPPER,
    103: _HOPPER,
    120: _AD10X,  # 24 blocks, as cuda_occupancy.h has it
    121: _AD10X,
}


@dataclass(frozen=True)
class Occupancy:
    """`share` = resident warps / the most there can be; `limit` names what allows no further block."""

    blocks: int
    warps: int
    share: float
    limit: str


@cache
def multiprocessor(arch: str) -> Multiprocessor:
    """Limits of an architecture such as `sm_90a`.

    Raises:
        UsageError: one we have no table row for.
    """
    match = re.fullmatch(r"(?:sm|compute)_(\d{2,3})[af]?", arch)
    found = MULTIPROCESSORS.get(int(match[1])) if match else None
    if found is None:
        known = ", ".join(f"sm_{number}" for number in MULTIPROCESSORS)
        raise UsageError(f"no occupancy limits for architecture '{arch}'; known: {known}")
    return found


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """Blocks of `threads` that are resident together; 0 blocks if not even one can be launched.

    Args:
        registers: of a thread, as ptxas reports them.
        shared_bytes: of a block, static and dynamic together.
    Raises:
        UsageError: unknown architecture, or numbers that no kernel has.
    """
    sm = multiprocessor(arch)
    if threads < 1 or registers < 0 or shared_bytes < 0:
        raise UsageError(f"no kernel has {threads} threads, {registers} registers, {shared_bytes} bytes shared")
    warps = -(-threads // WARP)
    fits = {
        "threads": sm.warps // warps if threads <= MAX_THREADS else 0,
        "registers": _by_registers(sm, warps, registers),
        "shared memory": _by_shared(sm, shared_bytes),
        "blocks": sm.blocks,
    }
    blocks = min(fits.values())
    limit = next(name for name, value in fits.items() if value == blocks)
    return Occupancy(blocks, blocks * warps, blocks * warps / sm.warps, limit)


def _by_registers(sm: Multiprocessor, warps: int, registers: int) -> int:
    if registers > MAX_REGISTERS:
        return 0
    if not registers:
        return sm.blocks
    per_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    spread = -(-warps // SUB_PARTITIONS) * SUB_PARTITIONS  # a block's warps are dealt out to all sub-partitions
    if spread * per_warp > sm.registers:
        return 0
    return sm.registers // SUB_PARTITIONS // per_warp * SUB_PARTITIONS // warps


def _by_shared(sm: Multiprocessor, shared_bytes: int) -> int:
    if shared_bytes > sm.shared_per_block:
        return 0
    taken = -(-(shared_bytes + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
    return sm.shared_bytes // taken
