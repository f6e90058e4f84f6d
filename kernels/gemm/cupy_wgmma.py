"""CUDA C++ for compute capability 9.0: TMA, wgmma, clusters, warp-specialised persistent blocks.

Emulated down to swizzled shared memory, barrier phases, clusters and late or early completion. `swap_ab` multiplies
the transposed product, for few rows; `split_k` adds a second kernel; `stream_k` deals out what is left after whole
rounds of tiles in parts of k (cuda/schedule.cuh). wgmma reads int8 and tf32 along k only: an operand stored otherwise
is transposed first, by a kernel of its own. tf32 is rounded to the nearest by the tensor copies.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.common import cupy as cuda
from rooftune.kernels.common.cupy_tensormap import ALIGNMENT, Layout, bind, layout
from rooftune.kernels.common.resources import worst
from rooftune.kernels.gemm import EPILOGUES

DEVICES = ("cuda",)
PRECISIONS = ("fp16", "bf16", "tf32", "fp8", "int8")

LINE = 128  # bytes of a swizzled line in shared memory
ARCH = "sm_90a"
TRANSPOSED = ("int8", "tf32")  # where operands are not stored along k; fp8 exists along k only
REDUCE_THREADS = 256
STREAM_STEPS = 4  # of k, at least, for each block that streams: fewer cost less than a tile's sums through L2


def _tile(config: Config) -> tuple[int, int]:
    """Rows and columns of a block's tile as wgmma sees it: transposed with swap_ab."""
    m, n = config["block_m"], config["block_n"]
    return (n, m) if config["swap_ab"] else (m, n)


def _groups(config: Config) -> tuple[int, int]:
    """Consumer warpgroups, and 64-row parts of the tile that one of them has."""
    rows = _tile(config)[0]
    if config["schedule"] == "pingpong":
        return 2, rows // 64
    groups = 2 if rows == 256 else rows // 64
    return groups, rows // 64 // groups


def _cluster(config: Config) -> tuple[int, int]:
    """Blocks of a cluster along the rows and the columns of `_tile`."""
    m, n = config["cluster_m"], config["cluster_n"]
    return (n, m) if config["swap_ab"] else (m, n)


def _along_k(config: Config, problem: Problem) -> tuple[bool, bool]:
    """Whether the left and the right operand are stored along k when the main kernel gets them."""
    ta, tb = problem.flag("transpose", "nn")
    transposed = problem.precision in TRANSPOSED
    a, b = ta == "n" or transposed, tb == "t" or transposed
    return (b, a) if config["swap_ab"] else (a, b)


def _raw(config: Config, problem: Problem) -> bool:
    """Results go to memory as they are in the accumulators, without the buffers of the tensor store."""
    return FORMATS[problem.precision].bytes_out == 4 or config["split_k"] > 1


def _shared_bytes(config: Config, problem: Problem) -> int:
    """The ring, two boxes of results a consumer warpgroup, the barriers."""
    rows, cols = _tile(config)
    ring = config["num_stages"] * (rows + cols) * config["block_k"] * cuda.bytes_in(problem)
    width = next(w for w in (64, 32, 16) if cols % w == 0)
    box = 0 if _raw(config, problem) else cols * LINE if config["swap_ab"] else 64 * width * 2
    return int(ring + 2 * _groups(config)[0] * box + 8 * (2 * config["num_stages"] + 2))


def _rows(config: Config, problem: Problem) -> bool:
    """wgmma has 64 rows. Two warpgroups in turn hold up to 128 rows each; one tile up to 256."""
    rows = _tile(config)[0]
    return rows in ((64, 128) if config["schedule"] == "pingpong" else (64, 128, 192, 256))


def _lines(config: Config, problem: Problem) -> bool:
    """Panels are 128 bytes wide, and each block of a cluster fetches whole groups of eight lines."""
    size, (rows, cols) = cuda.bytes_in(problem), _tile(config)
    if config["block_k"] * size not in (LINE, 2 * LINE):
        return False
    # blocks side by side share the left tile, blocks one below the other the right one
    for extent, along_k, sharers in zip(
        (rows, cols), _along_k(config, problem), reversed(_cluster(config)), strict=True
    ):
        lines = extent if along_k else config["block_k"]
        if lines % (8 * sharers) or (not along_k and extent % 64):
            return False
    return True


def _registers(config: Config, problem: Problem) -> bool:
    """Accumulators of a consumer: 232 registers a thread, 160 with three warpgroups, less some 40 for the rest."""
    groups, parts = _groups(config)
    sums = parts * _tile(config)[1] // 2 * (2 if config["promote"] else 1)
    return sums <= (192 if groups <= 2 else 112)


def _fits(config: Config, problem: Problem) -> bool:
    return _shared_bytes(config, problem) <= cuda.SHARED_LIMIT


def _splits(config: Config, problem: Problem) -> bool:
    """Every split has a tile of k; partial sums are bounded to 256 MiB."""
    split, tiles = config["split_k"], -(-problem["k"] // config["block_k"])
    return split == 1 or (split <= tiles and split * problem["m"] * problem["n"] * 4 <= 2**28)


def _streams(config: Config, problem: Problem) -> bool:
    return not config["stream_k"] or config["split_k"] == 1


def _shares(config: Config, problem: Problem) -> bool:
    """A cluster along m or n has tiles for all of its blocks."""
    return all(config[f"cluster_{x}"] == 1 or problem[x] > config[f"block_{x}"] for x in "mn")


def _promotes(config: Config, problem: Problem) -> bool:
    return not config["promote"] or problem.precision == "fp8"


def _default(problem: Problem) -> Config:
    """128 x 256; few rows: transposed, and enough splits to fill 132 blocks. fp8 without promotion, which takes a third
    of the speed and is within the operator's tolerance either way."""
    m, n, k = (problem[x] for x in "mnk")
    small = m <= 64
    wide = 256 if m * n >= 128 * 256 * 66 else 128  # half of the multiprocessors at least
    config: Config = {
        "block_m": next(r for r in (16, 32, 64) if m <= r) if small else 128,
        "block_n": 128 if small else wide,
        "block_k": LINE // cuda.bytes_in(problem),
        "num_stages": 6 if small else 4 if wide == 256 else 5,
        "cluster_m": 1,
        "cluster_n": 1,
        "schedule": "cooperative",
        "group_m": 8,
        "split_k": 1,
        "stream_k": 0,
        "swap_ab": int(small),
        "promote": 0,
    }
    if small and not _along_k(config, problem)[1]:
        config["block_m"] = 64  # a stored along m comes in 64s
    while small and config["split_k"] < 8 and -(-n // 128) * config["split_k"] * 2 <= 132:
        if -(-k // config["block_k"]) < 8 * config["split_k"]:
            break
        config["split_k"] *= 2
    return config


SPACE = Space(
    axes={
        "block_m": (16, 32, 64, 128, 256),
        "block_n": (64, 128, 192, 256),
        "block_k": (32, 64, 128, 256),
        "num_stages": (3, 4, 5, 6),
        "cluster_m": (1, 2),
        "cluster_n": (1, 2),
        "schedule": ("cooperative", "pingpong"),
        "group_m": (1, 8, 16),
        "split_k": (1, 2, 4, 8),
        "stream_k": (0, 1),
        "swap_ab": (0, 1),
        "promote": (0, 1),
    },
    where=(_promotes, _streams, _shares, _rows, _lines, _registers, _fits, _splits),
    default=_default,
)


def _kernel(problem: Problem, config: Config) -> cuda.Kernel:
    (rows, cols), (cluster_rows, cluster_cols) = _tile(config), _cluster(config)
    left, right = _along_k(config, problem)
    if problem.precision == "fp8" and not (left and right):
        raise UsageError(f"{problem}: wgmma reads fp8 along k only: transpose=nt")
    macros = {
        "PRECISION": cuda.PRECISION_CODE[problem.precision],
        "LEFT_MN": int(not left),
        "RIGHT_MN": int(not right),
        "EPILOGUE": EPILOGUES.index(problem.flag("epilogue", "none")),
        "TILE_ROWS": rows,
        "TILE_COLS": cols,
        "CLUSTER_ROWS": cluster_rows,
        "CLUSTER_COLS": cluster_cols,
        "CLUSTER_SIZE": cluster_rows * cluster_cols,
        "PINGPONG": int(config["schedule"] == "pingpong"),
        **cuda.axes(config, BLOCK_K="block_k", STAGES="num_stages", GROUP_M="group_m", SPLIT_K="split_k"),
        **cuda.axes(config, STREAM_K="stream_k", SWAP_AB="swap_ab", PROMOTE="promote"),
    }
    threads = 128 * (1 + _groups(config)[0])
    source = Path(__file__).with_suffix(".cu")
    return cuda.Kernel(source, "gemm_kernel", tuple(macros.items()), threads, _shared_bytes(config, problem))


def _reduce(problem: Problem, config: Config) -> cuda.Kernel:
    """The sum over split_k. Its loads are 16 bytes of accumulators at most."""
    macros = {
        "PRECISION": cuda.PRECISION_CODE[problem.precision],
        "EPILOGUE": EPILOGUES.index(problem.flag("epilogue", "none")),
        "SPLIT_K": config["split_k"],
        "VEC": cuda.chunk(problem["n"], 4),
    }
    return cuda.Kernel(Path(__file__).with_suffix(".reduce.cu"), "reduce_kernel", tuple(macros.items()), REDUCE_THREADS)


def _transpose(problem: Problem, which: int) -> cuda.Kernel | None:
    """The kernel that stores operand 0 (a) or 1 (b) along k, where wgmma cannot read it as it is.

    Raises:
        UsageError: lines of it are no multiples of 16 bytes.
    """
    if problem.precision not in TRANSPOSED or problem.flag("transpose", "nn")[which] == "nt"[which]:
        return None
    size, lines, length = cuda.bytes_in(problem), problem["k"], problem["mn"[which]]
    if length * size % 4 or lines * size % ALIGNMENT:
        what = f"{problem.precision} whose k is a multiple of {ALIGNMENT // size}, and the other size of {4 // size}"
        raise UsageError(f"gemm/cupy_wgmma transposes {what}; this is {lines} x {length}")
    shared = 64 * (68 if size == 1 else 65 * size)
    return cuda.Kernel(Path(__file__).with_suffix(".transpose.cu"), "transpose_kernel", (("SIZE", size),), 256, shared)


def _transposed(problem: Problem, compiled: Callable[[cuda.Kernel], cuda.Launch], device: str, which: int) -> Run:
    """along_k(operand): operand 0 (a) or 1 (b) as stored along k, by a kernel if it must be."""
    import torch

    kernel = _transpose(problem, which)
    if kernel is None:
        return lambda operand: operand
    launch, lines, length = compiled(kernel), problem["k"], problem["mn"[which]]
    dtype = getattr(torch, FORMATS[problem.precision].storage)
    result = torch.empty((length, lines), dtype=dtype, device=device)
    grid = -(-lines // 64) * -(-length // 64)

    def along_k(operand: Any) -> Any:
        launch(grid, result, operand, lines, length)
        return result

    return along_k


def _layouts(problem: Problem, config: Config) -> tuple[Layout, Layout, Layout | None]:
    """Tensor maps of the left operand, the right one, and c if it is stored by one.

    Raises:
        UsageError: TMA or wgmma cannot take the problem.
    """
    m, n, k = (problem[x] for x in "mnk")
    size, f = cuda.bytes_in(problem), FORMATS[problem.precision]
    stored = "tfloat32" if problem.precision == "tf32" else f.storage
    extents = (n, m) if config["swap_ab"] else (m, n)
    made = []
    for extent, block, along_k, sharers in zip(
        extents, _tile(config), _along_k(config, problem), reversed(_cluster(config)), strict=True
    ):
        if along_k:
            made.append(layout(stored, size, extent, k, (LINE // size, block // sharers)))
        else:
            made.append(layout(stored, size, k, extent, (LINE // size, config["block_k"] // sharers)))
    if _raw(config, problem):
        return made[0], made[1], None
    cols = _tile(config)[1]
    box = (64, cols) if config["swap_ab"] else (next(w for w in (64, 32, 16) if cols % w == 0), 64)
    return made[0], made[1], layout(f.out, f.bytes_out, m, n, box)


def _runner(
    problem: Problem, config: Config, compiled: Callable[[cuda.Kernel], cuda.Launch], blocks: int, device: str
) -> Run:
    """run(c: [m, n], a, b as stored[, scale_a: [1], scale_b: [1]][, what the epilogue adds]), on at most `blocks`."""
    import torch

    left, right, out_layout = _layouts(problem, config)
    launch = compiled(_kernel(problem, config))
    m, n, k = (problem[x] for x in "mnk")
    (rows, cols), (cluster_rows, cluster_cols) = _tile(config), _cluster(config)
    extents = (n, m) if config["swap_ab"] else (m, n)
    cluster, split = cluster_rows * cluster_cols, config["split_k"]
    tiles = -(-extents[0] // (rows * cluster_rows)) * -(-extents[1] // (cols * cluster_cols)) * split
    if config["stream_k"]:
        tiles = max(tiles, tiles * -(-k // config["block_k"]) // STREAM_STEPS)
    grid = min(tiles, max(blocks // cluster, 1)) * cluster
    scaled, sums = problem.precision == "fp8", torch.int32 if problem.precision == "int8" else torch.float32
    partial, reduce, parts, flags = None, None, None, None
    if split > 1:
        partial = torch.empty((split, m, n), dtype=sums, device=device)
        reduce = compiled(_reduce(problem, config))
    if config["stream_k"]:
        parts = torch.empty((grid, rows, cols), dtype=sums, device=device)
        flags = torch.zeros((grid, rows // 64), dtype=torch.int32, device=device)
    a_along_k, b_along_k = (_transposed(problem, compiled, device, which) for which in (0, 1))
    reduce_grid = -(-m * n // (REDUCE_THREADS * cuda.chunk(n, 4)))

    def run(out: Any, a: Any, b: Any, *rest: Any) -> None:
        scales = rest[:2] if scaled else (None, None)
        added = rest[2:] if scaled else rest
        more = added[0] if added else None
        a, b = a_along_k(a), b_along_k(b)
        operands = (b, a) if config["swap_ab"] else (a, b)
        maps = bind(operands[0], left), bind(operands[1], right)
        # without a tensor store the third map is not used: any will do
        stored = bind(out, out_layout) if out_layout else maps[0]
        raw = partial if split > 1 else None if out_layout else out
        launch(grid, *maps, stored, raw, parts, flags, *scales, more, *extents, k)
        if reduce:
            reduce(reduce_grid, out, partial, *scales, more, m, n)

    return run


def build(problem: Problem, config: Config) -> Run:
    """On the current GPU, one block a multiprocessor."""
    cuda.require_arch(cuda.current_arch(), ARCH, "gemm/cupy_wgmma")
    blocks = cuda.resident_blocks(_kernel(problem, config), config["cluster_m"] * config["cluster_n"])
    return _runner(problem, config, cuda.device, blocks, "cuda")


def emulate(problem: Problem, config: Config) -> Run:
    """The same source on CPU tensors, as if there were three multiprocessors: blocks have several tiles."""
    return _runner(problem, config, cuda.host, 3, "cpu")


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """What the machine code takes, of all kernels that are launched the most that one of them does.

    The product must be made of wgmma and TMA, and ptxas must not serialize the products.
    """
    cuda.require_arch(arch, ARCH, "gemm/cupy_wgmma")
    _layouts(problem, config)
    others = [_transpose(problem, which) for which in (0, 1)]
    others += [_reduce(problem, config)] if config["split_k"] > 1 else []
    found = [cuda.resources(kernel, arch) for kernel in others if kernel]
    return worst([cuda.hopper_resources(_kernel(problem, config), arch), *found])
