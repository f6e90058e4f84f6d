"""Triton: dk and dv by blocks of keys, dq by blocks of queries; weights come from lse, no atomic additions.

Seven products instead of the five of a single kernel, whose dq of different blocks of keys would have to be
added up in memory: in exchange, results are the same to the bit on every call.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.common.resources import worst
from rooftune.kernels.common.triton import SHARED_MAX, Launch, Operand, emulated, native, power_of_two, roomy

DEVICES = ("cuda", "rocm")
PRECISIONS = ("bf16", "fp16", "fp32")
DELTA_ROWS = 64


@triton.jit
def row_products(delta, dout, out, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """delta: [rows] = sum_j dout * out, in fp32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row, depth = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = row[:, None] * D + depth[None, :]
    inside = (row < rows - first)[:, None] & (depth < D)[None, :]
    x = tl.load(dout + first * D + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(out + first * D + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + first + row, tl.sum(x * y, 1), mask=row < rows - first)


@triton.jit
def add_queries(  # type: ignore[no-untyped-def]
    dk, dv, key, value, q, dout, lse, delta, begin, full, tail, sq, first, scale, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries added to dk and dv of a block of keys; everything is transposed: [keys, queries].

    Those from `full` to `tail`, or with MASKED those from `begin` to `full` and from `tail` to the last.
    `first`: [BLOCK_N] the first query that sees each key. `scale` includes log2(e).
    """
    row, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at = row[:, None] * D + depth[None, :]
    start, end, jump = full, tail, 0
    if MASKED:
        start, jump = begin, tail - full
        end = sq - jump
    for step in range(start, end, BLOCK_M):
        i = step
        if MASKED:  # over the middle, which needs no mask: one loop for both ends compiles in half the time
            i += tl.where(step >= full, jump, 0)
            # Past the last query: zeros, of weight exp(0 - inf) = 0.
            inside = (row < sq - i)[:, None] & (depth < D)[None, :]
            query = tl.load(q + i * D + at, mask=inside, other=0.0)
            slope = tl.load(dout + i * D + at, mask=inside, other=0.0)
            level = tl.load(lse + i + row, mask=row < sq - i, other=float("inf"))
            mean = tl.load(delta + i + row, mask=row < sq - i, other=0.0)
        else:
            if BLOCK_D != D:
                query = tl.load(q + i * D + at, mask=(depth < D)[None, :], other=0.0)
                slope = tl.load(dout + i * D + at, mask=(depth < D)[None, :], other=0.0)
            else:
                query = tl.load(q + i * D + at)
                slope = tl.load(dout + i * D + at)
            level = tl.load(lse + i + row)
            mean = tl.load(delta + i + row)
        weight = tl.exp2(tl.dot(key, query.T, input_precision="ieee") * scale - (level * 1.4426950408889634)[None, :])
        if MASKED and CAUSAL:
            weight = tl.where((i + row)[None, :] >= first[:, None], weight, 0.0)
        dv = tl.dot(weight.to(slope.dtype), slope, dv, input_precision="ieee")
        change = weight * (tl.dot(value, slope.T, input_precision="ieee") - mean[None, :])
        dk = tl.dot(change.to(query.dtype), query, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def backward_keys(  # type: ignore[no-untyped-def]
    out, dout, q, k, v, lse, delta, group, sq, sk, dk_at, dv_at, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head, over the `group` query heads that read it."""
    blocks = tl.cdiv(sk, BLOCK_N)
    head = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK_N  # causal: the first keys have the most queries, and come first
    column, depth = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    at = (head.to(tl.int64) * sk + start) * D + (column[:, None] * D + depth[None, :])
    inside = (column < sk - start)[:, None] & (depth < D)[None, :]
    key = tl.load(k + at, mask=inside, other=0.0)
    value = tl.load(v + at, mask=inside, other=0.0)

    # Queries from `begin` on see some key of the block, from `full` on every one; from `tail` on some are missing.
    begin, full = 0, 0
    tail = sq // BLOCK_M * BLOCK_M
    first = column + (start + sq - sk)
    if CAUSAL:
        begin = tl.maximum(start + sq - sk, 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(start + sq - sk + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M
        full = tl.minimum(full, tl.maximum(tail, begin))
    tail = tl.maximum(tail, full)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(group):
        row = (head.to(tl.int64) * group + member) * sq
        dk, dv = add_queries(
            dk, dv, key, value, q + row * D, dout + row * D, lse + row, delta + row, begin, full, tail, sq, first,
            scale, False, CAUSAL, D, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        dk, dv = add_queries(
            dk, dv, key, value, q + row * D, dout + row * D, lse + row, delta + row, begin, full, tail, sq, first,
            scale, True, CAUSAL, D, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    tl.store(out + dk_at + at, (dk * (scale * 0.6931471805599453)).to(out.dtype.element_ty), mask=inside)
    tl.store(out + dv_at + at, dv.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_keys(  # type: ignore[no-untyped-def]
    dq, query, slope, level, mean, k, v, begin, end, sk, last, scale, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys from `begin` to `end` added to dq of a block of queries; `last`: [BLOCK_M] the last key each may see."""
    column, depth = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    at = column[:, None] * D + depth[None, :]
    for j in range(begin, end, BLOCK_N):
        if MASKED:
            inside = (column < sk - j)[:, None] & (depth < D)[None, :]
            key = tl.load(k + j * D + at, mask=inside, other=0.0)
            value = tl.load(v + j * D + at, mask=inside, other=0.0)
        elif BLOCK_D != D:
            key = tl.load(k + j * D + at, mask=(depth < D)[None, :], other=0.0)
            value = tl.load(v + j * D + at, mask=(depth < D)[None, :], other=0.0)
        else:
            key = tl.load(k + j * D + at)
            value = tl.load(v + j * D + at)
        weight = tl.exp2(tl.dot(query, key.T, input_precision="ieee") * scale - level[:, None])
        if MASKED:
            weight = tl.where((j + column)[None, :] <= last[:, None], weight, 0.0)
        change = weight * (tl.dot(slope, value.T, input_precision="ieee") - mean[:, None])
        dq = tl.dot(change.to(key.dtype), key, dq, input_precision="ieee")
    return dq


@triton.jit
def backward_queries(  # type: ignore[no-untyped-def]
    out, dout, q, k, v, lse, delta, group, sq, sk, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head."""
    blocks = tl.cdiv(sq, BLOCK_M)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if CAUSAL:  # longest rows first: the short ones fill the last wave
        block = blocks - 1 - block
    start = block * BLOCK_M
    row, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    first = head.to(tl.int64) * sq + start
    at = first * D + (row[:, None] * D + depth[None, :])
    inside = (row < sq - start)[:, None] & (depth < D)[None, :]
    query = tl.load(q + at, mask=inside, other=0.0)
    slope = tl.load(dout + at, mask=inside, other=0.0)
    level = tl.load(lse + first + row, mask=row < sq - start, other=float("inf")) * 1.4426950408889634
    mean = tl.load(delta + first + row, mask=row < sq - start, other=0.0)
    k += (head // group).to(tl.int64) * sk * D
    v += (head // group).to(tl.int64) * sk * D

    # Keys below `full` are seen by every query of the block, keys from `end` on by none.
    last = tl.full((BLOCK_M,), 0, tl.int32) + (sk - 1)
    full = sk // BLOCK_N * BLOCK_N
    end = sk
    if CAUSAL:  # aligned at the bottom right: query i sees keys up to i + sk - sq
        reach = start + sk - sq
        last = tl.minimum(reach + row, sk - 1)
        full = tl.maximum(tl.minimum(reach + 1, sk), 0) // BLOCK_N * BLOCK_N
        end = tl.maximum(tl.minimum(reach + BLOCK_M, sk), 0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = add_keys(dq, query, slope, level, mean, k, v, 0, full, sk, last, scale, False, D, BLOCK_N, BLOCK_D)
    dq = add_keys(dq, query, slope, level, mean, k, v, full, end, sk, last, scale, True, D, BLOCK_N, BLOCK_D)
    tl.store(out + at, (dq * (scale * 0.6931471805599453)).to(out.dtype.element_ty), mask=inside)


def _shared(config: Config, problem: Problem) -> bool:
    """Of both kernels: the two tiles that stay, num_stages of the two that pass, and weights on their way."""
    size, d = FORMATS[problem.precision].bytes_in, _block_d(problem)
    for own, step in ((config["block_n1"], config["block_m1"]), (config["block_m2"], config["block_n2"])):
        if 2 * (own + config["num_stages"] * step) * d * size + own * step * size + 1024 > SHARED_MAX:
            return False
    return True


def _registers(config: Config, problem: Problem) -> bool:
    """Sums and two tiles of weights in registers: at most 160 values a thread; 96 for 32-bit operands."""
    d, threads = _block_d(problem), 32 * config["num_warps"]
    most = 160 if FORMATS[problem.precision].bytes_in == 2 else 96
    keys = config["block_n1"] * (2 * d + 2 * config["block_m1"])
    queries = config["block_m2"] * (d + 2 * config["block_n2"])
    return bool(max(keys, queries) <= most * threads)


def _useful(config: Config, problem: Problem) -> bool:
    """No block is more than half empty, no step longer than its block, each warp of tensor cores has rows; small checks
    are exempt."""
    if problem["sq"] * problem["sk"] < 2**15:
        return True
    m1, n1, m2, n2 = (config[x] for x in ("block_m1", "block_n1", "block_m2", "block_n2"))
    inside = max(m1, m2) < 2 * max(problem["sq"], 32) and max(n1, n2) < 2 * max(problem["sk"], 32)
    rows = config["num_warps"] == 4 or min(n1, m2) >= 64 or problem.precision == "fp32"
    return inside and m1 <= n1 and n2 <= m2 and rows


def _default(problem: Problem) -> Config:
    """Tiles without spills on every architecture, within the shared memory of the smallest; where there is room for
    it, what an H200 does best."""
    d = _block_d(problem)
    m1, n1, m2, n2, warps, stages = (32, 128, 128, 32, 8, 2) if d <= 64 else (32, 64, 64, 32, 8, 2)
    if d > 128:
        m1, n1, m2, n2 = 16, 32, 32, 16
    elif roomy():
        m1, n1, m2, n2, warps, stages = (64, 64, 64, 64, 4, 3) if d <= 64 else (32, 128, 128, 64, 8, 3)
    if problem.precision == "fp32":
        m1, n1, m2, n2 = (16, 64, 64, 16) if d <= 64 else (16, 32, 32, 16)
        stages = 2 if d <= 128 else 1
    return {"block_m1": m1, "block_n1": n1, "block_m2": m2, "block_n2": n2, "num_warps": warps, "num_stages": stages}


SPACE = Space(
    axes={
        "block_m1": (16, 32, 64),
        "block_n1": (32, 64, 128),
        "block_m2": (32, 64, 128),
        "block_n2": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3, 4),
    },
    where=(_useful, _registers, _shared),
    default=_default,
)


def _block_d(problem: Problem) -> int:
    return power_of_two(max(problem["d"], 16))


def _launches(problem: Problem, config: Config) -> list[Launch]:
    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    if h % hkv:
        raise UsageError(f"{problem}: h must be a multiple of hkv")
    if d > 256:
        raise UsageError(f"{problem}: d above 256 does not fit the registers of this kernel")
    if max(sq, sk) * d >= 2**31:
        raise UsageError(f"{problem}: a head above 2^31 elements is beyond 32-bit offsets")
    plain, row = Operand.of(problem, "in"), Operand("float32")
    shape: dict[str, Any] = {"CAUSAL": bool(problem.flag("causal")), "D": d}
    scale = math.log2(math.e) / math.sqrt(d)
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    operands = (Operand.of(problem, "out"), plain, plain, plain, plain, row, row)
    constants = {"D": d, "BLOCK": DELTA_ROWS, "BLOCK_D": _block_d(problem)}
    grid = (triton.cdiv(b * h * sq, DELTA_ROWS),)
    delta = Launch(row_products, grid, (row, plain, plain), (b * h * sq,), constants, {"num_warps": 4})
    blocks = {"BLOCK_M": config["block_m1"], "BLOCK_N": config["block_n1"], "BLOCK_D": _block_d(problem)}
    dk_at, dv_at = b * h * sq * d, (b * h * sq + b * hkv * sk) * d
    scalars = (h // hkv, sq, sk, dk_at, dv_at, scale)
    grid = (triton.cdiv(sk, config["block_n1"]) * b * hkv,)
    keys = Launch(backward_keys, grid, operands, scalars, {**shape, **blocks}, options)
    blocks = {"BLOCK_M": config["block_m2"], "BLOCK_N": config["block_n2"], "BLOCK_D": _block_d(problem)}
    grid = (triton.cdiv(sq, config["block_m2"]) * b * h,)
    queries = Launch(backward_queries, grid, operands, (h // hkv, sq, sk, scale), {**shape, **blocks}, options)
    return [delta, keys, queries]


def _run(problem: Problem, launches: list[Launch], device: str) -> Run:
    import torch

    delta = torch.empty(problem["b"] * problem["h"] * problem["sq"], device=device)
    products, keys, queries = (launch.runner() for launch in launches)

    def run(result: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
        products(delta, dout, out)
        keys(result, dout, q, k, v, lse, delta)
        queries(result, dout, q, k, v, lse, delta)

    return run


def build(problem: Problem, config: Config) -> Run:
    """run(result: dq, dk, dv as rows of d; dout, q, k, v, out, lse), all contiguous, see the operator."""
    launches = _launches(problem, config)
    native(*launches)
    return _run(problem, launches, "cuda")


def emulate(problem: Problem, config: Config) -> Run:
    """The same on CPU tensors, interpreted."""
    return emulated(_run(problem, _launches(problem, config), "cpu"))


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """Machine code for `arch`: the most that one of the two products takes (the row sums are a plain loop)."""
    return worst([launch.compile(arch) for launch in _launches(problem, config)[1:]])
