"""What the analytic models share: constants of NVIDIA GPUs, what a config takes of a multiprocessor, how loads add up.

The constants are round figures of public microbenchmarks and of DeepGEMM's own picker (its L1 and L2 terms).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rooftune.core import Config, Resources
from rooftune.occupancy import multiprocessor, occupancy

if TYPE_CHECKING:
    from rooftune.autotune.ranking import Gpu
    from rooftune.registry import Impl

CLUSTERED = 120 / 132  # share of multiprocessors that clusters of four find room on (H200: what the driver says)
LATENCY_S = 0.7e-6  # of a load that misses L2
LAUNCH_S = 2e-6
SHARED_RATE = 128  # bytes a cycle and multiprocessor, between shared memory and registers or tensor cores
SHARED_LOAD = 3  # cycles of a multiprocessor for a warp's 16-byte load from shared memory, broadcasts included
L2_RATE = 64  # the same, from L2 to one multiprocessor ...
L2_TOTAL = 46  # ... and what is left of it when all of them read
EXP_RATE = 16  # exponentials a cycle and multiprocessor
FMA_RATE = 128  # fp32 operations a cycle and multiprocessor
MMA_SYNC = 0.62  # of the tensor cores' peak, for warp-wide instructions on architectures with warpgroup-wide ones
SIMT = 0.85  # of the fp32 peak, for register tiles
SPILL_BYTES = 256  # spilled bytes a thread that cost as much again
SOFTMAX_OPS = 8  # per score, beside the exponential
STREAM_STEPS = 4  # of k that a block which streams has at least (kernels/gemm/cupy_wgmma.py)
STEP_CYCLES = 60  # of a block per step of its loop: barrier, waiting for a stage, addresses
OVERLAP = 4  # exponent of `joined`: two equal loads together take 1.19 times as long as one


@dataclass(frozen=True)
class Traits:
    """What the models must know of a competitor beside its axes."""

    triton: bool
    warpgroup: bool  # written for warpgroup-wide instructions

    @classmethod
    def of(cls, impl: Impl) -> Traits:
        """By the language it builds on, and its name."""
        return cls(impl.language.startswith("triton"), "wgmma" in impl.name)

    def wide(self, rows: int, warps: int, gpu: Gpu, compiled: Resources | None) -> bool:
        """Whether a tile's product uses warpgroup-wide (or Blackwell's) instructions."""
        if compiled is not None and compiled.tensor_core:
            starts = ("HGMMA", "IGMMA", "QGMMA", "UTC", "wgmma", "tcgen05")
            return any(name.startswith(starts) for name in compiled.tensor_core)
        newest = gpu.arch.startswith(("sm_90", "sm_10"))
        return newest and (self.warpgroup or (self.triton and rows >= 64 and warps % 4 == 0))


def ceil(a: float, b: float) -> int:
    return -(-int(a) // int(b))


def joined(*loads_s: float) -> float:
    """Loads that overlap: nearly the longest, and a little more for every other one, which also breaks ties."""
    top = max(loads_s)
    return float(top * sum((s / top) ** OVERLAP for s in loads_s) ** (1 / OVERLAP)) if top > 0 else 0.0


def axis(config: Config, *names: str, default: int = 1) -> int:
    """The value of the first of these axes that the competitor has."""
    return next((int(config[name]) for name in names if name in config), default)


def warps_of(config: Config) -> int | None:
    """Warps of a block, by the axes that our kernels have for it."""
    if "num_warps" in config:
        return int(config["num_warps"])
    if "warps_m" in config and "warps_n" in config:
        return int(config["warps_m"] * config["warps_n"])
    if "num_threads" in config:
        return ceil(config["num_threads"], 32)
    return None


def stages_of(config: Config) -> int:
    return axis(config, "num_stages", "stages", default=2)


def registers_of(traits: Traits, warps: int, held: int, wanted: int) -> int:
    """Registers at the launch. A warpgroup-specialised kernel moves them to those who compute, up to 240 a thread."""
    if not traits.warpgroup:
        return wanted
    return 65536 // (32 * warps) // 8 * 8 + max(0, held - 208)


def resident(
    gpu: Gpu, config: Config, warps: int, registers: int, shared: int, compiled: Resources | None
) -> tuple[int, float]:
    """Blocks on a multiprocessor at a time, and by what factor spills slow them.

    A kernel that caps its registers for a number of blocks gets that many, and spills what it lacks: 32 registers
    of each thread are taken to cost as much again.
    """
    asked = axis(config, "min_blocks", "blocks_per_sm")
    threads = warps * 32
    if compiled is not None and None not in (compiled.registers, compiled.shared_bytes):
        registers, shared = int(compiled.registers or 0), int(compiled.shared_bytes or 0)
        slower = 1 + (compiled.spill_bytes or 0) / SPILL_BYTES
        return occupancy(gpu.arch, compiled.threads or threads, registers, shared).blocks, slower
    allowed = max(16, min(255, multiprocessor(gpu.arch).registers // (threads * max(asked, 1)) // 8 * 8))
    slower = 1 + max(0, registers - allowed) / 32
    return occupancy(gpu.arch, threads, min(registers, allowed), shared).blocks, slower


def feed_rate(gpu: Gpu, blocks: float, bytes_ahead: float, bytes_each: float = 0.0) -> float:
    """Bytes a second that one multiprocessor gets: Little's law, up to what its port to L2 carries.

    Args:
        blocks: on it at a time. bytes_ahead: under way for one of them; bytes_each: of one step, which is complete a
            latency and its own passage through the port after it was asked for. With one step ahead (two stages)
            a GEMM of 128 x 256 x 128 took 1.47 times as long on an H200 as with two and three of 64.
    """
    port = L2_RATE * gpu.clock_hz
    return min(port, blocks * bytes_ahead / (LATENCY_S + blocks * bytes_each / port))
