"""CUDA C++ for compute capability 9.0: FlashAttention-3 scheme on TMA and wgmma, persistent, warp-specialised.

Emulated down to swizzled shared memory, barrier phases and late or early completion.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.attention import results
from rooftune.kernels.common import cupy as cuda
from rooftune.kernels.common.cupy_tensormap import bind, layout

DEVICES = ("cuda",)
PRECISIONS = ("fp16", "bf16")

HEAD_DIMS = (64, 128, 192, 256)
ARCH = "sm_90a"
PANEL = 64  # elements of a swizzled line of 128 bytes
TILE_KEYS = 160  # what a tile takes apart from its keys, in keys
L2_BYTES = 24 << 20  # about half of an H100's: keys and values of heads that run together take it up to twice


def _shared_bytes(config: Config, problem: Problem, apart: bool) -> int:
    """Queries, rings of keys and values, results if they have a place of their own, barriers."""
    rows = config["block_m"] * (1 + apart) + 2 * config["num_stages"] * config["block_n"]
    return int(rows * problem["d"] * 2 + 8 * (2 + 4 * config["num_stages"] + config["block_m"] // 64))


def _apart(config: Config, problem: Problem) -> bool:
    """Whether there is room for results beside the queries: then those of the next tile come during the end of this."""
    return _shared_bytes(config, problem, True) <= cuda.SHARED_LIMIT


def _fits(config: Config, problem: Problem) -> bool:
    return _shared_bytes(config, problem, False) <= cuda.SHARED_LIMIT


def _registers(config: Config, problem: Problem) -> bool:
    """Output, scores and probabilities of a thread beside 30 others: 240 with two consumers, 160 with three."""
    d, block_n = problem["d"], config["block_n"]
    return d // 2 + block_n // 2 + block_n // 4 + 30 <= (160 if config["block_m"] == 192 else 240)


def _turns(config: Config, problem: Problem) -> bool:
    return not config["pingpong"] or config["block_m"] > 64


def _pack(config: Config, problem: Problem) -> int:
    """Heads of q that share a tile: one, or all that share keys."""
    return problem["h"] // problem["hkv"] if config["pack_gqa"] else 1


def _packs(config: Config, problem: Problem) -> bool:
    """Whole heads in a tile; those of a warpgroup's 64 rows as well, whose tensor stores take one head each."""
    queries, rest = divmod(config["block_m"], _pack(config, problem))
    whole = rest == 0 and queries >= 8 and (64 % queries == 0 or queries % 64 == 0)
    return not config["pack_gqa"] or (problem["h"] > problem["hkv"] and whole)


def _default(problem: Problem) -> Config:
    """192 queries (128 for wide heads, and where causal tiles are few keys long; 64 if there are no more), 128 keys or,
    at larger d, what fits.

    Heads are packed where tiles of 128 rows are then a tenth fuller: FlashAttention-3 decides alike.
    """
    d, sq, causal = problem["d"], problem["sq"], problem.flag("causal") == "1"
    together = sq * (problem["h"] // problem["hkv"])
    block_m = 64 if together <= 64 else 128
    fuller = _filled(sq, 128) < 0.9 * _filled(together, 128)
    pack = int(fuller and _packs({"block_m": block_m, "pack_gqa": 1}, problem))
    if not pack:
        short = causal and sq <= {64: 2048, 128: 4096}.get(d, 0)  # an H200: 192 rows are 0.86 to 0.98 of 128 there
        block_m = 64 if sq <= 64 else 128 if d > 128 or short else 192
    block_n = {64: 128, 128: 80 if block_m == 192 else 128, 192: 112}.get(d, 80)
    tile = {"block_m": block_m, "block_n": block_n, "num_stages": 2, "pingpong": int(block_m > 64), "pack_gqa": pack}
    return {**tile, "late_wait": 0}


def _filled(rows: int, block: int) -> float:
    """Share of the rows of tiles that is used."""
    return rows / (-(-rows // block) * block)


SPACE = Space(
    axes={
        "block_m": (64, 128, 192),
        "block_n": (64, 80, 96, 112, 128, 144, 160, 176, 192),
        "num_stages": (2, 3, 4),
        "pingpong": (0, 1),
        "pack_gqa": (0, 1),
        "late_wait": (0, 1),
    },
    where=(_fits, _registers, _turns, _packs),
    default=_default,
)


def _kernel(problem: Problem, config: Config) -> cuda.Kernel:
    if problem["d"] not in HEAD_DIMS:
        raise UsageError(f"attention/cupy_wgmma needs d of {', '.join(map(str, HEAD_DIMS))}, not {problem['d']}")
    macros = {
        "PRECISION": cuda.PRECISION_CODE[problem.precision],
        "HEAD_DIM": problem["d"],
        "CAUSAL": int(problem.flag("causal") == "1"),
        "LSE": int(problem.flag("lse") == "1"),
        "PACK": _pack(config, problem),
        "OUT_APART": int(_apart(config, problem)),
        **cuda.axes(config, BLOCK_M="block_m", BLOCK_N="block_n", STAGES="num_stages", PINGPONG="pingpong"),
        **cuda.axes(config, LATE_WAIT="late_wait"),
    }
    threads, source = 128 * (1 + config["block_m"] // 64), Path(__file__).with_suffix(".cu")
    shared = _shared_bytes(config, problem, _apart(config, problem))
    return cuda.Kernel(source, "attention_kernel", tuple(macros.items()), threads, shared)


def _order(lengths: Sequence[int], heads: int, group_heads: int, grid: int) -> list[list[int]]:
    """Causal tiles dealt out to `grid` blocks as if each took the next one when it is done; [rounds][grid], -1: none.

    Tiles are numbered by groups of heads, within a group by `lengths` (of the tiles of a head, the longest first).
    Dealt out in rounds instead, 64 heads of 4096 queries leave 8 % of 132 blocks' time unused, 16 of 16384 46 %.
    """
    dealt: list[list[int]] = [[] for _ in range(grid)]
    free, tile = [(0, block) for block in range(grid)], 0
    for first in range(0, heads, group_heads):
        width = min(group_heads, heads - first)
        for length in lengths:
            for _ in range(width):
                at, block = heapq.heappop(free)
                heapq.heappush(free, (at + length, block))
                dealt[block].append(tile)
                tile += 1
    rounds = max(map(len, dealt)) + 1
    return [[mine[i] if i < len(mine) else -1 for mine in dealt] for i in range(rounds)]


def _lengths(problem: Problem, lines: int, block_n: int) -> list[int]:
    """Keys that the tiles of a head read, the last queries' first, and for each what else it takes: some 160 keys'
    time for its queries, its results and the first scores, beside which nothing runs."""
    sq, sk = problem["sq"], problem["sk"]
    seen = [max(min(sk, m0 + lines + sk - sq), 0) for m0 in range(0, sq, lines)]
    return [-(-keys // block_n) * block_n + TILE_KEYS for keys in reversed(seen)]


def _runner(
    problem: Problem, config: Config, compiled: Callable[[cuda.Kernel], cuda.Launch], blocks: int, device: str
) -> Run:
    """run(out: see the operator, q: [b, h, sq, d], k, v: [b, hkv, sk, d]), on at most `blocks` blocks."""
    import torch

    launch = compiled(_kernel(problem, config))
    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    storage, scale = FORMATS[problem.precision].storage, math.log2(math.e) / math.sqrt(d)
    pack = _pack(config, problem)
    lines = config["block_m"] // pack
    queries = layout(storage, 2, sq, d, (PANEL, lines), b * h)
    keys = layout(storage, 2, sk, d, (PANEL, config["block_n"]), b * hkv)
    stored = layout(storage, 2, sq, d, (PANEL, min(lines, 64)), b * h)
    heads = b * h // pack
    grid = min(-(-sq // lines) * heads, blocks)
    fitting = max(L2_BYTES // (4 * sk * d), 1) * (h // hkv) // pack
    group_heads = -(-heads // max(heads // fitting, 1))  # groups of one size: a small last one ends in long tiles
    order = None
    if problem.flag("causal"):
        dealt = _order(_lengths(problem, lines, config["block_n"]), heads, group_heads, grid)
        order = torch.tensor(dealt, dtype=torch.int32, device=device)

    def run(out: Any, q: Any, k: Any, v: Any) -> None:
        o, lse = results(problem, out)
        maps = bind(q, queries), bind(k, keys), bind(v, keys), bind(o, stored)
        launch(grid, *maps, lse, order, heads, h, hkv, sq, sk, group_heads, scale)

    return run


def build(problem: Problem, config: Config) -> Run:
    """On the current GPU, one block a multiprocessor."""
    import torch

    cuda.require_arch(cuda.current_arch(), ARCH, "attention/cupy_wgmma")
    blocks = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return _runner(problem, config, cuda.device, blocks, "cuda")


def emulate(problem: Problem, config: Config) -> Run:
    """The same source on CPU tensors, as if there were two multiprocessors: blocks have several tiles."""
    return _runner(problem, config, cuda.host, 2, "cpu")


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """What the machine code takes. It must be made of wgmma and TMA, and ptxas must not serialize the products."""
    cuda.require_arch(arch, ARCH, "attention/cupy_wgmma")
    return cuda.hopper_resources(_kernel(problem, config), arch)
