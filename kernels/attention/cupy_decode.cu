// o = softmax(q k^T / sqrt(D)) v for few queries and many keys: split over the keys (flash-decoding).
//
// The queries of all heads that share keys are the rows of one matrix (they are neighbours in memory), of which a
// block takes BLOCK_M and a part of the keys, one of SPLITS. Each warp goes through keys of its own, WARP_N at a
// time, by a ring of its own: there is no barrier of the block until the end, when the warps' results are
// merged. With SPLITS above 1 the merged sums go to `partial`, and cupy_decode.combine.cu ends the work.
//
// Macros: PRECISION (fp16, bf16), HEAD_DIM, BLOCK_M (16 or 32), WARP_N, NUM_WARPS, STAGES (2 or more), SPLITS, CAUSAL,
// LSE.
#include "rooftune.cuh"

using namespace rt;
using T = Format<PRECISION>::In;

constexpr int D = HEAD_DIM, THREADS = 32 * NUM_WARPS, TILES = BLOCK_M / 16;
constexpr int STEPS = D / 16, KEYS = WARP_N / 8, COLS = D / 8, CHUNKS = D / 8;  // chunks of 16 bytes a row
constexpr bool KEEP_Q = TILES * (D / 4 + D / 2) < 192;  // queries in registers, beside the sums of a thread
using Tile = Rows<CHUNKS>;
constexpr int Q_BYTES = BLOCK_M * Tile::STRIDE * 16, KV_BYTES = WARP_N * Tile::STRIDE * 16;
constexpr int LINE = D + 4;  // floats of a row of sums in shared memory; 16 bytes more: rows start in other banks

// Start copying a warp's keys, or values, from row `first` on.
__device__ __forceinline__ void fetch_rows(char* tile, const T* matrix, int first, int rows) {
#pragma unroll
  for (int unit = threadIdx.x % 32; unit < WARP_N * CHUNKS; unit += 32) {
    const int r = unit / CHUNKS, chunk = unit % CHUNKS;
    const bool inside = first + r < rows;
    const T* source = inside ? matrix + (long long)(first + r) * D + chunk * 8 : matrix;
    copy_async<16>(tile + Tile::at(r, chunk), source, inside);
  }
}

struct Rows16 {  // what a warp knows of 16 queries: two rows a thread, g and g + 8
  float acc[COLS][4] = {}, top[2] = {-infinity(), -infinity()}, sum[2] = {};

  __device__ __forceinline__ void add(float (&s)[KEYS][4], const char* v_tile, float scale) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float highest = top[r];
#pragma unroll
      for (int j = 0; j < KEYS; j++) highest = fmaxf(highest, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      highest = reduce_lanes<4>(highest, Max());
      const float base = highest == -infinity() ? 0.0f : highest * scale;  // no key seen yet: everything is 0
      const float shrink = fast_exp2(fmaf(top[r], scale, -base));
      top[r] = highest;
      sum[r] *= shrink;
#pragma unroll
      for (int j = 0; j < COLS; j++) acc[j][2 * r] *= shrink, acc[j][2 * r + 1] *= shrink;
#pragma unroll
      for (int j = 0; j < KEYS; j++)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; e++) sum[r] += s[j][e] = fast_exp2(fmaf(s[j][e], scale, -base));
    }
#pragma unroll
    for (int step = 0; step < WARP_N / 16; step++) {
      const float(&low)[4] = s[2 * step], (&high)[4] = s[2 * step + 1];
      const unsigned p[4] = {pack<PRECISION>(low[0], low[1]), pack<PRECISION>(low[2], low[3]),
                             pack<PRECISION>(high[0], high[1]), pack<PRECISION>(high[2], high[3])};
#pragma unroll
      for (int j = 0; j < COLS; j += 2) {
        unsigned b[4];  // (keys 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
        load_matrices_transposed(b, v_tile + Tile::at(16 * step + 8 * (matrix % 2) + lane % 8, j + matrix / 2));
        const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        mma<PRECISION>(acc[j], p, b0);
        mma<PRECISION>(acc[j + 1], p, b1);
      }
    }
  }
};

// q, o: [b hkv, rows, D] with rows = queries of h / hkv heads; k, v: [b hkv, sk, D]; partial: [SPLITS, b hkv rows,
// D], stats: [SPLITS, b hkv rows, 2] (maximum, sum); lse: [b hkv rows], with LSE and one split only. `scale` is
// log2(e) / sqrt(D). Grid: SPLITS blocks for each BLOCK_M rows of each b, hkv. Causal: query i of a head sees keys up
// to i + sk - sq.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    decode_kernel(T* __restrict__ o, const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                  float* __restrict__ partial, float* __restrict__ stats, float* __restrict__ lse, int heads,
                  int rows, int sq, int sk, float scale) {
  SHARED_MEMORY(shared);
  const int split = blockIdx.x % SPLITS, index = blockIdx.x / SPLITS, blocks = (rows + BLOCK_M - 1) / BLOCK_M;
  const int head = index / blocks, row0 = index % blocks * BLOCK_M;
  q += (long long)head * rows * D, k += (long long)head * sk * D, v += (long long)head * sk * D;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int tiles = (sk + WARP_N * NUM_WARPS - 1) / (WARP_N * NUM_WARPS);
  const int begin = (int)((long long)tiles * split / SPLITS), end = (int)((long long)tiles * (split + 1) / SPLITS);

  copy_tile<Tile, BLOCK_M, D, 16, THREADS>(shared, q, D, row0, 0, rows, D);
  copy_commit();
  const auto stage = [&](int tile) { return shared + Q_BYTES + (warp * STAGES + tile % STAGES) * (2 * KV_BYTES); };
  const auto first_key = [&](int tile) { return (tile * NUM_WARPS + warp) * WARP_N; };
  const auto fetch = [&](int tile) {
    if (tile < end) fetch_rows(stage(tile), k, first_key(tile), sk);
    copy_commit();
    if (tile < end) fetch_rows(stage(tile) + KV_BYTES, v, first_key(tile), sk);
    copy_commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) fetch(begin + i);
  copy_wait<2 * (STAGES - 1)>();  // the queries
  __syncthreads();
  unsigned kept[KEEP_Q ? TILES : 1][KEEP_Q ? STEPS : 1][4];
  const auto read_q = [&](unsigned(&r)[4], int i, int step) {
    load_matrices(r, shared + Tile::at(16 * i + 8 * (lane / 8 % 2) + lane % 8, 2 * step + lane / 16));
  };
  if constexpr (KEEP_Q)
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int step = 0; step < STEPS; step++) read_q(kept[i][step], i, step);

  Rows16 mine[TILES];
  for (int tile = begin; tile < end; tile++) {
    copy_wait<2 * STAGES - 3>();  // all groups up to these keys
    __syncwarp();                 // of all lanes; and all have left the stage that is filled next
    fetch(tile + STAGES - 1);
    const char* k_tile = stage(tile);
    const int key0 = first_key(tile);
    float s[TILES][KEYS][4] = {};
#pragma unroll(KEEP_Q ? STEPS : 2)  // registers are indexed by constants only
    for (int step = 0; step < STEPS; step++) {
      unsigned read[TILES][4];
      if constexpr (!KEEP_Q)
#pragma unroll
        for (int i = 0; i < TILES; i++) read_q(read[i], i, step);
#pragma unroll
      for (int j = 0; j < KEYS; j += 2) {
        unsigned b[4];  // (keys 0-7, half 0), (0-7, 1), (8-15, 0), (8-15, 1)
        load_matrices(b, k_tile + Tile::at(8 * j + 8 * (lane / 16) + lane % 8, 2 * step + lane / 8 % 2));
        const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < TILES; i++) {
          const unsigned(&left)[4] = KEEP_Q ? kept[KEEP_Q ? i : 0][KEEP_Q ? step : 0] : read[i];
          mma<PRECISION>(s[i][j], left, b0);
          mma<PRECISION>(s[i][j + 1], left, b1);
        }
      }
    }
    if (CAUSAL ? key0 + WARP_N > sk - sq + 1 : key0 + WARP_N > sk)
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int query = (row0 + 16 * i + g + 8 * (e / 2)) % sq, seen = CAUSAL ? min(query + sk - sq + 1, sk) : sk;
#pragma unroll
          for (int j = 0; j < KEYS; j++)
            if (key0 + 8 * j + 2 * t + e % 2 >= seen) s[i][j][e] = -infinity();
        }
    copy_wait<2 * STAGES - 2>();  // and these values
    __syncwarp();
#pragma unroll
    for (int i = 0; i < TILES; i++) mine[i].add(s[i], k_tile + KV_BYTES, scale);
  }

  // Merge the warps: sums [NUM_WARPS][BLOCK_M][LINE], then maxima and sums of rows, in the place of the rings.
  copy_wait<0>();
  __syncthreads();
  float *sums = reinterpret_cast<float*>(shared), *known = sums + NUM_WARPS * BLOCK_M * LINE;
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = warp * BLOCK_M + 16 * i + 8 * r + g;
      const float total = reduce_lanes<4>(mine[i].sum[r], Sum());
      if (t == 0) known[2 * row] = mine[i].top[r], known[2 * row + 1] = total;
#pragma unroll
      for (int j = 0; j < COLS; j++) {
        const float(&acc)[4] = mine[i].acc[j];
        store<float, 2>(sums + row * LINE + 8 * j + 2 * t, Vec<float, 2>{acc[2 * r], acc[2 * r + 1]});
      }
    }
  __syncthreads();
  for (int unit = threadIdx.x; unit < BLOCK_M * D / 4; unit += THREADS) {
    const int row = unit / (D / 4), col = unit % (D / 4) * 4;
    if (row0 + row >= rows) continue;
    float top = -infinity(), total = 0.0f;
    Vec<float, 4> value = {};
#pragma unroll
    for (int w = 0; w < NUM_WARPS; w++) top = fmaxf(top, known[2 * (w * BLOCK_M + row)]);
#pragma unroll
    for (int w = 0; w < NUM_WARPS; w++) {
      const int at = w * BLOCK_M + row;
      const float weight = top == -infinity() ? 0.0f : fast_exp2((known[2 * at] - top) * scale);
      total += weight * known[2 * at + 1];
      const Vec<float, 4> x = load<float, 4>(sums + at * LINE + col);
#pragma unroll
      for (int e = 0; e < 4; e++) value.v[e] += weight * x.v[e];
    }
    const long long global_row = (long long)head * rows + row0 + row;
    if constexpr (SPLITS == 1) {
      Vec<T, 4> result;
#pragma unroll
      for (int e = 0; e < 4; e++) result.v[e] = Convert<T>::from(total == 0.0f ? 0.0f : value.v[e] / total);
      store<T, 4>(o + global_row * D + col, result);
      if (LSE && col == 0) lse[global_row] = log_of_sum(top, scale, total);
    } else {
      const long long slot = (long long)split * heads * rows + global_row;
      store<float, 4>(partial + slot * D + col, value);
      if (col == 0) store<float, 2>(stats + 2 * slot, Vec<float, 2>{top, total});
    }
  }
}
