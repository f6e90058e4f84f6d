"""Numba-CUDA matrix product: tensor cores (mma.sync, cp.async ring) for fp16/bf16, register tiles for fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rooftune.check import Run
from rooftune.core import Config, Problem, Resources, Space
from rooftune.kernels.common import numba_cuda as common
from rooftune.kernels.common.numba_cuda import (
    ACCESS,
    SHARED_ACCESS,
    ceil_div,
    copy_commit,
    copy_wait,
    cuda,
    device,
    float32,
    fma,
    gelu,
    grid_add,
    grid_finish,
    grid_mma,
    grid_store,
    uint16,
    uint32,
)
from rooftune.kernels.common.numba_cuda_tiles import Tile, filler, reader_a, reader_b

DEVICES = ("cuda",)
PRECISIONS = ("fp32", "fp16", "bf16")

F0 = np.float32(0)


def _simt(problem: Problem) -> bool:
    return problem.precision == "fp32"


def _thread_tile(config: Config) -> tuple[int, int]:
    """Rows and columns of c that one thread of the fp32 kernel holds; (0, 0) if there is no such tile."""
    each = config["block_m"] * config["block_n"] / (32 * config["num_warps"])
    return {16: (4, 4), 32: (8, 4), 64: (8, 8)}.get(each, (0, 0))


def _warp_grid(config: Config) -> tuple[int, int]:
    """Warps along m and n of the tensor-core kernel: as square as their number allows, longer along the longer."""
    long, short = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}[config["num_warps"]]
    return (short, long) if config["block_n"] >= config["block_m"] else (long, short)


def _fits(config: Config, problem: Problem) -> bool:
    """Shared memory of the ring, and a tile each thread can hold."""
    bm, bn, bk, threads = config["block_m"], config["block_n"], config["block_k"], 32 * config["num_warps"]
    if _simt(problem):
        tm, _ = _thread_tile(config)
        whole = bm * bk % (4 * threads) == 0 and bn * bk % (4 * threads) == 0
        narrow = max(bm, bn, bk) <= 4 * threads  # the chunks of one row of a panel, at most one a thread
        return (
            tm > 0 and whole and narrow and config["num_stages"] == 2 and bk <= 32 and 8 * bk * (bm + bn + 8) <= 49152
        )
    wm, wn = _warp_grid(config)
    tile_m, tile_n = bm // wm, bn // wn
    held = tile_m % 16 == 0 and tile_n % 16 == 0 and tile_m * tile_n <= 32 * 128  # 128 sums a thread
    whole = bm * bk % (8 * threads) == 0 and bn * bk % (8 * threads) == 0
    return held and whole and bk >= 32 and config["num_stages"] * 2 * bk * (bm + bn) <= 49152


def _default(problem: Problem) -> Config:
    """Tiles of 128x128 once they fill most of 132 multiprocessors, of 64x64 below that.

    Two blocks a multiprocessor where tiles divide the sizes; the checks of ragged ones, and addresses of a residual,
    need more registers.
    """
    m, n, k = problem["m"], problem["n"], problem["k"]
    large = ceil_div(m, 128) * ceil_div(n, 128) >= 100
    block, step = (128 if large else 64), (16 if _simt(problem) else 32)
    exact = m % block == 0 and n % block == 0 and k % step == 0 and problem.flag("epilogue", "none") != "residual"
    warps = 8 if large else 4
    stages = 2 if _simt(problem) else 3
    return {"block_m": block, "block_n": block, "block_k": step, "num_warps": warps, "num_stages": stages,
            "blocks_per_sm": 2 if exact else 1, "group_m": 8}  # fmt: skip


SPACE = Space(
    axes={
        "block_m": (32, 64, 128, 256),
        "block_n": (32, 64, 128, 256),
        "block_k": (8, 16, 32, 64),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (2, 3, 4),
        "blocks_per_sm": (1, 2, 3, 4),  # registers are capped so that this many blocks fit
        "group_m": (1, 8),  # row blocks walked together, so that neighbours share columns of b in L2
    },
    where=(_fits,),
    default=_default,
)


@dataclass(frozen=True)
class _Sizes:
    """Constants of one kernel."""

    m: int
    n: int
    k: int
    bm: int
    bn: int
    bk: int
    threads: int
    ta: str
    tb: str
    epilogue: str
    precision: str
    group: int

    @property
    def blocks(self) -> int:
        return ceil_div(self.m, self.bm) * ceil_div(self.n, self.bn)


def _raster(z: _Sizes) -> Any:
    """A device function (row, column) of the block's corner in c."""
    blocks_m, blocks_n, bm, bn = ceil_div(z.m, z.bm), ceil_div(z.n, z.bn), z.bm, z.bn
    group = min(z.group, blocks_m)
    in_group = group * blocks_n
    even = blocks_m % group == 0  # then the group's size is a constant, and two divisions are

    @device
    def corner() -> Any:
        first = cuda.blockIdx.x // in_group * group
        size = group if even else min(blocks_m - first, group)
        rest = cuda.blockIdx.x % in_group
        return (first + rest % size) * bm, rest // size * bn

    return corner


def _finisher(epilogue: str) -> Any:
    """A device function finish(sum, bias): the epilogue of one value."""

    @device
    def add_bias(value: Any, bias: Any) -> Any:
        return value + bias

    @device
    def add_relu(value: Any, bias: Any) -> Any:
        value = value + bias
        return cuda.selp(value < F0, F0, value)  # a NaN stays

    @device
    def add_gelu(value: Any, bias: Any) -> Any:
        return gelu(value + bias)

    return {"bias": add_bias, "bias_relu": add_relu, "bias_gelu": add_gelu}.get(epilogue, add_bias)


def _tensor_core(z: _Sizes, stages: int, warps: tuple[int, int]) -> Any:
    """fp16/bf16: a ring of `stages` tiles filled by cp.async; each warp holds (bm/warps_m) x (bn/warps_n) sums."""
    M, N, K, BM, BN, BK, STAGES = z.m, z.n, z.k, z.bm, z.bn, z.bk, stages
    A_KINNER, B_KINNER = z.ta == "n", z.tb == "t"
    tile_a = Tile(BM, BK, K, M, K, z.threads) if A_KINNER else Tile(BK, BM, M, K, M, z.threads)
    tile_b = Tile(BN, BK, K, N, K, z.threads) if B_KINNER else Tile(BK, BN, N, K, N, z.threads)
    fill_a, fill_b = filler(tile_a), filler(tile_b)
    read_a, read_b = reader_a(tile_a.inner, A_KINNER), reader_b(tile_b.inner, B_KINNER)
    SIZE_A, SIZE_B, KT = tile_a.elements, tile_b.elements, ceil_div(K, BK)
    SHARED_A, SHARED_B = STAGES * SIZE_A, STAGES * SIZE_B
    WARPS_N, WM, WN = warps[1], BM // warps[0], BN // warps[1]
    MT, NT = WM // 16, WN // 8
    SUMS, WORDS_A, WORDS_B, COLUMNS = MT * NT * 4, MT * 4, NT * 2, NT * 2
    mma, finish = grid_mma(z.precision, MT, NT), grid_finish(z.epilogue, MT, NT)
    write = grid_store(z.precision, MT, NT, M, N, M % BM == 0 and N % BN == 0)
    add = grid_add(z.precision, MT, NT, M, N)
    wait, corner, load = copy_wait(STAGES - 2), _raster(z), ACCESS[z.precision][0]
    BIAS, RESIDUAL = z.epilogue.startswith("bias"), z.epilogue == "residual"

    @device
    def fill(sa: Any, sb: Any, a: Any, b: Any, row: Any, column: Any, step: Any, slot: Any) -> None:
        if step < KT:
            k = step * BK
            fill_a(sa, slot * SIZE_A, a, 0, row if A_KINNER else k, k if A_KINNER else row)
            fill_b(sb, slot * SIZE_B, b, 0, column if B_KINNER else k, k if B_KINNER else column)
        copy_commit()

    def gemm(c: Any, a: Any, b: Any, more: Any) -> None:
        sa = cuda.shared.array(SHARED_A, uint16, 16)
        sb = cuda.shared.array(SHARED_B, uint16, 16)
        acc = cuda.local.array(SUMS, float32)
        fa = cuda.local.array(WORDS_A, uint32)
        fb = cuda.local.array(WORDS_B, uint32)
        fn = cuda.local.array(COLUMNS, float32)
        row, column = corner()
        warp = cuda.threadIdx.x // 32
        wm = warp // WARPS_N * WM
        wn = warp % WARPS_N * WN
        for i in range(SUMS):
            acc[i] = F0
        for step in range(STAGES - 1):
            fill(sa, sb, a, b, row, column, step, step)
        slot = 0
        for step in range(KT):
            wait()
            cuda.syncthreads()  # everyone's copies of this step are there, and everyone left the slot filled next
            fill(sa, sb, a, b, row, column, step + STAGES - 1, slot - 1 if slot > 0 else STAGES - 1)
            for k in range(0, BK, 16):
                for j in range(NT // 2):
                    read_b(fb, 4 * j, sb, slot * SIZE_B, wn + 16 * j, k)
                for i in range(MT):
                    read_a(fa, 4 * i, sa, slot * SIZE_A, wm + 16 * i, k)
                mma(acc, fa, fb)
            slot = slot + 1 if slot + 1 < STAGES else 0
        lane = cuda.threadIdx.x % 32
        first = column + wn + lane % 4 * 2
        if BIAS:
            for x in range(COLUMNS):
                s = first + x // 2 * 8 + x % 2
                fn[x] = load(more, cuda.selp(s < N, s, 0))
            finish(acc, fn)
        if RESIDUAL:
            add(acc, more, row + wm + lane // 4, first)
        write(c, acc, row + wm + lane // 4, first)

    return gemm


def _panel(outer: int, inner: int, stride: int, ends: tuple[int, int], threads: int, transposed: bool) -> Any:
    """fp32: device functions (fetch, put) of a tile with `inner` contiguous in memory.

    fetch(registers, matrix, o0, i0) reads 4 elements a turn, zeros outside (selected: branches would be unrolled
    too late to keep the registers in registers on sm_100a); put(shared, base, registers) writes
    them as [inner][outer] if transposed, else [outer][inner], rows padded by 4 against bank conflicts.
    """
    outer_end, inner_end = ends
    per_row = inner // 4
    apart = threads // per_row  # rows between the chunks of a thread
    turns = outer // apart
    whole = stride % 4 == 0 and inner_end % 4 == 0
    pitch = (outer if transposed else inner) + 4
    load, _, load16, _, _ = ACCESS["fp32"]
    _, put_one, _, put16, _ = SHARED_ACCESS

    @device
    def fetch_chunks(registers: Any, matrix: Any, o0: Any, i0: Any) -> None:
        i = i0 + cuda.threadIdx.x % per_row * 4
        for q in range(turns):
            o = o0 + cuda.threadIdx.x // per_row + q * apart
            inside = (o < outer_end) & (i < inner_end)
            load16(matrix, cuda.selp(inside, o * stride + i, 0), registers, q * 4)
            for e in range(4):
                registers[q * 4 + e] = cuda.selp(inside, registers[q * 4 + e], F0)

    @device
    def fetch_elements(registers: Any, matrix: Any, o0: Any, i0: Any) -> None:
        for x in range(turns * 4):
            o = o0 + cuda.threadIdx.x // per_row + x // 4 * apart
            i = i0 + cuda.threadIdx.x % per_row * 4 + x % 4
            inside = (o < outer_end) & (i < inner_end)
            registers[x] = cuda.selp(inside, load(matrix, cuda.selp(inside, o * stride + i, 0)), F0)

    @device
    def put(shared: Any, base: Any, registers: Any) -> None:
        for q in range(turns):
            o = cuda.threadIdx.x // per_row + q * apart
            i = cuda.threadIdx.x % per_row * 4
            if transposed:
                for e in range(4):
                    put_one(shared, base + (i + e) * pitch + o, registers[q * 4 + e])
            else:
                put16(shared, base + o * pitch + i, registers, q * 4)

    return fetch_chunks if whole else fetch_elements, put


def _register_tiles(z: _Sizes, thread: tuple[int, int]) -> Any:
    """fp32: the next tile travels through registers while two shared buffers alternate; 4-wide groups per thread."""
    M, N, K, BM, BN, BK = z.m, z.n, z.k, z.bm, z.bn, z.bk
    TM, TN = thread
    COLUMNS, STEP_M, STEP_N = BN // TN, BM // (TM // 4), BN // (TN // 4)
    a_kinner, b_kinner = z.ta == "n", z.tb == "t"
    panel_a = (BM, BK, K, (M, K)) if a_kinner else (BK, BM, M, (K, M))
    panel_b = (BN, BK, K, (N, K)) if b_kinner else (BK, BN, N, (K, N))
    fetch_a, put_a = _panel(*panel_a, z.threads, a_kinner)
    fetch_b, put_b = _panel(*panel_b, z.threads, b_kinner)
    A_KINNER, B_KINNER = a_kinner, b_kinner
    PITCH_A, PITCH_B, KT = BM + 4, BN + 4, ceil_div(K, BK)
    SIZE_A, SIZE_B = BK * PITCH_A, BK * PITCH_B
    SHARED_A, SHARED_B, NEXT_A, NEXT_B = 2 * SIZE_A, 2 * SIZE_B, BM * BK // z.threads, BN * BK // z.threads
    SUMS, WHOLE = TM * TN, N % 4 == 0
    load, store, _, store16, _ = ACCESS["fp32"]
    BIAS, RESIDUAL = z.epilogue.startswith("bias"), z.epilogue == "residual"
    load16 = SHARED_ACCESS[2]
    finish, corner = _finisher(z.epilogue), _raster(z)

    def gemm(c: Any, a: Any, b: Any, more: Any) -> None:
        sa = cuda.shared.array(SHARED_A, float32, 16)
        sb = cuda.shared.array(SHARED_B, float32, 16)
        acc = cuda.local.array(SUMS, float32)
        fa = cuda.local.array(TM, float32)
        fb = cuda.local.array(TN, float32)
        na = cuda.local.array(NEXT_A, float32)
        nb = cuda.local.array(NEXT_B, float32)
        row, column = corner()
        ty = cuda.threadIdx.x // COLUMNS * 4
        tx = cuda.threadIdx.x % COLUMNS * 4
        for i in range(SUMS):
            acc[i] = F0
        fetch_a(na, a, row if A_KINNER else 0, 0 if A_KINNER else row)
        fetch_b(nb, b, column if B_KINNER else 0, 0 if B_KINNER else column)
        for step in range(KT):
            slot = step % 2
            put_a(sa, slot * SIZE_A, na)
            put_b(sb, slot * SIZE_B, nb)
            cuda.syncthreads()  # the other buffer was last read before this barrier, so one a step is enough
            if step + 1 < KT:
                k = (step + 1) * BK
                fetch_a(na, a, row if A_KINNER else k, k if A_KINNER else row)
                fetch_b(nb, b, column if B_KINNER else k, k if B_KINNER else column)
            for kk in range(BK):
                for i in range(0, TM, 4):
                    load16(sa, slot * SIZE_A + kk * PITCH_A + i // 4 * STEP_M + ty, fa, i)
                for j in range(0, TN, 4):
                    load16(sb, slot * SIZE_B + kk * PITCH_B + j // 4 * STEP_N + tx, fb, j)
                for i in range(TM):
                    for j in range(TN):
                        acc[i * TN + j] = fma(fa[i], fb[j], acc[i * TN + j])
        if BIAS:
            for j in range(TN):
                s = column + j // 4 * STEP_N + tx + j % 4
                fb[j] = load(more, cuda.selp(s < N, s, 0))
            for x in range(SUMS):
                acc[x] = finish(acc[x], fb[x % TN])
        if RESIDUAL:
            for x in range(SUMS):
                r = row + x // TN // 4 * STEP_M + ty + x // TN % 4
                s = column + x % TN // 4 * STEP_N + tx + x % 4
                acc[x] += load(more, cuda.selp((r < M) & (s < N), r * N + s, 0))
        for i in range(TM):
            r = row + i // 4 * STEP_M + ty + i % 4
            for j in range(0, TN, 4):
                s = column + j // 4 * STEP_N + tx
                if r < M and s < N:
                    if WHOLE:
                        store16(c, r * N + s, acc, i * TN + j)
                    else:
                        for e in range(4):
                            if s + e < N:
                                store(c, r * N + s + e, acc[i * TN + j + e])

    return gemm


def _launch(problem: Problem, config: Config) -> common.Launch:
    ta, tb = problem.flag("transpose", "nn")
    z = _Sizes(
        problem["m"], problem["n"], problem["k"], config["block_m"], config["block_n"], config["block_k"],
        32 * config["num_warps"], ta, tb, problem.flag("epilogue", "none"), problem.precision, config["group_m"],
    )  # fmt: skip
    if _simt(problem):
        body = _register_tiles(z, _thread_tile(config))
    else:
        body = _tensor_core(z, config["num_stages"], _warp_grid(config))
    registers = common.register_limit(z.threads, config["blocks_per_sm"])
    if z.epilogue != "none":
        return common.Launch(body, z.blocks, z.threads, (problem.precision,) * 4, registers)
    inner = device(body)

    def without_bias(c: Any, a: Any, b: Any) -> None:
        inner(c, a, b, a)  # the last argument is never read

    return common.Launch(without_bias, z.blocks, z.threads, (problem.precision,) * 3, registers)


def build(problem: Problem, config: Config) -> Run:
    """run(out: [m, n], a, b[, bias: [n] or residual: [m, n]]), all contiguous, on torch's current stream."""
    return common.build(_launch(problem, config))


def emulate(problem: Problem, config: Config) -> Run:
    """The same kernel on CPU tensors."""
    return common.emulate(_launch(problem, config))


def compile_for(problem: Problem, config: Config, arch: str) -> Resources:
    """Machine code without a GPU."""
    return common.resources(_launch(problem, config), arch)
