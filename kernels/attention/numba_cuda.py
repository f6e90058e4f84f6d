"""Numba-CUDA fused attention: tensor cores for fp16/bf16 (probabilities stay in registers), register tiles for fp32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources, Space, UsageError
from rooftune.kernels.attention import without_lse
from rooftune.kernels.common import numba_cuda as common
from rooftune.kernels.common.numba_cuda import (
    ACCESS,
    MMA,
    PACK,
    SHARED_ACCESS,
    ceil_div,
    copy16,
    copy_commit,
    copy_wait,
    cuda,
    device,
    exp2,
    float32,
    fma,
    fmax,
    shfl_xor,
    uint16,
    uint32,
)
from rooftune.kernels.common.numba_cuda_tiles import Tile, filler, reader_a, reader_b

DEVICES = ("cuda",)
PRECISIONS = ("fp32", "fp16", "bf16")

F0, F1, NEG_INF = np.float32(0), np.float32(1), np.float32(-np.inf)


@dataclass(frozen=True)
class _Sizes:
    """Constants of one kernel. `scale` is log2(e) / sqrt(d): scores leave the product times this."""

    h: int
    hkv: int
    sq: int
    sk: int
    d: int
    bm: int
    bn: int
    threads: int
    causal: bool
    precision: str

    @property
    def scale(self) -> Any:
        return np.float32(math.log2(math.e) / math.sqrt(self.d))


def _simt(problem: Problem) -> bool:
    return problem.precision == "fp32"


def _threads(config: Config, problem: Problem) -> int:
    """16 rows a warp on tensor cores; fp32: 4 rows and a sixteenth of the columns a thread."""
    return int(config["block_m"]) * (4 if _simt(problem) else 2)


def _fits(config: Config, problem: Problem) -> bool:
    """Tiles in shared memory; no more sums than registers hold."""
    bm, bn, d = config["block_m"], config["block_n"], problem["d"]
    if _simt(problem):
        words = (bm + bn) * (d + 4) + bm * (bn + 4)
        return 4 * words <= common.STATIC_SHARED and bn <= 64
    if bm < 16:  # the rows of one tensor-core tile
        return False
    held = d // 2 + bn // 2 + d // 4  # output, scores and query fragments of a thread
    return 2 * d * max(bm, 2 * bn) <= common.STATIC_SHARED and held <= 208


def _default(problem: Problem) -> Config:
    """64 queries by 64 keys where they fit; short sequences get smaller blocks, for there is little to share."""
    d, short = problem["d"], problem["sq"] <= 128
    if _simt(problem):
        bm = 8 if short else 16 if d > 128 else 32 if d > 64 else 64
        return {"block_m": bm, "block_n": 16 if d > 128 else 32, "blocks_per_sm": 1}
    return {"block_m": 16 if short else 64, "block_n": 64 if d <= 128 else 32, "blocks_per_sm": 1}


SPACE = Space(
    axes={"block_m": (8, 16, 32, 64, 128), "block_n": (16, 32, 64, 128), "blocks_per_sm": (1, 2, 3, 4)},
    where=(_fits,),
    default=_default,
)


def _corner(z: _Sizes) -> Any:
    """A device function (first query, queries' start, keys' start, number of keys to read) of a block.

    Blocks of one head are neighbours; the last queries come first, for causally they have the most work.
    """
    H, HKV, SQ, SK, D, BM = z.h, z.hkv, z.sq, z.sk, z.d, z.bm
    BLOCKS, SHIFT, CAUSAL = ceil_div(z.sq, z.bm), z.sk - z.sq, z.causal

    @device
    def corner() -> Any:
        head = cuda.blockIdx.x // BLOCKS
        q0 = (BLOCKS - 1 - cuda.blockIdx.x % BLOCKS) * BM
        kv = head // H * HKV + head % H * HKV // H
        keys = max(0, min(SK, q0 + BM + SHIFT)) if CAUSAL else SK
        return q0, head * SQ * D, kv * SK * D, keys

    return corner


def _tensor_core(z: _Sizes) -> Any:
    """FlashAttention-2 (Dao 2023): each warp owns 16 queries; the score registers become the next A operand.

    K and V have one buffer each: V is fetched while the scores are computed, the next K while V is used.
    """
    SQ, SK, D, BM, BN, CAUSAL, SHIFT = z.sq, z.sk, z.d, z.bm, z.bn, z.causal, z.sk - z.sq
    SCALE, SHARED, V_AT = z.scale, max(BM, 2 * BN) * D, BN * D
    fill_q = filler(Tile(BM, D, D, SQ, D, z.threads))
    fill_kv = filler(Tile(BN, D, D, SK, D, z.threads))
    read_q, read_k, read_v = reader_a(D, True), reader_b(D, True), reader_b(D, False)
    KS, NS, ND = D // 16, BN // 8, D // 8  # k steps of a score, score tiles and output tiles of 8 columns
    SCORES, SUMS, WORDS_Q = NS * 4, ND * 4, KS * 4
    # B operands read before their products: 2 tiles a read, up to 4 reads
    GN = next(g for g in (4, 3, 2, 1) if NS // 2 % g == 0)
    GD = next(g for g in (4, 3, 2, 1) if KS % g == 0)
    mma, pack, store2 = MMA[z.precision], PACK[z.precision], ACCESS[z.precision][4]
    wait_all, wait_older, corner = copy_wait(0), copy_wait(1), _corner(z)

    @device
    def quad_max(value: Any) -> Any:
        value = fmax(value, shfl_xor(value, 1))
        return fmax(value, shfl_xor(value, 2))

    @device
    def mask(s: Any, row: Any, first: Any) -> None:
        """Scores of keys that do not exist or come after the query become -inf. Selects, not branches."""
        for x in range(SCORES):  # one flat loop: nested ones are unrolled too late to keep s in registers on sm_100a
            key = first + x // 4 * 8 + x % 2
            end = row + x // 2 % 2 * 8 + SHIFT + 1
            seen = (key < SK) & (key < end) if CAUSAL else key < SK
            s[x] = cuda.selp(seen, s[x], NEG_INF)

    @device
    def softmax(s: Any, acc: Any, top: Any, total: Any, half: Any) -> None:
        """Scores to probabilities for one of the thread's two rows; rescales what was summed before."""
        largest = top[half]
        for x in range(2 * NS):
            largest = fmax(largest, s[x // 2 * 4 + 2 * half + x % 2])
        largest = quad_max(largest)
        base = cuda.selp(largest == NEG_INF, F0, largest * SCALE)  # nothing seen yet: -inf - -inf would be NaN
        shrink = exp2(fma(top[half], SCALE, -base))
        top[half] = largest
        summed = total[half] * shrink
        for x in range(2 * NS):
            at = x // 2 * 4 + 2 * half + x % 2
            s[at] = exp2(fma(s[at], SCALE, -base))
            summed += s[at]
        total[half] = summed
        for x in range(2 * ND):
            acc[x // 2 * 4 + 2 * half + x % 2] *= shrink

    def attention(o: Any, q: Any, k: Any, v: Any) -> None:
        shared = cuda.shared.array(SHARED, uint16, 16)  # queries first, then keys | values
        fq = cuda.local.array(WORDS_Q, uint32)
        fb = cuda.local.array(16, uint32)
        fp = cuda.local.array(4, uint32)
        s = cuda.local.array(SCORES, float32)
        acc = cuda.local.array(SUMS, float32)
        top = cuda.local.array(2, float32)
        total = cuda.local.array(2, float32)
        q0, start_q, start_kv, keys = corner()
        lane = cuda.threadIdx.x % 32
        warp_row = cuda.threadIdx.x // 32 * 16
        row = q0 + warp_row + lane // 4
        for half in range(2):
            top[half] = NEG_INF
            total[half] = F0
        for i in range(SUMS):
            acc[i] = F0
        fill_q(shared, 0, q, start_q, q0, 0)
        copy_commit()
        wait_all()
        cuda.syncthreads()
        for t in range(KS):
            read_q(fq, 4 * t, shared, 0, warp_row, 16 * t)
        cuda.syncthreads()
        fill_kv(shared, 0, k, start_kv, 0, 0)
        copy_commit()
        for j in range(0, keys, BN):
            fill_kv(shared, V_AT, v, start_kv, j, 0)
            copy_commit()
            wait_older()
            cuda.syncthreads()  # keys are there
            for i in range(SCORES):
                s[i] = F0
            for t in range(KS):
                for n in range(0, NS // 2, GN):
                    for g in range(GN):
                        read_k(fb, 4 * g, shared, 0, 16 * (n + g), 16 * t)
                    mma(s, 8 * n, fq, 4 * t, fb, 0, 2 * GN)
            cuda.syncthreads()  # everyone is done with the keys
            if j + BN < keys:
                fill_kv(shared, 0, k, start_kv, j + BN, 0)
            copy_commit()
            if j + BN > SK or (CAUSAL and j + BN - 1 > q0 + SHIFT):
                mask(s, row, j + lane % 4 * 2)
            softmax(s, acc, top, total, 0)
            softmax(s, acc, top, total, 1)
            wait_older()
            cuda.syncthreads()  # values are there
            for t in range(BN // 16):
                for i in range(4):
                    fp[i] = pack(s[8 * t + 2 * i], s[8 * t + 2 * i + 1])
                for n in range(0, KS, GD):
                    for g in range(GD):
                        read_v(fb, 4 * g, shared, V_AT, 16 * (n + g), 16 * t)
                    mma(acc, 8 * n, fp, 0, fb, 0, 2 * GD)
            cuda.syncthreads()  # everyone is done with the values
        wait_all()
        for half in range(2):
            summed = total[half]
            summed += shfl_xor(summed, 1)
            summed += shfl_xor(summed, 2)
            inverse = F0 if summed == F0 else F1 / summed  # a row that sees no key is 0
            if row + 8 * half < SQ:
                for n in range(ND):
                    at = start_q + (row + 8 * half) * D + 8 * n + lane % 4 * 2
                    store2(o, at, acc[4 * n + 2 * half] * inverse, acc[4 * n + 2 * half + 1] * inverse)

    return attention


def _register_tiles(z: _Sizes) -> Any:
    """fp32: 16 threads share 4 queries; each holds block_n/16 scores and d/16 outputs of every one of them.

    One buffer holds the keys, then the values; probabilities pass through shared memory. Rows are padded by
    4 words, so that 8 threads reading 16 bytes of 8 neighbouring rows meet 8 different bank groups.
    """
    SQ, SK, D, BM, BN, CAUSAL, SHIFT = z.sq, z.sk, z.d, z.bm, z.bn, z.causal, z.sk - z.sq
    SCALE, THREADS, PITCH, PITCH_P = z.scale, z.threads, z.d + 4, z.bn + 4
    KN, DN, CHUNKS = BN // 16, D // 16, D // 4
    SCORES, SUMS, WORDS_K = 4 * KN, 4 * DN, 4 * KN
    SHARED_Q, SHARED_KV, SHARED_P = BM * PITCH, BN * PITCH, BM * PITCH_P
    load, put, load16, _, _ = SHARED_ACCESS
    store = ACCESS["fp32"][1]
    wait_all, corner = copy_wait(0), _corner(z)

    @device
    def fill(shared: Any, matrix: Any, start: Any, first: Any, rows: Any, end: Any) -> None:
        for chunk in range(cuda.threadIdx.x, rows * CHUNKS, THREADS):
            r = chunk // CHUNKS
            c = chunk % CHUNKS * 4
            copy16(shared, r * PITCH + c, matrix, start + (first + r) * D + c, first + r < end)
        copy_commit()

    @device
    def row_max(value: Any) -> Any:
        value = fmax(value, shfl_xor(value, 8))
        value = fmax(value, shfl_xor(value, 4))
        value = fmax(value, shfl_xor(value, 2))
        return fmax(value, shfl_xor(value, 1))

    def attention(o: Any, q: Any, k: Any, v: Any) -> None:
        sq = cuda.shared.array(SHARED_Q, float32, 16)
        skv = cuda.shared.array(SHARED_KV, float32, 16)
        sp = cuda.shared.array(SHARED_P, float32, 16)
        rq = cuda.local.array(16, float32)
        rk = cuda.local.array(WORDS_K, float32)
        s = cuda.local.array(SCORES, float32)
        acc = cuda.local.array(SUMS, float32)
        top = cuda.local.array(4, float32)
        total = cuda.local.array(4, float32)
        q0, start_q, start_kv, keys = corner()
        tx = cuda.threadIdx.x % 16
        ty = cuda.threadIdx.x // 16 * 4
        for i in range(4):
            top[i] = NEG_INF
            total[i] = F0
        for i in range(SUMS):
            acc[i] = F0
        fill(sq, q, start_q, q0, BM, SQ)
        for j in range(0, keys, BN):
            fill(skv, k, start_kv, j, BN, SK)
            wait_all()
            cuda.syncthreads()
            for i in range(SCORES):
                s[i] = F0
            for c in range(0, D, 4):
                for i in range(4):
                    load16(sq, (ty + i) * PITCH + c, rq, 4 * i)
                for n in range(KN):
                    load16(skv, (tx + 16 * n) * PITCH + c, rk, 4 * n)
                for x in range(4 * SCORES):
                    i = x // 4 // KN
                    n = x // 4 % KN
                    s[x // 4] = fma(rq[4 * i + x % 4], rk[4 * n + x % 4], s[x // 4])
            cuda.syncthreads()  # everyone is done with the keys
            fill(skv, v, start_kv, j, BN, SK)
            for i in range(4):
                largest = top[i]
                end = q0 + ty + i + SHIFT + 1
                for n in range(KN):
                    key = j + tx + 16 * n
                    seen = (key < SK) & (key < end) if CAUSAL else key < SK
                    s[i * KN + n] = cuda.selp(seen, s[i * KN + n], NEG_INF)
                    largest = fmax(largest, s[i * KN + n])
                largest = row_max(largest)
                base = cuda.selp(largest == NEG_INF, F0, largest * SCALE)
                shrink = exp2(fma(top[i], SCALE, -base))
                top[i] = largest
                total[i] *= shrink
                for n in range(KN):
                    p = exp2(fma(s[i * KN + n], SCALE, -base))
                    total[i] += p
                    put(sp, (ty + i) * PITCH_P + tx + 16 * n, p)
                for n in range(DN):
                    acc[i * DN + n] *= shrink
            wait_all()
            cuda.syncthreads()  # values and probabilities are there
            for c in range(0, BN, 4):
                for i in range(4):
                    load16(sp, (ty + i) * PITCH_P + c, rq, 4 * i)
                for x in range(SUMS):
                    e = x // DN
                    n = x % DN
                    value = load(skv, (c + e) * PITCH + tx + 16 * n)
                    acc[n] = fma(rq[e], value, acc[n])
                    acc[DN + n] = fma(rq[4 + e], value, acc[DN + n])
                    acc[2 * DN + n] = fma(rq[8 + e], value, acc[2 * DN + n])
                    acc[3 * DN + n] = fma(rq[12 + e], value, acc[3 * DN + n])
            cuda.syncthreads()  # everyone is done with the values
        wait_all()
        for i in range(4):
            summed = total[i]
            summed += shfl_xor(summed, 8)
            summed += shfl_xor(summed, 4)
            summed += shfl_xor(summed, 2)
            summed += shfl_xor(summed, 1)
            inverse = F0 if summed == F0 else F1 / summed  # a row that sees no key is 0
            if q0 + ty + i < SQ:
                for n in range(DN):
                    store(o, start_q + (q0 + ty + i) * D + tx + 16 * n, acc[i * DN + n] * inverse)

    return attention


def _launch(problem: Problem, config: Config) -> common.Launch:
    b, h, hkv, sq, sk, d = (problem[x] for x in ("b", "h", "hkv", "sq", "sk", "d"))
    without_lse(problem, "attention/numba_cuda")
    if d % 16 or not 16 <= d <= 256:
        raise UsageError(f"Numba-CUDA attention takes d in multiples of 16 up to 256, not {d}")
    if h % hkv:
        raise UsageError(f"{problem}: h must be a multiple of hkv")
    z = _Sizes(
        h, hkv, sq, sk, d, config["block_m"], config["block_n"], _threads(config, problem),
        bool(problem.flag("causal")), problem.precision,
    )  # fmt: skip
    function = _register_tiles(z) if _simt(problem) else _tensor_core(z)
    registers = common.register_limit(z.threads, config["blocks_per_sm"])
    return common.Launch(function, b * h * ceil_div(sq, z.bm), z.threads, (problem.precision,) * 4, registers)


def build(problem: Problem, config: Config) -> Run:
    """run(out: [b, h, sq, d], q, k: [b, hkv, sk, d], v), all contiguous, on torch's current stream."""
    return common.build(_launch(problem, config))


def emulate(problem: Problem, config: Config) -> Run:
    """The same kernel on CPU tensors."""
    return common.emulate(_launch(problem, config))


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """Machine code without a GPU."""
    return common.resources(_launch(problem, config), arch)
