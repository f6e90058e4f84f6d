// c[m, n] = epilogue(op(a) op(b)): a block computes BLOCK_M x BLOCK_N, a warp a part of it.
//
// Tiles of a and b go through a ring of STAGES buffers in shared memory, filled by asynchronous copies
// that run STAGES - 1 tiles ahead. With tensor cores a warp reads fragments by ldmatrix and multiplies by
// mma.sync; fp32 does outer products in registers. Both operands keep their storage order in shared
// memory: nothing is transposed on the way in. The result leaves through shared memory, in whole lines.
//
// Macros: PRECISION, TRANS_A, TRANS_B (1: stored [k, m], [n, k]), EPILOGUE (see epilogue.cuh), BLOCK_M, BLOCK_N,
// BLOCK_K, WARPS_M, WARPS_N, STAGES, GROUP_M, COPY_A, COPY_B (bytes a copy, see copy_tile), VEC_C (elements of c a
// store), MIN_BLOCKS (on a multiprocessor at once: it limits the registers).
#include "epilogue.cuh"

using namespace rt;
using F = Format<PRECISION>;
using In = F::In;
using Acc = F::Acc;
using Out = F::Out;

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N;
constexpr bool TENSOR = PRECISION != FP32;

// One operand's tile: MN elements of m or n by BLOCK_K of k, its rows along k (K_MAJOR) or along m or n.
template <int MN, bool K_MAJOR_> struct Operand {
  static constexpr bool K_MAJOR = K_MAJOR_;
  static constexpr int SIZE = sizeof(In), ROWS = K_MAJOR ? MN : BLOCK_K, COLS = K_MAJOR ? BLOCK_K : MN;
  // ldmatrix can transpose 16-bit elements only. Where it cannot, a lane reads four neighbours in m or n
  // at once (a quad): they go to four fragments, and `position` says which rows of c those then are.
  static constexpr bool QUADS = !K_MAJOR && !(TENSOR && SIZE == 2);
  using Tile = Rows<COLS * SIZE / 16, TENSOR && QUADS && SIZE == 1 ? 2 : 0, TENSOR && QUADS ? 2 : 1>;
  static constexpr int BYTES = ROWS * Tile::STRIDE * 16;

  template <int COPY>
  static __device__ __forceinline__ void fetch(char* tile, const In* matrix, int mn0, int k0, int mn, int k) {
    if (K_MAJOR) copy_tile<Tile, ROWS, COLS, COPY, THREADS>(tile, matrix, k, mn0, k0, mn, k);
    else copy_tile<Tile, ROWS, COLS, COPY, THREADS>(tile, matrix, mn, k0, mn0, k, mn);
  }
};
using A = Operand<BLOCK_M, !TRANS_A>;
using B = Operand<BLOCK_N, TRANS_B != 0>;
constexpr int STAGE_BYTES = A::BYTES + B::BYTES;

// Row or column, within the warp's part, of a thread's `index`-th one, if LANES lanes share them.
template <bool QUADS, int LANES> __device__ __forceinline__ int position(int index, int lane) {
  return QUADS ? index / 4 * (4 * LANES) + 4 * lane + index % 4 : LANES * index + lane;
}

#if PRECISION != 0  // Tensor cores. (Precision's enumerators are not known to the preprocessor; FP32 is 0.)

constexpr int K_STEP = 32 / (int)sizeof(In);     // k of one mma: 32 bytes in every format
constexpr int TM = WARP_M / 8, TN = WARP_N / 8;  // groups of eight rows or columns; an mma takes 2 by 1

// What lane 4g + t has of GROUPS groups of eight rows or columns: of element g of a group, bytes 4t..4t+3 of each
// 16-byte half of k. The registers lie as an mma takes them, those of a (LEFT) for two groups at once: in another
// order each mma costs four moves, which is what half of the instructions were.
template <bool LEFT, int GROUPS> struct Fragments {
  static constexpr int LENGTH = LEFT ? 4 : 2;
  unsigned r[2 * GROUPS / LENGTH][LENGTH];
  __device__ __forceinline__ unsigned& at(int group, int half) {
    return LEFT ? r[group / 2][2 * half + group % 2] : r[group][half];
  }

  template <class Op> __device__ __forceinline__ void read(const char* tile, int first, int step) {
    using Tile = typename Op::Tile;
    const int lane = threadIdx.x % 32;
    if constexpr (!Op::QUADS) {
      // the 8x8 matrix this lane points into; their order is that of the registers
      const int group = LEFT ? lane / 8 % 2 : lane / 16, half = LEFT ? lane / 16 : lane / 8 % 2, within = lane % 8;
#pragma unroll
      for (int i = 0; i < GROUPS; i += 2) {
        unsigned four[4];
        if (Op::K_MAJOR) load_matrices(four, tile + Tile::at(first + 8 * (i + group) + within, 2 * step + half));
        else load_matrices_transposed(four, tile + Tile::at(16 * step + 8 * half + within, first / 8 + i + group));
#pragma unroll
        for (int e = 0; e < 4; e++) {
          if constexpr (PRECISION == TF32) four[e] = to_tf32(__int_as_float(four[e]));
          r[(2 * i + e) / LENGTH][(2 * i + e) % LENGTH] = four[e];
        }
      }
    } else {
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int i = 0; i < GROUPS; i += 4) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int mn = first + 8 * i + 4 * g;
          if constexpr (sizeof(In) == 4) {
            const char* quad = tile + Tile::at(8 * step + 4 * half + t, mn / 4);
            const Vec<float, 4> x = load<float, 4>(reinterpret_cast<const float*>(quad));
#pragma unroll
            for (int j = 0; j < 4; j++) at(i + j, half) = to_tf32(x.v[j]);
          } else {  // four bytes of four successive k: transpose them
            unsigned w[4];
#pragma unroll
            for (int s = 0; s < 4; s++) {
              const int k = 32 * step + 16 * half + 4 * t + s;
              w[s] = *reinterpret_cast<const unsigned*>(tile + Tile::at(k, mn / 16) + mn % 16);
            }
            const unsigned low01 = __byte_perm(w[0], w[1], 0x5140), low23 = __byte_perm(w[2], w[3], 0x5140);
            const unsigned high01 = __byte_perm(w[0], w[1], 0x7362), high23 = __byte_perm(w[2], w[3], 0x7362);
            at(i, half) = __byte_perm(low01, low23, 0x5410), at(i + 1, half) = __byte_perm(low01, low23, 0x7632);
            at(i + 2, half) = __byte_perm(high01, high23, 0x5410);
            at(i + 3, half) = __byte_perm(high01, high23, 0x7632);
          }
        }
      }
    }
  }
};

struct Product {
  Acc acc[TM / 2][TN][4] = {};

  __device__ __forceinline__ void add(const char* tile_a, const char* tile_b, int row, int col) {
    constexpr int STEPS = BLOCK_K / K_STEP;
    // Fragments of this step and, under way, of the next. 128 accumulators leave no registers for the latter,
    // nor does fp8 on compute capability 9.0, where ptxas widens all steps it sees to fp16: 92 bytes spilled.
    constexpr int BUFFERS = TM * TN <= 32 && PRECISION != FP8 ? 2 : 1;
    Fragments<true, TM> a[BUFFERS];
    Fragments<false, TN> b[BUFFERS];
    auto read = [&](int step) {
      a[step % BUFFERS].template read<A>(tile_a, row, step);
      b[step % BUFFERS].template read<B>(tile_b, col, step);
    };
    if (BUFFERS == 2) read(0);
#pragma unroll(PRECISION == FP8 ? 1 : STEPS)
    for (int step = 0; step < STEPS; step++) {
      const int now = step % BUFFERS;
      if (BUFFERS == 1) read(step);
      else if (step + 1 < STEPS) read(step + 1);
#pragma unroll
      for (int i = 0; i < TM / 2; i++)
#pragma unroll
        for (int j = 0; j < TN; j++) mma<PRECISION>(acc[i][j], a[now].r[i], b[now].r[j]);
    }
  }

  // use(row, col, value) for each value, row and col within the warp's part
  template <class Use> __device__ __forceinline__ void each(Use use) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < TM / 2; i++)
#pragma unroll
      for (int j = 0; j < TN; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          use(position<A::QUADS, 8>(2 * i + e / 2, g), position<B::QUADS, 8>(j, 2 * t + e % 2), acc[i][j][e]);
  }
};

#else  // fp32: a warp is 4 x 8 lanes, a thread computes TM x TN values

constexpr int TM = WARP_M / 4, TN = WARP_N / 8;

struct Product {
  float acc[TM][TN] = {};

  __device__ __forceinline__ void add(const char* tile_a, const char* tile_b, int row, int col) {
    const int y = threadIdx.x % 32 / 8, x = threadIdx.x % 8;
#pragma unroll 1
    for (int k = 0; k < BLOCK_K; k += 4) {
      float a[TM][4];
      if constexpr (A::K_MAJOR) {
#pragma unroll
        for (int i = 0; i < TM; i++) {
          const Vec<float, 4> v = quad<A>(tile_a, row + 4 * i + y, k / 4);
#pragma unroll
          for (int s = 0; s < 4; s++) a[i][s] = v.v[s];
        }
      } else {
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
          for (int i = 0; i < TM; i += 4) {
            const Vec<float, 4> v = quad<A>(tile_a, k + s, (row + 4 * i) / 4 + y);
#pragma unroll
            for (int c = 0; c < 4; c++) a[i + c][s] = v.v[c];
          }
      }
      if constexpr (B::K_MAJOR) {
#pragma unroll
        for (int j = 0; j < TN; j++) {
          const Vec<float, 4> v = quad<B>(tile_b, col + 8 * j + x, k / 4);
#pragma unroll
          for (int s = 0; s < 4; s++)
#pragma unroll
            for (int i = 0; i < TM; i++) acc[i][j] = fmaf(a[i][s], v.v[s], acc[i][j]);
        }
      } else {
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
          for (int j = 0; j < TN; j += 4) {
            const Vec<float, 4> v = quad<B>(tile_b, k + s, (col + 8 * j) / 4 + x);
#pragma unroll
            for (int c = 0; c < 4; c++)
#pragma unroll
              for (int i = 0; i < TM; i++) acc[i][j + c] = fmaf(a[i][s], v.v[c], acc[i][j + c]);
          }
      }
    }
  }

  template <class Op> static __device__ __forceinline__ Vec<float, 4> quad(const char* tile, int row, int chunk) {
    return load<float, 4>(reinterpret_cast<const float*>(tile + Op::Tile::at(row, chunk)));
  }

  template <class Use> __device__ __forceinline__ void each(Use use) const {
    const int y = threadIdx.x % 32 / 8, x = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
      for (int j = 0; j < TN; j++) use(position<A::QUADS, 4>(i, y), position<B::QUADS, 8>(j, x), acc[i][j]);
  }
};

#endif

// What follows the product, for one value of c.
__device__ __forceinline__ Out result_of(Acc value, float scale, float added) {
  if constexpr (PRECISION == INT8) return Convert<Out>::from(value);
  else return Convert<Out>::from(finish<EPILOGUE>(PRECISION == FP8 ? value * scale : value, added));
}

// scale_a, scale_b: [1], fp8 only; more: bias [n] or residual [m, n], with an epilogue only. Grid: one block per
// tile of c.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    gemm_kernel(Out* __restrict__ c, const In* __restrict__ a, const In* __restrict__ b,
                const float* __restrict__ scale_a, const float* __restrict__ scale_b, const Out* __restrict__ more,
                int m, int n, int k) {
  SHARED_MEMORY(shared);

  // Blocks that run together take GROUP_M rows of tiles, column by column: they share a's and b's tiles in L2.
  const int tiles_m = (m + BLOCK_M - 1) / BLOCK_M, tiles_n = (n + BLOCK_N - 1) / BLOCK_N;
  const int group = blockIdx.x / (GROUP_M * tiles_n), in_group = blockIdx.x % (GROUP_M * tiles_n);
  const int group_rows = min(tiles_m - group * GROUP_M, GROUP_M);
  const int m0 = (group * GROUP_M + in_group % group_rows) * BLOCK_M, n0 = in_group / group_rows * BLOCK_N;

  const int tiles = (k + BLOCK_K - 1) / BLOCK_K;
  auto fetch = [&](int tile) {
    if (tile < tiles) {
      char* stage = shared + tile % STAGES * STAGE_BYTES;
      A::fetch<COPY_A>(stage, a, m0, tile * BLOCK_K, m, k);
      B::fetch<COPY_B>(stage + A::BYTES, b, n0, tile * BLOCK_K, n, k);
    }
    copy_commit();  // an empty group past the end, so that the count in copy_wait holds
  };
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; tile++) fetch(tile);

  const int warp = threadIdx.x / 32, row = warp / WARPS_N * WARP_M, col = warp % WARPS_N * WARP_N;
  Product product;
  for (int tile = 0; tile < tiles; tile++) {
    copy_wait<STAGES - 2>();
    __syncthreads();  // the tile is there for all, and all have left the stage that is filled next
    fetch(tile + STAGES - 1);
    const char* stage = shared + tile % STAGES * STAGE_BYTES;
    product.add(stage, stage + A::BYTES, row, col);
  }

  copy_wait<0>();
  __syncthreads();
  constexpr int LINE = BLOCK_N + 32 / (int)sizeof(Acc);  // 32 bytes more: rows start in different banks
  Acc* staged = reinterpret_cast<Acc*>(shared);
  product.each([&](int r, int s, Acc value) { staged[(row + r) * LINE + col + s] = value; });
  __syncthreads();
  const float scale = PRECISION == FP8 ? *scale_a * *scale_b : 1.0f;
  constexpr int PER_LINE = BLOCK_N / VEC_C;
#pragma unroll 2
  for (int unit = threadIdx.x; unit < BLOCK_M * PER_LINE; unit += THREADS) {
    const int r = unit / PER_LINE, s = unit % PER_LINE * VEC_C;
    if (m0 + r >= m || n0 + s >= n) continue;
    const Vec<Acc, VEC_C> values = load<Acc, VEC_C>(staged + r * LINE + s);
    Vec<Out, VEC_C> added = {}, result;
    const long long at = (long long)(m0 + r) * n + n0 + s;
    if (EPILOGUE != 0) added = load<Out, VEC_C>(more + (EPILOGUE == RESIDUAL ? at : n0 + s));
#pragma unroll
    for (int i = 0; i < VEC_C; i++) result.v[i] = result_of(values.v[i], scale, to_float(added.v[i]));
    store<Out, VEC_C>(c + at, result);
  }
}
