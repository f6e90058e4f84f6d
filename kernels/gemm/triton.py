"""Triton: tiled product with fused epilogue; pointer loads, TMA, or TMA with persistent programs; split k."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.common.triton import (
    SHARED_MAX,
    Launch,
    Operand,
    emulated,
    multiprocessors,
    native,
    power_of_two,
    roomy,
    round_tf32,
)

DEVICES = ("cuda", "rocm")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")
REDUCE_BLOCK = 1024


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    acc, scale_a, scale_b, more, row, column, M, N, EPILOGUE: tl.constexpr
):
    """Scales of fp8, then what is added and the activation, in fp32; `row`, `column`: of acc's values, broadcast."""
    if scale_a is not None:
        acc = acc * (tl.load(scale_a) * tl.load(scale_b))
    if EPILOGUE == "residual":
        at = row.to(tl.int64) * N + column
        acc = acc + tl.load(more + at, mask=(row < M) & (column < N), other=0.0).to(tl.float32)
    elif EPILOGUE != "none":
        acc = acc + tl.load(more + column, mask=column < N, other=0.0).to(tl.float32)
    if EPILOGUE == "bias_relu":
        acc = tl.where(acc < 0.0, 0.0, acc)  # not maximum(): that would drop a NaN
    if EPILOGUE == "bias_gelu":
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    return acc


@triton.jit
def gemm_tile(  # type: ignore[no-untyped-def]
    tile, part, c, a, b, scale_a, scale_b, more, M, N, K,
    TRANS_A: tl.constexpr, TRANS_B: tl.constexpr, EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
    IMPRECISE: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M x BLOCK_N tile of c, over the part-th of SPLIT_K ranges of k."""
    # GROUP_M rows of tiles are walked column by column, so that concurrent tiles share a and b in L2.
    width = GROUP_M * tl.cdiv(N, BLOCK_N)
    top = tile // width * GROUP_M
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - top, GROUP_M)
    m0 = (top + tile % width % height) * BLOCK_M
    n0 = tile % width // height * BLOCK_N
    row, column, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m, in_n = row < M - m0, column < N - n0
    begin = 0
    end = K
    if SPLIT_K > 1:
        length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
        begin = part * length
        end = tl.minimum(begin + length, K)
        a += begin.to(tl.int64) * M if TRANS_A else begin
        b += begin if TRANS_B else begin.to(tl.int64) * N

    if not TMA:  # bases in 64 bits, offsets inside a tile in 32
        if TRANS_A:
            pa = a + m0 + (row[:, None] + depth[None, :] * M)
        else:
            pa = a + m0.to(tl.int64) * K + (row[:, None] * K + depth[None, :])
        if TRANS_B:
            pb = b + n0.to(tl.int64) * K + (depth[:, None] + column[None, :] * K)
        else:
            pb = b + n0 + (depth[:, None] * N + column[None, :])

    INTEGER: tl.constexpr = PRECISION == "int8"
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    for k in range(begin, end, BLOCK_K):
        if TMA:
            x = a.load([k, m0]).T if TRANS_A else a.load([m0, k])
            y = b.load([n0, k]).T if TRANS_B else b.load([k, n0])
        elif EVEN_K:
            x = tl.load(pa, mask=in_m[:, None], other=0.0)
            y = tl.load(pb, mask=in_n[None, :], other=0.0)
        else:  # both sides are cleared: 0 * inf of one tail would be NaN
            x = tl.load(pa, mask=in_m[:, None] & (depth < end - k)[None, :], other=0.0)
            y = tl.load(pb, mask=in_n[None, :] & (depth < end - k)[:, None], other=0.0)
        if PRECISION == "tf32":
            x, y = round_tf32(x), round_tf32(y)
        if INTEGER:
            acc = tl.dot(x, y, acc, out_dtype=tl.int32)
        elif PRECISION == "fp8":
            acc = tl.dot(x, y, acc, max_num_imprecise_acc=IMPRECISE)
        else:
            acc = tl.dot(x, y, acc, input_precision="ieee" if PRECISION == "fp32" else "tf32")
        if not TMA:
            pa += BLOCK_K * M if TRANS_A else BLOCK_K
            pb += BLOCK_K if TRANS_B else BLOCK_K * N

    if SUBTILES == 2:  # in halves: the tile on its way out takes half the shared memory
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        half = n0 + tl.arange(0, BLOCK_N // 2)
        left = finish(left, scale_a, scale_b, more, (m0 + row)[:, None], half[None, :], M, N, EPILOGUE)
        c.store([m0, n0], left.to(c.dtype))
        half += BLOCK_N // 2
        right = finish(right, scale_a, scale_b, more, (m0 + row)[:, None], half[None, :], M, N, EPILOGUE)
        c.store([m0, n0 + BLOCK_N // 2], right.to(c.dtype))
    elif SPLIT_K > 1:  # c: [SPLIT_K, M, N], summed and finished by gemm_reduce
        c += part.to(tl.int64) * M * N
    else:
        acc = finish(acc, scale_a, scale_b, more, (m0 + row)[:, None], (n0 + column)[None, :], M, N, EPILOGUE)
    if TMA and SUBTILES == 1:
        c.store([m0, n0], acc.to(c.dtype))
    elif not TMA:
        pc = c + m0.to(tl.int64) * N + n0 + (row[:, None] * N + column[None, :])
        tl.store(pc, acc.to(c.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def gemm(  # type: ignore[no-untyped-def]
    c, a, b, scale_a, scale_b, more, M, N, K,
    TRANS_A: tl.constexpr, TRANS_B: tl.constexpr, EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
    IMPRECISE: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """A tile a program, or with PERSISTENT every num_programs-th tile, loads running ahead across tiles."""
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            gemm_tile(
                tile, tl.program_id(1), c, a, b, scale_a, scale_b, more, M, N, K, TRANS_A, TRANS_B, EPILOGUE,
                PRECISION, IMPRECISE, EVEN_K, TMA, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUBTILES,
            )  # fmt: skip
    else:
        gemm_tile(
            tl.program_id(0), tl.program_id(1), c, a, b, scale_a, scale_b, more, M, N, K, TRANS_A, TRANS_B, EPILOGUE,
            PRECISION, IMPRECISE, EVEN_K, TMA, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUBTILES,
        )  # fmt: skip


@triton.jit
def gemm_reduce(  # type: ignore[no-untyped-def]
    c, parts, scale_a, scale_b, more, M, N, EPILOGUE: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr
):
    """c = epilogue of the sum of SPLIT_K products, always in the same order: repeatable to the bit."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < M * N
    acc = tl.load(parts + at, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLIT_K):
        acc += tl.load(parts + part * M * N + at, mask=inside, other=0.0)
    acc = finish(acc, scale_a, scale_b, more, at // N, at % N, M, N, EPILOGUE)
    tl.store(c + at, acc.to(c.dtype.element_ty), mask=inside)


def _small(problem: Problem) -> bool:
    """Sizes of the correctness check, for which waste does not matter."""
    return problem["m"] * problem["n"] * problem["k"] < 2**21


def _tile_useful(config: Config, problem: Problem) -> bool:
    """Not more than half of a tile lies outside of c."""
    inside = config["block_m"] < 2 * max(problem["m"], 16) and config["block_n"] < 2 * max(problem["n"], 32)
    return _small(problem) or inside


def _registers(config: Config, problem: Problem) -> bool:
    """Accumulators per thread: at most 128; half where operands or a second sum take registers too."""
    per_thread = config["block_m"] * config["block_n"] // (32 * config["num_warps"])
    crowded = problem.precision in ("fp32", "tf32") or (problem.precision == "fp8" and not config["fast_accum"])
    return 4 <= per_thread <= (64 if crowded else 128)


def _depth(config: Config, problem: Problem) -> bool:
    """block_k: one instruction's worth at least, 128 bytes of 32-bit operands at most."""
    size = FORMATS[problem.precision].bytes_in
    return bool(
        config["block_k"] >= (32 if size == 1 else 16) and config["block_k"] * size <= 256 // (2 if size == 4 else 1)
    )


def _shared(config: Config, problem: Problem) -> bool:
    """Stages of a and b, and the tile of c on its way out: beside them if persistent, else in their place."""
    return _shared_bytes(config, problem) <= SHARED_MAX


def _shared_bytes(config: Config, problem: Problem) -> int:
    f = FORMATS[problem.precision]
    m, n = config["block_m"], config["block_n"]
    stages = config["num_stages"] * (m + n) * config["block_k"] * f.bytes_in + 1024  # barriers, alignment
    tile = m * n * f.bytes_out // config["subtiles"]
    return int(stages + tile if config["schedule"] == "persistent" else max(stages, tile))


def _schedule(config: Config, problem: Problem) -> bool:
    """TMA: rows of a, b and c are whole multiples of 16 bytes. Fast accumulation exists for fp8 only.

    Subtiles are of persistent programs, in whose shared memory the next tile is on its way beside c.
    """
    if config["fast_accum"] and problem.precision != "fp8":
        return False
    if config["subtiles"] > 1 and not (config["schedule"] == "persistent" and config["block_n"] >= 64):
        return False
    if config["schedule"] == "pointer":
        return True
    f, (ta, tb) = FORMATS[problem.precision], problem.flag("transpose", "nn")
    row_a, row_b = problem["m" if ta == "t" else "k"], problem["k" if tb == "t" else "n"]
    return (row_a * f.bytes_in) % 16 == (row_b * f.bytes_in) % 16 == (problem["n"] * f.bytes_out) % 16 == 0


def _split(config: Config, problem: Problem) -> bool:
    """Splitting k pays where tiles are fewer than two waves of a large device and k is long."""
    split = config["split_k"]
    tiles = triton.cdiv(problem["m"], config["block_m"]) * triton.cdiv(problem["n"], config["block_n"])
    pays = tiles <= 264 and problem["k"] >= 4 * split * config["block_k"]
    legal = config["schedule"] == "pointer" and split * problem["m"] * problem["n"] < 2**31
    return split == 1 or (legal and (pays or _small(problem)))


def _wide(problem: Problem) -> Config | None:
    """What an H200 does best with 16 and 8 bits, on devices with that much shared memory and with tiles for all of
    their multiprocessors."""
    if problem.precision not in ("fp16", "bf16", "fp8") or not roomy():
        return None
    size = FORMATS[problem.precision].bytes_in
    config: Config = {"block_m": 128, "block_n": 256, "block_k": 128 // size, "group_m": 16, "num_warps": 8}
    config |= {"num_stages": 4 if size == 2 else 3, "schedule": "persistent", "split_k": 1, "subtiles": 2}
    config["fast_accum"] = problem.precision == "fp8"
    tiles = triton.cdiv(problem["m"], 128) * triton.cdiv(problem["n"], 256)
    return config if tiles >= multiprocessors() and _schedule(config, problem) else None


def _default(problem: Problem) -> Config:
    """Tiles that fit the smallest of our architectures (101376 bytes of shared memory), or `_wide`."""
    if (wide := _wide(problem)) is not None:
        return wide
    m, size = problem["m"], FORMATS[problem.precision].bytes_in
    config = {"group_m": 8, "num_stages": 3, "schedule": "pointer", "split_k": 1, "subtiles": 1}
    config["fast_accum"] = problem.precision == "fp8"
    if problem.precision == "fp32" and (m > 64 or _small(problem)):
        return {"block_m": 128, "block_n": 128, "block_k": 16, "num_warps": 8, **config}
    if m <= 64 and not _small(problem):  # a few tokens: b is read once, by narrow tiles on every multiprocessor
        tile = {"block_m": power_of_two(max(m, 16)), "block_n": 32 if problem["n"] <= 8192 else 64}
        return {
            **config,
            **tile,
            "block_k": 32 if size == 4 else 128,
            "num_warps": 4,
            "num_stages": 4 if m <= 32 else 3,
        }
    if problem.precision == "tf32":
        return {"block_m": 128, "block_n": 64, "block_k": 32, "num_warps": 8, **config}
    return {"block_m": 128, "block_n": 128, "block_k": 128 // size, "num_warps": 8, **config}


SPACE = Space(
    axes={
        "block_m": (16, 32, 64, 128, 256),
        "block_n": (32, 64, 128, 256),
        "block_k": (16, 32, 64, 128),
        "group_m": (1, 4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
        "schedule": ("pointer", "tma", "persistent"),
        "split_k": (1, 2, 4, 8),
        "subtiles": (1, 2),
        "fast_accum": (False, True),
    },
    where=(_schedule, _depth, _tile_useful, _registers, _shared, _split),
    default=_default,
)


def _launches(problem: Problem, config: Config, programs: int) -> list[Launch]:
    """The product, and for split k the sum of its parts. `programs`: how many a persistent launch has."""
    m, n, k, split = problem["m"], problem["n"], problem["k"], config["split_k"]
    bm, bn, bk = config["block_m"], config["block_n"], config["block_k"]
    ta, tb = (flag == "t" for flag in problem.flag("transpose", "nn"))
    epilogue, precision = problem.flag("epilogue", "none"), problem.precision
    f = FORMATS[precision]
    tma = config["schedule"] != "pointer"
    vector = Operand("bfloat16" if precision == "fp8" else f.storage)
    scale = Operand("float32") if precision == "fp8" else None
    rest = (scale, scale, None if epilogue == "none" else vector)

    def matrix(dtype: str, shape: tuple[int, int], box: tuple[int, int], transposed: bool = False) -> Operand:
        turn = -1 if transposed else 1
        return Operand(dtype, shape[::turn], box[::turn]) if tma else Operand(dtype)

    a, b = matrix(f.storage, (m, k), (bm, bk), ta), matrix(f.storage, (k, n), (bk, bn), tb)
    parts = Operand("int32" if precision == "int8" else "float32")
    c = parts if split > 1 else matrix(f.out, (m, n), (bm, bn // config["subtiles"]))
    tiles = triton.cdiv(m, bm) * triton.cdiv(n, bn)
    persistent = config["schedule"] == "persistent"
    constants: dict[str, Any] = {"TRANS_A": ta, "TRANS_B": tb, "EPILOGUE": epilogue, "PRECISION": precision}
    constants |= {"IMPRECISE": None if config["fast_accum"] or precision != "fp8" else bk}
    constants |= {"EVEN_K": k % (bk * split) == 0, "TMA": tma, "PERSISTENT": persistent, "SPLIT_K": split}
    constants |= {"BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": bk, "GROUP_M": config["group_m"]}
    constants |= {"SUBTILES": config["subtiles"]}
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    grid = (min(programs, tiles) if persistent else tiles, split)
    operands = (c, a, b, *((None, None, None) if split > 1 else rest))
    product = Launch(gemm, grid, operands, (m, n, k), constants, options)
    if split == 1:
        return [product]
    constants = {"EPILOGUE": epilogue, "SPLIT_K": split, "BLOCK": REDUCE_BLOCK}
    blocks = (triton.cdiv(m * n, REDUCE_BLOCK),)
    return [product, Launch(gemm_reduce, blocks, (Operand(f.out), parts, *rest), (m, n), constants, {"num_warps": 4})]


def _run(problem: Problem, config: Config, launches: list[Launch], device: str) -> Run:
    if len(launches) == 1:
        return launches[0].runner()
    import torch

    product, reduce = (launch.runner() for launch in launches)
    dtype = torch.int32 if problem.precision == "int8" else torch.float32
    parts = torch.empty(config["split_k"] * problem["m"] * problem["n"], dtype=dtype, device=device)

    def run(out: Any, a: Any, b: Any, *rest: Any) -> None:
        product(parts, a, b)
        reduce(out, parts, *rest)

    return run


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], a, b[, scale_a, scale_b][, bias or residual]): contiguous, stored as the problem's flags say."""
    launches = _launches(problem, config, multiprocessors())
    native(*launches)
    return _run(problem, config, launches, "cuda")


def emulate(problem: Problem, config: Config) -> Run:
    """The same on CPU tensors, interpreted; three programs where it is persistent."""
    return emulated(_run(problem, config, _launches(problem, config, 3), "cpu"))


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """Machine code of the product for `arch` (the sum of a split k is a plain copy loop).

    Raises:
        UsageError: fp8 on sm_80, which has no instruction for it.
    """
    if problem.precision == "fp8" and arch == "sm_80":
        raise UsageError("sm_80 has no fp8 matrix instruction; fp8 starts at sm_89")
    return _launches(problem, config, 1)[0].compile(arch)
