// o = softmax(q k^T / sqrt(D)) v on tensor cores, never storing the scores: FlashAttention-2 (Dao, 2023).
//
// A block takes BLOCK_M queries of one head, a warp 16 or 32 of them, and goes through the keys BLOCK_N at a
// time. Scores, probabilities and the output stay in the registers of the warp: the accumulators of
// q k^T have the layout that the next product wants for its left operand. Keys and values come
// through a ring of STAGES buffers, k and v in groups of their own, so that q k^T waits for k alone.
//
// Macros: PRECISION (tf32, fp16, bf16), HEAD_DIM, BLOCK_M, BLOCK_N, NUM_WARPS, STAGES (2 or more), CAUSAL, LSE, KEEP_Q
// (1: q in registers, 0: read again for each block of keys).
#include "rooftune.cuh"

using namespace rt;
using T = Format<PRECISION>::In;

constexpr int D = HEAD_DIM, THREADS = 32 * NUM_WARPS;
constexpr int SIZE = sizeof(T), K_STEP = 32 / SIZE;  // k of one mma: 32 bytes
constexpr int TILES = BLOCK_M / (16 * NUM_WARPS);        // of 16 queries, in each warp
constexpr int STEPS = D / K_STEP, KEYS = BLOCK_N / 8, COLS = D / 8;
using Tile = Rows<D * SIZE / 16>;
constexpr int Q_BYTES = BLOCK_M * Tile::STRIDE * 16, KV_BYTES = BLOCK_N * Tile::STRIDE * 16;

__device__ __forceinline__ void to_operand(unsigned (&r)[4]) {
  if (PRECISION == TF32)
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = to_tf32(__int_as_float(r[i]));
}

// 16 queries, one step of D: matrices (rows 0-7, half 0), (8-15, 0), (0-7, 1), (8-15, 1)
__device__ __forceinline__ void read_q(unsigned (&r)[4], const char* q, int row, int step) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  load_matrices(r, q + Tile::at(row + 8 * (matrix % 2) + lane % 8, 2 * step + matrix / 2));
  to_operand(r);
}
// 16 keys, one step of D: (keys 0-7, half 0), (0-7, 1), (8-15, 0), (8-15, 1)
__device__ __forceinline__ void read_k(unsigned (&r)[4], const char* k, int key, int step) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  load_matrices(r, k + Tile::at(key + 8 * (matrix / 2) + lane % 8, 2 * step + matrix % 2));
  to_operand(r);
}
// 16 columns of v for one step over keys, as two right operands. A tf32 step is 8 keys, in the order
// 0 2 4 6 1 3 5 7: that is how the probabilities lie in their accumulators.
__device__ __forceinline__ void read_v(unsigned (&r)[4], const char* v, int step, int col) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  if constexpr (PRECISION == TF32) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int key = 8 * step + 2 * t + i % 2, c = col + 8 * (i / 2) + g;
      r[i] = to_tf32(*reinterpret_cast<const float*>(v + Tile::at(key, c / 4) + c % 4 * 4));
    }
  } else {
    load_matrices_transposed(r, v + Tile::at(16 * step + 8 * (matrix % 2) + lane % 8, col / 8 + matrix / 2));
  }
}
// The probabilities of one step over keys as a left operand.
__device__ __forceinline__ void probabilities(unsigned (&r)[4], const float (&s)[KEYS][4], int step) {
  if constexpr (PRECISION == TF32) {
    r[0] = to_tf32(s[step][0]), r[1] = to_tf32(s[step][2]), r[2] = to_tf32(s[step][1]), r[3] = to_tf32(s[step][3]);
  } else {
    const float(&low)[4] = s[2 * step], (&high)[4] = s[2 * step + 1];
    r[0] = pack<PRECISION>(low[0], low[1]), r[1] = pack<PRECISION>(low[2], low[3]);
    r[2] = pack<PRECISION>(high[0], high[1]), r[3] = pack<PRECISION>(high[2], high[3]);
  }
}

// q, o: [b, h, sq, D]; k, v: [b, hkv, sk, D]; lse: [b, h, sq], with LSE only. Grid: one block per BLOCK_M queries of
// a head. `scale` is log2(e) / sqrt(D). Causal: query i sees keys up to i + sk - sq; one that sees none is 0.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_kernel(T* __restrict__ o, const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                     float* __restrict__ lse, int heads, int kv_heads, int sq, int sk, float scale) {
  SHARED_MEMORY(shared);
  const int blocks = (sq + BLOCK_M - 1) / BLOCK_M, index = blockIdx.x % blocks, head = blockIdx.x / blocks;
  const int m0 = (CAUSAL ? blocks - 1 - index : index) * BLOCK_M;  // causal: the longest first
  const long long kv = head / heads * kv_heads + head % heads * kv_heads / heads;
  q += (long long)head * sq * D, o += (long long)head * sq * D, k += kv * sk * D, v += kv * sk * D;

  const int ahead = sk - sq;  // the last key that query 0 sees
  const int seen = CAUSAL ? max(min(sk, m0 + BLOCK_M + ahead), 0) : sk;
  const int tiles = (seen + BLOCK_N - 1) / BLOCK_N;
  auto stage = [&](int tile) { return shared + Q_BYTES + tile % STAGES * (2 * KV_BYTES); };
  auto fetch = [&](int tile) {
    if (tile < tiles) copy_tile<Tile, BLOCK_N, D, 16, THREADS>(stage(tile), k, D, tile * BLOCK_N, 0, sk, D);
    copy_commit();
    if (tile < tiles) copy_tile<Tile, BLOCK_N, D, 16, THREADS>(stage(tile) + KV_BYTES, v, D, tile * BLOCK_N, 0, sk, D);
    copy_commit();
  };
  copy_tile<Tile, BLOCK_M, D, 16, THREADS>(shared, q, D, m0, 0, sq, D);  // in the group of the first k
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; tile++) fetch(tile);

  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = threadIdx.x / 32 * (16 * TILES);
  unsigned kept[KEEP_Q ? TILES : 1][KEEP_Q ? STEPS : 1][4];
  float acc[TILES][COLS][4] = {}, top[TILES][2], sum[TILES][2] = {};
#pragma unroll
  for (int i = 0; i < TILES; i++) top[i][0] = top[i][1] = -infinity();

  for (int tile = 0; tile < tiles; tile++) {
    copy_wait<2 * STAGES - 3>();  // all groups up to this k
    __syncthreads();
    fetch(tile + STAGES - 1);
    const char *k_tile = stage(tile), *v_tile = k_tile + KV_BYTES;
    if (KEEP_Q && tile == 0)
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          read_q(kept[KEEP_Q ? i : 0][KEEP_Q ? step : 0], shared, row + 16 * i, step);

    float s[TILES][KEYS][4] = {};
#pragma unroll(KEEP_Q ? STEPS : 2)  // registers are indexed by constants only
    for (int step = 0; step < STEPS; step++) {
      unsigned a[TILES][4];
#pragma unroll
      for (int i = 0; i < TILES; i++)
        if (!KEEP_Q) read_q(a[i], shared, row + 16 * i, step);
#pragma unroll
      for (int j = 0; j < KEYS; j += 2) {
        unsigned b[4];
        read_k(b, k_tile, 8 * j, step);
        const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < TILES; i++) {
          const unsigned(&left)[4] = KEEP_Q ? kept[KEEP_Q ? i : 0][KEEP_Q ? step : 0] : a[i];
          mma<PRECISION>(s[i][j], left, b0);
          mma<PRECISION>(s[i][j + 1], left, b1);
        }
      }
    }

#pragma unroll
    for (int i = 0; i < TILES; i++) {
      const int first_row = m0 + row + 16 * i, key0 = tile * BLOCK_N;
      if (key0 + BLOCK_N > sk || (CAUSAL && key0 + BLOCK_N - 1 > first_row + ahead)) {
#pragma unroll
        for (int j = 0; j < KEYS; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int key = key0 + 8 * j + 2 * t + e % 2;
            if (key >= sk || (CAUSAL && key > first_row + g + 8 * (e / 2) + ahead)) s[i][j][e] = -infinity();
          }
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {  // rows g and g + 8
        float highest = top[i][r];
#pragma unroll
        for (int j = 0; j < KEYS; j++) highest = fmaxf(highest, fmaxf(s[i][j][2 * r], s[i][j][2 * r + 1]));
        highest = reduce_lanes<4>(highest, Max());
        const float base = highest == -infinity() ? 0.0f : highest * scale;  // no key seen yet: everything is 0
        const float shrink = fast_exp2(fmaf(top[i][r], scale, -base));
        top[i][r] = highest;
        sum[i][r] *= shrink;
#pragma unroll
        for (int j = 0; j < COLS; j++) acc[i][j][2 * r] *= shrink, acc[i][j][2 * r + 1] *= shrink;
#pragma unroll
        for (int j = 0; j < KEYS; j++)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; e++) sum[i][r] += s[i][j][e] = fast_exp2(fmaf(s[i][j][e], scale, -base));
      }
    }

    copy_wait<2 * STAGES - 2>();  // and this v
    __syncthreads();
#pragma unroll
    for (int step = 0; step < BLOCK_N / K_STEP; step++) {
      unsigned a[TILES][4];
#pragma unroll
      for (int i = 0; i < TILES; i++) probabilities(a[i], s[i], step);
#pragma unroll
      for (int j = 0; j < COLS; j += 2) {
        unsigned b[4];
        read_v(b, v_tile, step, 8 * j);
        const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < TILES; i++) mma<PRECISION>(acc[i][j], a[i], b0), mma<PRECISION>(acc[i][j + 1], a[i], b1);
      }
    }
  }

  copy_wait<0>();
  __syncthreads();  // from here on each warp writes its rows over its own queries, then whole lines to o
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float total = reduce_lanes<4>(sum[i][r], Sum());
      const float inverse = total == 0.0f ? 0.0f : 1.0f / total;  // a row that sees no key is 0
      const int query = m0 + row + 16 * i + 8 * r + g;
      if (LSE && t == 0 && query < sq) lse[(long long)head * sq + query] = log_of_sum(top[i][r], scale, total);
#pragma unroll
      for (int j = 0; j < COLS; j++) {
        const int byte = (8 * j + 2 * t) * SIZE;
        Vec<T, 2> pair;
        pair.v[0] = Convert<T>::from(acc[i][j][2 * r] * inverse);
        pair.v[1] = Convert<T>::from(acc[i][j][2 * r + 1] * inverse);
        store<T, 2>(reinterpret_cast<T*>(shared + Tile::at(row + 16 * i + 8 * r + g, byte / 16) + byte % 16), pair);
      }
    }
  __syncwarp();
  constexpr int CHUNKS = D * SIZE / 16, VEC = 16 / SIZE;
#pragma unroll 4
  for (int unit = threadIdx.x % 32; unit < 16 * TILES * CHUNKS; unit += 32) {
    const int r = row + unit / CHUNKS, chunk = unit % CHUNKS;
    const T* staged = reinterpret_cast<const T*>(shared + Tile::at(r, chunk));
    if (m0 + r < sq) store<T, VEC>(o + (long long)(m0 + r) * D + chunk * VEC, load<T, VEC>(staged));
  }
}
