// o = softmax(q k^T / sqrt(D)) v in fp32 without tensor cores: the same online softmax as cupy.cu.
//
// A warp is 4 x 8 lanes. Each lane has QUERIES rows and, of them, every eighth key's score and every
// eighth 16-byte chunk of the output; the eight lanes of a row exchange probabilities by shuffles.
//
// Macros: HEAD_DIM, BLOCK_M, BLOCK_N, NUM_WARPS, STAGES (2 or more), CAUSAL, LSE.
#include "rooftune.cuh"

using namespace rt;

constexpr int D = HEAD_DIM, THREADS = 32 * NUM_WARPS;
constexpr int QUERIES = BLOCK_M / (4 * NUM_WARPS), KEYS = BLOCK_N / 8;
constexpr int CHUNKS = D / 4, OWN = (CHUNKS + 7) / 8;  // 16-byte chunks of a row; at most so many in a lane
using Tile = Rows<CHUNKS>;
constexpr int Q_BYTES = BLOCK_M * Tile::STRIDE * 16, KV_BYTES = BLOCK_N * Tile::STRIDE * 16;

__device__ __forceinline__ Vec<float, 4> quad(const char* tile, int row, int chunk) {
  return load<float, 4>(reinterpret_cast<const float*>(tile + Tile::at(row, chunk)));
}

// Arguments as in cupy.cu.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_kernel(float* __restrict__ o, const float* __restrict__ q, const float* __restrict__ k,
                     const float* __restrict__ v, float* __restrict__ lse, int heads, int kv_heads, int sq, int sk,
                     float scale) {
  SHARED_MEMORY(shared);
  const int blocks = (sq + BLOCK_M - 1) / BLOCK_M, index = blockIdx.x % blocks, head = blockIdx.x / blocks;
  const int m0 = (CAUSAL ? blocks - 1 - index : index) * BLOCK_M;
  const long long kv = head / heads * kv_heads + head % heads * kv_heads / heads;
  q += (long long)head * sq * D, o += (long long)head * sq * D, k += kv * sk * D, v += kv * sk * D;

  const int ahead = sk - sq;
  const int seen = CAUSAL ? max(min(sk, m0 + BLOCK_M + ahead), 0) : sk;
  const int tiles = (seen + BLOCK_N - 1) / BLOCK_N;
  auto stage = [&](int tile) { return shared + Q_BYTES + tile % STAGES * (2 * KV_BYTES); };
  auto fetch = [&](int tile) {
    if (tile < tiles) {
      copy_tile<Tile, BLOCK_N, D, 16, THREADS>(stage(tile), k, D, tile * BLOCK_N, 0, sk, D);
      copy_tile<Tile, BLOCK_N, D, 16, THREADS>(stage(tile) + KV_BYTES, v, D, tile * BLOCK_N, 0, sk, D);
    }
    copy_commit();
  };
  copy_tile<Tile, BLOCK_M, D, 16, THREADS>(shared, q, D, m0, 0, sq, D);
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; tile++) fetch(tile);

  const int lane = threadIdx.x % 32, x = lane % 8, row = threadIdx.x / 32 * (4 * QUERIES) + lane / 8;  // then every 4th
  float acc[QUERIES][OWN][4] = {}, top[QUERIES], sum[QUERIES] = {};
#pragma unroll
  for (int i = 0; i < QUERIES; i++) top[i] = -infinity();

  for (int tile = 0; tile < tiles; tile++) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    fetch(tile + STAGES - 1);
    const char *k_tile = stage(tile), *v_tile = k_tile + KV_BYTES;

    float s[QUERIES][KEYS] = {};
#pragma unroll 2
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      Vec<float, 4> a[QUERIES];
#pragma unroll
      for (int i = 0; i < QUERIES; i++) a[i] = quad(shared, row + 4 * i, chunk);
#pragma unroll
      for (int j = 0; j < KEYS; j++) {
        const Vec<float, 4> b = quad(k_tile, 8 * j + x, chunk);
#pragma unroll
        for (int i = 0; i < QUERIES; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) s[i][j] = fmaf(a[i].v[e], b.v[e], s[i][j]);
      }
    }

#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
      const int limit = CAUSAL ? min(sk - 1, m0 + row + 4 * i + ahead) : sk - 1;  // the last key it sees
      float highest = top[i];
#pragma unroll
      for (int j = 0; j < KEYS; j++) {
        if (tile * BLOCK_N + 8 * j + x > limit) s[i][j] = -infinity();
        highest = fmaxf(highest, s[i][j]);
      }
      highest = reduce_lanes<8>(highest, Max());
      const float base = highest == -infinity() ? 0.0f : highest;  // no key seen yet: everything is 0
      const float shrink = fast_exp2((top[i] - base) * scale);
      top[i] = highest;
      sum[i] *= shrink;
#pragma unroll
      for (int c = 0; c < OWN; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[i][c][e] *= shrink;
#pragma unroll
      for (int j = 0; j < KEYS; j++) sum[i] += s[i][j] = fast_exp2((s[i][j] - base) * scale);
    }

#pragma unroll
    for (int j = 0; j < KEYS; j++)
#pragma unroll 2
      for (int other = 0; other < 8; other++) {
        float p[QUERIES];
#pragma unroll
        for (int i = 0; i < QUERIES; i++) p[i] = __shfl_sync(0xffffffffu, s[i][j], lane / 8 * 8 + other);
#pragma unroll
        for (int c = 0; c < OWN; c++) {
          if (CHUNKS % 8 != 0 && 8 * c + x >= CHUNKS) continue;
          const Vec<float, 4> b = quad(v_tile, 8 * j + other, 8 * c + x);
#pragma unroll
          for (int i = 0; i < QUERIES; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][c][e] = fmaf(p[i], b.v[e], acc[i][c][e]);
        }
      }
  }

#pragma unroll
  for (int i = 0; i < QUERIES; i++) {
    const float total = reduce_lanes<8>(sum[i], Sum());
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const int r = m0 + row + 4 * i;
    if (LSE && x == 0 && r < sq) lse[(long long)head * sq + r] = log_of_sum(top[i], scale, total);
#pragma unroll
    for (int c = 0; c < OWN; c++) {
      if (r >= sq || 8 * c + x >= CHUNKS) continue;
      Vec<float, 4> y;
#pragma unroll
      for (int e = 0; e < 4; e++) y.v[e] = acc[i][c][e] * inverse;
      store<float, 4>(o + (long long)r * D + 4 * (8 * c + x), y);
    }
  }
}
