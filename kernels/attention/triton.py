"""Triton: FlashAttention-2 forward; online softmax in base 2, masks only where the diagonal or the tail is."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from rooftune.check import Run
from rooftune.core import PRECISIONS as FORMATS
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.attention import results
from rooftune.kernels.common.triton import (
    SHARED_MAX,
    Launch,
    Operand,
    emulated,
    native,
    power_of_two,
    roomy,
    round_tf32,
)

DEVICES = ("cuda", "rocm")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    acc, top, total, q, k, v, k_box, v_box, kv_row, begin, end, sk, last, scale, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from `begin` to `end`: scores, online softmax, product with the values.

    `last`: [BLOCK_M] the last key each query may see; `top`, `total`: running maximum (times `scale`)
    and sum of each row; `scale` includes log2(e), so that exp2 needs one fused multiply-add.
    """
    column, depth = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    dot: tl.constexpr = "ieee" if PRECISION == "fp32" else "tf32"
    at_key = depth[:, None] + column[None, :] * D
    at_value = column[:, None] * D + depth[None, :]
    for j in range(begin, end, BLOCK_N):
        if TMA:
            key = k_box.load([kv_row + j, 0]).T
        elif MASKED:
            key = tl.load(k + j * D + at_key, mask=(column < sk - j)[None, :] & (depth < D)[:, None], other=0.0)
        elif BLOCK_D != D:
            key = tl.load(k + j * D + at_key, mask=(depth < D)[:, None], other=0.0)
        else:
            key = tl.load(k + j * D + at_key)
        score = tl.dot(q, key, input_precision=dot)
        if MASKED:
            seen = (j + column)[None, :] <= last[:, None]
            score = tl.where(seen, score, -float("inf"))
        new = tl.maximum(top, tl.max(score, 1) * scale)
        base = new
        if MASKED:  # a row that has seen no key yet: exp2(-inf - 0) is 0, where -inf + inf were NaN
            base = tl.where(new == -float("inf"), 0.0, new)
        weight = tl.exp2(score * scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        if TMA:
            value = v_box.load([kv_row + j, 0])
        elif MASKED:  # rows past the end are cleared: a weight of 0 times garbage could be NaN
            value = tl.load(v + j * D + at_value, mask=(column < sk - j)[:, None] & (depth < D)[None, :], other=0.0)
        elif BLOCK_D != D:
            value = tl.load(v + j * D + at_value, mask=(depth < D)[None, :], other=0.0)
        else:
            value = tl.load(v + j * D + at_value)
        if PRECISION == "tf32":
            weight = round_tf32(weight)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=dot)
        top = new
    return acc, top, total


@triton.jit
def attention(  # type: ignore[no-untyped-def]
    out, lse, q, k, v, k_box, v_box, group, sq, sk, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head a program; `group` query heads read one key head."""
    blocks = tl.cdiv(sq, BLOCK_M)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if CAUSAL:  # longest rows first: the short ones fill the last wave
        block = blocks - 1 - block
    kv_head = head // group
    start = block * BLOCK_M
    row, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at = (head.to(tl.int64) * sq + start) * D + (row[:, None] * D + depth[None, :])
    inside = (row < sq - start)[:, None] & (depth < D)[None, :]
    query = tl.load(q + at, mask=inside, other=0.0)
    if PRECISION == "tf32":
        query = round_tf32(query)
    k += kv_head.to(tl.int64) * sk * D
    v += kv_head.to(tl.int64) * sk * D

    # Keys below `full` are seen by every query of the block, keys from `end` on by none.
    last = tl.full((BLOCK_M,), 0, tl.int32) + (sk - 1)
    full = sk // BLOCK_N * BLOCK_N
    end = sk
    if CAUSAL:  # aligned at the bottom right: query i sees keys up to i + sk - sq
        reach = start + sk - sq
        last = tl.minimum(reach + row, sk - 1)
        full = tl.maximum(tl.minimum(reach + 1, sk), 0) // BLOCK_N * BLOCK_N
        end = tl.maximum(tl.minimum(reach + BLOCK_M, sk), 0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, top, total = attend(
        acc, top, total, query, k, v, k_box, v_box, kv_head * sk, 0, full, sk, last, scale,
        False, PRECISION, TMA, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, query, k, v, k_box, v_box, kv_head * sk, full, end, sk, last, scale,
        True, PRECISION, False, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]  # a row that sees no key is 0
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    if lse is not None:  # infinite for a row that sees no key, so that a backward pass gives it no weight
        value = tl.where(total == 0.0, float("inf"), (top + tl.log2(total)) * 0.6931471805599453)
        tl.store(lse + head.to(tl.int64) * sq + start + row, value, mask=row < sq - start)


def _shared(config: Config, problem: Problem) -> bool:
    """The query tile, num_stages blocks of keys and values, and for 32 bits the weights on their way."""
    size, d = FORMATS[problem.precision].bytes_in, _block_d(problem)
    m, n = config["block_m"], config["block_n"]
    total = (m + 2 * config["num_stages"] * n) * d * size + (m * n * 4 if size == 4 else 0) + 1024
    return bool(total <= SHARED_MAX)


def _registers(config: Config, problem: Problem) -> bool:
    """Output and score tiles in registers: at most 160 values a thread; 96 for 32-bit operands."""
    held = config["block_m"] * (_block_d(problem) + config["block_n"]) // (32 * config["num_warps"])
    return held <= (160 if FORMATS[problem.precision].bytes_in == 2 else 96)


def _useful(config: Config, problem: Problem) -> bool:
    """Not more than half of a block is empty, and each warp has rows; small checks are exempt."""
    if problem["sq"] * problem["sk"] < 2**15:
        return True
    rows = config["block_m"] < 2 * max(problem["sq"], 16) and config["block_n"] < 2 * max(problem["sk"], 16)
    return rows and (config["num_warps"] == 4 or config["block_m"] >= 64)


def _tma(config: Config, problem: Problem) -> bool:
    """A box of keys is at most 256 columns of which each row is a multiple of 16 bytes."""
    return config["schedule"] == "pointer" or problem["d"] * FORMATS[problem.precision].bytes_in % 16 == 0


def _default(problem: Problem) -> Config:
    """Tiles that fit the smallest of our architectures (101376 bytes of shared memory), without spills on any.

    At d = 128, 128 rows by 8 warps spilled 128 bytes on sm_80 and 112 on sm_120a; 64 rows by 4 warps do not. Where
    there is room for it, what an H200 does best.
    """
    size, d = FORMATS[problem.precision].bytes_in, _block_d(problem)
    m, n, warps, stages = (128, 64, 8, 2) if d <= 64 else (64, 64, 4, 2) if d <= 128 else (64, 32, 8, 2)
    if roomy():
        m, n, warps, stages = (128, 64, 8, 3) if d <= 64 else (128, 128, 8, 3) if d <= 128 else (128, 64, 8, 2)
    if size == 4:
        m, n, warps, stages = (64, 16, 8, 2) if d <= 128 else (32, 16, 4, 2)
    if problem["sq"] < m:
        m = max(16, power_of_two(problem["sq"]))
        warps = min(warps, 4)
    return {"block_m": m, "block_n": n, "num_warps": warps, "num_stages": stages, "schedule": "pointer"}


SPACE = Space(
    axes={
        "block_m": (16, 32, 64, 128),
        "block_n": (16, 32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "schedule": ("pointer", "tma"),
    },
    where=(_tma, _useful, _registers, _shared),
    default=_default,
)


def _block_d(problem: Problem) -> int:
    return power_of_two(max(problem["d"], 16))


def _launch(problem: Problem, config: Config) -> Launch:
    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    if h % hkv:
        raise UsageError(f"{problem}: h must be a multiple of hkv")
    if d > 256:
        raise UsageError(f"{problem}: d above 256 does not fit the registers of this kernel")
    if sk * d >= 2**31:
        raise UsageError(f"{problem}: keys of one head above 2^31 elements are beyond 32-bit offsets")
    plain = Operand.of(problem, "in")
    tma = config["schedule"] == "tma"
    box = Operand(plain.dtype, (b * hkv * sk, d), (config["block_n"], _block_d(problem))) if tma else None
    constants: dict[str, Any] = {"CAUSAL": bool(problem.flag("causal")), "PRECISION": problem.precision}
    constants |= {"TMA": tma, "D": d, "BLOCK_M": config["block_m"], "BLOCK_N": config["block_n"]}
    constants |= {"BLOCK_D": _block_d(problem)}
    scale = math.log2(math.e) / math.sqrt(d)
    grid = (triton.cdiv(sq, config["block_m"]) * b * h,)
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    operands = (plain, Operand("float32") if problem.flag("lse") else None, plain, plain, plain, box, box)
    return Launch(attention, grid, operands, (h // hkv, sq, sk, scale), constants, options)


def _run(problem: Problem, config: Config) -> Run:
    launch = _launch(problem, config).runner()
    tma = config["schedule"] == "tma"
    if not tma and not problem.flag("lse"):
        return launch

    def run(out: Any, q: Any, k: Any, v: Any) -> None:
        found = [part for part in results(problem, out) if part is not None]
        launch(*found, q, k, v, *((k, v) if tma else ()))

    return run


def build(problem: Problem, config: Config) -> Run:
    """run(out: see the operator, q: [b, h, sq, d], k, v: [b, hkv, sk, d]), contiguous and of one precision."""
    native(_launch(problem, config))
    return _run(problem, config)


def emulate(problem: Problem, config: Config) -> Run:
    """The same on CPU tensors, interpreted."""
    return emulated(_run(problem, config))


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """Machine code of the kernel for `arch`."""
    return _launch(problem, config).compile(arch)
