// Backward of fused attention on tensor cores, from lse and the row sums delta = sum_j dout * out.
//
// One kernel in two roles. With KEYS a block owns keys (k, v) of one key head and goes through the queries
// (q, dout) of every head that reads them: dk and dv. Without, it owns queries (q, dout) and goes through the
// keys (k, v): dq. In both, with `a` the owned rows and `b` those that pass,
//   s = a1 b1^T,  p = exp2(scale * s - lse),  ds = p * (a2 b2^T - delta),  sum1 += ds b1,  KEYS: sum2 += p b2.
// A warp owns 16 rows. p and ds stay in its registers: accumulators have the layout of a left operand. Passing
// rows come through a ring of STAGES buffers. Nothing is added in memory, so results repeat to the bit.
//
// A thread holds HEAD_DIM / 2 values of each sum. Above 128 two sums are more registers than there are: dk and dv are
// then two launches (SUMS 1 and 2), which costs one more product of the queries with the keys.
//
// Macros: PRECISION (fp16, bf16), HEAD_DIM, NUM_WARPS, BLOCK (passing rows at a time), STAGES (2 or more), CAUSAL,
// KEYS, SUMS (1: dk or dq, 2: dv, 3: both; without KEYS 1); or PREPARE alone beside the first three: the kernel that
// makes the row statistics.
#include "backward.cuh"

using namespace rt;
using T = Format<PRECISION>::In;
constexpr int D = HEAD_DIM, THREADS = 32 * NUM_WARPS, VEC = 16 / sizeof(T);

#if PREPARE
// stats: [rows, 2] = (lse * log2(e), delta); a warp a row
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prepare_kernel(float* __restrict__ stats, const T* __restrict__ dout, const T* __restrict__ out,
                   const float* __restrict__ lse, int rows) {
  const int row = blockIdx.x * NUM_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  float delta = 0.0f;
#pragma unroll
  for (int col = lane * 2; col < D; col += 64) {
    const Vec<T, 2> x = load<T, 2>(dout + (long long)row * D + col), y = load<T, 2>(out + (long long)row * D + col);
    delta = fmaf(to_float(x.v[0]), to_float(y.v[0]), fmaf(to_float(x.v[1]), to_float(y.v[1]), delta));
  }
  delta = reduce_lanes<32>(delta, Sum());
  if (lane == 0) {
    stats[2 * (long long)row] = lse[row] * LOG2E;
    stats[2 * (long long)row + 1] = delta;
  }
}
#else
constexpr int OWN = 16 * NUM_WARPS, STEPS = D / 16, COLS = D / 8, TILES = BLOCK / 8;
using Tile = Rows<D / 8>;
constexpr bool SLOPES = SUMS & 1, WEIGHTS = SUMS & 2;  // which sums this launch makes: sum1 (of ds), sum2 (of p)
constexpr int OWN_TILES = SLOPES ? 2 : 1;  // p alone needs no v
using Passing = Walk<T, Tile, D, OWN, OWN_TILES, BLOCK, STAGES, THREADS, KEYS, CAUSAL>;

// 16 owned rows, one step of D, as a left operand
__device__ __forceinline__ void read_left(unsigned (&r)[4], const char* tile, int row, int step) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  load_matrices(r, tile + Tile::at(row + 8 * (matrix % 2) + lane % 8, 2 * step + matrix / 2));
}
// 16 passing rows, one step of D, as two right operands of a b^T
__device__ __forceinline__ void read_rows(unsigned (&r)[4], const char* tile, int row, int step) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  load_matrices(r, tile + Tile::at(row + 8 * (matrix / 2) + lane % 8, 2 * step + matrix % 2));
}
// 16 passing rows, 16 columns of D, as two right operands of w b
__device__ __forceinline__ void read_columns(unsigned (&r)[4], const char* tile, int step, int col) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  load_matrices_transposed(r, tile + Tile::at(16 * step + 8 * (matrix % 2) + lane % 8, col / 8 + matrix / 2));
}
// w[16, BLOCK] = a[16, D] b[BLOCK, D]^T
__device__ __forceinline__ void multiply_rows(float (&w)[TILES][4], const char* a, int row, const char* b) {
#pragma unroll 2
  for (int step = 0; step < STEPS; step++) {
    unsigned left[4];
    read_left(left, a, row, step);
#pragma unroll
    for (int j = 0; j < TILES; j += 2) {
      unsigned right[4];
      read_rows(right, b, 8 * j, step);
      const unsigned b0[2] = {right[0], right[1]}, b1[2] = {right[2], right[3]};
      mma<PRECISION>(w[j], left, b0);
      mma<PRECISION>(w[j + 1], left, b1);
    }
  }
}
// sum[16, D] += w[16, BLOCK] b[BLOCK, D]
__device__ __forceinline__ void add_product(float (&sum)[COLS][4], const float (&w)[TILES][4], const char* b) {
#pragma unroll
  for (int step = 0; step < BLOCK / 16; step++) {
    const float(&low)[4] = w[2 * step], (&high)[4] = w[2 * step + 1];
    const unsigned left[4] = {pack<PRECISION>(low[0], low[1]), pack<PRECISION>(low[2], low[3]),
                              pack<PRECISION>(high[0], high[1]), pack<PRECISION>(high[2], high[3])};
#pragma unroll
    for (int j = 0; j < COLS; j += 2) {
      unsigned right[4];
      read_columns(right, b, step, 8 * j);
      const unsigned b0[2] = {right[0], right[1]}, b1[2] = {right[2], right[3]};
      mma<PRECISION>(sum[j], left, b0);
      mma<PRECISION>(sum[j + 1], left, b1);
    }
  }
}
// The warp's rows, times `factor`, over its own rows of the tile in shared memory; then whole lines to memory.
__device__ __forceinline__ void write_rows(T* out, char* tile, const float (&sum)[COLS][4], float factor, int row,
                                           int rows) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int j = 0; j < COLS; j++) {
      Vec<T, 2> pair;
      pair.v[0] = Convert<T>::from(sum[j][2 * r] * factor);
      pair.v[1] = Convert<T>::from(sum[j][2 * r + 1] * factor);
      store<T, 2>(reinterpret_cast<T*>(tile + Tile::at(row + 8 * r + g, j) + 4 * t), pair);
    }
  __syncwarp();
  constexpr int CHUNKS = D / VEC;
#pragma unroll 4
  for (int unit = lane; unit < 16 * CHUNKS; unit += 32) {
    const int r = row + unit / CHUNKS, chunk = unit % CHUNKS;
    const T* staged = reinterpret_cast<const T*>(tile + Tile::at(r, chunk));
    if (r < rows) store<T, VEC>(out + (long long)r * D + chunk * VEC, load<T, VEC>(staged));
  }
}

// a1, a2, b1, b2: k, v, q, dout with KEYS, else q, dout, k, v. out1 is dk or dq, out2 dv. `group` query heads
// read a key head. Grid: one block per OWN rows of a head. `scale` is log2(e) / sqrt(D); causal: query i sees
// keys up to i + sk - sq.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_kernel(T* __restrict__ out, const T* __restrict__ a1, const T* __restrict__ a2, const T* __restrict__ b1,
                    const T* __restrict__ b2, const float* __restrict__ stats, int group, int sq, int sk, int row1,
                    int row2, float scale) {
  SHARED_MEMORY(shared);
  const Passing walk(b1, b2, stats, shared, group, sq, sk);
  const int own_rows = walk.own_rows, other_rows = walk.other_rows, head = walk.head, own0 = walk.own0;
  const int ahead = walk.ahead;
  walk.begin(a1, a2);

  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = threadIdx.x / 32 * 16;
  float level[2] = {}, mean[2] = {};  // of queries g and g + 8, if they are owned
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int query = own0 + row + g + 8 * r;
    if (!KEYS && query < sq) {
      level[r] = stats[2 * ((long long)head * sq + query)];
      mean[r] = stats[2 * ((long long)head * sq + query) + 1];
    }
  }
  float sum1[COLS][4] = {}, sum2[COLS][4] = {};  // one that is not made takes no registers

  for (int step = 0; step < walk.total; step++) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    walk.fetch(step + STAGES - 1);
    const char *tile1 = walk.stage(step), *tile2 = tile1 + Passing::BLOCK_BYTES;
    const float* pairs = reinterpret_cast<const float*>(tile2 + Passing::BLOCK_BYTES);
    const int other0 = walk.row(step);
    float w[TILES][4] = {};
    multiply_rows(w, walk.own1, row, tile1);
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        w[j][e] = fast_exp2(fmaf(w[j][e], scale, -(KEYS ? pairs[2 * (8 * j + 2 * t + e % 2)] : level[e / 2])));
    // The first key or the last query of this warp, against the other end of the passing rows.
    const bool diagonal =
        CAUSAL && (KEYS ? own0 + row + 15 > other0 + ahead : other0 + BLOCK - 1 > own0 + row + ahead);
    if (diagonal || other0 + BLOCK > other_rows) {
#pragma unroll
      for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int other = other0 + 8 * j + 2 * t + e % 2, own = own0 + row + g + 8 * (e / 2);
          const int query = KEYS ? other : own, key = KEYS ? own : other;
          if (other >= other_rows || (CAUSAL && key > query + ahead)) w[j][e] = 0.0f;
        }
    }
    if (WEIGHTS) add_product(sum2, w, tile2);
    if (!SLOPES) continue;
    float slope[TILES][4] = {};
    multiply_rows(slope, walk.own2, row, tile2);
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        w[j][e] *= slope[j][e] - (KEYS ? pairs[2 * (8 * j + 2 * t + e % 2) + 1] : mean[e / 2]);
    add_product(sum1, w, tile1);
  }

  copy_wait<0>();
  __syncthreads();
  const int rows = own_rows - own0;
  if (SLOPES)
    write_rows(out + ((long long)row1 + (long long)head * own_rows + own0) * D, walk.own1, sum1, scale / LOG2E, row, rows);
  if (WEIGHTS)
    write_rows(out + ((long long)row2 + (long long)head * own_rows + own0) * D, SLOPES ? walk.own2 : walk.own1, sum2, 1.0f, row,
               rows);
}
#endif
